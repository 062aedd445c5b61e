"""TRAM (arXiv 2310.03646): how its claims are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, cross_entropy, grid_sample
from torch.optim import SGD, Optimizer

from corollary.claims import Paired, Ratio, Trial, claim
from corollary.claims.timing import interleave, keep_freed_memory
from corollary.data import digits
from corollary.models import GPT, MLP
from corollary.optim import ASAM, SAM, TRAM, kl_divergence
from corollary.testing import Case, Problem
from corollary.testing.optimizer import separable

Arrays = list[NDArray[np.float64]]


def oracle(
    problem: Problem,
    steps: int,
    radius: Callable[[Arrays, Arrays, Arrays], float],
    adaptive: bool = False,
    eta: float = 0.0,
    lr: float = 0.05,
    momentum: float = 0.9,
) -> list[Arrays]:
    """SGD with momentum on gradients from θ + ε, with ``radius`` a function of θ, θ one step ago and θ at the start."""
    start = [p.copy() for p in problem.start]
    before, now = start, [p.copy() for p in start]
    buffers = [np.zeros_like(p) for p in now]
    path = []
    for _ in range(steps):
        scales = [np.abs(p) + eta if adaptive else np.ones_like(p) for p in now]
        gradients = problem.gradient(now)
        norm = np.sqrt(sum(float(np.sum((t * g) ** 2)) for t, g in zip(scales, gradients, strict=True)))
        far = radius(now, before, start)
        top = [p + far * t * t * g / norm for p, t, g in zip(now, scales, gradients, strict=True)]
        buffers = [momentum * b + g for b, g in zip(buffers, problem.gradient(top), strict=True)]
        before, now = now, [p - lr * b for p, b in zip(now, buffers, strict=True)]
        path.append(now)
    return path


def sam_oracle(problem: Problem, steps: int, rho: float = 0.05, **options: Any) -> list[Arrays]:
    """A fixed radius."""
    return oracle(problem, steps, lambda *_: rho, **options)


def asam_oracle(problem: Problem, steps: int, rho: float = 0.5, eta: float = 0.01, **options: Any) -> list[Arrays]:
    """A fixed radius, relative to the parameters."""
    return oracle(problem, steps, lambda *_: rho, adaptive=True, eta=eta, **options)


def tram_oracle(
    problem: Problem,
    steps: int,
    trust_region: str = "previous",
    scale: float = 1.0,
    max_radius: float | None = None,
    eta: float = 0.0,
    **options: Any,
) -> list[Arrays]:
    """A radius from the divergence of two softmaxes over the parameters' sums (see `tram_step`)."""

    def radius(now: Arrays, before: Arrays, start: Arrays) -> float:
        other = {"previous": before, "initial": start, "input": now}[trust_region]
        moved = 0.3 if trust_region == "input" else 0.0
        total = 0.0
        for sample in (0, 1):  # of the three samples the target runs two
            p, q = (
                np.exp([np.sum((w + m) * (1 + sample * i)) / 4 for i, w in enumerate(v)])
                for v, m in ((other, moved), (now, 0.0))
            )
            p, q = p / p.sum(), q / q.sum()
            total += float(np.sum(p * np.log(p / q))) / 2
        d = scale * total
        return d if max_radius is None else min(d, max_radius)

    return oracle(problem, steps, radius, adaptive=True, eta=eta, **options)


def sharp_step(optimizer: Optimizer, params: Sequence[Tensor], loss: Callable[[Sequence[Tensor]], Tensor]) -> Any:
    """One step of SAM or ASAM."""

    def closure() -> Tensor:
        value = loss(params)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    return optimizer.step(closure)  # type: ignore[arg-type]


def tram_step(optimizer: Optimizer, params: Sequence[Tensor], loss: Callable[[Sequence[Tensor]], Tensor]) -> Any:
    """One step of TRAM, on a model whose logits of sample s are the parameters' sums, the i-th times 1 + s i."""
    assert isinstance(optimizer, TRAM)
    full = [p for p in params if p.numel()]

    def logits(samples: int, noise: float) -> Tensor:
        rows = [[((p + noise).sum() * (1 + s * i) / 4).to(torch.float64) for i, p in enumerate(full)] for s in range(samples)]
        return torch.stack([torch.stack(row) for row in rows])

    def closure() -> tuple[Tensor, Tensor]:
        out = logits(3, 0.0)
        value = loss(params)
        value.backward()  # type: ignore[no-untyped-call]
        return value, out

    return optimizer.step(closure, lambda: logits(2, 0.3 if optimizer.trust_region == "input" else 0.0))


def coupled() -> Problem:
    """The separable problem, declared coupled: the climb's norm runs over all parameters."""
    return replace(separable(), separable=False)


def sam(params: Any, lr: float = 0.05, momentum: float = 0.9, **options: Any) -> SAM:
    """SAM around SGD with momentum, so that the base has a state."""
    return SAM(params, SGD, lr=lr, momentum=momentum, **options)


def asam(params: Any, lr: float = 0.05, momentum: float = 0.9, **options: Any) -> ASAM:
    """ASAM around SGD with momentum."""
    return ASAM(params, SGD, lr=lr, momentum=momentum, **options)


def tram(params: Any, lr: float = 0.05, momentum: float = 0.9, **options: Any) -> TRAM:
    """TRAM around SGD with momentum."""
    return TRAM(params, SGD, lr=lr, momentum=momentum, **options)


CONFORMANCE = {
    "corollary.optim.TRAM": Case(
        tram,
        tags={
            "oracle": tram_oracle,
            "options": (
                {},
                {"trust_region": "initial", "lr": 0.02, "scale": 2.0},
                {"trust_region": "input", "scale": 5.0, "eta": 0.1, "momentum": 0.0},
                {"trust_region": "initial", "max_radius": 0.01},
            ),
            "problem": coupled,
            "step": tram_step,
            "fsdp2": "refused",
        },
    ),
    "corollary.optim.SAM": Case(
        sam,
        tags={"oracle": sam_oracle, "options": ({}, {"rho": 0.7, "momentum": 0.0}), "problem": coupled, "step": sharp_step},
    ),
    "corollary.optim.ASAM": Case(
        asam,
        tags={"oracle": asam_oracle, "options": ({}, {"rho": 0.7, "eta": 0.0}), "problem": coupled, "step": sharp_step},
    ),
}


# ------------------------------------------------------------------------------------------------------- fine-tuning claims

RATE = 0.003  # of the methods that have a radius, which is what they tune
SETTINGS = {
    "plain": tuple((lr, 0.0) for lr in (0.001, 0.0015, 0.002, 0.003)),
    "sam": tuple((RATE, rho) for rho in (0.05, 0.1, 0.2, 0.4)),
    "asam": tuple((RATE, rho) for rho in (0.5, 1.0, 2.0, 4.0)),
    "tram": tuple((RATE, kappa) for kappa in (100.0, 300.0, 1000.0, 3000.0)),
}
BATCH, PART = 32, 4  # the trust region is measured on the first four samples of a batch


class RandomTRAM(TRAM):
    """A control: as long a way as TRAM's, in a direction that knows nothing of the loss."""

    def _climb(self, radius: Callable[[Mapping[str, Any]], float | Tensor], zero_grad: bool) -> None:
        kept = [(p, p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p, _ in kept:
            p.grad = torch.randn_like(p)
        super()._climb(radius, zero_grad)
        for p, gradient in kept:
            p.grad = gradient


class ConstantTRAM(TRAM):
    """A control: the trust region replaced by a constant radius, the mean of those that TRAM itself took on the same run."""

    constant: float | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.taken: list[float] = []

    def first_step(self, divergence: float | Tensor, zero_grad: bool = False) -> None:
        """With ``constant`` in the divergence's place, where there is one."""
        self.taken.append(float(divergence))
        super().first_step(divergence if self.constant is None else self.constant, zero_grad)


METHODS: dict[str, type[TRAM]] = {"tram": TRAM, "random": RandomTRAM, "constant": ConstantTRAM}


def _rotate(images: Tensor, degrees: Tensor) -> Tensor:
    angle = torch.deg2rad(degrees)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    turn = torch.stack([torch.stack([cos, -sin, zero], -1), torch.stack([sin, cos, zero], -1)], 1)
    size = list(images.shape)
    return grid_sample(images, affine_grid(turn, size, align_corners=False), align_corners=False)


def _corrupted(images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Noise, blur, missing pixels, low contrast."""
    return {
        "noise": (images + 0.3 * torch.randn(images.shape, generator=generator)).clamp(0, 1),
        "blur": avg_pool2d(images, 3, stride=1, padding=1),
        "missing": images * (torch.rand(images.shape, generator=generator) > 0.3),
        "contrast": 0.35 * images + 0.3,
    }


def _domains(images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """The domains that fine-tuning does not see: four rotations and the corruptions."""
    turned = {f"turned {d}": _rotate(images, torch.full((len(images),), float(d))) for d in (-40, -25, 25, 40)}
    return {**turned, **_corrupted(images, generator)}


def _mixed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned by up to 45 degrees, and corrupted in one of the four ways or in none."""
    turned = _rotate(images, (2 * torch.rand(len(images), generator=generator) - 1) * 45)
    kind = torch.randint(5, (len(images), 1, 1, 1), generator=generator)
    for i, version in enumerate(_corrupted(turned, generator).values()):
        turned = torch.where(kind == i, version, turned)
    return turned


def _network() -> MLP:
    return MLP(64, [64, 64], 10)


@lru_cache(maxsize=64)
def _pretrained(seed: int, steps: int) -> dict[str, Tensor]:
    """Weights after training on 700 digits in all domains."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    data, net = digits(seed=seed, test_size=0.4), _network()
    images = torch.cat([_mixed(data.train_x[:700], generator) for _ in range(6)])
    labels = data.train_y[:700].repeat(6)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        rows = torch.randint(len(images), (64,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(net(images[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
    return net.state_dict()


def _around(method: str, base: Optimizer, radius: float, constant: float | None) -> Optimizer:
    if method == "plain":
        return base
    if method in ("sam", "asam"):
        return SAM(base, rho=radius) if method == "sam" else ASAM(base, rho=radius)
    optimizer = METHODS[method](base, trust_region="previous", scale=radius)
    if isinstance(optimizer, ConstantTRAM):
        optimizer.constant = constant
    return optimizer


def _tune_on_clean(
    method: str, lr: float, radius: float, seed: int, steps: int, constant: float | None = None
) -> tuple[MLP, Optimizer]:
    """The pre-trained network with a new head, after ``steps`` steps on 150 clean, upright digits."""
    net = _network()
    net.load_state_dict(_pretrained(seed, 2 * steps))
    torch.manual_seed(seed)  # the new head, the batches and whatever the method draws
    net.head.reset_parameters()
    generator = torch.Generator().manual_seed(seed + 1)
    data = digits(seed=seed, test_size=0.4)
    images, labels = data.train_x[700:850], data.train_y[700:850]
    optimizer = _around(method, torch.optim.AdamW(net.parameters(), lr=lr), radius, constant)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        x, y = images[rows], labels[rows]

        def closure(x: Tensor = x, y: Tensor = y) -> tuple[Tensor, Tensor]:
            logits = net(x)
            loss = cross_entropy(logits, y)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss, logits

        if isinstance(optimizer, TRAM):
            optimizer.step(closure, lambda x=x: net(x[:PART]))
        elif method == "plain":
            optimizer.zero_grad()
            closure()
            optimizer.step()
        else:
            optimizer.step(lambda: closure()[0])  # type: ignore[arg-type,return-value]
        scheduler.step()
    return net, optimizer


@lru_cache(maxsize=4096)
def _run(method: str, lr: float, radius: float, seed: int, steps: int) -> dict[str, float]:
    """Accuracy in and out of the domain, and out of it the curvature d_x and the likeness to the pre-trained features."""
    constant = None
    if method == "constant":
        _, first = _tune_on_clean(method, lr, radius, seed, steps)
        assert isinstance(first, ConstantTRAM)
        constant = sum(first.taken) / len(first.taken)
    net, _ = _tune_on_clean(method, lr, radius, seed, steps, constant)
    before = _network()
    before.load_state_dict(_pretrained(seed, 2 * steps))
    data, generator = digits(seed=seed, test_size=0.4), torch.Generator().manual_seed(seed + 2)
    seen: dict[str, list[float]] = {"accuracy": [], "curvature": [], "likeness": []}
    with torch.no_grad():
        clean = float((net(data.test_x).argmax(1) == data.test_y).double().mean())
        for images in _domains(data.test_x, generator).values():
            logits = net(images)
            noised = net(images + 0.1 * torch.randn(images.shape, generator=generator))
            seen["accuracy"].append(float((logits.argmax(1) == data.test_y).double().mean()))
            seen["curvature"].append(float(kl_divergence(noised, logits)))
            seen["likeness"].append(_cka(before.features(images), net.features(images)))
    return {"clean": clean, **{name: sum(values) / len(values) for name, values in seen.items()}}


def _cka(left: Tensor, right: Tensor) -> float:
    """Linear centred kernel alignment of two sets of features."""
    left, right = left - left.mean(0), right - right.mean(0)
    return float((right.T @ left).norm() ** 2 / ((left.T @ left).norm() * (right.T @ right).norm()))


def _steps(trial: Trial) -> int:
    return trial.pick(smoke=5, laptop=150, full=600)


def _tuning(*methods: str) -> Callable[..., Mapping[str, Any]]:
    """Each method's best setting of four by accuracy out of the domain, summed over six seeds that no trial has.

    The controls take TRAM's setting, so that they differ from it in what they break alone.
    """

    def tune(trial: Trial, method: str = "tram") -> Mapping[str, Any]:
        best, seeds = {}, [trial.seed + 10_000 * i for i in range(trial.pick(smoke=1, laptop=6))]
        for name in methods:
            grid = SETTINGS[name][:: trial.pick(smoke=3, laptop=1)]
            score = [sum(_run(name, *setting, seed, _steps(trial))["accuracy"] for seed in seeds) for setting in grid]
            best[name] = list(grid[score.index(max(score))])
        return best

    return tune


def _measured(trial: Trial, method: str) -> dict[str, float]:
    lr, radius = trial.tuned["tram" if method in METHODS else method]
    return _run(method, lr, radius, trial.seed, _steps(trial))


def _accuracy(trial: Trial, method: str, baseline: str) -> Paired:
    ours, theirs = _measured(trial, method), _measured(trial, baseline)
    trial.log(clean=ours["clean"], baseline_clean=theirs["clean"])
    return Paired(ours=ours["accuracy"], baseline=theirs["accuracy"])


@claim(control={"method": "constant"}, tune=_tuning("tram", "plain"))
def beats_fine_tuning(trial: Trial, method: str = "tram") -> Paired:
    """Accuracy on rotated and corrupted digits after fine-tuning on clean ones, against AdamW alone."""
    return _accuracy(trial, method, "plain")


@claim(control={"method": "constant"}, tune=_tuning("tram", "sam"))
def beats_sam(trial: Trial, method: str = "tram") -> Paired:
    """Accuracy on rotated and corrupted digits after fine-tuning on clean ones, against SAM."""
    return _accuracy(trial, method, "sam")


@claim(control={"method": "constant"}, tune=_tuning("tram", "asam"))
def beats_asam(trial: Trial, method: str = "tram") -> Paired:
    """Accuracy on rotated and corrupted digits after fine-tuning on clean ones, against ASAM."""
    return _accuracy(trial, method, "asam")


@claim(control={"method": "random"}, tune=_tuning("tram"))
def representation_curvature(trial: Trial, method: str = "tram") -> Paired:
    """Curvature d_x out of the domain, against the same fine-tuning without the climb."""
    ours, theirs = _measured(trial, method), _run("plain", RATE, 0.0, trial.seed, _steps(trial))
    trial.log(accuracy=ours["accuracy"], baseline_accuracy=theirs["accuracy"])
    return Paired(ours=ours["curvature"], baseline=theirs["curvature"])


@claim(control={"method": "constant"}, tune=_tuning("tram", "sam", "asam"))
def representation_similarity(trial: Trial, method: str = "tram") -> Paired:
    """CKA of the features before and after fine-tuning, out of the domain, against the higher of SAM's and ASAM's."""
    ours, others = _measured(trial, method), {name: _measured(trial, name) for name in ("sam", "asam")}
    trial.log(accuracy=ours["accuracy"], **{f"{name}_accuracy": seen["accuracy"] for name, seen in others.items()})
    return Paired(ours=ours["likeness"], baseline=max(seen["likeness"] for seen in others.values()))


# ------------------------------------------------------------------------------------------------------------------ cost


def _cost(trial: Trial, share: float) -> Ratio:
    """Time of a step with the trust region measured on ``share`` of the batch, against the base optimizer's."""
    keep_freed_memory()
    rows = trial.pick(smoke=8, laptop=64)

    def step(name: str) -> Callable[[], Any]:
        torch.manual_seed(trial.seed)
        net = GPT(256, dim=48, depth=2, heads=4, context=32)
        tokens = torch.randint(256, (rows, 33))
        x, y = tokens[:, :-1], tokens[:, 1:].flatten()
        part = torch.cat([x, x])[: max(1, int(share * rows))]

        def closure() -> tuple[Tensor, Tensor]:
            logits = net(x)
            loss = cross_entropy(logits.flatten(0, 1), y)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss, logits[: len(part)] if share <= 1 else torch.cat([logits, logits])

        base = torch.optim.AdamW(net.parameters(), lr=1e-3)
        if name == "ours":
            optimizer = TRAM(base, trust_region="previous")
            return lambda: optimizer.step(closure, lambda: net(part))

        def plain() -> None:
            base.zero_grad()
            closure()
            base.step()

        return plain

    seconds = interleave({name: step(name) for name in ("ours", "base")}, rounds=trial.pick(smoke=2, laptop=11), warmup=2)
    return Ratio(ours=seconds["ours"], baseline=seconds["base"])


@claim(control={"share": 2.0})
def step_cost(trial: Trial, share: float = 1.0) -> Ratio:
    """Time of a step with the trust region measured on the whole batch, against the base optimizer's."""
    return _cost(trial, share)


@claim(control={"share": 2.0})
def part_step_cost(trial: Trial, share: float = 0.125) -> Ratio:
    """Time of a step with the trust region measured on an eighth of the batch, against the base optimizer's."""
    return _cost(trial, share)

"""AdamP (arXiv 2006.08217): how its claims are measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.optim import Optimizer

from corollary.claims import Paired, Ratio, Trial, claim
from corollary.claims.timing import interleave, keep_freed_memory
from corollary.data import digits, image_patches
from corollary.models import GPT, ResNet
from corollary.optim import SGDP, AdamP
from corollary.testing import Case, Problem

Array = NDArray[np.float64]


# ------------------------------------------------------------------------------------------------------------ conformance


def _project(w: Array, g: Array, u: Array, delta: float, wd_ratio: float, eps: float) -> tuple[Array, float]:
    """The projection slice by slice: first every output channel by itself, then the tensor as one."""
    if w.ndim < 2:
        return u, 1.0
    for channels in (list(range(len(w))), [slice(None)]):
        cosines: list[float] = []
        limit = 0.0
        for c in channels:
            a, b = w[c].ravel(), g[c].ravel()
            norm, grad_norm = float(np.sqrt(a @ a)), float(np.sqrt(b @ b))
            cosines.append(abs(float(a @ b)) / (max(norm, eps) * max(grad_norm, eps)))
            limit = delta / math.sqrt(a.size)
        if max(cosines) < limit:
            out = u.copy()
            for c in channels:
                unit = w[c] / (np.sqrt((w[c] ** 2).sum()) + eps)
                out[c] = u[c] - unit * (unit * u[c]).sum()
            return out, wd_ratio
    return u, 1.0


def adamp_oracle(
    problem: Problem,
    steps: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    nesterov: bool = False,
) -> list[list[Array]]:
    """AdamP as Algorithm 2 writes it, one parameter at a time."""
    params = [p.copy() for p in problem.start]
    means, squares = ([np.zeros(p.shape) for p in params] for _ in range(2))
    path = []
    for t in range(1, steps + 1):
        for i, g in enumerate(problem.gradient(params)):
            means[i] = betas[0] * means[i] + (1 - betas[0]) * g
            squares[i] = betas[1] * squares[i] + (1 - betas[1]) * g**2
            mean = betas[0] * means[i] + (1 - betas[0]) * g if nesterov else means[i]
            u = mean / (1 - betas[0] ** t) / (np.sqrt(squares[i] / (1 - betas[1] ** t)) + eps)
            u, ratio = _project(params[i], g, u, delta, wd_ratio, eps)
            params[i] = params[i] * (1 - lr * weight_decay * ratio) - lr * u
        path.append([p.copy() for p in params])
    return path


def sgdp_oracle(
    problem: Problem,
    steps: int,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    eps: float = 1e-8,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    project_momentum: bool = False,
) -> list[list[Array]]:
    """SGDP as Algorithm 1 writes it, one parameter at a time; with ``project_momentum`` as the authors' code runs."""
    params = [p.copy() for p in problem.start]
    buffers = [np.zeros(p.shape) for p in params]
    path = []
    for _ in range(steps):
        for i, g in enumerate(problem.gradient(params)):
            buffers[i] = momentum * buffers[i] + (1 - dampening) * g
            u, ratio = _project(params[i], g, g + momentum * buffers[i] if nesterov else buffers[i], delta, wd_ratio, eps)
            if project_momentum and not nesterov:
                buffers[i] = u
            params[i] = params[i] * (1 - lr * weight_decay * ratio / (1 - momentum)) - lr * u
        path.append([p.copy() for p in params])
    return path


CONFORMANCE = {
    "corollary.optim.AdamP": Case(
        partial(AdamP, lr=0.02),  # of the bfloat16 numbers around 1, steps of 0.001 would move none
        tags={
            "oracle": adamp_oracle,
            "options": (
                {"lr": 0.02},
                {"lr": 0.05, "delta": 1.5, "weight_decay": 0.1},  # by channel, by layer, and neither
                {"lr": 0.05, "delta": 3.0, "weight_decay": 0.1, "wd_ratio": 0.5, "nesterov": True},
                {"lr": 0.05, "delta": 10.0, "betas": (0.5, 0.9), "eps": 1e-2},
            ),
            "half_state": "float32",
        },
    ),
    "corollary.optim.SGDP": Case(
        partial(SGDP, lr=0.02),
        tags={
            "oracle": sgdp_oracle,
            "options": (
                {"lr": 0.02},
                {"lr": 0.05, "delta": 1.5, "momentum": 0.9, "weight_decay": 0.1},
                {"lr": 0.05, "delta": 3.0, "momentum": 0.8, "dampening": 0.2, "weight_decay": 0.1, "nesterov": True},
                {"lr": 0.05, "delta": 10.0, "momentum": 0.9, "project_momentum": True},
            ),
            "half_state": "float32",
        },
    ),
}


# ----------------------------------------------------------------------------------------- norms and effective step sizes


class RandomlyProjectedAdamP(AdamP):
    """The control: each row loses its component along a random direction, instead of that along the weight."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return _step_projected_at_random(self, super().step, closure)


class RandomlyProjectedSGDP(SGDP):
    """The same for SGDP."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return _step_projected_at_random(self, super().step, closure)


class RadialSGDP(SGDP):
    """The control of the accuracy: the radial component alone is kept, and all else dropped."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        matrices = [p for group in self.param_groups for p in group["params"] if p.dim() > 1]
        before = [p.clone() for p in matrices]
        for group in self.param_groups:
            group["delta"] = 0.0
        loss = super().step(closure)
        for new, old in zip(matrices, before, strict=True):
            direction = normalize(old.flatten(1), dim=1)
            along = ((new - old).flatten(1) * direction).sum(1, keepdim=True)
            new.copy_(old + (along * direction).view_as(new))
        return loss


@torch.no_grad()
def _step_projected_at_random(optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None) -> Any:
    matrices = [p for group in optimizer.param_groups for p in group["params"] if p.dim() > 1]
    before = [p.clone() for p in matrices]
    for group in optimizer.param_groups:
        group["delta"] = 0.0
    loss = step(closure)
    for new, old in zip(matrices, before, strict=True):
        direction = normalize(torch.randn_like(new).flatten(1), dim=1)
        along = ((new - old).flatten(1) * direction).sum(1, keepdim=True)
        new.sub_((along * direction).view_as(new))
    return loss


METHODS: Mapping[str, Callable[..., Optimizer]] = {
    "AdamP": AdamP,
    "Adam": partial(torch.optim.Adam, foreach=True),
    "AdamW": partial(torch.optim.AdamW, foreach=True),
    "AdamP, random direction": RandomlyProjectedAdamP,
    "SGDP": partial(SGDP, momentum=0.9),
    "SGD-M": partial(torch.optim.SGD, momentum=0.9, foreach=True),
    "SGDP, random direction": partial(RandomlyProjectedSGDP, momentum=0.9),
    "SGDP, radial": partial(RadialSGDP, momentum=0.9),
}


def _train(net: nn.Module, x: Tensor, y: Tensor, optimizer: Optimizer, seed: int, steps: int, batch: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = torch.randint(len(x), (batch,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(net(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield step


def _digits_run(method: str, lr: float, seed: int, steps: int) -> dict[str, list[float]]:
    """Mean log growth of the filters' norms, and the mean angle by which they turn, after every step at a constant rate."""
    torch.manual_seed(seed)
    data = digits(seed=seed)
    net = ResNet(1, len(data.classes), width=8)
    filters = [p for p in net.parameters() if p.dim() == 4]  # each stands before a BatchNorm
    optimizer = METHODS[method](net.parameters(), lr=lr)
    begin = torch.cat([f.detach().flatten(1).norm(dim=1) for f in filters])
    old = [normalize(f.detach().flatten(1), dim=1) for f in filters]
    growth, angles = [], []
    for _ in _train(net, data.train_x, data.train_y, optimizer, seed, steps, batch=32):
        norms = torch.cat([f.detach().flatten(1).norm(dim=1) for f in filters])
        new = [normalize(f.detach().flatten(1), dim=1) for f in filters]
        # The chord between two directions is free of the cancellation that an arc cosine near 1 has.
        chords = torch.cat([(n - o).norm(dim=1) for n, o in zip(new, old, strict=True)])
        growth.append(float((norms / begin).log().mean()))
        angles.append(float((2 * (chords / 2).asin()).mean()))
        old = new
    return {"growth": growth, "angles": angles}


def _norm_growth(trial: Trial, method: str, baseline: str, lr: float) -> Paired:
    steps = trial.pick(smoke=4, laptop=60, full=600)
    curves = {name: _digits_run(name, lr, trial.seed, steps)["growth"] for name in (method, baseline)}
    trial.figure("growth", x=range(1, steps + 1), y=curves, xlabel="step", ylabel="mean log growth of a filter's norm")
    return Paired(ours=curves[method][-1], baseline=curves[baseline][-1])


def _effective_step(trial: Trial, method: str, baseline: str, lr: float) -> Paired:
    steps = trial.pick(smoke=4, laptop=60, full=600)
    tenth = max(1, steps // 10)
    curves = {name: _digits_run(name, lr, trial.seed, steps)["angles"] for name in (method, baseline)}
    trial.figure("angle", x=range(1, steps + 1), y=curves, xlabel="step", ylabel="mean angle of a step, radians", log="y")
    ours, theirs = (math.log(sum(curves[n][-tenth:]) / sum(curves[n][:tenth])) for n in (method, baseline))
    return Paired(ours=ours, baseline=theirs)


@claim(control={"method": "AdamP, random direction"})
def norm_growth_adam(trial: Trial, method: str = "AdamP") -> Paired:
    """Log growth of the norms of a small ResNet's filters, AdamP against Adam."""
    return _norm_growth(trial, method, "Adam", lr=0.01)


@claim(control={"method": "SGDP, random direction"})
def norm_growth_sgd(trial: Trial, method: str = "SGDP") -> Paired:
    """Log growth of the norms of a small ResNet's filters, SGDP against SGD with momentum."""
    return _norm_growth(trial, method, "SGD-M", lr=0.2)


@claim(control={"method": "AdamP, random direction"})
def effective_step_adam(trial: Trial, method: str = "AdamP") -> Paired:
    """Log decay of the angle by which a step turns a filter, AdamP against Adam."""
    return _effective_step(trial, method, "Adam", lr=0.01)


@claim(control={"method": "SGDP, random direction"})
def effective_step_sgd(trial: Trial, method: str = "SGDP") -> Paired:
    """Log decay of the angle by which a step turns a filter, SGDP against SGD with momentum."""
    return _effective_step(trial, method, "SGD-M", lr=0.2)


# -------------------------------------------------------------------------------------------------------------- accuracy

ADAM_RATES = (0.002, 0.004, 0.008, 0.016, 0.032)
SGD_RATES = (0.02, 0.05, 0.125, 0.3125, 0.78)
WEIGHT_DECAY = {"AdamP": 0.1, "AdamP, random direction": 0.1, "AdamW": 0.1}  # for SGD, whose decay grows with its rate, 1e-3


@lru_cache(maxsize=1024)
def _patches_accuracy(method: str, lr: float, seed: int, steps: int, part: str) -> float:
    """Test accuracy (or, for tuning, that on a part held out of training) in naming the photograph of an 8x8 patch."""
    torch.manual_seed(seed)
    data = image_patches(size=8, per_image=300, seed=seed)
    net = ResNet(3, len(data.classes), width=4)
    x, y, test_x, test_y = data.train_x, data.train_y, data.test_x, data.test_y
    if part == "validation":
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        cut = len(x) // 4
        test_x, test_y, x, y = x[order[:cut]], y[order[:cut]], x[order[cut:]], y[order[cut:]]
    optimizer = METHODS[method](net.parameters(), lr=lr, weight_decay=WEIGHT_DECAY.get(method, 1e-3))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in _train(net, x, y, optimizer, seed, steps, batch=32):
        scheduler.step()
    net.eval()
    with torch.no_grad():
        return float((net(test_x).argmax(1) == test_y).double().mean())


def _best(trial: Trial, methods: Mapping[str, tuple[float, ...]]) -> tuple[str, float]:
    """The method and rate with the best mean accuracy over two tuning seeds, on data held out of training."""
    steps, seeds = trial.pick(smoke=3, laptop=120, full=2000), (trial.seed, trial.seed + 1)
    choices = [(name, lr) for name, rates in methods.items() for lr in rates]
    return max(choices, key=lambda c: sum(_patches_accuracy(*c, seed, steps, "validation") for seed in seeds))


def _tune_adam(trial: Trial, method: str = "AdamP") -> dict[str, Any]:
    baseline, baseline_lr = _best(trial, {"AdamW": ADAM_RATES, "SGD-M": SGD_RATES})
    return {"lr": _best(trial, {method: ADAM_RATES})[1], "baseline": baseline, "baseline_lr": baseline_lr}


def _tune_sgd(trial: Trial, method: str = "SGDP") -> dict[str, Any]:
    baseline, baseline_lr = _best(trial, {"SGD-M": SGD_RATES})
    return {"lr": _best(trial, {method: SGD_RATES})[1], "baseline": baseline, "baseline_lr": baseline_lr}


def _accuracy(trial: Trial, method: str) -> Paired:
    steps, tuned = trial.pick(smoke=3, laptop=120, full=2000), trial.tuned
    return Paired(
        ours=_patches_accuracy(method, tuned["lr"], trial.seed, steps, "test"),
        baseline=_patches_accuracy(tuned["baseline"], tuned["baseline_lr"], trial.seed, steps, "test"),
    )


@claim(control={"method": "AdamP, random direction"}, tune=_tune_adam)
def accuracy_adamp(trial: Trial, method: str = "AdamP") -> Paired:
    """Test accuracy of a small ResNet with BatchNorm on patches of photographs, against the better of AdamW and SGD-M."""
    return _accuracy(trial, method)


@claim(control={"method": "SGDP, radial"}, tune=_tune_sgd)
def accuracy_sgdp(trial: Trial, method: str = "SGDP") -> Paired:
    """The same for SGDP against SGD-M."""
    return _accuracy(trial, method)


# ------------------------------------------------------------------------------------------------------------------ speed


class LoopingAdamP(AdamP):
    """The control: the same step with nothing batched or fused, one parameter after the other in plain operations."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            (beta1, beta2), lr, eps = group["betas"], group["lr"], group["eps"]
            for p in group["params"]:
                state = self.state[p]
                state["t"] = state.get("t", 0) + 1
                m, v = (state.setdefault(key, torch.zeros_like(p)) for key in ("m", "v"))
                m.copy_(beta1 * m + (1 - beta1) * p.grad)
                v.copy_(beta2 * v + (1 - beta2) * p.grad * p.grad)
                u, ratio = m / (1 - beta1 ** state["t"]) / ((v / (1 - beta2 ** state["t"])).sqrt() + eps), 1.0
                for rows in (p.flatten(1), p.view(1, -1)) if p.dim() > 1 else ():
                    cosine = torch.cosine_similarity(rows, p.grad.view_as(rows), dim=1, eps=eps).abs().max()
                    if cosine.item() < group["delta"] / rows.shape[1] ** 0.5:
                        unit = rows / (rows.norm(dim=1, keepdim=True) + eps)
                        u = u - (unit * (unit * u.view_as(rows)).sum(1, keepdim=True)).view_as(u)
                        ratio = group["wd_ratio"]
                        break
                p.copy_(p * (1 - lr * group["weight_decay"] * ratio) - lr * u)


def networks(seed: int) -> list[Tensor]:
    """Parameters with real gradients: a ResNet with 697,000 in 47 tensors, a LLaMA with 1,870,000 in 39."""
    torch.manual_seed(seed)
    resnet, gpt = ResNet(3, 10, width=32, blocks=(2, 2, 2)), GPT(256, dim=192, depth=4, heads=6, context=64)
    images, tokens = torch.randn(16, 3, 16, 16), torch.randint(256, (8, 65))
    cross_entropy(resnet(images), torch.randint(10, (16,))).backward()  # type: ignore[no-untyped-call]
    cross_entropy(gpt(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
    return [*resnet.parameters(), *gpt.parameters()]


def _step_ratio(trial: Trial, ours: Callable[..., Optimizer], baseline: Callable[..., Optimizer]) -> Ratio:
    """Time of a step on both networks; the rate is so small that the weights stay at right angles to their gradients."""
    keep_freed_memory()
    cases = {name: make(networks(trial.seed), lr=1e-7).step for name, make in (("ours", ours), ("baseline", baseline))}
    seconds = interleave(cases, rounds=trial.pick(smoke=2, laptop=21), warmup=2, min_seconds=0.02)
    return Ratio(**seconds)


@claim(control={"method": LoopingAdamP})
def step_time(trial: Trial, method: Callable[..., Optimizer] = AdamP) -> Ratio:
    """Time of an AdamP step against torch's AdamW with foreach."""
    return _step_ratio(trial, partial(method, weight_decay=0.01), partial(torch.optim.AdamW, weight_decay=0.01, foreach=True))


@claim(control={"method": LoopingAdamP})
def faster_than_peer(trial: Trial, method: Callable[..., Optimizer] = AdamP) -> Ratio:
    """Time of an AdamP step against pytorch_optimizer's."""
    import pytorch_optimizer

    return _step_ratio(trial, partial(method, weight_decay=0.01), partial(pytorch_optimizer.AdamP, weight_decay=0.01))

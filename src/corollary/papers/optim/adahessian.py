"""AdaHessian (arXiv 2006.00719): how its claims are measured."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from corollary.claims import Paired, Ratio, Slope, Trial, claim
from corollary.claims.timing import interleave, keep_freed_memory
from corollary.data import TokenStream, digits, stdlib_text
from corollary.linalg import HessianOperator, hutchinson_diagonal, rademacher_like
from corollary.models import GPT, MLP, ResNet
from corollary.optim import AdaHessian
from corollary.testing import Case, Problem


def oracle(
    problem: Problem,
    steps: int,
    lr: float = 0.15,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-4,
    weight_decay: float = 0.0,
    hessian_power: float = 1.0,
    block_size: int = 1,
    average_conv_kernel: bool = True,
    signed: bool = False,
    hessian_interval: int = 1,
    n_samples: int = 1,
) -> list[list[NDArray[np.float64]]]:
    """AdaHessian entry by entry, with the exact diagonal in place of its estimate (equal where the Hessian is diagonal)."""
    assert problem.hessian_diagonal is not None
    assert n_samples >= 1
    params = [p.copy() for p in problem.start]
    means = [np.zeros(p.shape) for p in params]
    squares = [np.zeros(p.shape) for p in params]
    refreshes, path = 0, []
    for t in range(1, steps + 1):
        gradients, diagonals = problem.gradient(params), problem.hessian_diagonal(params)
        refresh = (t - 1) % hessian_interval == 0
        refreshes += refresh
        for p, g, d, m, v in zip(params, gradients, diagonals, means, squares, strict=True):
            blocks: dict[Any, list[tuple[int, ...]]] = {}
            for place, index in enumerate(np.ndindex(p.shape)):
                key: Any = place
                if p.ndim > 2 and average_conv_kernel:
                    key = index[:2]
                elif p.ndim == 2:
                    key = place // block_size
                blocks.setdefault(key, []).append(index)
            for members in blocks.values():
                average = sum(d[i] if signed else abs(d[i]) for i in members) / len(members)
                for i in members:
                    m[i] = betas[0] * m[i] + (1 - betas[0]) * g[i]
                    if refresh:
                        v[i] = betas[1] * v[i] + (1 - betas[1]) * average**2
                    scale = (v[i] / (1 - betas[1] ** refreshes)) ** (hessian_power / 2) + eps
                    p[i] -= lr * (m[i] / (1 - betas[0] ** t) / scale + weight_decay * p[i])
        path.append([p.copy() for p in params])
    return path


def backward(optimizer: Optimizer, loss: Tensor) -> None:
    """Gradients as AdaHessian makes them itself."""
    assert isinstance(optimizer, AdaHessian)
    optimizer.backward(loss)


CONFORMANCE = {
    "corollary.optim.AdaHessian": Case(
        AdaHessian,
        tags={
            "oracle": oracle,
            "options": (
                {},
                {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-2, "weight_decay": 0.1},
                {"hessian_power": 0.5, "block_size": 5},
                {"average_conv_kernel": False, "n_samples": 3},
                {"hessian_interval": 3, "signed": True, "block_size": 4},
            ),
            "backward": backward,
            "half_state": "float32",
            "fsdp2": "refused",
        },
    ),
}


# ------------------------------------------------------------------------------------------------------- training claims

ADAHESSIAN_RATES = (0.05, 0.1, 0.2, 0.4, 0.8)
ADAM_RATES = (0.002, 0.004, 0.008, 0.016, 0.032)
BASELINES = ("Adam", "AdamW")


class MisplacedAdaHessian(AdaHessian):
    """The control: each tensor's diagonal is dealt to its entries in a fixed wrong order, so that only its sizes are right."""

    def _gather_curvature(self, used: Sequence[tuple[Tensor, Tensor]]) -> None:
        super()._gather_curvature(used)
        for param, diagonal in self._curvature.items():
            order = torch.randperm(diagonal.numel(), generator=torch.Generator().manual_seed(diagonal.numel()))
            self._curvature[param] = diagonal.reshape(-1)[order.to(diagonal.device)].view_as(diagonal)


def _optimizer(name: str, params: Iterable[Tensor], lr: float, seed: int, block_size: int) -> Optimizer:
    if name in BASELINES:
        return torch.optim.Adam(params, lr=lr) if name == "Adam" else torch.optim.AdamW(params, lr=lr)
    kind = {"AdaHessian": AdaHessian, "MisplacedAdaHessian": MisplacedAdaHessian}[name]
    return kind(params, lr=lr, block_size=block_size, seed=seed)


def _train(optimizer: Optimizer, losses: Iterable[Callable[[], Tensor]], steps: int) -> None:
    """Every method's learning rate falls linearly to zero."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _, loss in zip(range(steps), losses, strict=False):
        optimizer.zero_grad()
        value = loss()
        if isinstance(optimizer, AdaHessian):
            optimizer.backward(value)
        else:
            value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()


def _capped(loss: Tensor, classes: int) -> float:
    """The loss, but at most twice that of guessing, where a diverged run counts too."""
    return float(loss.nan_to_num(nan=math.inf).clamp(max=2 * math.log(classes)))


@lru_cache(maxsize=256)
def _gpt_loss(name: str, lr: float, seed: int, steps: int) -> float:
    """Validation loss of a small LLaMA on the standard library's source, in nats a byte."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    stream = TokenStream(stdlib_text(1_000_000), context=32, seed=seed)
    net = GPT(stream.vocab_size, dim=32, depth=2, heads=4, context=32)

    def losses() -> Iterator[Callable[[], Tensor]]:
        while True:
            x, y = stream.batch(16, generator)
            yield lambda x=x, y=y: cross_entropy(net(x).flatten(0, 1), y.flatten())  # type: ignore[misc]

    _train(_optimizer(name, net.parameters(), lr, seed, block_size=32), losses(), steps)
    x, y = stream.batch(256, torch.Generator().manual_seed(seed), split="val")
    with torch.no_grad():
        return _capped(cross_entropy(net(x).flatten(0, 1), y.flatten()), stream.vocab_size)


@lru_cache(maxsize=1024)
def _digits_run(name: str, lr: float, seed: int, steps: int, width: int, batch: int) -> tuple[float, float]:
    """Training loss and test accuracy of a small ResNet on digits."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    data = digits(seed=seed)
    net = ResNet(1, len(data.classes), width=width)

    def losses() -> Iterator[Callable[[], Tensor]]:
        while True:
            rows = torch.randint(len(data.train_x), (batch,), generator=generator)
            yield lambda rows=rows: cross_entropy(net(data.train_x[rows]), data.train_y[rows])  # type: ignore[misc]

    _train(_optimizer(name, net.parameters(), lr, seed, block_size=1), losses(), steps)
    net.eval()
    with torch.no_grad():
        loss = _capped(cross_entropy(net(data.train_x), data.train_y), len(data.classes))
        hits = (net(data.test_x).argmax(1) == data.test_y).double().mean()
    return loss, float(hits)


def _tune(run: Callable[[str, float], float], method: str) -> dict[str, Any]:
    """Five learning rates for each of the three; of Adam and AdamW the better one is the baseline."""
    ours = min(ADAHESSIAN_RATES, key=lambda lr: run(method, lr))
    baseline, lr = min(((name, lr) for name in BASELINES for lr in ADAM_RATES), key=lambda choice: run(*choice))
    return {"lr": ours, "baseline": baseline, "baseline_lr": lr}


def _tune_gpt(trial: Trial, method: str = "AdaHessian") -> dict[str, Any]:
    steps = trial.pick(smoke=5, laptop=100, full=1000)
    return _tune(lambda name, lr: _gpt_loss(name, lr, trial.seed, steps), method)


def _tune_digits(trial: Trial, method: str = "AdaHessian") -> dict[str, Any]:
    steps = trial.pick(smoke=5, laptop=60, full=600)
    return _tune(lambda name, lr: _digits_run(name, lr, trial.seed, steps, 8, 64)[0], method)


@claim(control={"method": "MisplacedAdaHessian"}, tune=_tune_gpt)
def transformer_loss(trial: Trial, method: str = "AdaHessian") -> Paired:
    """Validation loss of the small LLaMA after equal steps."""
    steps, tuned = trial.pick(smoke=5, laptop=100, full=1000), trial.tuned
    return Paired(
        ours=_gpt_loss(method, tuned["lr"], trial.seed, steps),
        baseline=_gpt_loss(tuned["baseline"], tuned["baseline_lr"], trial.seed, steps),
    )


@claim(control={"method": "MisplacedAdaHessian"}, tune=_tune_digits)
def resnet_loss(trial: Trial, method: str = "AdaHessian") -> Paired:
    """Training loss of the small ResNet after equal steps."""
    steps, tuned = trial.pick(smoke=5, laptop=60, full=600), trial.tuned
    ours, accuracy = _digits_run(method, tuned["lr"], trial.seed, steps, 8, 64)
    baseline, baseline_accuracy = _digits_run(tuned["baseline"], tuned["baseline_lr"], trial.seed, steps, 8, 64)
    trial.log(test_accuracy=accuracy, baseline_test_accuracy=baseline_accuracy)
    return Paired(ours=ours, baseline=baseline)


@claim(control={"method": "MisplacedAdaHessian"})
def learning_rate_range(trial: Trial, method: str = "AdaHessian") -> Paired:
    """Decades of learning rate over which test accuracy stays within 5 points of the method's best."""
    steps, points = trial.pick(smoke=3, laptop=40, full=400), trial.pick(smoke=3, laptop=9)
    curves, widths = {}, []
    for name, centre in ((method, -0.5), ("Adam", -2.0)):
        rates = [10 ** (centre + (i - points // 2) / 2) for i in range(points)]
        accuracies = [_digits_run(name, lr, trial.seed, steps, 4, 32)[1] for lr in rates]
        widths.append(sum(a >= max(accuracies) - 0.05 for a in accuracies) / 2)
        curves[name] = accuracies
    trial.figure(
        "accuracy",
        x=[(i - points // 2) / 2 for i in range(points)],
        y=curves,
        xlabel="decades from the middle of the range (0.32 for AdaHessian, 0.01 for Adam)",
        ylabel="test accuracy",
    )
    return Paired(ours=widths[0], baseline=widths[1])


# ------------------------------------------------------------------------------------------------------ the estimator


def _biased_coin(operator: HessianOperator, samples: int, *, generator: torch.Generator) -> Tensor:
    """The control: probes whose entries have mean 1/2, so that E[z zᵀ] is not the identity."""
    z = torch.empty(operator.shape[0], samples).bernoulli_(0.75, generator=generator).mul_(2).sub_(1)
    return (z * (operator @ z)).mean(dim=1)


@claim(control={"estimate": _biased_coin})
def unbiased_diagonal(trial: Trial, estimate: Callable[..., Tensor] = hutchinson_diagonal) -> Slope:
    """Relative error of the estimate against the exact diagonal, for a network part-way through training on digits."""
    data = digits(seed=trial.seed, flat=True)
    net = MLP(data.train_x.shape[1], [12], len(data.classes), activation=nn.Tanh)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        cross_entropy(net(data.train_x), data.train_y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    hessian = HessianOperator(cross_entropy(net(data.train_x[:256]), data.train_y[:256]), net.parameters(), chunk=64)
    exact = hessian.dense().diagonal()
    samples = trial.pick(smoke=(1, 4, 16), laptop=(1, 4, 16, 64, 256, 1024), full=(1, 4, 16, 64, 256, 1024, 4096, 16384))
    repeats = [
        max(1, min(8, samples[-1] // n)) for n in samples
    ]  # few probes are cheap: average their error over several draws
    errors = [
        float(sum((estimate(hessian, n, generator=trial.generator) - exact).norm() for _ in range(k)) / k / exact.norm())
        for n, k in zip(samples, repeats, strict=True)
    ]
    trial.log(parameters=len(exact))
    trial.figure("error", x=samples, y={"relative error": errors}, xlabel="probes", ylabel="relative error", log="xy")
    return Slope(x=samples, y=errors)


# ------------------------------------------------------------------------------------------------------------------ cost


class LoopingAdaHessian(AdaHessian):
    """The control of the peer claim: a second backward pass for each parameter alone, where one serves all."""

    def _gather_curvature(self, used: Sequence[tuple[Tensor, Tensor]]) -> None:
        params, gradients = zip(*used, strict=True)
        for i, param in enumerate(params):
            [z] = rademacher_like([param], seed=i)
            products = torch.autograd.grad(gradients[i], param, z, retain_graph=True)
            self._curvature[param] = products[0] * z


def _llama_step(make: Callable[[Iterable[Tensor]], Optimizer], seed: int, *, create_graph: bool = False) -> Callable[[], None]:
    """One step of training, backward included, on a fixed batch."""
    torch.manual_seed(seed)
    net = GPT(256, dim=48, depth=2, heads=4, context=32)
    tokens = torch.randint(256, (16, 33))
    optimizer = make(net.parameters())

    def step() -> None:
        optimizer.zero_grad()
        loss = cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        if isinstance(optimizer, AdaHessian):
            optimizer.backward(loss)
        else:
            loss.backward(create_graph=create_graph)  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _several(steps: int, step: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(steps):
            step()

    return run


def _cost(trial: Trial, steps: int, options: dict[str, Any]) -> Ratio:
    """Time of ``steps`` steps against as many of SGD."""
    keep_freed_memory()
    seconds = interleave(
        {
            "ours": _several(steps, _llama_step(lambda p: AdaHessian(p, lr=1e-3, **options), trial.seed)),
            "sgd": _several(steps, _llama_step(lambda p: torch.optim.SGD(p, lr=1e-3), trial.seed)),
        },
        rounds=trial.pick(smoke=2, laptop=15),
        warmup=2,
    )
    return Ratio(ours=seconds["ours"], baseline=seconds["sgd"])


@claim(control={"n_samples": 4})
def step_cost(trial: Trial, n_samples: int = 1) -> Ratio:
    """Time of a step that refreshes the Hessian, backward included, against one of SGD."""
    return _cost(trial, 1, {"n_samples": n_samples})


@claim(control={"n_samples": 8})
def delayed_step_cost(trial: Trial, n_samples: int = 1) -> Ratio:
    """Mean time of a step with the Hessian refreshed every second step, against one of SGD."""
    return _cost(trial, 2, {"n_samples": n_samples, "hessian_interval": 2})


@claim(control={"method": LoopingAdaHessian})
def faster_than_peer(trial: Trial, method: type[AdaHessian] = AdaHessian) -> Ratio:
    """Mean time of a step with the Hessian refreshed every fifth step, backward included, against pytorch_optimizer's."""
    import pytorch_optimizer

    keep_freed_memory()

    def ours(params: Iterable[Tensor]) -> Optimizer:
        return method(params, lr=1e-3, hessian_interval=5)

    def peer(params: Iterable[Tensor]) -> Optimizer:
        made: Optimizer = pytorch_optimizer.AdaHessian(params, lr=1e-3, update_period=5)
        return made

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")
        seconds = interleave(
            {
                "ours": _several(5, _llama_step(ours, trial.seed)),
                "peer": _several(5, _llama_step(peer, trial.seed, create_graph=True)),
            },
            rounds=trial.pick(smoke=2, laptop=15),
            warmup=1,
        )
    return Ratio(ours=seconds["ours"], baseline=seconds["peer"])

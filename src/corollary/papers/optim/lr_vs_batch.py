"""Learning rates as a function of batch size (arXiv 2006.09092): how its claims are measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from corollary.claims import Exact, Paired, Slope, Trial, claim
from corollary.data import digits
from corollary.linalg import GaussNewtonOperator, HessianOperator, extreme_eigenvalues
from corollary.models import MLP
from corollary.optim import SLQLearningRate, batch_eigenvalues, batch_noise, scale_lr
from corollary.testing import Case

# --------------------------------------------------------------------------------------------------- conformance


def fixed_hessian(optimizer: Optimizer, **options: Any) -> SLQLearningRate:
    """The learner on a Hessian with eigenvalues 9, 4 and 1, so that its rate is known: 2 / (9 + 1)."""
    matrix = torch.diag(torch.tensor([9.0, 4.0, 1.0], dtype=torch.float64))
    return SLQLearningRate(optimizer, lambda: matrix, **{"learn_momentum": False, **options})


def fixed_rate(step: int, lr: float, interval: int = 100) -> float:
    """2 / (L + μ), whenever it was looked at last."""
    assert step >= 0
    assert interval >= 1
    return lr * 0.2


def spread(eigenvalues: Tensor) -> Tensor:
    """`batch_eigenvalues` for one noise and batch."""
    return batch_eigenvalues(eigenvalues, 2.0, 4, dataset_size=100)


def saturated(lr: Tensor) -> Tensor:
    """`scale_lr` from 4 to 16 samples by the square root."""
    return scale_lr(lr, 4, 16, rule="sqrt", saturation=50.0)


def ends(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The two largest eigenvalues and the smallest of a small matrix, from a fixed start."""
    found = extreme_eigenvalues(matrix, largest=2, start=torch.arange(1.0, 1.0 + len(matrix)) if len(matrix) else None)
    return found.largest, found.smallest


def _draw_eigenvalues(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (3 * torch.randn(4, 3, generator=generator, dtype=dtype),)


def _draw_rates(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.rand(4, 3, generator=generator, dtype=dtype),)


def _draw_matrix(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
    square = torch.randn(7, 7, generator=generator, dtype=dtype)
    return (square + square.mT,)


CONFORMANCE = {
    "corollary.optim.SLQLearningRate": Case(
        fixed_hessian,
        tags={
            "oracle": fixed_rate,
            "options": ({}, {"interval": 3}),
            "bad": {
                "no interval": {"interval": 0},
                "no Lanczos steps": {"lanczos_steps": 0},
                "momentum of one": {"max_momentum": 1.0},
            },
        },
    ),
    "corollary.optim.batch_eigenvalues": Case(lambda: spread, tags={"inputs": _draw_eigenvalues}),
    "corollary.optim.scale_lr": Case(lambda: saturated, tags={"inputs": _draw_rates}),
    "corollary.linalg.extreme_eigenvalues": Case(
        lambda: ends, tags={"inputs": _draw_matrix, "batched": False, "differentiable": False}
    ),
}


# ------------------------------------------------------------------------------------------- the batch Hessian's spectrum

Predict = Callable[[Tensor, float, int], Tensor]


def _unmoved(eigenvalues: Tensor, noise: float, batch_size: int) -> Tensor:
    """The control: the batch Hessian taken for the full one."""
    assert noise >= 0
    assert batch_size >= 1
    return eigenvalues


@claim(control={"predict": _unmoved})
def spiked_matrix(trial: Trial, predict: Predict = batch_eigenvalues) -> Exact:
    """Relative error of both extreme eigenvalues of spikes 10 and -4 in Wigner noise of norm 6 a sample."""
    n, noise, spikes = trial.pick(smoke=200, laptop=1500, full=6000), 36.0, torch.tensor([10.0, -4.0])
    basis, _ = torch.linalg.qr(torch.randn(n, 2, generator=trial.generator))
    sizes = (1, 2, 4, 8, 16, 64, 256)
    errors, curves = [], {"measured": [], "predicted": []}  # type: ignore[var-annotated]
    wigner = torch.randn(n, n, generator=trial.generator).triu_()
    wigner += wigner.triu(1).T
    for size in sizes:
        # The mean of so many independent Wigner matrices is one Wigner matrix, smaller by the square root.
        batch = (basis * spikes) @ basis.T + wigner * math.sqrt(noise / (n * size))
        found = extreme_eigenvalues(batch, tol=1e-4, generator=trial.generator)
        measured = torch.cat([found.largest, found.smallest])
        predicted = predict(spikes, noise, size)
        errors.append((predicted / measured - 1).abs().max())
        curves["measured"].append(float(measured[0]))
        curves["predicted"].append(float(predicted[0]))
    trial.figure("largest", x=sizes, y=curves, xlabel="batch size", ylabel="largest eigenvalue", log="x")
    return Exact(torch.stack(errors))


class _Trained:
    """A network part-way through training on digits, and the curvature of its loss on any of its samples.

    ``parity`` learns odd against even by squared loss with one output, which gives the Hessian one dominant outlier;
    otherwise it learns the ten classes by cross-entropy, whose outliers are as many and crowded.
    """

    def __init__(self, seed: int, parity: bool, steps: int) -> None:
        torch.manual_seed(seed)
        data = digits(seed=seed, flat=True)
        self.x, self.parity = data.train_x, parity
        self.y = (data.train_y % 2 * 2 - 1).float() if parity else data.train_y
        self.net = MLP(self.x.shape[1], [32], 1 if parity else len(data.classes), activation=nn.Tanh)
        optimizer = torch.optim.Adam(self.net.parameters(), lr=0.01)
        everyone = torch.arange(len(self.x))
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss(everyone).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        self.full = self.hessian(everyone)
        self.found = extreme_eigenvalues(self.full, tol=1e-5, vectors=True, start=torch.ones(self.full.shape[0]))

    def loss(self, rows: Tensor) -> Tensor:
        out: Tensor = self.net(self.x[rows])
        if self.parity:
            return (out.squeeze(1) - self.y[rows]).square().mean() / 2
        return cross_entropy(out, self.y[rows])

    def hessian(self, rows: Tensor) -> HessianOperator:
        return HessianOperator(self.loss(rows), self.net.parameters())

    def gauss_newton(self, rows: Tensor) -> GaussNewtonOperator:
        return GaussNewtonOperator(lambda out: cross_entropy(out, self.y[rows]), self.net(self.x[rows]), self.net.parameters())

    def batches(self, size: int, count: int, generator: torch.Generator) -> Iterator[Tensor]:
        for _ in range(count):
            yield torch.randperm(len(self.x), generator=generator)[:size]


@lru_cache(maxsize=64)
def _trained(seed: int, parity: bool, steps: int) -> _Trained:
    return _Trained(seed, parity, steps)


def _mean_ends(trial: Trial, whole: bool) -> tuple[float, float]:
    """Largest and smallest eigenvalue of batches of 32, averaged over batches, relative to the whole set's."""
    net = _trained(trial.seed, False, trial.pick(smoke=5, laptop=50))
    size = len(net.x) if whole else 32
    tops, bottoms = [], []
    for rows in net.batches(size, trial.pick(smoke=1, laptop=2 if whole else 8), trial.generator):
        found = extreme_eigenvalues(net.hessian(rows), tol=1e-5, generator=trial.generator)
        tops.append(found.largest[0] / net.found.largest[0])
        bottoms.append(found.smallest[0] / net.found.smallest[0])
    trial.log(full_largest=float(net.found.largest[0]), full_smallest=float(net.found.smallest[0]))
    return float(torch.stack(tops).mean()), float(torch.stack(bottoms).mean())


@claim(control={"whole": True})
def largest_exceeds(trial: Trial, whole: bool = False) -> Paired:
    """Largest eigenvalue of batches of 32, relative to that of the whole set."""
    return Paired(ours=_mean_ends(trial, whole)[0], baseline=1.0)


@claim(control={"whole": True})
def smallest_exceeds(trial: Trial, whole: bool = False) -> Paired:
    """Most negative eigenvalue of batches of 32, relative to that of the whole set."""
    return Paired(ours=_mean_ends(trial, whole)[1], baseline=1.0)


@claim(control={"whole": True})
def gauss_newton_exceeds(trial: Trial, whole: bool = False) -> Paired:
    """Largest eigenvalue of the Gauss-Newton matrix of batches of 32, relative to that of the whole set's."""
    net = _trained(trial.seed, False, trial.pick(smoke=5, laptop=50))
    full = extreme_eigenvalues(net.gauss_newton(torch.arange(len(net.x))), smallest=0, tol=1e-5, generator=trial.generator)
    tops = []
    for rows in net.batches(len(net.x) if whole else 32, trial.pick(smoke=1, laptop=2 if whole else 8), trial.generator):
        found = extreme_eigenvalues(net.gauss_newton(rows), smallest=0, tol=1e-5, generator=trial.generator)
        tops.append(found.largest[0] / full.largest[0])
    return Paired(ours=float(torch.stack(tops).mean()), baseline=1.0)


def _square_root(eigenvalues: Tensor, noise: Tensor, size: int, total: int) -> Tensor:
    """The control: noise that adds its own norm, as if it did not act across the outlier but along it."""
    return eigenvalues + (noise / (size * (total - 1) / (total - size))).sqrt()


def _spiked(eigenvalues: Tensor, noise: Tensor, size: int, total: int) -> Tensor:
    return batch_eigenvalues(eigenvalues, noise, size, dataset_size=total)


@lru_cache(maxsize=64)
def _excesses(seed: int, sizes: tuple[int, ...], repeats: int, own: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Outlier and noise of the network that learns parity, and the mean excess of the batches' largest eigenvalue.

    The excess is taken over v·H_b v, the batch's curvature along the full outlier's v: its mean is the outlier itself, and
    what a batch gives or takes along v is a fluctuation that the mean excess does not contain.
    """
    net, generator = _trained(seed, True, 50), torch.Generator().manual_seed(seed)
    vector = net.found.largest_vectors
    assert vector is not None
    if not own:
        vector = torch.randn(vector.shape, generator=generator)
        vector = vector / vector.norm()
    pieces = torch.split(torch.randperm(len(net.x), generator=generator), 16)[:-1]
    noise = batch_noise(net.full, (net.hessian(rows) for rows in pieces), vector, 16, dataset_size=len(net.x))
    means = []
    for size in sizes:
        excess = []
        for rows in net.batches(size, repeats, generator):
            hessian = net.hessian(rows)
            found = extreme_eigenvalues(hessian, smallest=0, tol=1e-4, start=net.found.largest_vectors[:, 0])  # type: ignore[index]
            along = (net.found.largest_vectors[:, 0] * (hessian @ net.found.largest_vectors[:, 0])).sum()  # type: ignore[index]
            excess.append(found.largest[0] - along)
        means.append(torch.stack(excess).mean())
    return net.found.largest, noise, torch.stack(means)


def _excess_on_digits(trial: Trial, predict: Callable[..., Tensor], own: bool = True) -> tuple[tuple[int, ...], Tensor, Tensor]:
    """Batch sizes, measured and predicted excess of the largest eigenvalue over the full Hessian's."""
    sizes = trial.pick(smoke=(16, 64, 256), laptop=(16, 32, 64, 128, 256))
    outlier, noise, measured = _excesses(trial.seed, sizes, trial.pick(smoke=1, laptop=16, full=64), own)
    total = len(_trained(trial.seed, True, 50).x)
    predicted = torch.stack([(predict(outlier, noise, size, total) - outlier)[0] for size in sizes])
    trial.log(outlier=float(outlier[0]), noise=float(noise[0]), saturation=float(noise[0] / outlier[0] ** 2))
    trial.figure(
        "excess",
        x=sizes,
        y={"measured": measured.tolist(), "predicted": predicted.tolist()},
        xlabel="batch size",
        ylabel="excess of the largest eigenvalue",
        log="xy",
    )
    return sizes, measured, predicted


@claim(control={"predict": _square_root})
def excess_follows_prediction(trial: Trial, predict: Callable[..., Tensor] = _spiked) -> Slope:
    """Measured excess against the predicted one, across batch sizes."""
    _, measured, predicted = _excess_on_digits(trial, predict)
    return Slope(x=predicted.tolist(), y=measured.tolist())


@claim(control={"own": False})
def excess_has_predicted_size(trial: Trial, own: bool = True) -> Exact:
    """Octaves between measured and predicted excess, in the mean over batch sizes; nothing is fitted."""
    _, measured, predicted = _excess_on_digits(trial, _spiked, own)
    return Exact((measured / predicted).log2().mean().abs())


# ------------------------------------------------------------------------------------------------- largest stable rates


@lru_cache(maxsize=64)
def _whitened(seed: int, components: int | None) -> tuple[Tensor, Tensor]:
    """Training digits on their principal components at unit variance, without those below a hundredth of the largest."""
    data = digits(seed=seed, flat=True)
    left, scales, _ = torch.linalg.svd(data.train_x - data.train_x.mean(0), full_matrices=False)
    kept = int((scales > 0.01 * scales[0]).sum()) if components is None else components
    return left[:, :kept] * math.sqrt(len(left)), data.train_y


Gradients = Callable[[Sequence[Tensor], Tensor], Sequence[Tensor]]


def descend(
    method: str,
    params: Sequence[Tensor],
    gradients: Gradients,
    rates: Tensor,
    batches: Iterator[Tensor],
    steps: int,
    betas: tuple[float, float] = (0.9, 0.999),
) -> list[Tensor]:
    """Copies of one start, each under its own learning rate, all on the same batches.

    Args:
        method: 'sgd', 'adam', or 'momentum' for Adam without its division.
        params: start, each (...).
        gradients: of parameters (r, ...) on a batch: each copy's own.
        rates: (r,).
        batches: rows of each step.
        steps: how many.
        betas: of Adam; 'momentum' takes the first.

    Returns:
        The ends, each (r, ...).
    """
    now = [p.expand(len(rates), *p.shape).clone() for p in params]
    by = [rates.view(-1, *[1] * p.dim()) for p in params]
    means, squares = ([torch.zeros_like(p) for p in now] for _ in range(2))
    for t in range(1, steps + 1):
        moves = list(gradients(now, next(batches)))
        if method != "sgd":
            torch._foreach_lerp_(means, moves, 1 - betas[0])
            corrected = torch._foreach_div(means, 1 - betas[0] ** t)
            if method == "adam":
                torch._foreach_mul_(squares, betas[1])
                torch._foreach_addcmul_(squares, moves, moves, 1 - betas[1])
                roots = torch._foreach_sqrt(torch._foreach_div(squares, 1 - betas[1] ** t))
                torch._foreach_add_(roots, 1e-8)
                torch._foreach_div_(corrected, roots)
            moves = list(corrected)
        torch._foreach_addcmul_(now, by, moves, -1.0)
    return now


def crossing(rates: Tensor, heights: Tensor) -> float:
    """The rate at which ``heights`` (the log of the loss over that at the start) first rises above 0 past its minimum.

    Between two rates of the grid it is interpolated, in the logarithm of the rate.
    """
    lowest = int(heights.argmin())
    above = (heights[lowest:] > 0).nonzero()
    if heights[lowest] > 0 or not len(above):
        raise ValueError(f"the grid from {rates[0]:.3g} to {rates[-1]:.3g} does not hold the largest stable rate")
    j = lowest + int(above[0])
    share = float(-heights[j - 1] / (heights[j] - heights[j - 1]))
    return float(rates[j - 1] * (rates[j] / rates[j - 1]) ** share)


def _rows(count: int, size: int, generator: torch.Generator, repeat: bool = False) -> Iterator[Tensor]:
    """Batches drawn with replacement; with ``repeat`` one sample as many times, which averages no noise away."""
    while True:
        rows = torch.randint(count, (1 if repeat else size,), generator=generator)
        yield rows.expand(size) if repeat else rows


def _network_gradients(x: Tensor, y: Tensor) -> tuple[Gradients, Callable[[Sequence[Tensor]], Tensor]]:
    """Gradients and whole-set losses of copies of a network with one hidden layer of tanh, by cross-entropy."""

    def losses(params: Sequence[Tensor], rows: Tensor) -> Tensor:
        first, second = params
        logits = torch.tanh(x[rows] @ first) @ second
        copies = len(first)
        return cross_entropy(logits.flatten(0, 1), y[rows].repeat(copies), reduction="none").view(copies, -1).mean(1)

    def gradients(params: Sequence[Tensor], rows: Tensor) -> Sequence[Tensor]:
        leaves = [p.detach().requires_grad_() for p in params]
        return torch.autograd.grad(losses(leaves, rows).sum(), leaves)

    return gradients, lambda params: losses(params, torch.arange(len(x))).detach()


def _largest_rates(trial: Trial, method: str, low: int, high: int, steps: int, repeat: bool = False) -> Slope:
    """Largest rate, of a grid a factor √2 apart, that ends below the loss at the start, for batches of 1 to 32."""
    x, y = _whitened(trial.seed, None)
    sizes = trial.pick(smoke=(1, 8, 32), laptop=(1, 2, 4, 8, 16, 32))
    rates = 2.0 ** (torch.arange(2 * low, 2 * high + 1) / 2)
    gradients, losses = _network_gradients(x, y)
    start = [torch.randn(shape, generator=trial.generator) / math.sqrt(shape[0]) for shape in ((x.shape[1], 32), (32, 10))]
    begin = losses([p.unsqueeze(0) for p in start]).log()
    found = []
    for size in sizes:
        ends = descend(method, start, gradients, rates, _rows(len(x), size, trial.generator, repeat), steps)
        found.append(crossing(rates, losses(ends).log().nan_to_num(nan=99.0, posinf=99.0) - begin))
    trial.figure("rate", x=sizes, y={"measured": found}, xlabel="batch size", ylabel="largest stable rate", log="xy")
    return Slope(x=sizes, y=found)


@claim(control={"repeat": True})
def sgd_rate_linear(trial: Trial, repeat: bool = False) -> Slope:
    """Largest stable rate of SGD by batch size, before saturation."""
    return _largest_rates(trial, "sgd", -6, 6, trial.pick(smoke=20, laptop=150, full=1000), repeat)


@claim(control={"method": "momentum"})
def adam_rate_square_root(trial: Trial, method: str = "adam") -> Slope:
    """Largest stable rate of Adam by batch size, before saturation."""
    low, high = (-6, 1) if method == "adam" else (-6, 6)
    return _largest_rates(trial, method, low, high, trial.pick(smoke=20, laptop=300, full=2000))


@claim(control={"saturates": False})
def rate_saturates(trial: Trial, saturates: bool = True) -> Slope:
    """Largest stable rate of SGD on least squares against that which `scale_lr` predicts, far beyond saturation."""
    x, y = _whitened(trial.seed, 30)
    target = nn.functional.one_hot(y).float() - 0.1
    sizes = trial.pick(smoke=(1, 16, 256), laptop=(1, 4, 16, 64, 256))
    rates = 2.0 ** (torch.arange(-16, 5) / 2)

    def gradients(params: Sequence[Tensor], rows: Tensor) -> Sequence[Tensor]:
        return [x[rows].T @ (x[rows] @ params[0] - target[rows]) / len(rows)]

    found = []
    for size in sizes:
        batches = _rows(len(x), size, trial.generator)
        [end] = descend("sgd", [torch.zeros(x.shape[1], 10)], gradients, rates, batches, trial.pick(smoke=30, laptop=60))
        height = ((x @ end - target).square().mean((1, 2)) / target.square().mean()).log()
        found.append(crossing(rates, height.nan_to_num(nan=99.0, posinf=99.0)))
    # Whitened, the full Hessian is the identity: any direction is an eigenvector, and its noise is measured along several.
    vectors, _ = torch.linalg.qr(torch.randn(x.shape[1], 8, generator=trial.generator))
    noise = float(batch_noise(x.T @ x / len(x), (row.outer(row) for row in x), vectors, 1, dataset_size=len(x)).mean())
    predicted = [scale_lr(1.0, 1, size, saturation=noise if saturates else math.inf) for size in sizes]
    trial.log(saturation=noise)
    trial.figure(
        "rate",
        x=sizes,
        y={"measured": found, "predicted from the first": [found[0] * p for p in predicted]},
        xlabel="batch size",
        ylabel="largest stable rate",
        log="xy",
    )
    return Slope(x=predicted, y=found)


# ------------------------------------------------------------------------------------------------------------ the learner

GRID = (0.03, 0.1, 0.3, 1.0, 3.0)
INTERVAL, PRODUCTS = 50, 8


class TraceLearner(SLQLearningRate):
    """The control: the Hessian's trace, which bounds its largest eigenvalue, in place of it."""

    def _refresh(self, step: int) -> None:
        super()._refresh(step)
        operator, generator = self.hessian(), torch.Generator().manual_seed(step)
        probes = torch.randn(operator.shape[0], 8, generator=generator).sign()
        trace = float((probes * (operator @ probes)).sum() / probes.shape[1])
        self.learned_rate *= min(1.0, self.largest / trace) if trace > 0 else 1.0


def _train_digits(seed: int, steps: int, lr: float, momentum: float, learner: type[SLQLearningRate] | None = None) -> float:
    """Training loss of a small network on digits after so many steps with batches of 64, at most twice that of guessing."""
    torch.manual_seed(seed)
    data, generator = digits(seed=seed, flat=True), torch.Generator().manual_seed(seed)
    net = MLP(data.train_x.shape[1], [32], len(data.classes), activation=nn.Tanh)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum)

    def loss(rows: Tensor) -> Tensor:
        return cross_entropy(net(data.train_x[rows]), data.train_y[rows])

    batches = _rows(len(data.train_x), 64, generator)
    schedule = None
    if learner is not None:
        others = _rows(len(data.train_x), 64, torch.Generator().manual_seed(seed + 1))
        schedule = learner(
            optimizer,
            lambda: HessianOperator(loss(next(others)), net.parameters()),
            interval=INTERVAL,
            lanczos_steps=PRODUCTS,
        )
    for _ in range(steps):
        optimizer.zero_grad()
        loss(next(batches)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if schedule is not None:
            schedule.step()
    with torch.no_grad():
        return float(loss(torch.arange(len(data.train_x))).nan_to_num(nan=math.inf).clamp(max=2 * math.log(10)))


def _grid(seed: int, steps: int, momentum: float) -> list[float]:
    return [_train_digits(seed, steps, lr, momentum) for lr in GRID]


def _grid_steps(steps: int) -> int:
    """Steps of each run of the grid for the learner's cost: a step is one gradient, a Hessian product counts as two."""
    refreshes = 1 + steps // INTERVAL
    return (steps + refreshes * (1 + 2 * PRODUCTS)) // len(GRID)


def _tune_momentum(trial: Trial, learner: type[SLQLearningRate] = SLQLearningRate) -> Mapping[str, Any]:
    """The better of no momentum and 0.9 for the grid, on two seeds; the learner keeps the fraction it is registered with."""
    steps = _grid_steps(trial.pick(smoke=10, laptop=300))
    means = {m: sum(min(_grid(trial.seed + i, steps, m)) for i in range(2)) for m in (0.0, 0.9)}
    return {"momentum": min(means, key=lambda m: means[m])}


@claim(control={"learner": TraceLearner}, tune=_tune_momentum)
def learner_beats_grid_at_equal_cost(trial: Trial, learner: type[SLQLearningRate] = SLQLearningRate) -> Paired:
    """Training loss of one run of the learner and of the best run of a grid of rates, at the same cost together."""
    steps = trial.pick(smoke=10, laptop=300, full=3000)
    grid = _grid(trial.seed, _grid_steps(steps), trial.tuned["momentum"])
    trial.log(best_rate=GRID[grid.index(min(grid))], momentum=trial.tuned["momentum"])
    return Paired(ours=_train_digits(trial.seed, steps, 0.5, 0.0, learner), baseline=min(grid))

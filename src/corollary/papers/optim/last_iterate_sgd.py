"""Last-iterate convergence of stochastic gradient methods (arXiv 2312.08531): how its claims are measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from corollary.claims import Paired, Slope, Trial, claim
from corollary.data import tabular
from corollary.optim import CompositeMirrorDescent, LastIterateLR
from corollary.testing import Case, Problem

Array = NDArray[np.float64]


# -------------------------------------------------------------------------------------------------------------- conformance


def _largest_shift(values: Sequence[float], total: float) -> float:
    """τ with Σ max(v - τ, 0) = total, by halving: the sum falls in τ."""
    low, high = min(values) - total, max(values)
    for _ in range(200):
        middle = (low + high) / 2
        if sum(max(v - middle, 0.0) for v in values) > total:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _norm(values: Sequence[float], p: float) -> float:
    return math.pow(sum(math.pow(abs(v), p) for v in values), 1 / p)


def _one_step(x: Sequence[float], g: Sequence[float], lr: float, options: Mapping[str, Any]) -> list[float]:
    """One mirror step, entry by entry, from the optimality conditions."""
    mirror, h, weight = options.get("mirror", "euclidean"), options.get("composite"), options.get("weight", 0.0)
    order, radius = float(options.get("order", 2.0)), float(options.get("radius", 1.0))
    if mirror == "p_norm":
        size = _norm(x, order)
        slopes = [math.copysign(abs(v) ** (order - 1), v) * size ** (2 - order) / (order - 1) for v in x]
    elif mirror == "power":
        slopes = [2 ** (order - 2) * _norm(x, 2) ** (order - 2) * v for v in x]
    else:
        slopes = list(x)
    z = [s - lr * e for s, e in zip(slopes, g, strict=True)]
    if h == "l1":
        z = [math.copysign(max(abs(v) - lr * weight, 0.0), v) for v in z]
    if h == "mirror":
        z = [v / (1 + lr * weight) for v in z]
    if mirror == "p_norm":
        dual = order / (order - 1)
        size = _norm(z, dual) * (order - 1)
        y = [math.copysign((abs(v) * (order - 1)) ** (dual - 1), v) * size ** (2 - dual) for v in z]
    elif mirror == "power":
        size = _norm(z, 2)
        y = [v / size * (size / 2 ** (order - 2)) ** (1 / (order - 1)) for v in z]
    else:
        y = z
    if h == "box":
        y = [min(max(v, options["low"]), options["high"]) for v in y]
    if h == "ball" and _norm(y, 2) > radius:
        y = [v * radius / _norm(y, 2) for v in y]
    if h == "simplex":
        shift = _largest_shift(y, radius)
        y = [max(v - shift, 0.0) for v in y]
    return y


def oracle(problem: Problem, steps: int, lr: float = 0.1, **options: Any) -> list[list[Array]]:
    """Composite mirror descent in loops over entries; leading dimensions count problems where the options say so."""
    params, path = [p.copy() for p in problem.start], []
    dims = options.get("batch_dims", 0)
    for _ in range(steps):
        after = []
        for p, g in zip(params, problem.gradient(params), strict=True):
            count = math.prod(p.shape[:dims])
            rows = [
                _one_step(x.tolist(), e.tolist(), lr, options)
                for x, e in zip(p.reshape(count, -1), g.reshape(count, -1), strict=True)
            ]
            after.append(np.array(rows).reshape(p.shape))
        params = after
        path.append([p.copy() for p in params])
    return path


def rate_oracle(
    step: int,
    lr: float,
    total_steps: int | None = None,
    strong_convexity: float = 0.0,
    smoothness: float = 0.0,
    tail_index: float = 2.0,
    decay: str = "linear",
) -> float:
    """The table of `LastIterateLR`, with the condition number κ = L / μ."""
    t = step + 1
    if strong_convexity > 0:
        kappa = smoothness / strong_convexity
        if total_steps is not None:
            half = math.ceil(total_steps / 2)
            if t <= half:
                return lr / (strong_convexity * (1 + 2 * kappa))
            return lr * 2 / (strong_convexity * (t - half + 2 + 4 * kappa))
        return lr * 2 / (strong_convexity * (t + 1 + 4 * kappa))
    if total_steps is None:
        rate = lr / math.pow(t, 1 / tail_index)
    elif decay == "constant":
        rate = lr / math.pow(total_steps, 1 / tail_index)
    else:
        rate = lr * max(total_steps + 1 - t, 0) / total_steps / math.pow(total_steps, 1 / tail_index)
    return min(rate, 1 / (2 * smoothness)) if smoothness else rate


def _end(**options: Any) -> int:
    return int(options.get("total_steps") or 12)


CONFORMANCE = {
    "corollary.optim.CompositeMirrorDescent": Case(
        CompositeMirrorDescent,
        tags={
            "oracle": oracle,
            "options": (
                {},
                {"composite": "l1", "weight": 0.8},
                {"composite": "mirror", "weight": 0.8},
                {"composite": "box", "low": -0.3, "high": 0.6},
                {"composite": "ball", "radius": 0.5, "batch_dims": 1},
                {"composite": "simplex", "radius": 2.0},
                {"mirror": "p_norm", "order": 1.3, "composite": "l1", "weight": 0.1},
                {"mirror": "p_norm", "order": 1.6, "composite": "mirror", "weight": 0.5, "batch_dims": 1},
                {"mirror": "power", "order": 2.5, "composite": "ball", "radius": 1.5},
                {"mirror": "power", "order": 4.0, "composite": "mirror", "weight": 0.2, "lr": 0.02},
            ),
        },
    ),
    "corollary.optim.LastIterateLR": Case(
        LastIterateLR,
        tags={
            "oracle": rate_oracle,
            "options": (
                {"total_steps": 9},
                {"total_steps": 9, "smoothness": 20.0},
                {"total_steps": 7, "decay": "constant", "smoothness": 0.1},
                {"tail_index": 1.4},
                {"total_steps": 8, "tail_index": 1.4},
                {"strong_convexity": 0.5},
                {"strong_convexity": 0.5, "smoothness": 3.0, "total_steps": 9},
            ),
            "end": _end,
            "beyond": "oracle",
            "tolerance": 1e-12,
            "bad": {
                "no steps": {"total_steps": 0},
                "an infinite smoothness": {"smoothness": math.inf},
                "a tail index above 2": {"tail_index": 2.5},
                "an unknown decay": {"decay": "cosine"},
            },
        },
    ),
}


# ------------------------------------------------------------------------------------------------------------------ problems


class Instance:
    """A convex problem over rows of a table, with its optimum from a convex solver."""

    def __init__(self, rows: Tensor, targets: Tensor, kind: str, ridge: float = 0.0) -> None:
        import cvxpy

        self.rows, self.targets, self.kind, self.ridge = rows, targets, kind, ridge
        x = cvxpy.Variable(rows.shape[1])
        a, b = rows.numpy(), targets.numpy()
        loss = cvxpy.sum(cvxpy.pos(b - a @ x)) if kind == "hinge" else cvxpy.sum(cvxpy.abs(a @ x - b))
        constraints = [x >= 0, cvxpy.sum(x) == 1] if kind == "simplex" else []
        program = cvxpy.Problem(cvxpy.Minimize(loss / len(b) + ridge / 2 * cvxpy.sum_squares(x)), constraints)
        self.optimum = float(program.solve(solver=cvxpy.CLARABEL))

    def gradient(self, x: Tensor, picked: Tensor) -> Tensor:
        """Subgradient of one row's loss, without the ridge, for each of the runs (runs, d)."""
        a, b = self.rows[picked], self.targets[picked]
        if self.kind == "hinge":
            return -((a * x).sum(1) < b).to(a.dtype)[:, None] * a
        return ((a * x).sum(1) - b).sign()[:, None] * a

    def gap(self, x: Tensor) -> float:
        """Mean over the runs of the objective's distance from the optimum."""
        residual = x @ self.rows.T - self.targets
        loss = (-residual).clamp_min(0) if self.kind == "hinge" else residual.abs()
        return float((loss.mean(1) + self.ridge / 2 * x.square().sum(1)).mean()) - self.optimum


def _with_intercept(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)


@lru_cache(maxsize=32)
def _diabetes(seed: int) -> Instance:
    """Least absolute deviations: convex and Lipschitz."""
    data = tabular("diabetes", seed=seed).to(dtype=torch.float64)
    return Instance(_with_intercept(data.train_x), data.train_y, "absolute")


@lru_cache(maxsize=32)
def _breast_cancer(seed: int, ridge: float) -> Instance:
    """A support vector machine: hinge loss, with a ridge that makes it strongly convex."""
    data = tabular("breast_cancer", seed=seed).to(dtype=torch.float64)
    signs = 2 * data.train_y.to(torch.float64) - 1
    return Instance(_with_intercept(data.train_x) * signs[:, None], torch.ones_like(signs), "hinge", ridge)


@lru_cache(maxsize=32)
def _mixture(seed: int, d: int = 100) -> Instance:
    """Weights of a sparse mixture from signs of ±1: gradients of size 1 in the norm dual to that of the entropy."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(2, (400, d), generator=generator).double() * 2 - 1
    truth = torch.zeros(d, dtype=torch.float64)
    truth[:5] = 0.2
    return Instance(rows, rows @ truth + 0.1 * torch.randn(400, generator=generator, dtype=torch.float64), "simplex")


class RisingLR(LastIterateLR):
    """The control: the same step sizes in the opposite order, so that the last steps are the largest."""

    def multiplier(self, step: int) -> float:
        return super().multiplier(max((self.total_steps or 0) - 1 - step, 0))


class FixedLR(LastIterateLR):
    """The control: the step size of a horizon of 64 steps, whatever the horizon."""

    def multiplier(self, step: int) -> float:
        return float(64 ** (-1 / self.tail_index))


Noise = Callable[[int, int], Tensor]


def _run(
    problem: Instance,
    steps: int,
    runs: int,
    generator: torch.Generator,
    *,
    method: Mapping[str, Any],
    schedule: type[LastIterateLR] = LastIterateLR,
    noise: Noise | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Last iterates and averages of independent runs, side by side: each (runs, d)."""
    d = problem.rows.shape[1]
    start = torch.full((runs, d), 1 / d if problem.kind == "simplex" else 0.0, dtype=torch.float64)
    x = nn.Parameter(start)
    optimizer = CompositeMirrorDescent([x], batch_dims=1, **method)
    rates = schedule(optimizer, **options)
    picked = torch.randint(len(problem.targets), (steps, runs), generator=generator)
    total = torch.zeros_like(start)
    with torch.no_grad():
        for t in range(steps):
            x.grad = problem.gradient(x, picked[t])
            if noise is not None:
                x.grad += noise(runs, d)
            optimizer.step()
            rates.step()
            total += x
    return x.detach(), total / steps


def _slope(
    trial: Trial,
    problem: Instance,
    runs: int,
    method: Mapping[str, Any],
    options: Callable[[int], Mapping[str, Any]],
    noise: Noise | None = None,
    schedule: type[LastIterateLR] = LastIterateLR,
) -> Slope:
    """Mean gap of the last iterate against the number of steps, every number in runs of its own."""
    horizons = trial.pick(smoke=(16, 64, 256), laptop=(64, 256, 1024, 2048), full=(64, 256, 1024, 4096, 16384))
    gaps = []
    for steps in horizons:
        last, _ = _run(problem, steps, runs, trial.generator, method=method, schedule=schedule, noise=noise, **options(steps))
        gaps.append(max(problem.gap(last), 1e-12))
    trial.figure("gap", x=horizons, y={"last iterate": gaps}, xlabel="steps T", ylabel="F(last) - F*", log="xy")
    return Slope(x=horizons, y=gaps)


# --------------------------------------------------------------------------------------------------------------------- rates


@claim(control={"schedule": FixedLR})
def convex_rate(trial: Trial, schedule: type[LastIterateLR] = LastIterateLR) -> Slope:
    """Least absolute deviations on diabetes, horizon known."""
    return _slope(trial, _diabetes(trial.seed), 64, {"lr": 0.3}, lambda steps: {"total_steps": steps}, schedule=schedule)


@claim(control={"schedule": FixedLR})
def convex_rate_unknown_horizon(trial: Trial, schedule: type[LastIterateLR] = LastIterateLR) -> Slope:
    """Least absolute deviations on diabetes, horizon unknown."""
    return _slope(trial, _diabetes(trial.seed), 64, {"lr": 0.3}, lambda steps: {}, schedule=schedule)


@claim(control={"known": False})
def strongly_convex_rate(trial: Trial, known: bool = True) -> Slope:
    """A support vector machine on breast cancer, the ridge as composite term; the control steps as if it were only convex."""
    ridge = 0.3
    method = {"lr": 1.0 if known else 0.3, "composite": "mirror", "weight": ridge}
    options = {"strong_convexity": ridge} if known else {}
    return _slope(trial, _breast_cancer(trial.seed, ridge), 64, method, lambda steps: options)


@claim(control={"schedule": FixedLR})
def entropy_rate(trial: Trial, schedule: type[LastIterateLR] = LastIterateLR) -> Slope:
    """Weights of a mixture on the simplex, by entropic mirror descent."""
    method = {"lr": 2.0, "mirror": "entropy"}
    return _slope(trial, _mixture(trial.seed), 32, method, lambda steps: {"total_steps": steps}, schedule=schedule)


TAIL, INDEX = 1.6, 1.5  # moments below 1.6 are finite; the theorem is told 1.5


@claim(control={"schedule": FixedLR})
def heavy_tailed_rate(trial: Trial, schedule: type[LastIterateLR] = LastIterateLR) -> Slope:
    """Least absolute deviations on diabetes, with noise of infinite variance on every gradient."""
    largest = 0.0

    def noise(runs: int, d: int) -> Tensor:
        nonlocal largest
        length: Tensor = torch.rand(runs, 1, generator=trial.generator, dtype=torch.float64).pow(-1 / TAIL) - 1
        largest = max(largest, float(length.max()))
        direction = torch.randn(runs, d, generator=trial.generator, dtype=torch.float64)
        scaled: Tensor = direction * (length / direction.norm(dim=1, keepdim=True))
        return scaled

    method = {"lr": 0.3, "mirror": "power", "order": INDEX / (INDEX - 1)}
    options = {"tail_index": INDEX}
    # A single run that a huge jump hit late weighs heavily in a mean, so there are more runs here than elsewhere.
    found = _slope(trial, _diabetes(trial.seed), 256, method, lambda steps: {"total_steps": steps} | options, noise, schedule)
    trial.log(largest_noise=largest)
    return found


# --------------------------------------------------------------------------------------------------------------- comparisons

RATES = (0.05, 0.1, 0.2, 0.4, 0.8)
Method = tuple[type[LastIterateLR], str]
CONSTANT: Method = (LastIterateLR, "constant")


def _gaps(method: Method, lr: float, seed: int, steps: int) -> tuple[float, float]:
    """Gaps of the last iterate and of the average, on diabetes, over 32 runs."""
    schedule, decay = method
    problem = _diabetes(seed)
    generator = torch.Generator().manual_seed(seed)
    last, average = _run(problem, steps, 32, generator, method={"lr": lr}, schedule=schedule, total_steps=steps, decay=decay)
    return problem.gap(last), problem.gap(average)


def _tune(trial: Trial, which: int, schedule: type[LastIterateLR]) -> dict[str, Any]:
    """The rate of smallest gap for each, over the same five and two seeds."""
    steps = trial.pick(smoke=50, laptop=1000, full=10000)

    def best(method: Method, place: int) -> float:
        return min(RATES, key=lambda lr: sum(_gaps(method, lr, seed, steps)[place] for seed in (trial.seed, trial.seed ^ 1)))

    return {"ours": best((schedule, "linear"), 0), "baseline": best(CONSTANT, which)}


def _compare(trial: Trial, which: int, schedule: type[LastIterateLR]) -> Paired:
    """Logarithms to base 10 of the gaps."""
    steps = trial.pick(smoke=50, laptop=1000, full=10000)
    ours = _gaps((schedule, "linear"), trial.tuned["ours"], trial.seed, steps)[0]
    baseline = _gaps(CONSTANT, trial.tuned["baseline"], trial.seed, steps)[which]
    trial.log(gap=ours, baseline_gap=baseline)
    return Paired(ours=math.log10(ours), baseline=math.log10(baseline))


def _tune_last(trial: Trial, schedule: type[LastIterateLR] = LastIterateLR) -> dict[str, Any]:
    return _tune(trial, 0, schedule)


def _tune_average(trial: Trial, schedule: type[LastIterateLR] = LastIterateLR) -> dict[str, Any]:
    return _tune(trial, 1, schedule)


@claim(control={"schedule": RisingLR}, tune=_tune_last)
def beats_constant_step_last_iterate(trial: Trial, schedule: type[LastIterateLR] = LastIterateLR) -> Paired:
    """The last iterate under the theorem's step sizes against the last iterate of SGD with a constant step."""
    return _compare(trial, 0, schedule)


@claim(control={"schedule": RisingLR}, tune=_tune_average)
def as_good_as_the_average(trial: Trial, schedule: type[LastIterateLR] = LastIterateLR) -> Paired:
    """The last iterate under the theorem's step sizes against the average of SGD with a constant step."""
    return _compare(trial, 1, schedule)

"""Gradient-Normalized Smoothness (arXiv 2506.13710): how its claims are measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, softplus
from torch.optim import Optimizer

from corollary.claims import Exact, Paired, Slope, Trial, claim
from corollary.data import digits, tabular
from corollary.linalg import EmpiricalFisherOperator, SymmetricOperator
from corollary.optim import GradientNormalizedNewton
from corollary.optim.gradient_normalized_smoothness import Curvature, Evaluation
from corollary.testing import Case, Problem

Array = NDArray[np.float64]


def oracle(
    problem: Problem, steps: int, lr: float = 1.0, radius: float = 1.0, adaptive: bool = True, tol: float = 0.0
) -> list[list[Array]]:
    """Algorithm 1 where the Hessian is diagonal: the linear system is solved entry by entry."""
    assert problem.hessian_diagonal is not None
    assert tol < 1e-9
    shapes, sizes = [p.shape for p in problem.start], [p.size for p in problem.start]

    def flat(arrays: Sequence[Array]) -> Array:
        return np.concatenate([a.ravel() for a in arrays])

    def split(vector: Array) -> list[Array]:
        return [part.reshape(s) for part, s in zip(np.split(vector, np.cumsum(sizes)[:-1]), shapes, strict=True)]

    def loss(vector: Array) -> float:
        return float(problem.loss([torch.as_tensor(a) for a in split(vector)]))

    theta, path = flat(problem.start), []
    for _ in range(steps):
        g, h = flat(problem.gradient(split(theta))), flat(problem.hessian_diagonal(split(theta)))
        norm = np.sqrt(np.sum(g * g))
        while norm > 0:
            step = -g / (h + norm / radius)
            after = flat(problem.gradient(split(theta + step)))
            rounding = 4 * np.finfo(float).eps * abs(loss(theta))
            if not adaptive or loss(theta) - loss(theta + step) + rounding >= np.sum(after * after) * radius / (8 * norm):
                theta = theta + lr * step
                radius = max(2 * radius, 1e-9) if adaptive else radius
                break
            radius /= 2
        path.append(split(theta))
    return path


def step(optimizer: Optimizer, params: Sequence[Tensor], loss: Callable[[Sequence[Tensor]], Tensor]) -> Any:
    """One step, with the closure that the method needs."""
    return optimizer.step(lambda: loss(params))  # type: ignore[arg-type, return-value]


CONFORMANCE = {
    "corollary.optim.GradientNormalizedNewton": Case(
        GradientNormalizedNewton,
        tags={
            "oracle": oracle,
            "options": (
                {"tol": 1e-13},
                {"tol": 1e-13, "radius": 100.0, "lr": 0.5},
                {"tol": 1e-13, "radius": 0.3, "adaptive": False},
            ),
            "step": step,
            "groups": "refused",
            "foreach": False,
            "nan": "raises",
            "fsdp2": "refused",
        },
    ),
}


# ------------------------------------------------------------------------------------------------------------ the problems


@dataclass(frozen=True)
class Objective:
    """A smooth convex function of d numbers: the closure for the method, dense derivatives for the baselines.

    ``outputs`` and ``loss`` make f = loss(outputs(θ)); ``matrix`` is the (approximate) Hessian that both methods get, dense
    for the baseline and as ``curvature`` for ours. ``radius`` is the γ that the theory allows; ``best`` the infimum of f.
    """

    dim: int
    outputs: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor], Tensor]
    matrix: Callable[[Array], Array]
    curvature: str | Curvature
    radius: float
    best: float = 0.0

    def value(self, theta: Array) -> float:
        return float(self.loss(self.outputs(torch.as_tensor(theta))))

    def gradient(self, theta: Array) -> Array:
        leaf = torch.tensor(theta, requires_grad=True)
        [g] = torch.autograd.grad(self.loss(self.outputs(leaf)), [leaf])
        return np.asarray(g.numpy(), dtype=np.float64)


def _margins(seed: int, pair: tuple[int, int]) -> Array:
    """Rows yᵢ(xᵢ, 1) of two classes of digits: each is classified rightly where it has a negative product with θ."""
    data = digits(seed=seed, flat=True)
    x = torch.cat([data.train_x, torch.ones(len(data.train_x), 1)], dim=1).double()
    first, second = data.train_y == pair[0], data.train_y == pair[1]
    sign = torch.where(first, -1.0, 1.0).double()[:, None]
    return np.asarray((x * sign)[first | second].numpy(), dtype=np.float64)


def _hard_margin(rows: Array) -> float:
    """A lower bound on the largest m with -<aᵢ, w> ≥ m for a unit w; not positive where none was found."""
    from sklearn.svm import LinearSVC

    signs = np.where(np.arange(len(rows)) % 2 == 0, 1.0, -1.0)  # LinearSVC wants two classes: mirror every other row
    w = (
        LinearSVC(C=1e3, fit_intercept=False, dual=True, max_iter=20_000, random_state=0)
        .fit(rows * signs[:, None], signs)
        .coef_[0]
    )
    return float((rows @ w).min() / np.linalg.norm(w))


def _logistic(rows: Array, *, fisher: bool = False, ridge: float = 0.0) -> Objective:
    """Mean of log(1 + exp<aᵢ, θ>), plus ridge/2 ‖θ‖²; ``fisher`` takes the mean of ∇fᵢ∇fᵢᵀ for the Hessian of the mean."""
    a = torch.as_tensor(rows)
    n, d = rows.shape
    size = float(np.linalg.norm(rows, axis=1).max())

    def matrix(theta: Array) -> Array:
        p = 1 / (1 + np.exp(-np.clip(rows @ theta, -700, 700)))
        weights = p**2 if fisher else p * (1 - p)
        return np.asarray((rows.T * weights) @ rows / n + ridge * np.eye(d), dtype=np.float64)

    def empirical(evaluation: Evaluation, params: Sequence[Tensor]) -> SymmetricOperator:
        slopes = (a @ params[0].detach()).sigmoid()
        return EmpiricalFisherOperator(a * slopes[:, None], damp=ridge)

    return Objective(
        d,
        outputs=lambda theta: torch.cat([a @ theta, theta]) if ridge else a @ theta,
        loss=lambda z: softplus(z[:n], threshold=1e9).mean() + ridge / 2 * z[n:].square().sum(),
        matrix=matrix,
        curvature=empirical if fisher else "hessian",
        radius=0.9 / size,
    )


def _softmax(seed: int, classes: int, samples: int, *, pool: int = 1, ridge: float = 0.0) -> Objective:
    """Mean cross-entropy of linear logits on digits of the first few classes, their pixels averaged over ``pool`` by ``pool``.

    The curvature is the model's Fisher matrix, or the Gauss-Newton matrix where a penalty makes the minimum one that is attained.
    """
    data = digits(seed=seed)
    rows = (data.train_y < classes).nonzero()[:samples, 0]
    x, y = avg_pool2d(data.train_x[rows], pool).flatten(1).double(), data.train_y[rows]
    d = x.shape[1]

    def logits(theta: Tensor) -> Tensor:
        return x @ theta.view(classes, d).T

    return Objective(
        classes * d,
        outputs=lambda theta: torch.cat([logits(theta).reshape(-1), theta]) if ridge else logits(theta),
        loss=(
            (
                lambda z: (
                    cross_entropy(z[: len(y) * classes].view(-1, classes), y) + ridge / 2 * z[len(y) * classes :].square().sum()
                )
            )
            if ridge
            else lambda z: cross_entropy(z, y)
        ),
        matrix=lambda theta: np.zeros((classes * d,) * 2),
        curvature="gauss_newton" if ridge else "fisher",
        radius=0.9 / (math.sqrt(2) * float(x.norm(dim=1).max())),
    )


def _log_sum_exp(seed: int, n: int = 80, d: int = 20, mu: float = 0.25) -> Objective:
    """μ log Σ exp((<aᵢ, x> - bᵢ)/μ), the smooth maximum, with the weighted Gauss-Newton matrix Aᵀ diag(π) A/μ."""
    rng = np.random.default_rng(seed)
    rows, offsets = rng.uniform(-1, 1, (n, d)), rng.uniform(-1, 1, n)

    def weights(x: Array) -> Array:
        z = (rows @ x - offsets) / mu
        e = np.exp(z - z.max())
        return np.asarray(e / e.sum(), dtype=np.float64)

    rows = rows - rows.T @ weights(np.zeros(d))  # brings the minimum to zero, as is usual with this function
    a, b = torch.as_tensor(rows), torch.as_tensor(offsets)

    def weighted(evaluation: Evaluation, params: Sequence[Tensor]) -> SymmetricOperator:
        p = ((a @ params[0].detach() - b) / mu).softmax(0)
        return (a.T * p) @ a / mu

    objective = Objective(
        d,
        outputs=lambda x: (a @ x - b) / mu,
        loss=lambda z: mu * z.logsumexp(0),
        matrix=lambda x: np.asarray((rows.T * weights(x)) @ rows / mu, dtype=np.float64),
        curvature=weighted,
        radius=0.29 * mu / float(np.linalg.norm(rows, axis=1).max()),
    )
    return _with_best(objective, np.zeros(d))


def _with_best(objective: Objective, start: Array) -> Objective:
    """The objective with its minimum, found with BFGS, which no claim measures."""
    from scipy.optimize import minimize

    found = minimize(objective.value, start, jac=objective.gradient, method="BFGS", options={"gtol": 1e-10, "maxiter": 2000})
    return Objective(**{**objective.__dict__, "best": float(found.fun)})


# ------------------------------------------------------------------------------------------------------------- the methods


class ConstantRegularization(GradientNormalizedNewton):
    """The control of the rates: the regularization of the first step in every step, whatever the gradient's norm."""

    def _shift(self, norm: float, radius: float) -> float:
        self.first = getattr(self, "first", norm)
        return self.first / radius


class InverseRegularization(GradientNormalizedNewton):
    """The control against cubic regularization: one over the gradient's norm in place of the norm."""

    def _shift(self, norm: float, radius: float) -> float:
        return 1 / (norm * radius)


def _none(evaluation: Evaluation, params: Sequence[Tensor]) -> SymmetricOperator:
    """No curvature at all: what is left is a gradient method."""
    n = sum(p.numel() for p in params)
    return EmpiricalFisherOperator(torch.zeros(1, n, dtype=params[0].dtype))


def _shuffled(objective: Objective) -> Curvature:
    """The control against gradient descent: the Hessian with its coordinates in a wrong order."""
    order = np.random.default_rng(objective.dim).permutation(objective.dim)

    def curvature(evaluation: Evaluation, params: Sequence[Tensor]) -> SymmetricOperator:
        from corollary.linalg import HessianOperator

        return HessianOperator(evaluation.loss, params).dense()[order][:, order]

    return curvature


def _newton(
    objective: Objective,
    *,
    start: Array,
    method: type[GradientNormalizedNewton] = GradientNormalizedNewton,
    curvature: str | Curvature | None = None,
    **options: Any,
) -> tuple[GradientNormalizedNewton, nn.Parameter, Callable[[], float]]:
    """The method on a parameter, and a function that takes one step and gives the loss before it."""
    theta = nn.Parameter(torch.tensor(start))
    optimizer = method([theta], curvature=objective.curvature if curvature is None else curvature, **options)

    def advance() -> float:
        return float(optimizer.step(lambda: (objective.outputs(theta), objective.loss)))

    return optimizer, theta, advance


def _systems(objective: Objective, start: Array, ratio: float, cap: int, **options: Any) -> int:
    """Linear systems solved, those of rejected steps included, until the gap to the infimum has fallen by ``ratio``."""
    optimizer, theta, advance = _newton(objective, start=start, **options)
    goal = objective.best + ratio * (objective.value(start) - objective.best)
    while optimizer.param_groups[0]["solves"] < cap:
        before = theta.detach().clone()
        advance()
        if objective.value(theta.detach().numpy()) <= goal:
            return int(optimizer.param_groups[0]["solves"])
        if torch.equal(before, theta.detach()):
            break
    return cap


def cubic_newton(objective: Objective, start: Array, ratio: float, cap: int, constant: float) -> int:
    """Cubic regularization with the same matrix and the adaptive search of the authors' code: systems until the goal.

    The step minimizes <g, h> + <Hh, h>/2 + M/6 ‖h‖³; M doubles until the model lies above the function there, and halves
    after. The subproblem is solved exactly, from one eigendecomposition a step, and counts as one system for each M.
    """
    theta, f = start.copy(), objective.value(start)
    goal = objective.best + ratio * (f - objective.best)
    systems = 0
    while systems < cap:
        w, v = np.linalg.eigh(objective.matrix(theta))
        g = v.T @ objective.gradient(theta)
        while systems < cap:
            # ‖(H + M r/2)⁻¹ g‖ = r: the left side falls in r, so that bisection finds it.
            low, high = max(0.0, -2 * w[0] / constant), max(1.0, -4 * w[0] / constant)
            while np.linalg.norm(g / (w + constant * high / 2)) > high:
                high *= 2
            for _ in range(100):
                middle = (low + high) / 2
                long = w[0] + constant * middle / 2 <= 0 or np.linalg.norm(g / (w + constant * middle / 2)) > middle
                low, high = (middle, high) if long else (low, middle)
            h = -g / (w + constant * high / 2)
            model = g @ h + (w * h * h).sum() / 2 + constant / 6 * np.linalg.norm(h) ** 3
            systems += 1
            new = objective.value(theta + v @ h)
            if new <= f + model + 4 * np.finfo(float).eps * abs(f):
                theta, f, constant = theta + v @ h, new, max(constant / 2, 1e-5)
                break
            constant *= 2
        if f <= goal:
            return systems
    return cap


def gradient_descent(objective: Objective, start: Array, ratio: float, cap: int, step: float, *, search: bool) -> int:
    """Steps tried until the goal, with a constant step size or with the doubling and halving search of the authors' code."""
    theta, f = start.copy(), objective.value(start)
    goal = objective.best + ratio * (f - objective.best)
    g = objective.gradient(theta)
    for tried in range(1, cap + 1):
        trial = theta - step * g
        new = objective.value(trial)
        if search and not new <= f - step / 2 * (g @ g):
            step /= 2
            continue
        if not math.isfinite(new):
            break
        theta, f, g = trial, new, objective.gradient(trial)
        if f <= goal:
            return tried
        if search:
            step *= 2
    return cap


# ------------------------------------------------------------------------------------------------------------- the radius


def _instances(trial: Trial) -> Iterable[tuple[str, Objective]]:
    separable = _separable(trial.seed)
    samples = trial.pick(smoke=40, laptop=150, full=500)
    yield "logistic, exact", _breast_cancer(trial.seed % 2**31)
    fisher = _logistic(separable, fisher=True)
    size = float(np.linalg.norm(separable, axis=1).max())
    yield "logistic, empirical Fisher", Objective(**{**fisher.__dict__, "radius": 0.4 * _hard_margin(-separable) / size**2})
    yield "softmax regression, Fisher", _softmax(trial.seed % 2**31, 3, samples, pool=2)
    yield "smooth maximum, Gauss-Newton", _log_sum_exp(trial.seed)


@lru_cache(maxsize=64)
def _separable(seed: int) -> Array:
    """Two classes of digits that a hyperplane separates with room to spare, drawn by the seed."""
    rng = np.random.default_rng(seed)
    while True:
        first, second = sorted(rng.choice(10, 2, replace=False).tolist())
        rows = _margins(seed % 2**31, (first, second))
        if _hard_margin(-rows) > 0.08 * float(np.linalg.norm(rows, axis=1).max()):
            return rows


@claim(control={"curvature": _none})
def radius_bounded(trial: Trial, curvature: Curvature | None = None) -> Exact:
    """By how much the radius that the search accepts falls below half of what the theory allows, as a logarithm."""
    errors = []
    for name, objective in _instances(trial):
        optimizer, theta, advance = _newton(
            objective, start=trial.rng.normal(size=objective.dim), curvature=curvature, radius=1.0, tol=1e-9
        )
        smallest = math.inf
        attained = objective.best != 0  # else the loss falls for ever, and every step looks like the last
        for _ in range(trial.pick(smoke=3, laptop=300 if attained else 25)):
            loss = advance()
            if loss - objective.value(theta.detach().numpy()) <= 1e-11 * abs(loss):
                break  # from here on rounding decides the search, not the function
            smallest = min(smallest, optimizer.param_groups[0]["radius"] / 2)
        trial.log(**{name.replace(",", "").replace(" ", "_"): smallest / objective.radius})
        errors.append(max(0.0, math.log(min(1.0, objective.radius / 2) / smallest)))
    return Exact(errors)


# ---------------------------------------------------------------------------------------------------------------- the rate


def _rate(trial: Trial, objective: Objective, method: type[GradientNormalizedNewton], burn_in: int, last: int) -> Slope:
    """Decrease of log f against iterations, with the one radius of the theory for the whole run and no search."""
    _, _, advance = _newton(
        objective, start=np.zeros(objective.dim), method=method, adaptive=False, radius=objective.radius, tol=1e-8
    )
    last = trial.pick(smoke=last // 16, laptop=last)
    burn_in = trial.pick(smoke=2, laptop=burn_in)
    losses = np.array([advance() for _ in range(burn_in + last + 1)])
    drops = np.log(losses[burn_in] / losses[burn_in:])
    x = [max(1, last * k // 16) for k in (1, 2, 4, 8, 16)]
    every = max(1, len(losses) // 100)
    trial.figure(
        "loss",
        x=list(range(0, len(losses), every)),
        y={"loss": losses[::every].tolist()},
        xlabel="iterations",
        ylabel="loss",
        log="y",
    )
    return Slope(x=x, y=[drops[k] for k in x])


@claim(control={"method": ConstantRegularization})
def logistic_rate(trial: Trial, method: type[GradientNormalizedNewton] = GradientNormalizedNewton) -> Slope:
    """Logistic regression on two separable classes of digits, exact Hessian."""
    return _rate(trial, _logistic(_separable(trial.seed)), method, 40, 320)


@claim(control={"method": ConstantRegularization})
def fisher_rate(trial: Trial, method: type[GradientNormalizedNewton] = GradientNormalizedNewton) -> Slope:
    """Logistic regression on two separable classes of digits, empirical Fisher matrix."""
    rows = _separable(trial.seed)
    size = float(np.linalg.norm(rows, axis=1).max())
    objective = _logistic(rows, fisher=True)
    objective = Objective(**{**objective.__dict__, "radius": 0.4 * _hard_margin(-rows) / size**2})
    return _rate(trial, objective, method, 60, 960)


@claim(control={"method": ConstantRegularization})
def softmax_rate(trial: Trial, method: type[GradientNormalizedNewton] = GradientNormalizedNewton) -> Slope:
    """Softmax regression on four classes of digits, the model's Fisher matrix."""
    return _rate(trial, _softmax(trial.seed % 2**31, 4, 100), method, 60, 320)


# ------------------------------------------------------------------------------------------------------------- comparisons

RADII = (0.1, 1.0, 10.0, 100.0, 1000.0)
CUBIC_CONSTANTS = (0.01, 0.1, 1.0, 10.0, 100.0)
RATES = (0.1, 0.3, 1.0, 3.0, 10.0)


def _breast_cancer(seed: int) -> Objective:
    data = tabular("breast_cancer", seed=seed)
    x, y = data.train_x.double().numpy(), data.train_y.numpy()
    rows = np.asarray(x * np.where(y == 1, -1.0, 1.0)[:, None], dtype=np.float64)
    objective = _logistic(rows, ridge=1e-3)
    return _with_best(objective, np.zeros(objective.dim))


def _digits_softmax(seed: int) -> Objective:
    objective = _softmax(seed, 4, 200, pool=2, ridge=1e-3)
    return _with_best(objective, np.zeros(objective.dim))


def _against_descent(objective: Objective, shuffled: bool, cap: int) -> tuple[Callable[[float], int], Callable[..., int]]:
    start = np.zeros(objective.dim)
    curvature = _shuffled(objective) if shuffled else None

    def ours(radius: float) -> int:
        return _systems(objective, start, 1e-3, cap, radius=radius, curvature=curvature)

    def descent(step: float, search: bool) -> int:
        return gradient_descent(objective, start, 1e-3, cap, step, search=search)

    return ours, descent


def _tune_descent(make: Callable[[int], Objective]) -> Callable[..., Mapping[str, Any]]:
    def tune(trial: Trial, shuffled: bool = False) -> Mapping[str, Any]:
        cap = trial.pick(smoke=20, laptop=500)
        ours, descent = _against_descent(make(trial.seed % 2**31), shuffled, cap)
        radius = min(RADII, key=ours)
        step, search = min([(step, search) for search in (False, True) for step in RATES], key=lambda c: descent(*c))
        return {"radius": radius, "step": step, "search": search}

    return tune


def _descent_pair(trial: Trial, make: Callable[[int], Objective], shuffled: bool) -> Paired:
    cap = trial.pick(smoke=20, laptop=500)
    ours, descent = _against_descent(make(trial.seed % 2**31), shuffled, cap)
    tried, steps = ours(trial.tuned["radius"]), descent(trial.tuned["step"], trial.tuned["search"])
    trial.log(systems=tried, descent_steps=steps, search=trial.tuned["search"])
    return Paired(ours=math.log2(tried), baseline=math.log2(steps))


@claim(control={"shuffled": True}, tune=_tune_descent(_breast_cancer))
def fewer_than_gd(trial: Trial, shuffled: bool = False) -> Paired:
    """Steps tried on logistic regression on the breast cancer table, in powers of two."""
    return _descent_pair(trial, _breast_cancer, shuffled)


@claim(control={"shuffled": True}, tune=_tune_descent(_digits_softmax))
def fewer_than_gd_softmax(trial: Trial, shuffled: bool = False) -> Paired:
    """Steps tried on softmax regression on four classes of digits with the Gauss-Newton matrix, in powers of two."""
    return _descent_pair(trial, _digits_softmax, shuffled)


def _fisher_problems(seed: int, count: int) -> list[tuple[Objective, Array]]:
    problems = [_logistic(_separable(seed + i), fisher=True) for i in range(count)]
    return [(p, np.zeros(p.dim)) for p in problems]


def _maximum_problems(seed: int, count: int) -> list[tuple[Objective, Array]]:
    return [(_log_sum_exp(seed + i), np.random.default_rng(seed + i).normal(size=20)) for i in range(count)]


Problems = Callable[[int, int], list[tuple[Objective, Array]]]


def _logs(counts: Iterable[int]) -> float:
    return float(np.mean([math.log2(c) for c in counts]))


def _tune_cubic(make: Problems, ratio: float) -> Callable[..., Mapping[str, Any]]:
    def tune(trial: Trial, method: type[GradientNormalizedNewton] = GradientNormalizedNewton) -> Mapping[str, Any]:
        cap = trial.pick(smoke=10, laptop=200)
        problems = make(trial.seed, trial.pick(smoke=1, laptop=8))
        radius = min(RADII, key=lambda r: _logs(_systems(p, s, ratio, cap, radius=r, method=method) for p, s in problems))
        constant = min(CUBIC_CONSTANTS, key=lambda m: _logs(cubic_newton(p, s, ratio, cap, m) for p, s in problems))
        return {"radius": radius, "constant": constant}

    return tune


def _cubic_pair(trial: Trial, make: Problems, ratio: float, method: type[GradientNormalizedNewton]) -> Paired:
    cap = trial.pick(smoke=10, laptop=200)
    problems = make(trial.seed, trial.pick(smoke=1, laptop=4))
    return Paired(
        ours=_logs(_systems(p, s, ratio, cap, radius=trial.tuned["radius"], method=method) for p, s in problems),
        baseline=_logs(cubic_newton(p, s, ratio, cap, trial.tuned["constant"]) for p, s in problems),
    )


@claim(control={"method": InverseRegularization}, tune=_tune_cubic(_fisher_problems, 1e-3))
def fewer_than_cubic(trial: Trial, method: type[GradientNormalizedNewton] = GradientNormalizedNewton) -> Paired:
    """Systems solved on logistic regression on separable digits with the empirical Fisher matrix, in powers of two."""
    return _cubic_pair(trial, _fisher_problems, 1e-3, method)


@claim(control={"method": InverseRegularization}, tune=_tune_cubic(_maximum_problems, 1e-6))
def fewer_than_cubic_softmax(trial: Trial, method: type[GradientNormalizedNewton] = GradientNormalizedNewton) -> Paired:
    """Systems solved on the smooth maximum with the weighted Gauss-Newton matrix, in powers of two."""
    return _cubic_pair(trial, _maximum_problems, 1e-6, method)

"""Large-step logistic descent and the perceptron (arXiv 2412.08424): how the claims are measured."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import SVC

from corollary.claims import Exact, Paired, Ratio, Slope, Trial, claim
from corollary.data import digits
from corollary.optim import BatchPerceptron, LogisticGD, NormalizedLogisticGD
from corollary.testing import Case

Array = NDArray[Any]
STEPS = (0.1, 1.0, 10.0, 100.0)

CONFORMANCE = {
    "corollary.optim.NormalizedLogisticGD": Case(NormalizedLogisticGD),
    "corollary.optim.BatchPerceptron": Case(BatchPerceptron),
    "corollary.optim.LogisticGD": Case(LogisticGD),
}


@lru_cache(maxsize=1)
def _all_digits() -> tuple[Array, Array]:
    data = digits(seed=0, flat=True)
    x = np.concatenate([data.train_x.numpy(), data.test_x.numpy()]).astype(np.float64)
    return x, np.concatenate([data.train_y.numpy(), data.test_y.numpy()])


def _one_against_rest(rng: np.random.Generator) -> tuple[Array, Array]:
    """50 samples of a random digit, labelled 1, and 50 of the others, labelled -1.

    Every pixel is shaken by a thousandth of its range: the theorem asks for data in general position, and pixels are integers.
    """
    x, labels = _all_digits()
    digit = rng.integers(10)
    a = rng.choice(np.flatnonzero(labels == digit), size=50, replace=False)
    b = rng.choice(np.flatnonzero(labels != digit), size=50, replace=False)
    samples = x[np.concatenate([a, b])]
    return samples + 1e-3 * rng.normal(size=samples.shape), np.repeat([1, -1], [len(a), len(b)])


def _gaussian(rng: np.random.Generator, n: int = 100, d: int = 20, margin: float = 0.1) -> tuple[Array, Array]:
    """Samples pushed away from a random plane through 0 by ``margin``."""
    w = rng.normal(size=d)
    w /= np.linalg.norm(w)
    x = rng.normal(size=(n, d))
    y = np.where(x @ w > 0, 1, -1)
    return x + margin * y[:, None] * w, y


def _fitted(kind: type[LogisticGD], step_size: float, x: Array, y: Array, max_iter: int = 50_000) -> LogisticGD:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the count of steps then is max_iter
        model = kind(step_size, fit_intercept=False, max_iter=max_iter)
        model.fit(x, y)
    return model


# -------------------------------------------------------------------------------------------------------- the limit


def _path(kind: type[LogisticGD], step_size: float, x: Array, y: Array, steps: int) -> Array:
    """The iterates divided by the step size, (steps + 1, d)."""
    model, theta, path = kind(step_size), np.zeros(x.shape[1]), [np.zeros(x.shape[1])]
    for t in range(steps):
        weights = model._weights((y * (x @ theta))[:, None], t)[:, 0]
        theta = theta + x.T @ (y * weights)
        path.append(theta / step_size)
    return np.stack(path)


def _perceptron_path(x: Array, y: Array, steps: int) -> Array:
    """The batch perceptron's iterates as the paper writes them."""
    n = len(y)
    theta = (y[:, None] * x).sum(0) / (2 * n)
    path = [np.zeros(x.shape[1]), theta]
    for _ in range(steps - 1):
        wrong = y * (x @ theta) <= 0
        theta = theta + (y[wrong, None] * x[wrong]).sum(0) / n
        path.append(theta)
    return np.stack(path)


@claim(control={"largest": 1.0})
def reduces_to_perceptron(trial: Trial, largest: float = 1e12) -> Exact:
    """Distance of θ_t / γ from the perceptron's iterate, relative to its size, over all steps to separation."""
    worst = []
    for make in (_one_against_rest, _gaussian):
        x, y = make(trial.rng)
        steps = BatchPerceptron(fit_intercept=False).fit(x, y).n_iter_
        wanted = _perceptron_path(x, y, steps)
        sizes = np.maximum(np.linalg.norm(wanted, axis=1), 1e-300)

        def off(step_size: float, x: Array = x, y: Array = y, wanted: Array = wanted, sizes: Array = sizes) -> float:
            path = _path(LogisticGD, step_size, x, y, len(wanted) - 1)
            return float((np.linalg.norm(path - wanted, axis=1) / sizes).max())

        worst.append(off(largest))
        sweep = [largest * 10.0**-k for k in range(12, -1, -2)]
        trial.figure(
            "digits" if make is _one_against_rest else "gaussian",
            x=sweep,
            y={"largest relative distance": [max(off(step), 1e-17) for step in sweep]},
            xlabel="step size",
            ylabel="distance from the perceptron",
            log="xy",
        )
    return Exact(worst)


# ------------------------------------------------------------------------------------------------------ large steps


def _two_steps(trial: Trial, shrink: bool) -> dict[str, LogisticGD]:
    """Descent with a step that cannot raise the loss, 1 / L, and with a thousand times it, on a digit against the rest."""
    x, y = _one_against_rest(trial.rng)
    stable = 4 * len(x) / float(np.linalg.eigvalsh(x.T @ x)[-1])
    many = trial.pick(smoke=2000, laptop=50_000)
    return {
        "small": _fitted(LogisticGD, stable, x, y, many),
        # shrunk by the root of the step's growth, the features make the large step as small as the other
        "large": _fitted(LogisticGD, 1000 * stable, x / np.sqrt(1000) if shrink else x, y, many),
    }


@claim(control={"shrink": True})
def larger_steps_higher_loss(trial: Trial, shrink: bool = False) -> Paired:
    """Highest logistic loss after the first step, on the way to separation."""
    models = _two_steps(trial, shrink)
    points = [i for i in range(200) if i < min(len(m.loss_curve_) for m in models.values())]
    trial.figure(
        "loss",
        x=points,
        y={f"{name} step": [float(m.loss_curve_[i]) for i in points] for name, m in models.items()},
        xlabel="step",
        ylabel="logistic loss",
        log="y",
    )
    ours, theirs = (float(models[name].loss_curve_[1:].max()) for name in ("large", "small"))
    return Paired(ours=ours, baseline=theirs)


@claim(control={"shrink": True})
def larger_steps_separate_sooner(trial: Trial, shrink: bool = False) -> Ratio:
    """Steps until a digit is separated from the rest."""
    models = _two_steps(trial, shrink)
    return Ratio(ours=models["large"].n_iter_, baseline=models["small"].n_iter_)


# -------------------------------------------------------------------------------------------------- the normalized method


def _two_digits(rng: np.random.Generator) -> tuple[Array, Array]:
    """10 samples of one random digit, labelled 1, and 170 of another, labelled -1."""
    x, labels = _all_digits()
    first, second = rng.choice(10, size=2, replace=False)
    a = rng.choice(np.flatnonzero(labels == first), size=10, replace=False)
    b = rng.choice(np.flatnonzero(labels == second), size=170, replace=False)
    samples = x[np.concatenate([a, b])]
    return samples + 1e-3 * rng.normal(size=samples.shape), np.repeat([1, -1], [len(a), len(b)])


def _tuning(draw: Callable[[np.random.Generator], tuple[Array, Array]]) -> Callable[..., Mapping[str, Any]]:
    """Of four step sizes the one with the fewest steps (geometric mean over ten draws), for either method."""

    def tune(trial: Trial, method: type[LogisticGD] = NormalizedLogisticGD) -> Mapping[str, Any]:
        rng = np.random.default_rng(trial.seed)
        draws = [draw(rng) for _ in range(trial.pick(smoke=1, laptop=10))]
        best = {}
        for name, kind in (("ours", method), ("baseline", LogisticGD)):
            totals = [float(np.mean([np.log(_fitted(kind, step, x, y).n_iter_) for x, y in draws])) for step in STEPS]
            best[name] = STEPS[int(np.argmin(totals))]
        return best

    return tune


def _steps_needed(trial: Trial, method: type[LogisticGD], data: tuple[Array, Array]) -> Ratio:
    ours = _fitted(method, trial.tuned["ours"], *data).n_iter_
    return Ratio(ours=ours, baseline=_fitted(LogisticGD, trial.tuned["baseline"], *data).n_iter_)


def _worst_case(rng: np.random.Generator, n: int = 100) -> tuple[Array, Array]:
    """The data of Theorem 5.1, one sample against n - 1, turned at random and shaken."""
    x = np.array([[0.5, -1.0]] + (n - 1) * [[-0.5, -1.0]]) + 0.01 * rng.normal(size=(n, 2))
    turn, _ = np.linalg.qr(rng.normal(size=(2, 2)))
    return x @ turn, np.array([1] + (n - 1) * [-1])


@claim(control={"method": LogisticGD}, tune=_tuning(_worst_case))
def normalized_on_worst_case(trial: Trial, method: type[LogisticGD] = NormalizedLogisticGD) -> Ratio:
    """Steps until one sample is separated from 99 in the data of Theorem 5.1."""
    return _steps_needed(trial, method, _worst_case(trial.rng))


@claim(control={"method": LogisticGD}, tune=_tuning(_two_digits))
def normalized_on_imbalanced(trial: Trial, method: type[LogisticGD] = NormalizedLogisticGD) -> Ratio:
    """Steps until 10 samples of one digit are separated from 170 of another."""
    return _steps_needed(trial, method, _two_digits(trial.rng))


@claim(control={"method": LogisticGD}, tune=_tuning(_one_against_rest))
def normalized_on_balanced(trial: Trial, method: type[LogisticGD] = NormalizedLogisticGD) -> Ratio:
    """Steps until 50 samples of one digit are separated from 50 of the others."""
    return _steps_needed(trial, method, _one_against_rest(trial.rng))


@claim(control={"method": NormalizedLogisticGD})
def descent_needs_n_steps(trial: Trial, method: type[LogisticGD] = LogisticGD) -> Slope:
    """Steps with γ = 1e6 on the data of Theorem 5.1, against the number of samples."""
    sizes = trial.pick(smoke=(50, 100, 200), laptop=(100, 200, 400, 800, 1600, 3200))
    counts = [_fitted(method, 1e6, x, y).n_iter_ for x, y in (_worst_case(trial.rng, n) for n in sizes)]
    return Slope(x=sizes, y=counts)


@claim(control={"method": LogisticGD})
def normalized_keeps_its_bound(trial: Trial, method: type[LogisticGD] = NormalizedLogisticGD) -> Exact:
    """Share of runs not separated within the bound of Theorem 6.1, with the largest margin from a hard-margin SVM."""
    beyond = []
    for make in (_worst_case, _gaussian):
        for step in (0.1, 1.0, 100.0):
            x, y = _worst_case(trial.rng, 500) if make is _worst_case else _gaussian(trial.rng, 100, 5, 0.3)
            plane = SVC(kernel="linear", C=1e8, tol=1e-6).fit(np.concatenate([x, -x]), np.concatenate([y, -y]))  # through 0
            normal = plane.coef_[0] / np.linalg.norm(plane.coef_[0])
            margin, radius = float((y * (x @ normal)).min()), float(np.linalg.norm(x, axis=1).max())
            bound = int(np.ceil((radius**2 + 2 * np.log(2 * len(y) - 1) / step) / margin**2))
            beyond.append(float(not _fitted(method, step, x, y, bound).separated_.all()))
    return Exact(float(np.mean(beyond)))

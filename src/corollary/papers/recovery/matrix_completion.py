"""How the claims of robust alternating minimization for matrix completion are measured."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from corollary.claims import Exact, Paired, Slope, Trial, claim
from corollary.claims.timing import interleave
from corollary.data import low_rank_matrix, photographs
from corollary.linalg.regression import Csr, ObservedBlocks, solve_rows_exact, solve_rows_refined
from corollary.recovery import MatrixCompletion
from corollary.testing import Case

Array = NDArray[Any]
csr_matrix: Any = sparse.csr_matrix
Model = TypeVar("Model", bound=MatrixCompletion)

CONFORMANCE = {"corollary.recovery.MatrixCompletion": Case(MatrixCompletion)}


def _observe(full: Array, mask: Array) -> Csr:
    return csr_matrix((full[mask], np.nonzero(mask)), shape=full.shape)


def _instance(trial: Trial, size: int, k: int, samples: float) -> tuple[Array, Csr]:
    """An incoherent square matrix of rank k and ``samples`` · n k ln n of its entries, drawn uniformly."""
    full = low_rank_matrix(size, size, k, generator=trial.generator).numpy()
    mask = trial.rng.random(full.shape) < samples * k * np.log(size) / size
    return full, _observe(full, mask)


def _relative_error(model: MatrixCompletion, full: Array) -> float:
    return float(np.linalg.norm(model.inverse_transform(model.embedding_) - full) / np.linalg.norm(full))


def _fit(model: Model, observed: Csr) -> Model:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of iterations is part of the protocol
        model.fit(observed)
    return model


# --- time ---------------------------------------------------------------------------------------------------------------------


class _Dense:
    """Control: the observed entries as a dense matrix and a dense 0-1 weight matrix, for `_solve_dense`."""

    def __init__(self, matrix: Csr, width: int) -> None:
        self.values = matrix.toarray()
        self.weights = np.zeros_like(self.values)
        self.weights[matrix.nonzero()] = 1


def _solve_dense(blocks: _Dense, factor: Array, start: Array) -> Array:
    """The two refinements of ``_REFINED``, preconditioned alike, with products over all entries."""
    basis = np.linalg.cholesky(np.linalg.inv(factor.T @ factor))
    white, y = factor @ basis, start @ np.linalg.inv(basis).T
    residual = blocks.values - blocks.weights * (y @ white.T)
    direction, before = np.zeros_like(y), 1.0
    for step in range(2):
        gradient = residual @ white
        now = (gradient**2).sum(1)
        direction = gradient + (now / before if step else 0 * now)[:, None] * direction
        moved = blocks.weights * (direction @ white.T)
        length = now / np.maximum((moved**2).sum(1), 1e-300)
        y = y + length[:, None] * direction
        residual -= length[:, None] * moved
        before = np.maximum(now, 1e-300)
    return np.asarray(y @ basis.T)


_REFINED = partial(solve_rows_refined, tol=MatrixCompletion().inner_tol, max_iter=MatrixCompletion().max_inner_iter)


def _iteration_seconds(trial: Trial, sizes: list[tuple[int, int, int]], solver: str) -> tuple[list[int], list[float]]:
    """Observed entries and median seconds of one iteration (both turns) at each (n, entries a row, k), interleaved."""
    cases, observed = {}, []
    for n, each, k in sizes:
        u, v = trial.rng.normal(size=(n, k)), trial.rng.normal(size=(n, k))
        rows = np.repeat(np.arange(n), each)
        columns = np.argpartition(trial.rng.random((n, n)), each - 1, axis=1)[:, :each].ravel()
        values = np.concatenate([(v[columns[i : i + each]] @ u[i // each]) for i in range(0, n * each, each)])
        x = csr_matrix((values, (rows, columns)), shape=(n, n))
        x.sort_indices()
        # as in the middle of a run: the factors are a tenth away from the truth
        u += 0.1 * trial.rng.normal(size=u.shape)
        v += 0.1 * trial.rng.normal(size=v.shape)
        make = _Dense if solver == "dense" else ObservedBlocks
        observed.append(x.nnz)
        cases[f"{n}-{each}-{k}"] = partial(_turns, solver, make(x, k), make(x.T.tocsr(), k), u, v)
    with threadpool_limits(1):  # growth is of work: threads would serve large sizes and burden small ones
        seconds = interleave(cases, rounds=trial.pick(smoke=1, laptop=3), min_seconds=trial.pick(smoke=0.0, laptop=0.03))
    return observed, list(seconds.values())


def _turns(solver: str, rows: Any, columns: Any, u: Array, v: Array) -> None:
    if solver == "exact":
        solve_rows_exact(rows, solve_rows_exact(columns, u)[0])
    elif solver == "dense":
        _solve_dense(rows, _solve_dense(columns, u, v), u)
    else:
        _REFINED(rows, _REFINED(columns, u, v)[0], u)


@claim(control={"solver": "exact"})
def time_linear_in_rank(trial: Trial, solver: str = "sketched") -> Slope:
    """Seconds of an iteration against k, at one set of observed entries."""
    n, each = trial.pick(smoke=(80, 60), laptop=(640, 560))
    ranks = trial.pick(smoke=[2, 4, 8], laptop=[14, 35, 70, 140])
    _, seconds = _iteration_seconds(trial, [(n, each, k) for k in ranks], solver)
    trial.figure("time", x=ranks, y={solver: seconds}, xlabel="rank k", ylabel="seconds an iteration", log="xy")
    return Slope(ranks, seconds)


@claim(control={"solver": "dense"})
def time_linear_in_observed(trial: Trial, solver: str = "sketched") -> Slope:
    """Seconds of an iteration against the observed entries, at one rank and as many entries in every row."""
    each, k = trial.pick(smoke=(16, 2), laptop=(128, 16))
    sizes = trial.pick(smoke=[40, 80, 160], laptop=[300, 600, 1200, 3000])
    observed, seconds = _iteration_seconds(trial, [(n, each, k) for n in sizes], solver)
    trial.figure("time", x=observed, y={solver: seconds}, xlabel="observed entries", ylabel="seconds an iteration", log="xy")
    return Slope(observed, seconds)


# --- recovery -----------------------------------------------------------------------------------------------------------------


class _Unrefined(MatrixCompletion):
    """Control: the shared preconditioner stands for the inverse of every row's system."""

    def _update(self, blocks: ObservedBlocks, factor: Array, start: Array) -> tuple[Array, float]:
        return solve_rows_refined(blocks, factor, None, alpha=self.alpha, max_iter=1)


class _SketchAndSolve(MatrixCompletion):
    """Control: each regression is sketched to 4 k equations and solved once."""

    def _update(self, blocks: ObservedBlocks, factor: Array, start: Array) -> tuple[Array, float]:
        return solve_rows_refined(
            blocks, factor, None, alpha=self.alpha, preconditioner="row", oversampling=4, max_iter=0, generator=self._generator
        )


@claim(control={"method": _Unrefined})
def recovers_at_near_optimal_sampling(trial: Trial, method: type[MatrixCompletion] = MatrixCompletion) -> Exact:
    """Relative Frobenius error of the whole matrix."""
    size, k = trial.pick(smoke=(150, 2), laptop=(600, 8), full=(4000, 16))
    full, observed = _instance(trial, size, k, samples=1.0)
    model = _fit(method(k, tol=0, max_iter=50, random_state=trial.seed % 2**32), observed)
    trial.log(observed=observed.nnz, degrees_of_freedom=2 * size * k - k * k, observed_residual=float(model.loss_curve_[-1]))
    steps = range(1, len(model.loss_curve_) + 1)
    curve = {"observed entries": np.maximum(model.loss_curve_, 1e-17).tolist()}
    trial.figure("convergence", x=steps, y=curve, xlabel="iteration", ylabel="root mean squared residual", log="y")
    return Exact(_relative_error(model, full))


_PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")
_RIDGES = (0.1, 0.3, 1.0)


def _missing_pixels(method: type[MatrixCompletion], ridge: float, rng: np.random.Generator, names: Any, **kwargs: Any) -> float:
    """Mean over photographs of the error on the 70% of pixels that were left out."""
    errors = []
    pictures = photographs()
    for name in names:
        grey = pictures[name].mean(0).numpy().astype(np.float64)
        mask = rng.random(grey.shape) < 0.3
        model = _fit(method(10, alpha=ridge, tol=0, max_iter=10, random_state=0, **kwargs), _observe(grey, mask))
        errors.append(-model.score(_observe(grey, ~mask)))
    return float(np.mean(errors))


def _tune_ridge(trial: Trial, method: type[MatrixCompletion] = MatrixCompletion) -> Mapping[str, Any]:
    """The ridge of each method on masks that no trial draws: the same values, the same masks."""
    seed = int(trial.rng.integers(2**32))
    sides: dict[str, dict[str, Any]] = {"ours": {"method": method}, "exact": {"method": MatrixCompletion, "solver": "exact"}}
    best = {}
    for side, kwargs in sides.items():
        errors = [_missing_pixels(ridge=r, rng=np.random.default_rng(seed), names=_PHOTOGRAPHS[:2], **kwargs) for r in _RIDGES]
        best[side] = _RIDGES[int(np.argmin(errors))]
    return best


@claim(control={"method": _SketchAndSolve}, tune=_tune_ridge)
def matches_exact_on_photographs(trial: Trial, method: type[MatrixCompletion] = MatrixCompletion) -> Paired:
    """Error on missing pixels, approximate updates against exact ones on the same masks."""
    names = trial.pick(smoke=_PHOTOGRAPHS[1:2], laptop=_PHOTOGRAPHS, full=tuple(photographs()))
    ridge = {"ours": 0.3, "exact": 0.3, **trial.tuned}
    ours = _missing_pixels(method, ridge["ours"], np.random.default_rng(trial.seed), names)
    exact = _missing_pixels(MatrixCompletion, ridge["exact"], np.random.default_rng(trial.seed), names, solver="exact")
    return Paired(ours, exact)


# --- tolerance of error -------------------------------------------------------------------------------------------------------


class _Perturbed(MatrixCompletion):
    """Each row of each update is moved in a random direction, by ``rate`` times the step that it took."""

    rate = 0.5

    def _size(self, solution: Array, start: Array) -> Array:
        return np.asarray(np.linalg.norm(solution - start, axis=1, keepdims=True))

    def _update(self, blocks: ObservedBlocks, factor: Array, start: Array) -> tuple[Array, float]:
        solution, squared = super()._update(blocks, factor, start)
        noise = torch.randn(solution.shape, generator=self._generator, dtype=torch.float64).numpy()
        noise /= np.linalg.norm(noise, axis=1, keepdims=True)
        return solution + self.rate * self._size(solution, start) * noise, squared


class _PerturbedForever(_Perturbed):
    """Control: moved by ``rate`` times the row's own norm, however near the truth it is."""

    def _size(self, solution: Array, start: Array) -> Array:
        return np.asarray(np.linalg.norm(solution, axis=1, keepdims=True))


@claim(control={"method": _PerturbedForever})
def tolerates_update_error(trial: Trial, method: type[_Perturbed] = _Perturbed) -> Exact:
    """Relative Frobenius error of the whole matrix after perturbed updates."""
    size, k = trial.pick(smoke=(150, 2), laptop=(600, 8), full=(4000, 16))
    full, observed = _instance(trial, size, k, samples=1.5)
    model = _fit(method(k, tol=0, max_iter=60, inner_tol=0.5, random_state=trial.seed % 2**32), observed)
    curve = {"observed entries, before the perturbation": np.maximum(model.loss_curve_, 1e-17).tolist()}
    steps = range(1, len(model.loss_curve_) + 1)
    trial.figure("convergence", x=steps, y=curve, xlabel="iteration", ylabel="root mean squared residual", log="y")
    return Exact(_relative_error(model, full))

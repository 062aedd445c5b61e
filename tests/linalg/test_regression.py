"""The row regressions against numpy's lstsq, one row at a time in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from corollary.linalg.regression import ObservedBlocks, solve_rows_exact, solve_rows_refined


def problem(seed=0, m=40, n=60, k=4, density=0.3, noise=0.1, dtype=np.float64):
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(n, k))
    dense = rng.normal(size=(m, k)) @ factor.T + noise * rng.normal(size=(m, n))
    mask = rng.random((m, n)) < density * rng.random((m, 1)) * 2
    mask[0] = False
    mask[1] = True
    rows, columns = np.nonzero(mask)
    return sparse.csr_matrix((dense[mask].astype(dtype), (rows, columns)), shape=(m, n)), factor.astype(dtype)


def oracle(x, factor, alpha=0.0):
    """numpy's minimum-norm least squares on each row's augmented system."""
    k = factor.shape[1]
    out = np.zeros((x.shape[0], k))
    for i in range(x.shape[0]):
        columns = x.indices[x.indptr[i] : x.indptr[i + 1]]
        values = x.data[x.indptr[i] : x.indptr[i + 1]]
        if len(columns):
            a = np.vstack([factor[columns], np.sqrt(alpha) * np.eye(k)])
            out[i] = np.linalg.lstsq(a, np.concatenate([values, np.zeros(k)]), rcond=None)[0]
    return out


def squared_residual(x, solution, factor):
    rows, columns = x.nonzero()
    return float(((np.asarray(x[rows, columns]).ravel() - np.einsum("ek,ek->e", solution[rows], factor[columns])) ** 2).sum())


SOLVERS = {
    "exact": solve_rows_exact,
    "shared": lambda b, v, alpha: solve_rows_refined(b, v, alpha=alpha, tol=1e-12, max_iter=200),
    "row": lambda b, v, alpha: solve_rows_refined(
        b, v, alpha=alpha, tol=1e-12, max_iter=200, preconditioner="row", oversampling=4
    ),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("alpha", [0.01, 1.0])
@pytest.mark.parametrize("block_bytes", [1, 5000, 1 << 20])
def test_against_lstsq(solver, alpha, block_bytes):
    x, factor = problem()
    solution, squared = SOLVERS[solver](ObservedBlocks(x, 4, block_bytes), factor, alpha=alpha)
    np.testing.assert_allclose(solution, oracle(x, factor, alpha), atol=1e-8)
    assert squared == pytest.approx(squared_residual(x, solution, factor))
    assert (solution[0] == 0).all()  # the row that observes nothing


@pytest.mark.parametrize("solver", SOLVERS)
def test_without_ridge(solver):
    x, factor = problem(density=0.9)
    enough = np.diff(x.indptr) >= 6
    solution, _ = SOLVERS[solver](ObservedBlocks(x, 4), factor, alpha=0.0)
    np.testing.assert_allclose(solution[enough], oracle(x, factor)[enough], atol=1e-7)


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_with_fewer_entries_than_columns_are_fitted(solver):
    x, factor = problem(density=0.05, k=12, n=80)
    assert (np.diff(x.indptr) < 12).any()
    solution, squared = SOLVERS[solver](ObservedBlocks(x, 12), factor, alpha=0.0)
    assert np.isfinite(solution).all()
    assert squared == pytest.approx(squared_residual(x, oracle(x, factor), factor), abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), density=st.floats(0.0, 1.0), alpha=st.floats(1e-3, 10.0), k=st.integers(1, 8))
def test_solvers_agree(seed, density, alpha, k):
    x, factor = problem(seed, m=15, n=20, k=k, density=density)
    blocks = ObservedBlocks(x, k, 3000)
    exact, _ = solve_rows_exact(blocks, factor, alpha=alpha)
    for preconditioner in ("shared", "row"):
        refined, _ = solve_rows_refined(blocks, factor, alpha=alpha, preconditioner=preconditioner, tol=1e-11, max_iter=100)
        np.testing.assert_allclose(refined, exact, atol=1e-6)


def test_blocks_hold_every_entry_once_with_little_padding():
    x, _ = problem(m=300, n=200)
    blocks = ObservedBlocks(x, 4, 20_000).blocks
    seen = sparse.lil_matrix(x.shape)
    for block in blocks:
        for row, columns, values in zip(block.rows, block.columns, block.values, strict=True):
            for column, value in zip(columns, values, strict=True):
                if column < x.shape[1]:
                    assert seen[row, column] == 0
                    seen[row, column] = value
    assert abs(seen.tocsr() - x).max() == 0
    assert sum(block.columns.size for block in blocks) < 1.125 * x.nnz


def test_stored_zeros_count():
    x = sparse.csr_matrix((np.array([0.0, 0.0, 3.0]), ([0, 0, 0], [0, 1, 2])), shape=(1, 3))
    solution, _ = solve_rows_exact(ObservedBlocks(x, 1), np.ones((3, 1)))
    assert solution[0, 0] == pytest.approx(1.0)


def test_ill_conditioned_factor_needs_no_more_refinements():
    """The whitening takes the factor's condition number out of the iteration count."""
    x, factor = problem(density=0.9)
    stretched = factor * np.array([1e3, 1e1, 1.0, 1e-1])
    blocks = ObservedBlocks(x, 4)
    enough = np.diff(x.indptr) >= 20
    plain, _ = solve_rows_refined(blocks, factor, tol=0, max_iter=4)
    hard, _ = solve_rows_refined(blocks, stretched, tol=0, max_iter=4)
    np.testing.assert_allclose((hard @ stretched.T)[enough], (plain @ factor.T)[enough], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preconditioner", ["shared", "row"])
def test_tolerance_bounds_the_error(preconditioner):
    x, factor = problem(m=200, n=400, k=6, density=0.5)
    keep = np.diff(x.indptr) > 60
    blocks = ObservedBlocks(x, 6)
    exact, _ = solve_rows_exact(blocks, factor)
    start = exact + np.random.default_rng(0).normal(size=exact.shape)
    refined, _ = solve_rows_refined(blocks, factor, start, tol=0.1, preconditioner=preconditioner)
    before, after = (np.linalg.norm((s - exact)[keep], axis=1) for s in (start, refined))
    assert (after < 0.3 * before).all()


def test_no_refinement_gives_the_start_or_the_sketched_solution():
    x, factor = problem()
    blocks = ObservedBlocks(x, 4)
    start = np.random.default_rng(0).normal(size=(40, 4))
    same, _ = solve_rows_refined(blocks, factor, start, max_iter=0)
    some = np.diff(x.indptr) > 0
    np.testing.assert_allclose(same[some], start[some], atol=1e-12)
    # on noiseless data every nonsingular sketched system has the exact solution
    clean, factor = problem(noise=0.0, density=0.9)
    once, _ = solve_rows_refined(ObservedBlocks(clean, 4), factor, max_iter=0, preconditioner="row", oversampling=4)
    enough = np.diff(clean.indptr) >= 20
    np.testing.assert_allclose(once[enough], oracle(clean, factor)[enough], atol=1e-8)


def test_seeded_and_float32():
    x, factor = problem(n=300, dtype=np.float32)
    blocks = ObservedBlocks(x, 4)
    a, b = (solve_rows_refined(blocks, factor, generator=torch.Generator().manual_seed(7))[0] for _ in range(2))
    assert a.dtype == np.float32
    assert (a == b).all()
    exact, _ = solve_rows_exact(blocks, factor, alpha=0.1)
    refined, _ = solve_rows_refined(blocks, factor, alpha=0.1, tol=1e-6, max_iter=100)
    np.testing.assert_allclose(refined, exact, atol=1e-3)


def test_bad_input():
    x, factor = problem()
    blocks = ObservedBlocks(x, 4)
    with pytest.raises(ValueError, match=r"'factor' must have shape \(60, k\), not \(59, 4\)"):
        solve_rows_exact(blocks, factor[1:])
    with pytest.raises(TypeError, match=r"'factor' must have the matrix's dtype float64, not float32"):
        solve_rows_refined(blocks, factor.astype(np.float32))
    with pytest.raises(ValueError, match=r"'start' must have shape \(40, 4\), not \(40, 3\)"):
        solve_rows_refined(blocks, factor, np.zeros((40, 3)))
    with pytest.raises(ValueError, match="'preconditioner' is 'none'; allowed: 'shared', 'row'"):
        solve_rows_refined(blocks, factor, preconditioner="none")

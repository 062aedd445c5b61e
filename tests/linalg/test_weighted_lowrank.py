"""The weighted low-rank problem against whitening written out, and against gradient-free perturbations of its own answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from corollary.linalg import weighted_low_rank


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size: int, seed: int) -> Tensor:
    x = draw(3 * size, size, seed=seed) * torch.logspace(0, -2, size, dtype=torch.float64)
    return x.T @ x / len(x)


def root(c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, vectors = np.linalg.eigh(c)
    return vectors @ np.diag(np.sqrt(values)), np.diag(1 / np.sqrt(values)) @ vectors.T


def by_whitening(m: Tensor, rank: int, c: Tensor | None = None, g: Tensor | None = None) -> tuple[np.ndarray, float]:
    """Whiten both sides, cut the singular values, and undo the whitening by the inverse: the textbook's way."""
    matrix = m.numpy()
    right, right_inverse = root(c.numpy()) if c is not None else (np.eye(m.shape[1]),) * 2
    left, left_inverse = root(g.numpy()) if g is not None else (np.eye(m.shape[0]),) * 2
    u, s, vh = np.linalg.svd(left.T @ matrix @ right, full_matrices=False)
    cut = u[:, :rank] @ np.diag(s[:rank]) @ vh[:rank]
    return left_inverse.T @ cut @ right_inverse, float((s[rank:] ** 2).sum())


@pytest.mark.parametrize(("m", "n"), [(7, 5), (5, 7), (6, 6), (1, 4), (4, 1)])
@pytest.mark.parametrize("sides", ["none", "inputs", "outputs", "both"])
def test_equals_whitening(m: int, n: int, sides: str) -> None:
    matrix = draw(m, n, seed=m)
    c = moment(n, 1) if sides in ("inputs", "both") else None
    g = moment(m, 2) if sides in ("outputs", "both") else None
    solution = weighted_low_rank(matrix, c, g)
    for rank in range(1, min(m, n) + 1):
        b, a = solution.factors(rank)
        true, error = by_whitening(matrix, rank, c, g)
        np.testing.assert_allclose((b @ a).numpy(), true, atol=1e-7)
        assert float(solution.errors()[rank]) == pytest.approx(error, abs=1e-10)
        assert b.shape == (m, rank)
        assert a.shape == (rank, n)
        torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1))


def test_a_diagonal_moment_is_the_same_as_its_matrix() -> None:
    matrix, c, g = draw(6, 5), draw(5, seed=1).square() + 0.1, draw(6, seed=2).square() + 0.1
    short, long = weighted_low_rank(matrix, c, g), weighted_low_rank(matrix, c.diag(), g.diag())
    torch.testing.assert_close(short.energy, long.energy)
    for ours, true in zip(short.factors(2), long.factors(2), strict=True):
        torch.testing.assert_close(ours, true)


@pytest.mark.parametrize("shape", [(8, 5), (5, 8)])
def test_the_mean_is_taken_off(shape: tuple[int, int]) -> None:
    """Principal components of the outputs, by numpy's own covariance of data."""
    m, n = shape
    matrix, x = draw(m, n), draw(50, n, seed=1) + 3.0
    solution = weighted_low_rank(matrix, x.T @ x / 50, mean=x.mean(0))
    y = (x @ matrix.T).numpy()
    values = np.linalg.eigvalsh(np.cov(y.T, bias=True))[::-1]
    np.testing.assert_allclose(solution.energy.numpy(), values[: min(m, n)], atol=1e-9)
    b, a = solution.factors(2)
    centred = x - x.mean(0)
    left = (centred @ (matrix - b @ a).T).square().sum(1).mean()
    assert float(left) == pytest.approx(float(solution.errors()[2]), rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(2, 6))
def test_no_neighbour_is_better(seed: int, m: int, n: int) -> None:
    """Optimality itself: no rank-r matrix near the answer, and no other cut of the matrix, has a smaller error."""
    matrix, c, g = draw(m, n, seed=seed), moment(n, seed + 1), moment(m, seed + 2)
    rank = 1 + seed % min(m, n)
    solution = weighted_low_rank(matrix, c, g)
    b, a = solution.factors(rank)

    def error(p: Tensor, q: Tensor) -> float:
        delta = matrix - p @ q
        return float((g @ delta @ c @ delta.T).trace())

    best = error(b, a)
    assert best == pytest.approx(float(solution.errors()[rank]), rel=1e-6, abs=1e-12)
    for i in range(4):
        step = 10.0 ** -(1 + i)
        other = error(b + step * draw(*b.shape, seed=seed + 3 + i), a + step * draw(*a.shape, seed=seed + 9 + i))
        assert other >= best - 1e-9 * abs(best) - 1e-12
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    assert error(u[:, :rank] * s[:rank], vh[:rank]) >= best - 1e-9


def test_inputs_that_never_occurred_leave_the_rest_exact() -> None:
    matrix = draw(6, 8)
    x = draw(40, 3, seed=1) @ draw(3, 8, seed=2)
    b, a = weighted_low_rank(matrix, x.T @ x / 40, damping=1e-9).factors(3)
    torch.testing.assert_close(x @ (b @ a).T, x @ matrix.T, atol=1e-5, rtol=0)


def test_a_matrix_of_zeros() -> None:
    solution = weighted_low_rank(torch.zeros(3, 4), torch.eye(4))
    b, a = solution.factors(2)
    assert not solution.energy.any()
    assert not (b @ a).any()
    assert b.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((torch.ones(2, 2, dtype=torch.int64),), {}, TypeError, "int64"),
        (([[1.0]],), {}, TypeError, "list"),
        ((torch.ones(2),), {}, ValueError, r"\(2,\)"),
        ((torch.ones(0, 2),), {}, ValueError, "0, 2"),
        ((torch.full((2, 2), torch.nan),), {}, ValueError, "NaN"),
        ((torch.ones(2, 3), torch.eye(2)), {}, ValueError, r"\(3, 3\)"),
        ((torch.ones(2, 3), torch.eye(3), torch.eye(3)), {}, ValueError, r"\(2, 2\)"),
        ((torch.ones(2, 3), torch.ones(3, dtype=torch.int64)), {}, TypeError, "int64"),
        ((torch.ones(2, 3), -torch.eye(3)), {}, ValueError, "no second moment"),
        ((torch.ones(2, 3), torch.full((3,), torch.inf)), {}, ValueError, "finite"),
        ((torch.ones(2, 3), None, torch.zeros(2, 2)), {}, ValueError, "damping"),
        ((torch.ones(2, 3), None, torch.zeros(2)), {}, ValueError, "damping"),
        ((torch.ones(2, 3),), {"damping": -1.0}, ValueError, "-1"),
        ((torch.ones(2, 3),), {"mean": torch.ones(3)}, ValueError, "needs 'inputs'"),
        ((torch.ones(2, 3), torch.eye(3)), {"mean": torch.ones(2)}, ValueError, r"\(3,\)"),
    ],
)
def test_bad_input(arguments: tuple, options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        weighted_low_rank(*arguments, **options)


@pytest.mark.parametrize("rank", [0, 4])
def test_bad_rank(rank: int) -> None:
    with pytest.raises(ValueError, match=f"not {rank}"):
        weighted_low_rank(torch.ones(3, 5)).factors(rank)

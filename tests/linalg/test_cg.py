"""Conjugate gradients against dense solves in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from corollary.linalg import conjugate_gradient


def _matrix(n: int, seed: int, *, low: float = 0.1, high: float = 10.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q
    return q @ torch.diag(torch.linspace(low, high, n, dtype=torch.float64)) @ q.T


@given(n=st.integers(1, 30), k=st.integers(0, 4), shift=st.floats(0, 5), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_it_solves_what_a_dense_solver_solves(n: int, k: int, shift: float, seed: int) -> None:
    matrix = _matrix(n, seed)
    generator = torch.Generator().manual_seed(seed)
    rhs = torch.randn(*((n, k) if k else (n,)), dtype=torch.float64, generator=generator)
    result = conjugate_gradient(matrix, rhs, shift=shift, rtol=1e-12)
    wanted = torch.linalg.solve(matrix + shift * torch.eye(n, dtype=torch.float64), rhs)
    torch.testing.assert_close(result.solution, wanted, rtol=1e-9, atol=1e-9)
    assert result.converged
    assert not result.negative_curvature
    assert result.iterations <= 2 * n + 2


def test_a_column_by_itself_gives_the_same_as_among_others() -> None:
    matrix = _matrix(12, 0)
    rhs = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rhs[:, 1] = 0  # done before it begins
    together = conjugate_gradient(matrix, rhs, rtol=1e-8)
    for j in range(3):
        alone = conjugate_gradient(matrix, rhs[:, j], rtol=1e-8)
        torch.testing.assert_close(together.solution[:, j], alone.solution, rtol=1e-10, atol=1e-12)
    assert together.residual.shape == (3,)


def test_few_distinct_eigenvalues_need_as_few_products() -> None:
    matrix = torch.diag(torch.tensor([1.0, 1, 1, 5, 5, 9, 9, 9], dtype=torch.float64))
    result = conjugate_gradient(matrix, torch.ones(8, dtype=torch.float64), rtol=1e-12)
    assert result.iterations == 3


def test_the_exact_inverse_as_preconditioner_needs_one_product() -> None:
    matrix = _matrix(10, 3, low=1e-4, high=1e3)
    inverse = torch.linalg.inv(matrix + 0.5 * torch.eye(10, dtype=torch.float64))
    rhs = torch.ones(10, 2, dtype=torch.float64)
    result = conjugate_gradient(matrix, rhs, shift=0.5, preconditioner=lambda v: inverse @ v, rtol=1e-9)
    assert result.iterations == 1
    torch.testing.assert_close(result.solution, inverse @ rhs)


def test_the_residual_it_reports_is_the_true_one_and_a_start_is_used() -> None:
    matrix = _matrix(20, 4)
    rhs = torch.ones(20, dtype=torch.float64)
    rough = conjugate_gradient(matrix, rhs, max_iter=5)
    assert not rough.converged
    assert rough.iterations == 5
    torch.testing.assert_close(rough.residual, (rhs - matrix @ rough.solution).norm())
    again = conjugate_gradient(matrix, rhs, x0=rough.solution, rtol=1e-10)
    torch.testing.assert_close(again.solution, torch.linalg.solve(matrix, rhs), rtol=1e-8, atol=1e-8)
    assert conjugate_gradient(matrix, rhs, x0=again.solution, rtol=1e-6).iterations == 0


def test_negative_curvature_is_reported_and_not_followed() -> None:
    matrix = torch.diag(torch.tensor([2.0, -1.0], dtype=torch.float64))
    result = conjugate_gradient(matrix, torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
    assert result.negative_curvature
    assert not result.converged
    torch.testing.assert_close(result.solution[:, 0], torch.tensor([0.5, 0.0], dtype=torch.float64))
    assert (result.solution[:, 1] == 0).all()
    assert conjugate_gradient(matrix, torch.ones(2, dtype=torch.float64), shift=2.0).converged


def test_a_nan_in_one_column_leaves_the_others_alone() -> None:
    matrix = _matrix(6, 5)
    rhs = torch.ones(6, 2, dtype=torch.float64)
    rhs[2, 0] = torch.nan
    result = conjugate_gradient(matrix, rhs, rtol=1e-10)
    assert not result.converged
    torch.testing.assert_close(result.solution[:, 1], torch.linalg.solve(matrix, rhs[:, 1]))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((torch.ones(2, 3), torch.ones(2)), {}, ValueError, "'operator' must be square"),
        ((torch.eye(2), torch.ones(3)), {}, ValueError, r"'rhs' must be \(2,\) or \(2, k\), not \(3,\)"),
        ((torch.eye(2), torch.ones(2, dtype=torch.int64)), {}, TypeError, "floating point, not torch.int64"),
        ((torch.eye(2), torch.ones(2)), {"x0": torch.ones(2, 1)}, ValueError, "'x0' has shape"),
        ((torch.eye(2), torch.ones(2)), {"rtol": -1}, ValueError, "'rtol' and 'atol' must be at least 0"),
        ((torch.eye(2), torch.ones(2)), {"max_iter": 0}, ValueError, "'max_iter' must be at least 1"),
    ],
)
def test_bad_input_is_named(arguments: Any, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        conjugate_gradient(*arguments, **options)

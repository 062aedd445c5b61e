"""Curvature operators and Hutchinson's diagonal against dense Hessians, closed forms and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from corollary.linalg import HessianOperator, hessian_vector_product, hutchinson_diagonal, rademacher_like


def _network(seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()
    x, y = torch.randn(6, 1, 4, 4, dtype=torch.float64), torch.randint(3, (6,))
    return net, nn.functional.cross_entropy(net(x), y)


def test_the_operator_equals_the_hessian_of_central_differences() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    params = list(net.parameters())

    def gradient() -> np.ndarray:
        parts = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), params)
        return torch.cat([p.reshape(-1) for p in parts]).numpy()

    columns = []
    for p in params:
        for i in range(p.numel()):
            sides = []
            for shift in (1e-5, -2e-5):
                with torch.no_grad():
                    p.view(-1)[i] += shift
                sides.append(gradient())
            with torch.no_grad():
                p.view(-1)[i] += 1e-5
            columns.append((sides[0] - sides[1]) / 2e-5)
    hessian = HessianOperator(nn.functional.cross_entropy(net(x), y), params)
    np.testing.assert_allclose(hessian.dense().numpy(), np.stack(columns, axis=1), atol=1e-8)


def test_vector_and_matrix_products_agree_whatever_the_chunk() -> None:
    net, loss = _network()
    hessian = HessianOperator(loss, net.parameters(), chunk=3)
    vectors = torch.randn(hessian.shape[0], 7, dtype=torch.float64)
    one_by_one = torch.stack([hessian @ v for v in vectors.T], dim=1)
    torch.testing.assert_close(hessian @ vectors, one_by_one, rtol=1e-10, atol=1e-12)
    dense = hessian.dense()
    torch.testing.assert_close(dense, dense.T, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(dense @ vectors, one_by_one, rtol=1e-8, atol=1e-12)
    assert (hessian @ vectors[:, :0]).shape == (hessian.shape[0], 0)


def test_the_gradient_comes_with_the_operator() -> None:
    net, loss = _network()
    hessian = HessianOperator(loss, net.parameters())
    wanted = torch.autograd.grad(loss, list(net.parameters()))
    torch.testing.assert_close(hessian.gradient(), torch.cat([g.reshape(-1) for g in wanted]))
    assert not hessian.gradient().requires_grad


def test_linear_and_unused_parameters_have_zero_rows() -> None:
    a, b, c = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    hessian = HessianOperator((a**3).sum() + b.sum(), [a, b, c])
    assert hessian.dense().diag().tolist() == [6, 6, 0, 0, 0, 0]
    flat = HessianOperator(b.sum(), [b])
    assert (flat @ torch.ones(2)).tolist() == [0, 0]
    assert (flat @ torch.ones(2, 3)).tolist() == [[0, 0, 0]] * 2


@given(n=st.integers(1, 12), seed=st.integers(0, 2**31 - 1))
@settings(max_examples=40, deadline=None)
def test_one_rademacher_probe_gets_a_diagonal_matrix_right(n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    diagonal = torch.randn(n, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(hutchinson_diagonal(torch.diag(diagonal), 1, generator=generator), diagonal)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_the_variance_is_the_one_of_theory(probe: str) -> None:
    """Var = Σ_{j≠i} A_ij² / n for Rademacher probes, and 2 A_ii² / n more for Gaussian ones."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(8, 8, dtype=torch.float64, generator=generator)
    matrix = raw + raw.T
    estimates = torch.stack([hutchinson_diagonal(matrix, 4, probe=probe, generator=generator) for _ in range(6000)])
    square = matrix**2
    wanted = (square.sum(1) - square.diag()) / 4 + (2 * square.diag() / 4 if probe == "gaussian" else 0)
    assert ((estimates.mean(0) - matrix.diag()).abs() < 5 * (wanted / 6000).sqrt()).all()
    torch.testing.assert_close(estimates.var(0), wanted, rtol=0.15, atol=0)


def test_chunks_do_not_change_how_many_probes_are_drawn() -> None:
    matrix = torch.ones(3, 3, dtype=torch.float64)
    few = hutchinson_diagonal(matrix, 5000, chunk=7, generator=torch.Generator().manual_seed(0))
    assert (few - 1).abs().max() < 0.1


def test_rademacher_probes_repeat_and_do_not_correlate() -> None:
    shapes = [torch.zeros(1000), torch.zeros(30, 40), torch.zeros(500, dtype=torch.float64), torch.zeros(0, 3)]
    one, again, other = (rademacher_like(shapes, seed) for seed in (1, 1, 2))
    for a, b, c, like in zip(one, again, other, shapes, strict=True):
        assert a.shape == like.shape
        assert a.dtype == like.dtype
        assert torch.equal(a, b)
        if a.numel():
            assert set(a.unique().tolist()) == {-1.0, 1.0}
            assert abs(float((a * c).mean())) < 5 / a.numel() ** 0.5
    assert abs(float((one[0][:500] * one[2]).mean())) < 5 / 500**0.5


def test_near_seeds_are_independent() -> None:
    """torch's CPU generator keeps 32 bits of a seed: steps of one run, and steps of two runs, must not meet."""
    draws = torch.stack(
        [rademacher_like([torch.zeros(64)], (run << 32) + (step << 8))[0] for run in range(8) for step in range(64)]
    )
    assert len({tuple(d.tolist()) for d in draws}) == len(draws)
    correlation = draws @ draws.T / 64 - torch.eye(len(draws))
    assert abs(float(correlation.mean())) < 0.005


def test_bad_input_is_named() -> None:
    x = torch.ones(2, requires_grad=True)
    loss = (x**2).sum()
    for words, call in (
        ("'params' is empty", lambda: HessianOperator(loss, [])),
        ("'loss' must be a scalar, not of shape", lambda: HessianOperator(x**2, [x])),
        ("'chunk' must be at least 1, not 0", lambda: HessianOperator(loss, [x], chunk=0)),
        ("'params' must share one dtype", lambda: HessianOperator(loss, [x, torch.ones(1, dtype=torch.float64)])),
        (r"'vectors' must be \(2,\) or \(2, k\), not \(3,\)", lambda: HessianOperator(loss, [x]) @ torch.ones(3)),
        ("one tensor for each parameter", lambda: hessian_vector_product([], [x], [x])),
        (r"'vectors\[0\]' has shape \(3,\)", lambda: hessian_vector_product([x], [x], [torch.ones(3)])),
        ("'operator' must be square", lambda: hutchinson_diagonal(torch.ones(2, 3), 1)),
        ("'samples' and 'chunk' must be at least 1, not 0", lambda: hutchinson_diagonal(torch.eye(2), 0)),
        ("'probe' is 'uniform'; allowed: rademacher, gaussian", lambda: hutchinson_diagonal(torch.eye(2), 1, probe="uniform")),
    ):
        with pytest.raises(ValueError, match=words):
            call()

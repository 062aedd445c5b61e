"""The empirical Fisher operator and what its inverse is made from, against dense matrices and loops over samples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from corollary.linalg import EmpiricalFisherOperator, SymmetricOperator, hutchinson_diagonal, per_sample_gradients
from corollary.linalg import fisher as module
from corollary.linalg.fisher import column_chunks, damped_cholesky, gram_matrix


def _rows(m: int = 5, n: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(m=st.integers(1, 6), n=st.integers(1, 9), damp=st.floats(0, 10), seed=st.integers(0, 2**31 - 1))
@settings(max_examples=30, deadline=None)
def test_the_operator_is_the_sum_of_outer_products(m: int, n: int, damp: float, seed: int) -> None:
    rows = _rows(m, n, seed)
    dense = damp * torch.eye(n, dtype=torch.float64) + sum(torch.outer(g, g) for g in rows) / m
    operator: SymmetricOperator = EmpiricalFisherOperator(rows, damp=damp)
    assert operator.shape == (n, n)
    assert (operator.dtype, operator.device) == (rows.dtype, rows.device)
    vectors = _rows(n, 3, seed + 1)
    torch.testing.assert_close(operator @ vectors, dense @ vectors)
    torch.testing.assert_close(operator @ vectors[:, 0], dense @ vectors[:, 0])
    torch.testing.assert_close(EmpiricalFisherOperator(rows, damp=damp).dense(), dense)
    torch.testing.assert_close(EmpiricalFisherOperator(rows, damp=damp).diagonal(), dense.diagonal())


def test_estimators_of_symmetric_operators_take_it() -> None:
    operator = EmpiricalFisherOperator(_rows(), damp=0.5)
    estimate = hutchinson_diagonal(operator, 20_000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(estimate, operator.dense().diagonal(), rtol=0.1, atol=0.02)


@pytest.mark.parametrize("chunk", [2, 64])
def test_per_sample_gradients_are_those_of_a_loop(chunk: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)).double().eval()
    x, y = torch.randn(5, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    chosen = {"3.weight": net[3].weight, "0.weight": net[0].weight}
    ours, fewer = (
        per_sample_gradients(net, cross_entropy, x, y, chunk=chunk),
        per_sample_gradients(net, cross_entropy, x, y, params=chosen, chunk=chunk),
    )
    for i in range(5):
        loss = cross_entropy(net(x[i : i + 1]), y[i : i + 1])
        every = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
        torch.testing.assert_close(ours[i], torch.cat([g.reshape(-1) for g in every]))
        some = torch.autograd.grad(loss, list(chosen.values()))
        torch.testing.assert_close(fewer[i], torch.cat([g.reshape(-1) for g in some]))
    assert all(p.grad is None for p in net.parameters())


def test_gram_matrices_keep_float64s_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 8 * 5 * 3)  # three columns at a time
    rows = (_rows(5, 100) + 1000).float()
    torch.testing.assert_close(gram_matrix(rows), rows.double() @ rows.double().T, rtol=1e-14, atol=0)
    widths = [c.stop - c.start for c, _ in column_chunks(rows, multiple=2)]
    assert sum(widths) == 100
    assert set(widths[:-1]) == {2}


def test_a_gram_matrix_that_rounding_left_indefinite_is_repaired() -> None:
    """A rank-one matrix with an eigenvalue of -1e-3, damped by 1e-4: the repaired one is damped by that alone."""
    basis = torch.linalg.qr(_rows(4, 4))[0]
    gram = (basis * torch.tensor([2.0, 0.0, 0.0, -1e-3], dtype=torch.float64)) @ basis.T
    factor = damped_cholesky(gram, 1e-4)
    wanted = (basis * torch.tensor([2.0001, 1e-4, 1e-4, 1e-4], dtype=torch.float64)) @ basis.T
    torch.testing.assert_close(factor @ factor.T, wanted)
    with pytest.raises(ValueError, match="'damp' is too small"):
        damped_cholesky(1e20 * gram.abs() + 1e20, 1e-4)
    with pytest.raises(ValueError, match="not finite"):
        damped_cholesky(gram * torch.nan, 1e-4)


def test_bad_input_is_named() -> None:
    with pytest.raises(TypeError, match=r"'gradients' must be a real floating tensor, not torch\.int64"):
        EmpiricalFisherOperator(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="complex64"):
        EmpiricalFisherOperator(torch.ones(2, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"not \(0, 3\)"):
        EmpiricalFisherOperator(torch.ones(0, 3))
    with pytest.raises(ValueError, match="'damp' must be at least 0 and finite, not -1"):
        EmpiricalFisherOperator(torch.ones(2, 2), damp=-1)
    with pytest.raises(ValueError, match=r"'vectors' must be \(7,\) or \(7, k\), not \(5,\)"):
        EmpiricalFisherOperator(_rows()) @ torch.ones(5)
    net, x, y = nn.Linear(2, 2), torch.ones(3, 2), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="as many samples, at least one, not 3 and 2"):
        per_sample_gradients(net, cross_entropy, x, y[:2])
    with pytest.raises(ValueError, match="'chunk' must be at least 1, not 0"):
        per_sample_gradients(net, cross_entropy, x, y, chunk=0)
    with pytest.raises(ValueError, match="'params' is empty"):
        per_sample_gradients(net, cross_entropy, x, y, params={})

"""Gauss-Newton and Fisher operators against dense Jacobians, sample by sample, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from corollary.linalg import FisherOperator, GaussNewtonOperator, HessianOperator


def _net(outputs: int = 3) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()
    return net, torch.randn(7, 4, dtype=torch.float64), torch.randint(max(outputs, 2), (7,))


def _jacobian(net: nn.Module, x: Tensor) -> np.ndarray:
    """(samples, outputs, n) by central differences of the outputs."""
    params = list(net.parameters())
    columns = []
    with torch.no_grad():
        for p in params:
            for i in range(p.numel()):
                sides = []
                for shift in (1e-5, -2e-5):
                    p.view(-1)[i] += shift
                    sides.append(net(x).numpy().copy())
                p.view(-1)[i] += 1e-5
                columns.append((sides[0] - sides[1]) / 2e-5)
    return np.stack(columns, axis=-1)


def _softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def test_both_equal_the_sum_over_samples_for_cross_entropy() -> None:
    net, x, y = _net()
    jacobian, logits = _jacobian(net, x), net(x).detach().numpy()
    wanted = np.zeros((jacobian.shape[-1],) * 2)
    for j, z in zip(jacobian, logits, strict=True):
        p = _softmax(z)
        wanted += j.T @ (np.diag(p) - np.outer(p, p)) @ j / len(x)
    params = list(net.parameters())
    gauss_newton = GaussNewtonOperator(lambda z: cross_entropy(z, y), net(x), params, chunk=5)
    fisher = FisherOperator(net(x), params, chunk=7)
    np.testing.assert_allclose(gauss_newton.dense().numpy(), wanted, atol=1e-8)
    np.testing.assert_allclose(fisher.dense().numpy(), wanted, atol=1e-8)
    np.testing.assert_allclose(FisherOperator(net(x), params, reduction="sum").dense().numpy(), wanted * 7, atol=1e-7)


@pytest.mark.parametrize(
    ("likelihood", "weight"),
    [("bernoulli", lambda z: 1 / (2 + np.exp(z) + np.exp(-z))), ("gaussian", lambda z: np.ones_like(z))],
)
def test_the_other_likelihoods(likelihood: str, weight: Callable[[np.ndarray], np.ndarray]) -> None:
    net, x, _ = _net(2)
    jacobian = _jacobian(net, x).reshape(14, -1)
    w = weight(net(x).detach().numpy().reshape(-1))
    fisher = FisherOperator(net(x), net.parameters(), likelihood=likelihood)
    np.testing.assert_allclose(fisher.dense().numpy(), (jacobian * w[:, None]).T @ jacobian / 14, atol=1e-8)


def test_the_fisher_matrix_is_the_mean_square_of_sampled_gradients() -> None:
    """Its definition: the expectation, over labels drawn from the model, of the gradients' outer products."""
    net, x, _ = _net()
    x = x[:1]
    probabilities = net(x).detach().softmax(-1)[0]
    params = list(net.parameters())
    total = torch.zeros((sum(p.numel() for p in params),) * 2, dtype=torch.float64)
    for label, p in enumerate(probabilities):
        g = torch.cat([v.reshape(-1) for v in torch.autograd.grad(cross_entropy(net(x), torch.tensor([label])), params)])
        total += p * torch.outer(g, g)
    torch.testing.assert_close(FisherOperator(net(x), params).dense(), total, rtol=1e-10, atol=1e-12)


def test_for_a_linear_model_gauss_newton_is_the_hessian_also_with_a_penalty() -> None:
    _, x, y = _net()
    weight = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def loss_fn(logits: Tensor, w: Tensor) -> Tensor:
        return cross_entropy(logits, y) + 0.3 * (w**4).sum()

    hessian = HessianOperator(loss_fn(x @ weight, weight), [weight])
    gauss_newton = GaussNewtonOperator(loss_fn, (x @ weight, weight), [weight])
    torch.testing.assert_close(gauss_newton.dense(), hessian.dense())


def test_a_vector_a_matrix_and_an_unused_parameter() -> None:
    net, x, y = _net()
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    params = [*net.parameters(), unused]
    for operator in (GaussNewtonOperator(lambda z: cross_entropy(z, y), net(x), params), FisherOperator(net(x), params)):
        n = operator.shape[0]
        dense = operator.dense()
        vectors = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(operator @ vectors, dense @ vectors)
        torch.testing.assert_close(operator @ vectors[:, 0], dense @ vectors[:, 0])
        torch.testing.assert_close(dense, dense.T)
        assert (dense[-2:] == 0).all()
        assert torch.linalg.eigvalsh(dense).min() > -1e-12
        assert (operator @ vectors[:, :0]).shape == (n, 0)
        assert operator.dtype == torch.float64


def test_a_loss_that_is_linear_in_the_outputs_has_no_curvature() -> None:
    net, x, _ = _net()
    assert (GaussNewtonOperator(lambda z: z.sum(), net(x), net.parameters()).dense() == 0).all()


def _weight() -> Tensor:
    return torch.ones(2, requires_grad=True)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FisherOperator(torch.ones(2), [_weight()]), "carry no graph"),
        (lambda: FisherOperator(_weight() * 2, []), "'params' is empty"),
        (lambda: FisherOperator(_weight() * 2, [_weight()], likelihood="poisson"), "'likelihood' is 'poisson'; allowed: cat"),
        (lambda: FisherOperator(_weight() * 2, [_weight()], reduction="none"), "'reduction' is 'none'; allowed: mean"),
        (lambda: FisherOperator(_weight().sum(), [_weight()]), "not a scalar"),
        (lambda: FisherOperator((_weight() * 2).double(), [_weight()]), "share one dtype and device"),
        (lambda: FisherOperator(_weight() * 2, [_weight()], chunk=0), "'chunk' must be at least 1"),
        (lambda: GaussNewtonOperator(lambda z: z, _weight() * 2, [_weight()]), r"scalar, not a tensor of shape \(2,\)"),
        (lambda: GaussNewtonOperator(lambda z: z.sum(), (), [_weight()]), "'outputs' is empty"),
        (lambda: GaussNewtonOperator(lambda z: z.sum(), _weight() * 2, [_weight()]) @ torch.ones(3), r"must be \(2,\)"),
    ],
)
def test_bad_input_is_named(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()

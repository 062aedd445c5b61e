"""GradientNormalizedNewton against dense matrices in numpy; the conformance checks cover what every optimizer owes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

import corollary.optim.gradient_normalized_smoothness as module
from corollary.linalg import SymmetricOperator
from corollary.optim import GradientNormalizedNewton

Array = np.ndarray[Any, np.dtype[np.float64]]


def newton(
    f: Callable[[Array], float],
    gradient: Callable[[Array], Array],
    matrix: Callable[[Array], Array],
    theta: Array,
    steps: int,
    radius: float = 1.0,
) -> list[tuple[Array, float]]:
    """Algorithm 1 with dense solves: the iterates and the radius after each, up to where f's rounding decides the search."""
    path = []
    for _ in range(steps):
        g, h = gradient(theta), matrix(theta)
        norm = float(np.linalg.norm(g))
        if norm < 1e-6:
            break
        for _ in range(40):
            regularization = norm / radius
            step = np.linalg.solve(h + regularization * np.eye(len(theta)), -g)
            after = gradient(theta + step)
            if f(theta) - f(theta + step) >= after @ after / (8 * regularization):
                theta = theta + step
                radius = max(2 * radius, 1e-9)
                break
            radius /= 2
        path.append((theta, radius))
    assert len(path) >= 4
    return path


def softmax_problem(seed: int = 0, n: int = 40, d: int = 4, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = (
        torch.randn(n, d, dtype=torch.float64, generator=generator)
        * torch.tensor([1.0, 3.0, 0.3, 2.0], dtype=torch.float64)[:d]
    )
    return x, torch.randint(classes, (n,), generator=generator)


def closed_forms(x: Tensor, y: Tensor, classes: int = 3) -> tuple[Any, Any, Any]:
    """Loss, gradient and Hessian of mean cross-entropy of W x, W (classes, d) flattened row by row."""
    a, labels = x.numpy(), np.eye(classes)[y.numpy()]

    def parts(theta: Array) -> tuple[Array, Array]:
        z = a @ theta.reshape(classes, -1).T
        top = z.max(1, keepdims=True)
        e = np.exp(z - top)
        return z - top - np.log(e.sum(1, keepdims=True)), e / e.sum(1, keepdims=True)

    def f(theta: Array) -> float:
        return float(-(parts(theta)[0] * labels).sum(1).mean())

    def gradient(theta: Array) -> Array:
        return ((parts(theta)[1] - labels).T @ a / len(a)).ravel()

    def hessian(theta: Array) -> Array:
        total = np.zeros((theta.size, theta.size))
        for row, p in zip(a, parts(theta)[1], strict=True):
            total += np.kron(np.diag(p) - np.outer(p, p), np.outer(row, row)) / len(a)
        return total

    return f, gradient, hessian


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton", "fisher"])
@pytest.mark.parametrize("radius", [1.0, 100.0, 0.01])
def test_on_softmax_regression_all_three_take_the_dense_steps(curvature: str, radius: float) -> None:
    x, y = softmax_problem()
    f, gradient, hessian = closed_forms(x, y)
    weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    optimizer = GradientNormalizedNewton([weight], curvature=curvature, radius=radius, tol=1e-13)
    for wanted, wanted_radius in newton(f, gradient, hessian, np.zeros(12), 12, radius):
        optimizer.step(lambda: (x @ weight.T, lambda z: cross_entropy(z, y)))
        # Softmax's curvature is singular (a shift of all classes costs nothing), so at a large radius the last digits are the processor's.
        np.testing.assert_allclose(weight.detach().numpy().ravel(), wanted, rtol=1e-6, atol=1e-7)
        assert optimizer.param_groups[0]["radius"] == wanted_radius


def test_gauss_newton_on_a_nonlinear_least_squares_takes_the_dense_steps() -> None:
    """u(θ) = (θ₁ - 1, 3(θ₂ - θ₁²)), f = ‖u‖²/2: Rosenbrock's valley, where Gauss-Newton is not the Hessian."""

    def u(t: Any) -> list[Any]:
        return [t[0] - 1, 3 * (t[1] - t[0] ** 2)]

    def jacobian(t: Array) -> Array:
        return np.array([[1, 0], [-6 * t[0], 3]])

    def f(t: Array) -> float:
        return float(np.square(u(t)).sum() / 2)

    theta = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    optimizer = GradientNormalizedNewton([theta], curvature="gauss_newton", tol=1e-14)
    path = newton(f, lambda t: jacobian(t).T @ np.array(u(t)), lambda t: jacobian(t).T @ jacobian(t), np.array([-1.2, 1.0]), 12)
    for wanted, _ in path:
        optimizer.step(lambda: (torch.stack(u(theta)), lambda z: z.square().sum() / 2))
        np.testing.assert_allclose(theta.detach().numpy(), wanted, rtol=1e-7, atol=1e-9)


def test_a_curvature_of_ones_own_is_used_and_gets_outputs_and_parameters() -> None:
    """The rank-one part of ‖Ax - b‖⁴/4, which the paper calls its Fisher term."""
    a = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b = torch.ones(6, dtype=torch.float64)

    def fisher_term(evaluation: module.Evaluation, params: Sequence[Tensor]) -> SymmetricOperator:
        [u] = evaluation.outputs
        [gradient] = torch.autograd.grad(evaluation.loss, params, retain_graph=True)
        return 2 / u.detach().norm() ** 4 * torch.outer(gradient, gradient)

    def f(t: Array) -> float:
        return float(np.linalg.norm(a.numpy() @ t - b.numpy()) ** 4 / 4)

    def gradient(t: Array) -> Array:
        u = a.numpy() @ t - b.numpy()
        return (u @ u) * a.numpy().T @ u

    def term(t: Array) -> Array:
        u, g = a.numpy() @ t - b.numpy(), gradient(t)
        return 2 / np.linalg.norm(u) ** 4 * np.outer(g, g)

    theta = nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
    optimizer = GradientNormalizedNewton([theta], curvature=fisher_term, tol=1e-14)
    for wanted, _ in newton(f, gradient, term, np.full(3, 2.0), 10):
        optimizer.step(lambda: (a @ theta - b, lambda z: z.norm() ** 4 / 4))
        np.testing.assert_allclose(theta.detach().numpy(), wanted, rtol=1e-7, atol=1e-10)


@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 20), radius=st.floats(1e-3, 1e3))
@settings(max_examples=30, deadline=None)
def test_the_radius_of_a_logistic_loss_stays_above_its_bound(seed: int, scale: float, radius: float) -> None:
    """With rows of norm at most R the loss is quasi-self-concordant with R, and any γ ≤ 0.9/R gives the progress asked for.

    From ‖g₊ - g - Hs‖ ≤ λ‖s‖ (e^t - 1 - t)/t with t = γR: at t = 0.9 the factor q is 0.62, and the progress is at least
    (1 - q)/(1 + q)² > 1/8 of ‖g₊‖²/λ. Halving thus ends above 0.45/R, and each step keeps within γ.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(30, 5, dtype=torch.float64, generator=generator) * scale
    y = torch.randint(2, (30,), generator=generator).double()
    bound = 0.45 / float(x.norm(dim=1).max())
    weight = nn.Parameter(torch.randn(5, dtype=torch.float64, generator=generator))
    optimizer = GradientNormalizedNewton([weight], radius=radius, tol=1e-10)
    losses = []
    for _ in range(8):
        before = weight.detach().clone()
        losses.append(float(optimizer.step(lambda: binary_cross_entropy_with_logits(x @ weight, y))))
        accepted = optimizer.param_groups[0]["radius"] / 2
        assert accepted >= min(bound, radius)
        assert (weight.detach() - before).norm() <= accepted * (1 + 1e-6)
    assert np.diff(losses).max() <= 1e-14


def test_newtons_step_in_the_limit_of_a_large_radius() -> None:
    theta = nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))
    matrix = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    optimizer = GradientNormalizedNewton([theta], radius=1e12)
    optimizer.step(lambda: theta @ matrix @ theta / 2)
    torch.testing.assert_close(theta.detach(), torch.zeros(2, dtype=torch.float64), atol=1e-9, rtol=0)


def test_without_the_search_the_radius_stays() -> None:
    theta = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = GradientNormalizedNewton([theta], radius=0.5, adaptive=False)
    optimizer.step(lambda: (theta**2).sum())
    assert optimizer.param_groups[0]["radius"] == 0.5
    assert theta.item() == pytest.approx(2 - 4 / (2 + 4 / 0.5))
    assert optimizer.param_groups[0]["evaluations"] == 1


def test_lr_scales_the_accepted_step_and_counts_are_kept() -> None:
    ends = []
    for lr in (1.0, 0.25):
        theta = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
        optimizer = GradientNormalizedNewton([theta], lr=lr)
        assert float(optimizer.step(lambda theta=theta: (theta**4).sum())) == 16  # type: ignore[misc]
        ends.append(theta.item())
        group = optimizer.param_groups[0]
        assert group["evaluations"] == 1 + group["solves"]
        assert group["products"] >= group["solves"]
        assert theta.grad is None
    assert ends[1] - 2 == pytest.approx((ends[0] - 2) / 4)


def test_on_a_concave_stretch_the_radius_shrinks_until_the_step_goes_down() -> None:
    """f = cos: at 0.1 the second derivative is -0.995, so that plain Newton climbs to the maximum at 0."""
    theta = nn.Parameter(torch.tensor([0.1], dtype=torch.float64))
    optimizer = GradientNormalizedNewton([theta], radius=10.0)
    for _ in range(30):
        optimizer.step(lambda: theta.cos().sum())
    assert theta.item() == pytest.approx(math.pi, abs=1e-6)


def test_a_failed_search_and_a_flat_loss_move_nothing() -> None:
    theta = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = GradientNormalizedNewton([theta], max_search=3)
    calls = iter(range(100))
    optimizer.step(lambda: theta.sum() + next(calls))  # a loss that grows from call to call
    assert theta.item() == 1
    assert optimizer.param_groups[0]["radius"] == 1
    optimizer.step(lambda: (theta * 0).sum())
    assert theta.item() == 1


def test_a_copy_keeps_its_curvature() -> None:
    theta = nn.Parameter(torch.ones(1))
    optimizer = copy.deepcopy(GradientNormalizedNewton([theta], curvature="fisher", likelihood="gaussian"))
    assert (optimizer.curvature, optimizer.likelihood) == ("fisher", "gaussian")


def _theta() -> nn.Parameter:
    return nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "'lr' must be at least 0, not -1.0"),
        ({"radius": 0.0}, "'radius' must be above 0 and finite, not 0.0"),
        ({"radius": float("nan")}, "'radius' must be above 0"),
        ({"min_radius": 0.0}, "'min_radius' must be above 0"),
        ({"max_search": 0}, "'max_search' must be at least 1"),
        ({"tol": 1.0}, r"'tol' must be in \[0, 1\), not 1.0"),
        ({"max_cg": 0}, "'max_cg' must be None or at least 1"),
        ({"curvature": "newton"}, "'curvature' is 'newton'; allowed: hessian, gauss_newton, fisher"),
    ],
)
def test_a_bad_hyperparameter_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GradientNormalizedNewton([_theta()], **options)


@pytest.mark.parametrize(
    ("closure", "curvature", "error", "words"),
    [
        (None, "hessian", ValueError, "needs a 'closure'"),
        (lambda t: 1.0, "hessian", ValueError, r"must give the loss or \(outputs, loss_fn\), not float"),
        (lambda t: t * 2, "hessian", ValueError, r"must be a scalar tensor, not \(2,\)"),
        (lambda t: t.detach().sum(), "hessian", RuntimeError, "has no graph"),
        (lambda t: (t**2).sum(), "gauss_newton", ValueError, r"needs a closure that gives \(outputs, loss_fn\)"),
        (lambda t: ((t, t), lambda a, b: (a + b).sum()), "fisher", ValueError, "takes one tensor of outputs, not 2"),
        (lambda t: (t**2).sum() * torch.nan, "hessian", RuntimeError, "not finite"),
        (lambda t: (t.sqrt() - 1).sum() + (t - 1).abs().sqrt().sum(), "hessian", RuntimeError, "not finite"),
    ],
)
def test_a_bad_closure_is_named(closure: Any, curvature: str, error: type[Exception], words: str) -> None:
    theta = _theta()
    optimizer = GradientNormalizedNewton([theta], curvature=curvature)
    with pytest.raises(error, match=words):
        optimizer.step(None if closure is None else lambda: closure(theta))
    assert (theta == 1).all()


def test_a_closure_that_calls_backward_is_named() -> None:
    theta = _theta()

    def closure() -> Tensor:
        loss = (theta**3).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with pytest.raises(RuntimeError, match=r"must not call backward\(\)"):
        GradientNormalizedNewton([theta]).step(closure)


def test_bad_parameters_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="share one dtype and device"):
        GradientNormalizedNewton([_theta(), nn.Parameter(torch.ones(2, dtype=torch.float64))])
    with pytest.raises(TypeError, match="complex64; allowed: real"):
        GradientNormalizedNewton([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="takes one parameter group"):
        GradientNormalizedNewton([{"params": [_theta()]}, {"params": [_theta()]}])
    monkeypatch.setattr(module, "_is_distributed", lambda _: True)
    with pytest.raises(TypeError, match="is a DTensor"):
        GradientNormalizedNewton([_theta()])

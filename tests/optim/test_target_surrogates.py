"""SSO and ArmijoGD against plain numpy and closed forms; the conformance checks cover what every optimizer owes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

import corollary.optim.target_surrogates as module
from corollary.optim import SSO, ArmijoGD, TargetSurrogate


def _data(seed: int = 0, n: int = 20, d: int = 4, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, dtype=torch.float64, generator=generator), torch.randint(classes, (n,), generator=generator)


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def _vector(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


# ------------------------------------------------------------------------------------------------------------------- SSO


@pytest.mark.parametrize("schedule", ["constant", "sqrt"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_inner_step_of_gradient_descent_is_plain_sgd(schedule: str, reduction: str) -> None:
    """At z_t the surrogate's gradient is the loss's, whatever η is."""
    x, y = _data()
    ours, plain = _net(), _net()
    sso = SSO(
        ours.parameters(), 0.7, inner=torch.optim.SGD, inner_options={"lr": 0.05}, inner_steps=1, schedule=schedule,
        reduction=reduction,
    )  # fmt: skip
    sgd = torch.optim.SGD(plain.parameters(), lr=0.05)
    for _ in range(6):
        given = sso.step(lambda: (ours(x), lambda z: cross_entropy(z, y, reduction=reduction)))
        sgd.zero_grad()
        loss = cross_entropy(plain(x), y, reduction=reduction)
        loss.backward()  # type: ignore[no-untyped-call]
        sgd.step()
        torch.testing.assert_close(given, loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(_vector(ours), _vector(plain), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("inner", ["lbfgs", "armijo", "sgd"])
def test_minimized_exactly_on_a_linear_model_it_is_a_preconditioned_step(inner: str) -> None:
    """θ - η (XᵀX)⁻¹ Xᵀ ∇ℓ(z) n for a mean over n samples: the projection of a gradient step in target space."""
    x, y = _data(n=30)
    labels = (y > 0).double()
    weight = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    makes: dict[str, tuple[Any, dict[str, Any], int]] = {
        "lbfgs": (
            torch.optim.LBFGS,
            {"line_search_fn": "strong_wolfe", "max_iter": 100, "tolerance_grad": 1e-12, "tolerance_change": 0},
            1,
        ),
        "armijo": (ArmijoGD, {}, 300),
        "sgd": (torch.optim.SGD, {"lr": 3 / float(torch.linalg.matrix_norm(x, 2) ** 2 / 30) / 1.5}, 400),
    }
    make, options, steps = makes[inner]
    sso = SSO([weight], 3.0, inner=make, inner_options=options, inner_steps=steps)
    theta = np.zeros(4)
    a = x.numpy()
    for _ in range(5):
        sso.step(lambda: (x @ weight, lambda z: binary_cross_entropy_with_logits(z, labels)))
        slopes = 1 / (1 + np.exp(-a @ theta)) - labels.numpy()
        theta = theta - 3.0 * np.linalg.solve(a.T @ a, a.T @ slopes)
        np.testing.assert_allclose(weight.detach().numpy(), theta, atol=1e-6)


def test_several_adam_steps_on_a_network_equal_the_same_done_by_hand() -> None:
    """The trajectory against the surrogate written out in numpy, its gradient by a Jacobian from differences."""
    x, y = _data(n=6)
    net = _net()
    theta = _vector(net).numpy().copy()
    shapes = [(6, 4), (6,), (3, 6), (3,)]
    sso = SSO(net.parameters(), 0.5, inner=torch.optim.Adam, inner_options={"lr": 0.02}, inner_steps=3)

    def forward(t: np.ndarray) -> np.ndarray:
        parts = np.split(t, np.cumsum([int(np.prod(s)) for s in shapes])[:-1])
        w1, b1, w2, b2 = (p.reshape(s) for p, s in zip(parts, shapes, strict=True))
        return np.tanh(x.numpy() @ w1.T + b1) @ w2.T + b2

    def gradient(t: np.ndarray, slopes: np.ndarray, start: np.ndarray) -> np.ndarray:
        outer = slopes + (forward(t) - start) / (0.5 * 6)
        g = np.zeros_like(t)
        for i in range(t.size):
            e = np.zeros_like(t)
            e[i] = 1e-6
            g[i] = (outer * (forward(t + e) - forward(t - e))).sum() / 2e-6
        return g

    for _ in range(3):
        sso.step(lambda: (net(x), lambda z: cross_entropy(z, y)))
        start = forward(theta)
        p = np.exp(start) / np.exp(start).sum(1, keepdims=True)
        slopes = (p - np.eye(3)[y.numpy()]) / 6
        m, v = np.zeros_like(theta), np.zeros_like(theta)
        for k in range(1, 4):
            g = gradient(theta, slopes, start)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            theta = theta - 0.02 * (m / (1 - 0.9**k)) / (np.sqrt(v / (1 - 0.999**k)) + 1e-8)
        np.testing.assert_allclose(_vector(net).numpy(), theta, atol=1e-6)


@given(seed=st.integers(0, 10_000), n=st.integers(1, 6), classes=st.integers(2, 4), reduction=st.sampled_from(["mean", "sum"]))
@settings(max_examples=50, deadline=None)
def test_the_surrogate_lies_above_the_loss_and_touches_it(seed: int, n: int, classes: int, reduction: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    start = 3 * torch.randn(n, classes, dtype=torch.float64, generator=generator)
    y = torch.randint(classes, (n,), generator=generator)
    leaf = start.clone().requires_grad_()
    loss = cross_entropy(leaf, y, reduction=reduction)
    gradients = torch.autograd.grad(loss, [leaf])
    surrogate = TargetSurrogate([start], gradients, float(loss.detach()), eta=2.0, samples=n if reduction == "mean" else 1)
    torch.testing.assert_close(surrogate(start), loss.detach(), rtol=1e-12, atol=1e-12)
    for scale in (0.01, 1.0, 10.0):
        other = start + scale * torch.randn(n, classes, dtype=torch.float64, generator=generator)
        assert surrogate(other) >= cross_entropy(other, y, reduction=reduction) - 1e-12


@pytest.mark.parametrize("schedule", ["constant", "line_search"])
def test_full_batch_steps_never_raise_the_loss(schedule: str) -> None:
    x, y = _data(n=40)
    net = _net()
    sso = SSO(net.parameters(), 2.0 if schedule == "constant" else 100.0, inner_steps=15, schedule=schedule)
    losses = [float(sso.step(lambda: (net(x), lambda z: cross_entropy(z, y)))) for _ in range(20)]
    assert np.diff(losses).max() <= 1e-12
    assert (sso.param_groups[0]["loss_evaluations"] > 0) == (schedule == "line_search")


def test_the_expensive_gradient_is_computed_once_and_the_model_cut_off() -> None:
    x, y = _data()
    net, calls = _net(), []

    def loss_fn(z: Tensor) -> Tensor:
        calls.append(z)
        return cross_entropy(z, y)

    sso = SSO(net.parameters(), 1.0, inner_steps=7, inner=torch.optim.Adam)
    sso.step(lambda: (net(x), loss_fn))
    assert len(calls) == 1
    assert calls[0].is_leaf
    assert sso.param_groups[0]["inner_evaluations"] == 7
    assert all(p.grad is None for p in net.parameters())


def test_gradients_from_outside_autograd_and_several_targets() -> None:
    """A loss of two targets, one of them a parameter: the same steps whether autograd or the function gives the gradient."""
    ends = []
    for by_hand in (False, True):
        weight = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
        x = torch.arange(8, dtype=torch.float64).view(2, 4).T / 8

        def loss_fn(z: Tensor, w: Tensor, by_hand: bool = by_hand) -> Any:
            loss = (z**2).sum() / 2 + 0.1 * w.sum()
            return (float(loss.detach()), (z.detach().numpy(), torch.full_like(w, 0.1))) if by_hand else loss

        sso = SSO([weight], 0.5, reduction="sum", inner_steps=5)
        for _ in range(3):
            sso.step(lambda weight=weight, x=x, loss_fn=loss_fn: ((x @ weight, weight * 1), loss_fn))  # type: ignore[misc]
        ends.append(weight.detach())
    torch.testing.assert_close(ends[0], ends[1])


@pytest.mark.parametrize("inner", [torch.optim.Adam, torch.optim.Adagrad])
def test_a_kept_inner_state_goes_on_and_resumes_bit_by_bit(inner: Any) -> None:
    x, y = _data()

    def run(net: nn.Module, sso: SSO, steps: int) -> None:
        for _ in range(steps):
            sso.step(lambda: (net(x), lambda z: cross_entropy(z, y)))

    options: dict[str, Any] = {"inner": inner, "inner_options": {"lr": 0.01}, "inner_steps": 3, "reset_inner": False}
    whole = _net()
    optimizer = SSO(whole.parameters(), 1.0, **options)
    run(whole, optimizer, 6)
    half = _net()
    first = SSO(half.parameters(), 1.0, **options)
    run(half, first, 3)
    assert int(next(iter(first.state.values()))["step"]) == 9
    second = SSO(half.parameters(), 0.1, **options)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(half, second, 3)
    assert torch.equal(_vector(half), _vector(whole))
    fresh = _net()
    reset = SSO(fresh.parameters(), 1.0, **{**options, "reset_inner": True})
    run(fresh, reset, 6)
    assert not torch.equal(_vector(fresh), _vector(whole))
    assert not reset.state


def test_the_schedule_is_one_over_root_t(monkeypatch: pytest.MonkeyPatch) -> None:
    etas = []
    monkeypatch.setattr(SSO, "_minimize", lambda self, closure, surrogate: etas.append(surrogate.eta))
    weight = nn.Parameter(torch.ones(2))
    sso = SSO([weight], 3.0, schedule="sqrt")
    for _ in range(4):
        sso.step(lambda: (weight * 1, lambda z: z.sum()))
    np.testing.assert_allclose(etas, [3.0 / np.sqrt(t) for t in (1, 2, 3, 4)])


def test_the_inner_steps_end_early_at_the_tolerance() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.float64))
    sso = SSO([weight], 0.5, reduction="sum", inner=torch.optim.SGD, inner_options={"lr": 0.5}, inner_steps=50, inner_tol=1e-9)
    sso.step(lambda: (weight * 1, lambda z: z.square().sum() / 2))
    assert sso.param_groups[0]["inner_evaluations"] == 2  # the first step lands on the minimum, the second sees it
    torch.testing.assert_close(weight.detach(), torch.full((2,), 0.5, dtype=torch.float64))


def _weight() -> nn.Parameter:
    return nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "'lr' must be at least 0, not -1.0"),
        ({"inner_steps": 0}, "'inner_steps' must be at least 1, not 0"),
        ({"inner_tol": -1}, "'inner_tol' must be at least 0"),
        ({"c": 1.0}, r"'c' must be in \(0, 1\), not 1.0"),
        ({"schedule": "cosine"}, "'schedule' is 'cosine'; allowed: constant, sqrt, line_search"),
        ({"reduction": "none"}, "'reduction' is 'none'; allowed: mean, sum"),
    ],
)
def test_a_bad_option_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SSO([_weight()], **options)


@pytest.mark.parametrize(
    ("closure", "error", "words"),
    [
        (None, ValueError, "needs a 'closure'"),
        (lambda w: w.sum(), ValueError, r"must give \(targets, loss_fn\), not Tensor"),
        (lambda w: ((), lambda: 0), ValueError, "must be a tensor, or several"),
        (lambda w: (w.detach(), lambda z: z.sum()), RuntimeError, "targets have no graph"),
        (lambda w: (w * 1, lambda z: z), ValueError, r"must give a scalar, not a tensor of shape \(2,\)"),
        (lambda w: (w * 1, lambda z: 1.0), ValueError, r"depends on the targets, or \(loss, gradients\)"),
        (lambda w: (w * 1, lambda z: (1.0, torch.ones(3))), ValueError, r"a gradient has shape \(3,\); its targets have"),
        (lambda w: (w * 1, lambda z: z.sum() * torch.nan), RuntimeError, "not finite"),
        (lambda w: (w * 1, lambda z: (1.0, torch.full((2,), torch.inf))), RuntimeError, "not finite"),
        (lambda w: ((w * 1, torch.cat([w, w])), lambda a, b: a.sum() + b.sum()), ValueError, "share their first axis"),
    ],
)
def test_a_bad_closure_is_named(closure: Any, error: type[Exception], words: str) -> None:
    weight = _weight()
    with pytest.raises(error, match=words):
        SSO([weight]).step(None if closure is None else lambda: closure(weight))
    assert (weight == 1).all()


def test_other_samples_in_the_midst_of_a_step_are_named() -> None:
    weight, sizes = _weight(), iter((3, 4, 4))
    with pytest.raises(ValueError, match="same samples throughout one step"):
        SSO([weight]).step(lambda: (torch.ones(next(sizes), 2) @ weight, lambda z: z.sum()))


def test_bad_parameters_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="takes one parameter group"):
        SSO([{"params": [_weight()]}, {"params": [_weight()]}])
    with pytest.raises(TypeError, match=r"is torch\.complex64; SSO takes real"):
        SSO([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    monkeypatch.setattr(module, "_is_distributed", lambda _: True)
    with pytest.raises(TypeError, match="is a DTensor"):
        SSO([_weight()])


def test_a_copy_keeps_its_inner_optimizer() -> None:
    optimizer = copy.deepcopy(SSO([_weight()], inner=torch.optim.Adam, inner_options={"lr": 0.3}))
    assert (optimizer.inner, optimizer.inner_options) == (torch.optim.Adam, {"lr": 0.3})


# -------------------------------------------------------------------------------------------------------------- ArmijoGD


def _closure(optimizer: ArmijoGD, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        if value.requires_grad:
            value.backward()  # type: ignore[no-untyped-call]
        return value

    return closure


@given(curvature=st.lists(st.floats(0.1, 50), min_size=1, max_size=5), lr=st.floats(0.01, 100))
@settings(max_examples=40, deadline=None)
def test_armijo_takes_the_largest_step_of_its_grid_that_will_do(curvature: list[float], lr: float) -> None:
    h = np.array(curvature)
    start = np.linspace(1, 2, len(h))
    theta = nn.Parameter(torch.tensor(start))
    optimizer = ArmijoGD([theta], lr)
    optimizer.step(_closure(optimizer, lambda: (torch.tensor(h) / 2 * theta**2).sum()))
    g, size = h * start, lr

    def f(t: np.ndarray) -> float:
        return float((h / 2 * t * t).sum())

    while f(start - size * g) > f(start) - 0.5 * size * g @ g:
        size *= 0.9
    np.testing.assert_allclose(theta.detach().numpy(), start - size * g, rtol=1e-9, atol=1e-9)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(size * 1.8)


def test_armijo_stays_where_no_step_goes_down() -> None:
    theta, values = nn.Parameter(torch.ones(1)), iter(range(1000))
    optimizer = ArmijoGD([theta], max_search=5)
    optimizer.step(_closure(optimizer, lambda: theta.sum() + 10 * next(values)))
    assert theta.item() == 1
    optimizer.step(_closure(optimizer, lambda: (theta * 0).sum()))
    assert theta.item() == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1}, "'lr' must be at least 0"),
        ({"c": 0.0}, r"'c' must be in \(0, 1\)"),
        ({"backtrack": 1.0}, r"'backtrack' must be in \(0, 1\)"),
        ({"expand": 0.5}, "'expand' must be at least 1"),
        ({"max_search": 0}, "'max_search' must be at least 1"),
    ],
)
def test_armijos_bad_options_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ArmijoGD([_weight()], **options)


def test_armijo_needs_its_closure_and_keeps_to_one_group_and_dense_gradients() -> None:
    with pytest.raises(ValueError, match="needs a 'closure'"):
        ArmijoGD([_weight()]).step()
    with pytest.raises(ValueError, match="takes one parameter group"):
        ArmijoGD([{"params": [_weight()]}, {"params": [_weight()]}])
    table = nn.Parameter(torch.ones(3, 2))
    optimizer = ArmijoGD([table])
    with pytest.raises(RuntimeError, match="needs dense gradients"):
        optimizer.step(_closure(optimizer, lambda: nn.functional.embedding(torch.tensor([0]), table, sparse=True).sum()))

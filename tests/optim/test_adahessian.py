"""AdaHessian against dense Hessians and closed forms; the conformance checks cover what every optimizer owes."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import corollary.optim.adahessian as module
from corollary.optim import AdaHessian


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, (3, 2)), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()


def _batch(seed: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 1, 4, 4, dtype=torch.float64, generator=generator), torch.randint(3, (size,), generator=generator)


def _loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def _dense(net: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Gradient and Hessian of the flattened parameters, the Hessian from central differences of gradients."""
    params = list(net.parameters())

    def gradient() -> np.ndarray:
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(_loss(net, batch), params)]).numpy()

    rows = []
    for p in params:
        for i in range(p.numel()):
            sides = []
            for shift in (1e-4, -2e-4):
                p.data.view(-1)[i] += shift
                sides.append(gradient())
            p.data.view(-1)[i] += 1e-4
            rows.append((sides[0] - sides[1]) / 2e-4)
    return gradient(), np.stack(rows)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("n_samples", [1, 3])
def test_steps_equal_those_of_a_dense_hessian(signed: bool, n_samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net, drawn = _network(), []

    def record(tensors: list[Tensor], seed: int) -> list[Tensor]:
        probes = real(tensors, seed)
        drawn.append(np.concatenate([z.numpy().ravel() for z in probes]))
        return probes

    real = module.rademacher_like
    monkeypatch.setattr(module, "rademacher_like", record)
    lr, b1, b2, eps, decay, size = 0.05, 0.8, 0.95, 1e-2, 0.1, 5
    optimizer = AdaHessian(
        net.parameters(), lr, (b1, b2), eps, decay, block_size=size, signed=signed, n_samples=n_samples, seed=3
    )
    shapes = [tuple(p.shape) for p in net.parameters()]
    theta = np.concatenate([p.detach().numpy().ravel() for p in net.parameters()])
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for t in range(1, 6):
        gradient, hessian = _dense(net, _batch(t))
        drawn.clear()
        optimizer.zero_grad()
        optimizer.backward(_loss(net, _batch(t)))
        optimizer.step()
        assert len(drawn) == n_samples
        diagonal = sum(z * (hessian @ z) for z in drawn) / n_samples
        average, at = np.empty_like(diagonal), 0
        for shape in shapes:
            d = diagonal[at : at + int(np.prod(shape))]
            d = d if signed else np.abs(d)
            if len(shape) == 4:
                d = np.concatenate([np.full(6, kernel.mean()) for kernel in d.reshape(-1, 6)])
            elif len(shape) == 2:
                d = np.concatenate([np.full(min(size, d.size - i), d[i : i + size].mean()) for i in range(0, d.size, size)])
            average[at : at + d.size] = d
            at += d.size
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * average**2
        theta = theta - lr * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * theta)
        ours = np.concatenate([p.detach().numpy().ravel() for p in net.parameters()])
        np.testing.assert_allclose(ours, theta, atol=2e-6)
        theta = ours  # differences' error must not pile up


@given(
    curvature=st.lists(st.floats(0.01, 100) | st.floats(-100, -0.01), min_size=1, max_size=6),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=40, deadline=None)
def test_the_first_step_on_a_quadratic_is_newtons(curvature: list[float], seed: int) -> None:
    """With lr = 1, k = 1, ε = 0: θ - g / |h|, which is the minimum where h > 0 and its mirror image where h < 0."""
    h = torch.tensor(curvature, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    start, centre = torch.randn(2, len(h), dtype=torch.float64, generator=generator)
    theta = nn.Parameter(start.clone())
    optimizer = AdaHessian([theta], lr=1.0, eps=0.0, seed=seed)
    optimizer.backward((h / 2 * (theta - centre) ** 2).sum())
    optimizer.step()
    wanted = torch.where(h > 0, centre, 2 * start - centre)
    torch.testing.assert_close(theta.detach(), wanted, rtol=1e-9, atol=1e-9)


@given(scale=st.floats(0.01, 100))
@settings(max_examples=20, deadline=None)
def test_with_power_one_the_step_does_not_depend_on_the_losss_scale(scale: float) -> None:
    ends = []
    for factor in (1.0, scale):
        net = _network()
        optimizer = AdaHessian(net.parameters(), lr=0.01, eps=0.0, seed=0)
        for t in range(3):
            optimizer.zero_grad()
            optimizer.backward(factor * _loss(net, _batch(t)))
            optimizer.step()
        ends.append(torch.cat([p.detach().reshape(-1) for p in net.parameters()]))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-6, atol=1e-8)


def _train(form: str, steps: int = 4, **options: Any) -> list[Tensor]:
    net = _network()
    optimizer = AdaHessian(net.parameters(), lr=0.05, seed=5, **options)
    for t in range(steps):
        batch = _batch(t)
        optimizer.zero_grad()
        if form == "helper":
            optimizer.backward(_loss(net, batch))
        elif form == "create_graph":
            _loss(net, batch).backward(create_graph=optimizer.hessian_due)  # type: ignore[no-untyped-call]
        elif form == "two halves":
            for half in (slice(0, 4), slice(4, 8)):
                optimizer.backward(_loss(net, (batch[0][half], batch[1][half])) / 2)
        optimizer.step()
    return [p.detach() for p in net.parameters()]


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("options", [{}, {"hessian_interval": 2}, {"n_samples": 2}])
@pytest.mark.parametrize("form", ["create_graph", "two halves"])
def test_every_way_to_give_gradients_takes_the_same_steps(form: str, options: dict[str, Any]) -> None:
    for ours, wanted in zip(_train(form, **options), _train("helper", **options), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("form", ["helper", "create_graph"])
@pytest.mark.parametrize("interval", [1, 3])
def test_no_graph_outlives_a_step(form: str, interval: int) -> None:
    """Without the garbage collector everything goes with its last name: no cycle between parameter and gradient."""
    gc.collect()
    gc.disable()
    try:
        net = _network()
        optimizer = AdaHessian(net.parameters(), hessian_interval=interval)
        for t in range(4):
            loss = _loss(net, _batch(t))
            if form == "helper":
                optimizer.backward(loss)
                assert all(p.grad is not None and not p.grad.requires_grad for p in net.parameters())
            else:
                loss.backward(create_graph=True)  # type: ignore[no-untyped-call]
            optimizer.step()
            assert all(p.grad is not None and not p.grad.requires_grad for p in net.parameters())
        graph = weakref.ref(loss)
        params = [weakref.ref(p) for p in net.parameters()]
        del loss
        assert graph() is None
        del net, optimizer
        assert not any(ref() is not None for ref in params)
    finally:
        gc.enable()


def test_the_graph_is_built_only_when_it_is_due() -> None:
    net = _network()
    optimizer = AdaHessian(net.parameters(), hessian_interval=3, seed=0)
    due, products = [], []
    for t in range(7):
        before = {p: optimizer.state[p].get("hessian_step", torch.zeros(())).item() for p in net.parameters()}
        due.append(optimizer.hessian_due)
        optimizer.zero_grad()
        optimizer.backward(_loss(net, _batch(t)))
        optimizer.step()
        products.append(all(optimizer.state[p]["hessian_step"].item() > before[p] for p in net.parameters()))
    assert due == products == [True, False, False, True, False, False, True]


def test_a_parameter_first_seen_between_refreshes_waits_for_the_next() -> None:
    early, late = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = AdaHessian([early, late], hessian_interval=3, seed=0)
    for t in range(4):
        optimizer.zero_grad()
        optimizer.backward((early**2).sum() + ((late**2).sum() if t >= 1 else 0))
        optimizer.step()
        assert (late.detach() == 1).all() == (t < 3)
    assert late.isfinite().all()
    assert late not in optimizer.state or optimizer.state[late]["step"] == 1


def test_probes_and_refreshes_go_on_where_only_a_late_parameter_trains() -> None:
    torch.manual_seed(0)
    old, young = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(8))
    mixing = torch.randn(8, 8)
    optimizer = AdaHessian([old, young], hessian_interval=2, seed=0)
    seen, due = [], []
    for t in range(9):
        due.append(optimizer.hessian_due)
        optimizer.zero_grad()
        optimizer.backward((old**2).sum() if t < 3 else ((mixing @ young) ** 2).sum())
        if young in optimizer._curvature:
            seen.append(optimizer._curvature[young].tolist())
        optimizer.step()
    assert due == [t % 2 == 0 for t in range(9)]
    assert len({tuple(s) for s in seen}) == len(seen) == 3


def test_half_precision_keeps_float32_state_through_a_checkpoint() -> None:
    param = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = AdaHessian([param], seed=0)
    optimizer.backward((param**4).sum())
    optimizer.step()
    other = AdaHessian([nn.Parameter(param.detach().clone())])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for key, value in optimizer.state[param].items():
        loaded = next(iter(other.state.values()))[key]
        assert loaded.dtype == value.dtype == torch.float32
        assert torch.equal(loaded, value)


def test_a_constant_second_derivative_is_learnt_in_half_precision() -> None:
    """In bfloat16 a decay of 0.999 rounds to none; the float32 state must follow a drop of the curvature."""
    param = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = AdaHessian([param], lr=0.0, seed=0)
    for scale in [4.0] * 20 + [0.0] * 500:
        optimizer.zero_grad()
        optimizer.backward((scale * param**2).sum())
        optimizer.step()
    square = optimizer.state[param]["exp_hessian_diag_sq"]
    assert square.item() == pytest.approx(64 * (1 - 0.999**20) * 0.999**500, rel=1e-3)


def test_zero_grad_forgets_gathered_curvature() -> None:
    one, two = _network(), _network()
    for net, detour in ((one, False), (two, True)):
        optimizer = AdaHessian(net.parameters(), seed=0)
        if detour:
            optimizer.backward(7 * _loss(net, _batch(9)))
        optimizer.zero_grad()
        optimizer.backward(_loss(net, _batch(0)))
        optimizer.step()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_seed_none_follows_torchs_global_seed() -> None:
    seeds = []
    for global_seed in (0, 0, 1):
        torch.manual_seed(global_seed)
        seeds.append(AdaHessian([nn.Parameter(torch.ones(1))]).param_groups[0]["seed"])
    assert seeds[0] == seeds[1] != seeds[2]


def test_a_loss_without_curvature_is_divided_by_eps_alone() -> None:
    """H = 0: the denominator is ε alone, and the helper knows that no graph was forgotten."""
    param = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = AdaHessian([param], lr=0.1, eps=0.5)
    optimizer.backward(param.sum())
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((2,), -0.2, dtype=torch.float64))


def _ones() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2))]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -0.1}, "'lr' must be at least 0, not -0.1"),
        ({"lr": float("nan")}, "'lr' must be at least 0, not nan"),
        ({"betas": (1.0, 0.9)}, r"'betas\[0\]' must be in \[0, 1\), not 1.0"),
        ({"betas": (0.9, -0.1)}, r"'betas\[1\]' must be in \[0, 1\), not -0.1"),
        ({"eps": -1}, "'eps' must be at least 0, not -1"),
        ({"weight_decay": -1}, "'weight_decay' must be at least 0, not -1"),
        ({"hessian_power": 0.0}, r"'hessian_power' must be in \(0, 1\], not 0.0"),
        ({"block_size": 0}, "'block_size' must be at least 1, not 0"),
        ({"n_samples": 0}, "'n_samples' must be from 1 to 256, not 0"),
        ({"hessian_interval": 0}, "'hessian_interval' must be at least 1, not 0"),
        ({"seed": -1}, r"'seed' must be in \[0, 2\*\*31\), not -1"),
    ],
)
def test_a_bad_hyperparameter_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AdaHessian(_ones(), **options)


def test_probe_options_are_one_for_all_groups() -> None:
    optimizer = AdaHessian(_ones())
    with pytest.raises(ValueError, match="'n_samples' must be the same in every group"):
        optimizer.add_param_group({"params": _ones(), "n_samples": 2})
    assert len(optimizer.param_groups) == 1


def test_a_forgotten_graph_is_named() -> None:
    [param] = _ones()
    optimizer = AdaHessian([param])
    (param**2).sum().backward()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match=r"optimizer.backward\(loss\) or loss.backward\(create_graph=True\)"):
        optimizer.step()
    assert (param == 1).all()


def test_a_distributed_parameter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_is_distributed", lambda _: True)
    with pytest.raises(TypeError, match="is a DTensor"):
        AdaHessian(_ones())


def test_deepcopy_and_loading_drop_gathered_curvature() -> None:
    [param] = _ones()
    optimizer = AdaHessian([param], seed=0)
    optimizer.backward((param**2).sum())
    copy.deepcopy(optimizer).step()  # a copied parameter has no gradient, and its curvature must not linger either
    assert (param == 1).all()
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="carry no graph"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_the_closure_may_use_either_form() -> None:
    ends = []
    for use_helper in (True, False):
        net = _network()
        optimizer = AdaHessian(net.parameters(), seed=0)

        def closure(net: nn.Module = net, optimizer: AdaHessian = optimizer, use_helper: bool = use_helper) -> Tensor:
            optimizer.zero_grad()
            loss = _loss(net, _batch(0))
            if use_helper:
                optimizer.backward(loss)
            else:
                loss.backward(create_graph=True)  # type: ignore[no-untyped-call]
            return loss

        assert optimizer.step(closure).item() > 0
        ends.append(torch.cat([p.detach().reshape(-1) for p in net.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=0)

"""SAM, ASAM and TRAM against closed forms, numpy and a peer; the conformance checks cover what every optimizer owes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import pytorch_optimizer
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import corollary.optim.sharpness as sharpness
from corollary.optim import ASAM, SAM, TRAM, kl_divergence
from corollary.optim.sharpness import SharpnessAware, frozen_running_stats

SGD = torch.optim.SGD


def _network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def _batch(seed: int, size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 5, dtype=torch.float64, generator=generator), torch.randint(3, (size,), generator=generator)


def _closure(net: nn.Module, batch: tuple[Tensor, Tensor], logits: bool = False) -> Callable[[], Any]:
    def closure() -> Any:
        out = net(batch[0])
        loss = cross_entropy(out, batch[1])
        loss.backward()  # type: ignore[no-untyped-call]
        return (loss, out) if logits else loss

    return closure


def _flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


# ----------------------------------------------------------------------------------------------------- closed forms, numpy


@given(
    seed=st.integers(0, 2**31 - 1),
    rho=st.floats(0.0, 3.0),
    eta=st.floats(0.0, 1.0),
    adaptive=st.booleans(),
    steps=st.integers(1, 4),
)
@settings(max_examples=40, deadline=None)
def test_steps_on_a_quadratic_have_the_closed_form(seed: int, rho: float, eta: float, adaptive: bool, steps: int) -> None:
    """∇L(θ + ε) = H (θ + ε - c) on L = (θ - c)ᵀ H (θ - c) / 2."""
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(6, 6))
    h, c, theta = factor @ factor.T / 6, rng.normal(size=6), rng.normal(size=6)
    parts = [nn.Parameter(torch.from_numpy(theta[:2].copy())), nn.Parameter(torch.from_numpy(theta[2:].copy()))]
    kind: Any = (lambda p: ASAM(p, SGD, rho, eta, lr=0.1)) if adaptive else (lambda p: SAM(p, SGD, rho, lr=0.1))
    optimizer = kind(parts)

    def closure() -> Tensor:
        offset = torch.cat(list(parts)) - torch.from_numpy(c)
        loss = offset @ torch.from_numpy(h) @ offset / 2
        loss.backward()
        return loss

    for _ in range(steps):
        loss = optimizer.step(closure)
        assert loss.item() == pytest.approx((theta - c) @ h @ (theta - c) / 2, rel=1e-9, abs=1e-12)
        g = h @ (theta - c)
        t = np.abs(theta) + eta if adaptive else np.ones(6)
        theta = theta - 0.1 * h @ (theta + rho * t**2 * g / np.sqrt(np.sum((t * g) ** 2)) - c)
        np.testing.assert_allclose(torch.cat(list(parts)).detach().numpy(), theta, rtol=1e-9, atol=1e-11)


@given(seed=st.integers(0, 2**31 - 1), rho=st.floats(1e-3, 10.0), eta=st.sampled_from([0.01, 0.5]))
@settings(max_examples=30, deadline=None)
def test_the_climb_ends_on_the_neighbourhoods_edge(seed: int, rho: float, eta: float) -> None:
    """‖ε‖ = ρ for SAM and ‖ε / T‖ = ρ for ASAM and TRAM, and no other point of the edge is higher to first order."""
    torch.manual_seed(seed)
    params = [nn.Parameter(torch.randn(3, 4, dtype=torch.float64)), nn.Parameter(torch.randn(5, dtype=torch.float64))]
    gradients = [torch.randn_like(p) for p in params]
    makes: dict[str, Any] = {
        "sam": SAM(params, SGD, rho, lr=0.1),
        "asam": ASAM(params, SGD, rho, eta, lr=0.1),
        "tram": TRAM(params, SGD, eta=eta, lr=0.1),
    }
    for name, optimizer in makes.items():
        begin = torch.cat([p.detach().reshape(-1) for p in params])
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.clone()
        g = torch.cat([g.reshape(-1) for g in gradients])
        optimizer.first_step(*([rho] if name == "tram" else []))
        move = torch.cat([p.detach().reshape(-1) for p in params]) - begin
        t = torch.ones_like(begin) if name == "sam" else begin.abs() + eta
        assert (move / t).norm().item() == pytest.approx(rho, rel=1e-9)
        assert (g @ move).item() == pytest.approx(rho * (t * g).norm().item(), rel=1e-9)  # Cauchy-Schwarz with equality
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.second_step()
        assert torch.equal(torch.cat([p.detach().reshape(-1) for p in params]), begin)


@given(seed=st.integers(0, 2**31 - 1), log_scale=st.lists(st.floats(-3, 3), min_size=6, max_size=6))
@settings(max_examples=30, deadline=None)
def test_without_eta_asam_does_not_see_a_rescaling_of_the_parameters(seed: int, log_scale: list[float]) -> None:
    """With θ = A φ for a diagonal A, the climb in φ is the climb in θ; SAM's is another."""
    rng = np.random.default_rng(seed)
    a, theta, g = torch.tensor(log_scale, dtype=torch.float64).exp(), *torch.from_numpy(rng.normal(size=(2, 6)))
    ends = []
    for start, gradient in ((theta, g), (theta / a, g * a)):
        p = nn.Parameter(start.clone())
        optimizer = ASAM([p], SGD, 0.3, 0.0, lr=0.1)
        p.grad = gradient.clone()
        optimizer.first_step()
        ends.append(p.detach().clone())
    torch.testing.assert_close(ends[1] * a, ends[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("base", [SGD, torch.optim.AdamW])
@pytest.mark.parametrize("adaptive", [False, True])
def test_ten_steps_equal_those_of_pytorch_optimizer(base: Any, adaptive: bool) -> None:
    options: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1} | ({"momentum": 0.9} if base is SGD else {})
    one, two = _network(), _network()
    ours: Any = ASAM(one.parameters(), base, 0.4, 0.0, **options) if adaptive else SAM(one.parameters(), base, 0.4, **options)
    theirs = pytorch_optimizer.SAM(two.parameters(), base, rho=0.4, adaptive=adaptive, **options)
    for t in range(10):
        ours.step(_closure(one, _batch(t)))
        theirs.zero_grad()
        again = _closure(two, _batch(t))
        again()
        theirs.step(again)
        torch.testing.assert_close(_flat(one), _flat(two), rtol=1e-6, atol=1e-6)  # the peer sums its norm in float32


def _softmax_regression_path(region: str, steps: int, lr: float, scale: float, rows: int, top: float) -> list[np.ndarray]:
    """TRAM on a linear classifier, sample by sample in numpy, from the paper's equations 4, 5 and 7."""
    rng = np.random.default_rng(5)
    w = rng.normal(size=(4, 3))
    first = before = w.copy()
    path = []
    for t in range(steps):
        x, y, z = _regression_batch(t)

        def gradient(w: np.ndarray, x: np.ndarray = x, y: np.ndarray = y) -> np.ndarray:
            total = np.zeros_like(w)
            for sample, label in zip(x, y, strict=True):
                total += np.outer(sample, softmax(sample @ w) - np.eye(3)[label])
            return total / len(x)

        target, inputs = {"previous": (before, x), "initial": (first, x), "input": (w, x + z)}[region]
        divergences = [
            rel_entr(softmax(a @ target), softmax(b @ w)).sum() for a, b in zip(inputs[:rows], x[:rows], strict=True)
        ]
        d = min(top, scale * float(np.mean(divergences)))
        g = gradient(w)
        climbed = w + d * w**2 * g / np.sqrt(np.sum((w * g) ** 2))
        before, w = w, w - lr * gradient(climbed)
        path.append(w.copy())
    return path


def _regression_batch(t: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(100 + t)
    return rng.normal(size=(9, 4)), rng.integers(3, size=9), 0.4 * rng.normal(size=(9, 4))


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize(("scale", "rows", "top"), [(1.0, 9, np.inf), (30.0, 4, np.inf), (300.0, 9, 0.05)])
@pytest.mark.parametrize("region", ["previous", "initial", "input"])
def test_tram_follows_the_papers_equations_sample_by_sample(
    region: str, scale: float, rows: int, top: float, foreach: bool | None
) -> None:
    w = nn.Parameter(torch.from_numpy(np.random.default_rng(5).normal(size=(4, 3))))
    largest = None if np.isinf(top) else top
    optimizer = TRAM([w], SGD, region, scale=scale, max_radius=largest, foreach=foreach, lr=0.5)
    for t, wanted in enumerate(_softmax_regression_path(region, 8, 0.5, scale, rows, top)):
        x, y, z = (torch.from_numpy(part) for part in _regression_batch(t))

        def closure(x: Tensor = x, y: Tensor = y) -> tuple[Tensor, Tensor]:
            logits = x @ w
            loss = cross_entropy(logits, y)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss, logits

        def target(x: Tensor = x, z: Tensor = z) -> Tensor:
            assert not torch.is_grad_enabled()
            return (x + z if region == "input" else x)[:rows] @ w

        optimizer.step(closure, target)
        np.testing.assert_allclose(w.detach().numpy(), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("base", [SGD, torch.optim.AdamW])
def test_tram_with_a_given_divergence_is_asam(base: Any) -> None:
    one, two = _network(), _network()
    tram, asam = TRAM(one.parameters(), base, scale=2.0, lr=0.05), ASAM(two.parameters(), base, 0.6, 0.0, lr=0.05)
    for t in range(5):
        again = _closure(one, _batch(t))
        tram.zero_grad()
        again()
        tram.first_step(0.3, zero_grad=True)
        again()
        tram.second_step()
        asam.step(_closure(two, _batch(t)))
    torch.testing.assert_close(_flat(one), _flat(two), rtol=1e-12, atol=0)


@pytest.mark.parametrize("make", [lambda p: SAM(p, SGD, 0.0, lr=0.1), lambda p: TRAM(p, SGD, scale=0.0, lr=0.1)])
def test_a_radius_of_zero_is_the_base_optimizer(make: Any) -> None:
    one, two = _network(), _network()
    optimizer, plain = make(one.parameters()), SGD(two.parameters(), lr=0.1)
    for t in range(4):
        batch = _batch(t)
        if isinstance(optimizer, TRAM):
            optimizer.step(_closure(one, batch, logits=True), lambda batch=batch: one(batch[0] + 1))
        else:
            optimizer.step(_closure(one, batch))
        plain.zero_grad()
        _closure(two, batch)()
        plain.step()
    assert torch.equal(_flat(one), _flat(two))


# ---------------------------------------------------------------------------------------------------------------- divergence


@given(seed=st.integers(0, 2**31 - 1), size=st.floats(0.0, 30.0), rows=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_the_divergence_is_that_of_scipy(seed: int, size: float, rows: int) -> None:
    rng = np.random.default_rng(seed)
    target, logits = size * rng.normal(size=(rows, 4)), size * rng.normal(size=(6, 4))
    ours = kl_divergence(torch.from_numpy(target), torch.from_numpy(logits)).item()
    wanted = rel_entr(softmax(target, -1), softmax(logits[:rows], -1)).sum(-1).mean()
    assert ours == pytest.approx(wanted, rel=1e-8, abs=1e-10)
    assert ours >= 0
    shifted = kl_divergence(torch.from_numpy(target), torch.from_numpy(target + rng.normal(size=(rows, 1)))).item()
    assert shifted == pytest.approx(0, abs=1e-12)


def test_the_divergence_takes_sequences_half_precision_and_extreme_logits() -> None:
    logits = torch.tensor([[[300.0, -300.0], [0.0, 0.0]]], dtype=torch.bfloat16)
    value = kl_divergence(logits.flip(-1), logits)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(600 / 2, rel=1e-3)


@pytest.mark.parametrize("shapes", [((3,), (3,)), ((2, 3), (2, 4)), ((3, 4), (2, 4)), ((0, 4), (2, 4))])
def test_shapes_that_do_not_fit_are_named(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"'target' has shape .* and 'logits' .*; allowed"):
        kl_divergence(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


# ------------------------------------------------------------------------------------------------------------- the interface


@pytest.mark.parametrize("region", ["previous", "initial", "input"])
def test_the_two_halves_do_what_step_does(region: str) -> None:
    one, two = _network(), _network()
    whole, halves = (TRAM(n.parameters(), SGD, region, scale=50.0, lr=0.2, momentum=0.9) for n in (one, two))
    for t in range(4):
        x, y = _batch(t)
        whole.step(_closure(one, (x, y), logits=True), lambda x=x: one(x[:5] + (0.3 if region == "input" else 0)))
        halves.zero_grad()
        logits = two(x)
        cross_entropy(logits, y).backward()  # type: ignore[no-untyped-call]
        with halves.reference():
            target = two(x[:5] + (0.3 if region == "input" else 0))
        assert not target.requires_grad
        halves.first_step(kl_divergence(target, logits), zero_grad=True)
        cross_entropy(two(x), y).backward()  # type: ignore[no-untyped-call]
        halves.second_step(zero_grad=True)
        assert all(p.grad is None for p in two.parameters())
    assert torch.equal(_flat(one), _flat(two))


def test_a_made_optimizer_is_wrapped_and_keeps_its_groups_state_and_schedule() -> None:
    net = _network()
    base = torch.optim.AdamW([{"params": net[0].parameters(), "lr": 0.01}, {"params": net[2].parameters(), "rho": 0.5}], lr=0.1)
    optimizer = SAM(base, rho=0.2)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert [(g["lr"], g["rho"]) for g in optimizer.param_groups] == [(0.01, 0.2), (0.1, 0.5)]
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step(_closure(net, _batch(0)))
    schedule.step()
    assert [g["lr"] for g in base.param_groups] == [0.005, 0.05]


def test_batch_norms_see_one_pass_a_step() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).double()
    plain = copy.deepcopy(net)
    frozen: Any = net[1]
    for make in (
        lambda n, m: SAM(n.parameters(), SGD, 0.5, lr=0.0, model=m),
        lambda n, m: TRAM(n.parameters(), SGD, "input", lr=0.0, model=m),
    ):
        ours, wanted = copy.deepcopy(net), copy.deepcopy(plain)
        optimizer: Any = make(ours, ours)
        for t in range(3):
            batch = _batch(t)
            if isinstance(optimizer, TRAM):
                optimizer.step(_closure(ours, batch, logits=True), lambda b=batch, n=ours: n(b[0] + 0.5))
            else:
                optimizer.step(_closure(ours, batch))
            wanted(batch[0])
        for name, value in wanted.named_buffers():
            assert torch.equal(dict(ours.named_buffers())[name], value), name
    loose = copy.deepcopy(net)
    SAM(loose.parameters(), SGD, 0.5, lr=0.0).step(_closure(loose, _batch(0)))
    assert loose[1].num_batches_tracked == 2
    frozen.eval()
    with frozen_running_stats(net):
        assert frozen.track_running_stats  # in evaluation it must go on using them


@pytest.mark.parametrize("where", ["closure", "target"])
def test_an_error_in_a_pass_leaves_the_parameters_where_they_were(where: str) -> None:
    net = _network()
    optimizer = TRAM(net.parameters(), SGD, "initial", scale=10.0, lr=0.1)
    calls = []

    def closure() -> tuple[Tensor, Tensor]:
        calls.append(1)
        if where == "closure" and len(calls) == 4:
            raise KeyError("broken batch")
        given: tuple[Tensor, Tensor] = _closure(net, _batch(0), logits=True)()
        return given

    def target() -> Tensor:
        if where == "target" and len(calls) == 3:
            raise KeyError("broken batch")
        out: Tensor = net(_batch(0)[0])
        return out

    optimizer.step(closure, target)
    begin = _flat(net)
    with pytest.raises(KeyError, match="broken batch"):
        optimizer.step(closure, target)
    assert torch.equal(_flat(net), begin)
    optimizer.step(closure, target)  # and the next step is free to begin
    assert not torch.equal(_flat(net), begin)


@pytest.mark.parametrize("region", ["previous", "initial"])
@pytest.mark.parametrize("route", ["state_dict", "deepcopy"])
def test_the_reference_outlives_a_checkpoint(region: str, route: str) -> None:
    def run(net: nn.Module, optimizer: TRAM, steps: range) -> None:
        for t in steps:
            optimizer.step(_closure(net, _batch(t), logits=True), lambda t=t: net(_batch(t)[0]))

    whole = _network()
    optimizer = TRAM(whole.parameters(), torch.optim.AdamW, region, scale=50.0, lr=0.05)
    run(whole, optimizer, range(3))
    if route == "deepcopy":
        other, resumed = copy.deepcopy((whole, optimizer))
    else:
        other = copy.deepcopy(whole)
        resumed = TRAM(other.parameters(), torch.optim.AdamW, region, lr=1.0)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(whole, optimizer, range(3, 6))
    run(other, resumed, range(3, 6))
    assert torch.equal(_flat(whole), _flat(other))


def test_a_group_added_later_starts_with_itself_as_the_reference() -> None:
    net, late = _network(), nn.Linear(3, 3).double()
    optimizer = TRAM(net.parameters(), SGD, "initial", scale=5.0, lr=0.1)
    whole = nn.Sequential(net, late)
    optimizer.step(_closure(whole, _batch(0), logits=True), lambda: whole(_batch(0)[0]))
    begin = late.weight.detach().clone()
    optimizer.add_param_group({"params": late.parameters()})
    assert optimizer.param_groups[1]["scale"] == 5.0
    optimizer.step(_closure(whole, _batch(1), logits=True), lambda: whole(_batch(1)[0]))
    assert not torch.equal(late.weight, begin)
    with optimizer.reference():
        assert torch.equal(late.weight, begin)
    assert not torch.equal(late.weight, begin)


def test_previous_is_one_step_back_also_where_a_gradient_was_missing() -> None:
    torch.manual_seed(0)
    a, b = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    optimizer = TRAM([a, b], SGD, lr=0.1)
    for t in range(4):
        begin = [a.detach().clone(), b.detach().clone()]
        optimizer.zero_grad()
        ((a**2).sum() + ((b**2).sum() if t % 2 == 0 else 0)).backward()
        optimizer.first_step(0.1)
        optimizer.second_step()
        with optimizer.reference():
            assert torch.equal(a, begin[0])
            assert torch.equal(b, begin[1])


def test_a_nan_gradient_stops_the_climb_and_stays_in_its_parameter() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = SAM([a, b], SGD, 1.0, lr=0.1)
    a.grad, b.grad = torch.tensor([float("nan"), 1.0]), torch.ones(2)
    optimizer.first_step()
    assert a[1] == 1
    assert (b == 1).all()
    optimizer.second_step()
    assert a.isnan().tolist() == [True, False]
    torch.testing.assert_close(b.detach(), torch.full((2,), 0.9))


def test_groups_of_two_dtypes_share_one_norm() -> None:
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = SAM([a, b], SGD, 1.0, lr=0.1)
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0], dtype=torch.float64)
    optimizer.first_step()
    assert a.item() == pytest.approx(0.6)
    assert b.item() == pytest.approx(0.8)


# ------------------------------------------------------------------------------------------------------------------- refusals


def _ones() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2))]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: SAM(_ones(), SGD, -0.1, lr=0.1), ValueError, "'rho' must be at least 0, not -0.1"),
        (lambda: SAM(_ones(), SGD, float("nan"), lr=0.1), ValueError, "'rho' must be at least 0, not nan"),
        (lambda: ASAM(_ones(), SGD, 0.1, -1.0, lr=0.1), ValueError, "'eta' must be at least 0, not -1.0"),
        (
            lambda: TRAM(_ones(), SGD, "x", lr=0.1),
            ValueError,
            "'trust_region' must be one of previous, initial, input, not 'x'",
        ),
        (lambda: TRAM(_ones(), SGD, scale=-1.0, lr=0.1), ValueError, "'scale' must be at least 0"),
        (lambda: TRAM(_ones(), SGD, max_radius=-1.0, lr=0.1), ValueError, "'max_radius' must be at least 0"),
        (lambda: SAM(_ones(), lr=0.1), TypeError, "'base_optimizer' must be an optimizer class .*, not None"),
        (lambda: SAM(_ones(), list), TypeError, "must make a torch.optim.Optimizer, not list"),
        (lambda: SAM(SGD(_ones(), lr=0.1), lr=0.1), TypeError, "'params' is an optimizer, .* leave out lr"),
        (lambda: SAM(SGD(_ones(), lr=0.1), SGD), TypeError, "leave out base_optimizer"),
        (lambda: SAM(_ones(), torch.optim.LBFGS), ValueError, "must step from gradients alone, which LBFGS does not"),
        (lambda: SAM(SAM(_ones(), SGD, lr=0.1)), ValueError, "which SAM does not"),
        (lambda: SAM([nn.Parameter(torch.ones(2, dtype=torch.complex64))], SGD, lr=0.1), TypeError, "real parameters"),
        (
            lambda: TRAM([{"params": _ones(), "trust_region": "input"}, {"params": _ones()}], SGD, lr=0.1),
            ValueError,
            "'trust_region' must be the same in every group; the first has 'input', this one 'previous'",
        ),
    ],
)
def test_bad_options_are_named(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_a_refused_group_is_not_kept() -> None:
    optimizer = SAM(_ones(), SGD, lr=0.1)
    with pytest.raises(ValueError, match="'rho'"):
        optimizer.add_param_group({"params": _ones(), "rho": -1.0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "make", [lambda p: SAM(p, SGD, lr=0.1), lambda p: ASAM(p, SGD, lr=0.1), lambda p: TRAM(p, SGD, lr=0.1)]
)
def test_a_step_without_its_functions_is_refused(make: Any) -> None:
    params = _ones()
    optimizer = make(params)
    with pytest.raises(RuntimeError, match=r"step needs a closure, not None: .* first_step\(\) and second_step\(\)"):
        optimizer.step()
    if isinstance(optimizer, TRAM):
        with pytest.raises(RuntimeError, match="step needs a target, not None"):
            optimizer.step(lambda: (torch.zeros(()), torch.zeros(1, 2)))
        with pytest.raises(TypeError, match=r"'closure' must give \(loss, logits\), not Tensor"):
            optimizer.step(lambda: torch.zeros(()), lambda: torch.zeros(1, 2))
        with pytest.raises(ValueError, match=r"'divergence' must be one number, not a tensor of shape \(2,\)"):
            optimizer.first_step(torch.zeros(2))


def test_halves_out_of_order_are_refused() -> None:
    [param] = params = _ones()
    optimizer = SAM(params, SGD, lr=0.1)
    param.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="second_step needs first_step before it"):
        optimizer.second_step()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="first_step came twice"):
        optimizer.first_step()


def test_a_reference_of_another_shape_is_refused_and_nothing_is_loaded() -> None:
    small, large = nn.Linear(2, 2), nn.Linear(2, 3)
    saved = TRAM(small.parameters(), SGD, lr=0.5)
    with saved.reference():
        pass
    optimizer = TRAM(large.parameters(), SGD, lr=0.1)
    with pytest.raises(ValueError, match=r"reference of shape \(2, 2\) for parameter 0, which has shape \(3, 2\)"):
        optimizer.load_state_dict(saved.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_tram_refuses_a_distributed_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharpness, "_is_distributed", lambda _: True)
    with pytest.raises(TypeError, match="is a DTensor"):
        TRAM(_ones(), SGD, lr=0.1)
    assert isinstance(SAM(_ones(), SGD, lr=0.1), SharpnessAware)

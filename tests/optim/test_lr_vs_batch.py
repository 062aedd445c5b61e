"""Batch eigenvalues, scaling rules and the SLQ learner against random matrices, closed forms and a dense eigensolver."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from corollary.linalg import HessianOperator, extreme_eigenvalues
from corollary.optim import SLQLearningRate, batch_eigenvalues, batch_noise, scale_lr

# ------------------------------------------------------------------------------------------------------- spikes in noise


@pytest.mark.parametrize("batch", [1, 4, 25])
def test_extreme_eigenvalues_of_spikes_in_wigner_noise(batch: int) -> None:
    """A random matrix with known truth, solved densely: spikes 5 and -3, noise of norm s = 4 in a single sample."""
    rng = np.random.default_rng(batch)
    n, s = 1200, 4.0
    basis, _ = np.linalg.qr(rng.normal(size=(n, 2)))
    noise = rng.normal(size=(n, n)) * s / math.sqrt(n * batch)
    values = np.linalg.eigvalsh(basis @ np.diag([5.0, -3.0]) @ basis.T + (np.tril(noise) + np.tril(noise, -1).T))
    wanted = batch_eigenvalues(torch.tensor([5.0, -3.0]), s**2, batch)
    np.testing.assert_allclose(wanted.numpy(), values[[-1, 0]], rtol=0.03)


@given(
    value=st.floats(0.01, 100),
    noise=st.floats(0, 1e4),
    batch=st.integers(1, 10_000),
    sign=st.sampled_from([-1.0, 1.0]),
)
@settings(max_examples=100, deadline=None)
def test_batches_spread_the_spectrum_less_the_larger_they_are(value: float, noise: float, batch: int, sign: float) -> None:
    eigenvalue = torch.tensor([sign * value], dtype=torch.float64)
    small, large = (float(batch_eigenvalues(eigenvalue, noise, b)) * sign for b in (batch, 2 * batch))
    assert small >= large - 1e-12 * small  # monotone through the transition, where both branches give 2 s / sqrt(b)
    assert large >= value - 1e-12 * value
    assert large >= 2 * math.sqrt(noise / (2 * batch)) - 1e-9 * large


def test_the_two_branches_meet() -> None:
    near = torch.tensor([2 - 1e-9, 2 + 1e-9], dtype=torch.float64)
    assert batch_eigenvalues(near, 4.0, 1).tolist() == pytest.approx([4.0, 4.0], abs=1e-8)


def test_the_whole_set_has_no_noise_and_less_is_corrected_for() -> None:
    value = torch.tensor([3.0], dtype=torch.float64)
    assert batch_eigenvalues(value, 5.0, 60, dataset_size=60).item() == 3.0
    # Drawing b of N without replacement leaves (N - b) / (N - 1) of the variance of a mean.
    assert batch_eigenvalues(value, 5.0, 20, dataset_size=60).item() == pytest.approx(3 + 5 / 20 * (40 / 59) / 3)


def _samples(n: int, count: int, seed: int) -> Tensor:
    noise = torch.randn(count, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (noise + noise.mT) / math.sqrt(2)


def test_noise_is_measured_without_bias_from_any_batch_size() -> None:
    """Against the variance computed entry by entry over all single samples."""
    n, count = 8, 240
    hessians = _samples(n, count, 0) + torch.diag(torch.linspace(-1, 5, n, dtype=torch.float64))
    full = hessians.mean(0)
    vector = torch.linalg.eigh(full)[1][:, -1:]
    errors = (hessians - full).numpy() @ vector.numpy()[:, 0]
    wanted = np.mean([np.sum(e**2) - (e @ vector.numpy()[:, 0]) ** 2 for e in errors])
    generator = torch.Generator().manual_seed(1)
    for size in (1, 5, 40):
        rows = [torch.randperm(count, generator=generator)[:size] for _ in range(4000)]
        found = batch_noise(full, (hessians[r].mean(0) for r in rows), vector, size, dataset_size=count)
        assert float(found) == pytest.approx(wanted, rel=0.05)
    every = batch_noise(full, hessians, vector, 1, dataset_size=count)
    assert float(every) == pytest.approx(wanted, rel=1e-10)


def test_prediction_from_measured_noise_on_a_sampled_set() -> None:
    """The whole path, matrix-free: outlier and vector by Lanczos, noise from batches, prediction against dense batches."""
    n, count, size = 120, 400, 20
    generator = torch.Generator().manual_seed(0)
    hessians = _samples(n, count, 2) * 6 / math.sqrt(n)
    hessians[:, 0, 0] += 6.0

    def mean(rows: Tensor) -> Tensor:
        return hessians[rows].mean(0)

    full = mean(torch.arange(count))
    found = extreme_eigenvalues(full, vectors=True, generator=generator)
    assert found.largest_vectors is not None
    batches = [torch.randperm(count, generator=generator)[:size] for _ in range(12)]
    noise = batch_noise(full, (mean(r) for r in batches), found.largest_vectors, size, dataset_size=count)
    predicted = batch_eigenvalues(found.largest, noise, size, dataset_size=count)
    measured = np.mean([np.linalg.eigvalsh(mean(r).numpy())[-1] for r in batches])
    assert float(predicted) == pytest.approx(measured, rel=0.03)
    assert measured > 1.03 * float(found.largest)


# -------------------------------------------------------------------------------------------------------- scaling rules


@given(
    lr=st.floats(1e-6, 10),
    sizes=st.tuples(st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 4096)),
    rule=st.sampled_from(["linear", "sqrt"]),
    saturation=st.just(math.inf) | st.floats(1, 1e5),
)
@settings(max_examples=100, deadline=None)
def test_scaling_in_two_steps_is_scaling_in_one(lr: float, sizes: tuple[int, int, int], rule: str, saturation: float) -> None:
    def scale(rate: float, a: int, b: int) -> float:
        return scale_lr(rate, a, b, rule=rule, saturation=saturation)

    a, b, c = sizes
    assert scale(scale(lr, a, b), b, c) == pytest.approx(scale(lr, a, c), rel=1e-9)
    assert scale(lr, a, a) == pytest.approx(lr, rel=1e-12)
    exponent = 1.0 if rule == "linear" else 0.5
    if b >= a:
        assert lr * (1 - 1e-9) <= scale(lr, a, b) <= lr * (b / a) ** exponent * (1 + 1e-9)


@pytest.mark.parametrize("dimension", [3, 40])
def test_linear_scaling_with_saturation_is_exact_for_gaussian_least_squares(dimension: int) -> None:
    """SGD on y = w·x, x ~ N(0, I): E|w|² shrinks by 1 - 2η + η² (b + P + 1) / b a step, so it is stable below 2b / (b + P + 1).

    From E (XᵀX/b)² = (b + P + 1)/b · I for X with b rows; the saturation is b* = P + 1.
    """

    def largest(b: int) -> float:
        return 2 * b / (b + dimension + 1)

    for a, b in ((1, 2), (1, 512), (64, 8)):
        assert scale_lr(largest(a), a, b, saturation=dimension + 1) == pytest.approx(largest(b), rel=1e-12)
    b, chains = 4, 20_000
    generator = torch.Generator().manual_seed(dimension)
    w = torch.ones(chains, 3, dtype=torch.float64)
    rate = 0.5 * 2 * b / (b + 4)
    x = torch.randn(chains, b, 3, dtype=torch.float64, generator=generator)
    after = w - rate * (x.mT @ (x @ w.unsqueeze(2))).squeeze(2) / b
    assert float((after**2).sum(1).mean()) / 3 == pytest.approx(1 - 2 * rate + rate**2 * (b + 4) / b, rel=0.05)


def test_a_tensor_rate_stays_a_tensor() -> None:
    rate = torch.tensor([0.1, 0.2])
    assert torch.equal(scale_lr(rate, 1, 4, rule="sqrt"), 2 * rate)
    assert torch.equal(rate, torch.tensor([0.1, 0.2]))


# ----------------------------------------------------------------------------------------------------------- the learner


def _group(momentum: float = 0.0, lr: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=lr, momentum=momentum)


def _dense_rule(matrix: np.ndarray, cap: float, momentum: bool) -> tuple[float, float]:
    """Polyak's parameters from a dense eigensolver, μ found by bisection where the cap binds."""
    values = np.linalg.eigvalsh(matrix)
    top, low = values[-1], abs(values[0])

    def beta(mu: float) -> float:
        return float(((math.sqrt(top) - math.sqrt(mu)) / (math.sqrt(top) + math.sqrt(mu))) ** 2)

    mu = min(low, top)
    if beta(mu) > cap:
        a, b = mu, top
        for _ in range(200):
            a, b = ((a + b) / 2, b) if beta((a + b) / 2) > cap else (a, (a + b) / 2)
        mu = b
    rate = 4 / (math.sqrt(top) + math.sqrt(mu)) ** 2 if momentum else 2 / (top + mu)
    return float(rate), beta(mu)


@given(seed=st.integers(0, 2**31 - 1), n=st.integers(1, 12), cap=st.floats(0.1, 0.99), momentum=st.booleans())
@settings(max_examples=60, deadline=None)
def test_rate_and_momentum_are_polyaks(seed: int, n: int, cap: float, momentum: bool) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(n, n))
    matrix = matrix @ matrix.T - 0.3 * np.eye(n)
    matrix[0, 0] += 1.0 + abs(np.linalg.eigvalsh(matrix)[0])
    if np.linalg.eigvalsh(matrix)[-1] <= 0:
        return
    optimizer = _group(lr=0.7)
    schedule = SLQLearningRate(
        optimizer, lambda: torch.from_numpy(matrix), lanczos_steps=n, learn_momentum=momentum, max_momentum=cap
    )
    rate, beta = _dense_rule(matrix, cap, momentum)
    assert schedule.get_last_lr()[0] == pytest.approx(0.7 * rate, rel=1e-6)
    assert schedule.momentum == pytest.approx(beta, rel=1e-5, abs=1e-9)
    assert optimizer.param_groups[0]["momentum"] == (schedule.momentum if momentum else 0.0)


def test_on_a_quadratic_it_converges_at_polyaks_speed() -> None:
    """The spectral radius of heavy ball at its best is √β; plain descent at its best shrinks by (L - μ)/(L + μ)."""
    curvature = torch.tensor([100.0, 30.0, 1.0], dtype=torch.float64)
    for momentum, speed in ((True, (10 - 1) / (10 + 1)), (False, 99 / 101)):
        x = nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = torch.optim.SGD([x], lr=1.0)
        schedule = SLQLearningRate(
            optimizer,
            lambda x=x: HessianOperator((curvature / 2 * x**2).sum(), [x]),
            learn_momentum=momentum,
            max_momentum=0.99,
        )
        norms = []
        for _ in range(300):
            optimizer.zero_grad()
            (curvature / 2 * x**2).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            norms.append(float(x.detach().norm()))
        assert (norms[-1] / norms[99]) ** (1 / 200) == pytest.approx(speed, rel=0.01)


def test_it_looks_at_the_hessian_when_due_and_only_then() -> None:
    calls = []
    optimizer = _group()

    def hessian() -> Tensor:
        calls.append(len(calls))
        return torch.diag(torch.tensor([float(2 + len(calls)), 1.0]))

    schedule = SLQLearningRate(optimizer, hessian, interval=3, learn_momentum=False)
    rates = []
    for _ in range(7):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert len(calls) == 3
    assert rates == pytest.approx([2 / 4] * 3 + [2 / 5] * 3 + [2 / 6], rel=1e-6)


def test_a_rise_of_the_rate_waits_and_a_fall_does_not() -> None:
    """L reads 8, 2, 2, 10 and a memory of 3/4 keeps 8, 6.5, 5.375, 10; ν reads 4, 1, 1, 1 and keeps 4, 3.25, 2.6875, 2.265625."""
    readings = iter([(8.0, 4.0), (2.0, 1.0), (2.0, 1.0), (10.0, 1.0)])
    optimizer = _group()
    schedule = SLQLearningRate(
        optimizer,
        lambda: torch.diag(torch.tensor(next(readings), dtype=torch.float64)),
        interval=1,
        learn_momentum=False,
        memory=0.75,
    )
    rates = []
    for _ in range(4):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        if len(rates) < 4:
            schedule.step()
    wanted = [2 / (8 + 4), 2 / (6.5 + 3.25), 2 / (5.375 + 2.6875), 2 / (10 + 2.265625)]
    assert rates == pytest.approx(wanted, rel=1e-9)


def test_a_batch_without_curvature_leaves_the_rate_as_it_is() -> None:
    readings = iter([4.0, 0.0, 0.0])
    optimizer = _group()
    schedule = SLQLearningRate(optimizer, lambda: next(readings) * torch.eye(2), interval=1, learn_momentum=False)
    for _ in range(2):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == [pytest.approx(2 / 8)]


@pytest.mark.parametrize(("method", "make"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)])
def test_copies_under_many_rates_step_as_torchs_optimizers_do(method: str, make: Callable[..., torch.optim.Optimizer]) -> None:
    """The runs that the claims on the largest stable rate are measured with."""
    from corollary.papers.optim.lr_vs_batch import _network_gradients, descend

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 6, generator=generator), torch.randint(10, (20,), generator=generator)
    start = [torch.randn(6, 5, generator=generator), torch.randn(5, 10, generator=generator)]
    batches = [torch.randint(20, (4,), generator=generator) for _ in range(7)]
    rates = torch.tensor([0.01, 0.1])
    gradients, losses = _network_gradients(x, y)
    ends = descend(method, start, gradients, rates, iter(batches), 7)
    for i, rate in enumerate(rates.tolist()):
        params = [nn.Parameter(p.clone()) for p in start]
        optimizer = make(params, lr=rate)
        for rows in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(torch.tanh(x[rows] @ params[0]) @ params[1], y[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        for ours, wanted in zip(ends, params, strict=True):
            torch.testing.assert_close(ours[i], wanted.detach(), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            wanted_loss = nn.functional.cross_entropy(torch.tanh(x @ params[0]) @ params[1], y)
        torch.testing.assert_close(losses(ends)[i], wanted_loss, rtol=1e-4, atol=1e-5)


def test_the_largest_stable_rate_is_where_the_loss_first_rises_above_its_start() -> None:
    from corollary.papers.optim.lr_vs_batch import crossing

    rates = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    assert crossing(rates, torch.tensor([-1.0, -3.0, -1.0, 3.0, 9.0])) == pytest.approx(4 * 2**0.25)
    with pytest.raises(ValueError, match="does not hold the largest stable rate"):
        crossing(rates, torch.full((5,), -1.0))


def _network_run(cut: int | None) -> list[Tensor]:
    def build() -> tuple[nn.Module, torch.optim.Optimizer, SLQLearningRate]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
        x, y = torch.randn(16, 4), torch.randint(3, (16,))

        def loss() -> Tensor:
            return nn.functional.cross_entropy(net(x), y)

        net.loss = loss  # type: ignore[assignment]
        return (
            net,
            optimizer,
            SLQLearningRate(optimizer, lambda: HessianOperator(loss(), net.parameters()), interval=4, lanczos_steps=5),
        )

    def train(net: Any, optimizer: torch.optim.Optimizer, schedule: SLQLearningRate, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            net.loss().backward()
            optimizer.step()
            schedule.step()

    net, optimizer, schedule = build()
    train(net, optimizer, schedule, 10 if cut is None else cut)
    if cut is not None:
        states = copy.deepcopy((net.state_dict(), optimizer.state_dict(), schedule.state_dict()))
        assert "hessian" not in states[2]
        assert all(isinstance(v, int | float | bool | list) or v is None for v in states[2].values())
        net, optimizer, schedule = build()
        net.load_state_dict(states[0])
        optimizer.load_state_dict(states[1])
        schedule.load_state_dict(states[2])
        train(net, optimizer, schedule, 10 - cut)
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("cut", [3, 4, 6])
def test_a_resumed_run_repeats_the_whole_one_bit_by_bit(cut: int) -> None:
    for a, b in zip(_network_run(cut), _network_run(None), strict=True):
        assert torch.equal(a, b)


def test_sequential_lr_makes_it_look_anew_at_its_own_start() -> None:
    seen: list[int] = []
    optimizer = _group()
    clock = {"t": 0}

    def hessian() -> Tensor:
        seen.append(clock["t"])
        return torch.eye(2) * (clock["t"] + 1)

    warm = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.1, total_iters=5)
    schedule = SLQLearningRate(optimizer, hessian, learn_momentum=False)
    joined = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, schedule], milestones=[3])
    for t in range(1, 5):
        optimizer.step()
        clock["t"] = t
        joined.step()
    assert seen[-1] == 3
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2 / (4 + 4), rel=1e-6)


def test_larger_batches_get_larger_rates_by_themselves() -> None:
    """Samples of rank one in 256 dimensions: the batch Hessian's largest eigenvalue is about (1 + √(256/b))²."""
    rates, sizes, n = [], (8, 32, 2048), 256
    for b in sizes:
        x = torch.randn(b, n, generator=torch.Generator().manual_seed(b))
        optimizer = _group()
        SLQLearningRate(optimizer, lambda x=x, b=b: x.T @ x / b, lanczos_steps=40, learn_momentum=False)
        rates.append(optimizer.param_groups[0]["lr"])
    wanted = [2 / (1 + math.sqrt(n / b)) ** 2 for b in sizes]
    assert rates == pytest.approx(wanted, rel=0.2)
    assert rates[0] < rates[1] < rates[2]


def test_negative_curvature_alone_is_taken_by_its_size() -> None:
    optimizer = _group()
    schedule = SLQLearningRate(optimizer, lambda: -4 * torch.eye(3), learn_momentum=False)
    assert schedule.get_last_lr()[0] == pytest.approx(2 / 8)


# --------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: batch_eigenvalues([1.0], 1.0, 1), TypeError, "must be a real floating tensor, not list"),  # type: ignore[arg-type]
        (lambda: batch_eigenvalues(torch.tensor([1]), 1.0, 1), TypeError, "not torch.int64"),
        (lambda: batch_eigenvalues(torch.zeros(0), 1.0, 1), ValueError, r"is empty, of shape \(0,\)"),
        (lambda: batch_eigenvalues(torch.tensor([math.nan]), 1.0, 1), ValueError, "'eigenvalues' has a NaN"),
        (lambda: batch_eigenvalues(torch.ones(1), -1.0, 1), ValueError, "'noise' must be a finite variance"),
        (lambda: batch_eigenvalues(torch.ones(1), 1.0, 0), ValueError, "'batch_size' must be at least 1, not 0"),
        (
            lambda: batch_eigenvalues(torch.ones(1), 1.0, 9, dataset_size=8),
            ValueError,
            "'dataset_size' must be at least 'batch_size' = 9, not 8",
        ),
        (lambda: batch_noise(torch.eye(2), [], torch.eye(2), 1), ValueError, "'batches' is empty"),
        (lambda: batch_noise(torch.eye(2), [torch.eye(2)], torch.ones(2), 1), ValueError, r"must be \(2, k\)"),
        (lambda: batch_noise(torch.eye(2), [torch.eye(2)], 2 * torch.eye(2), 1), ValueError, "must have unit columns"),
        (lambda: scale_lr(-0.1, 1, 2), ValueError, "'lr' must be at least 0, not -0.1"),
        (lambda: scale_lr(math.nan, 1, 2), ValueError, "'lr' must be at least 0, not nan"),
        (lambda: scale_lr(torch.tensor(1), 1, 2), TypeError, "not torch.int64"),
        (lambda: scale_lr(torch.zeros(0), 1, 2), ValueError, "'lr' is empty"),
        (lambda: scale_lr(0.1, 0, 2), ValueError, "'from_batch' must be at least 1, not 0"),
        (lambda: scale_lr(0.1, 1, -2), ValueError, "'to_batch' must be at least 1, not -2"),
        (lambda: scale_lr(0.1, 1, 2, rule="cube"), ValueError, "'rule' is 'cube'; allowed: linear, sqrt"),
        (lambda: scale_lr(0.1, 1, 2, saturation=0.0), ValueError, "'saturation' must be above 0, not 0.0"),
    ],
)
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"hessian": torch.eye(2)}, TypeError, "'hessian' must be a function that gives an operator, not Tensor"),
        ({"interval": 0}, ValueError, "'interval' must be at least 1, not 0"),
        ({"lanczos_steps": 0}, ValueError, "'lanczos_steps' must be at least 1, not 0"),
        ({"memory": 1.0}, ValueError, r"'memory' must be in \[0, 1\), not 1.0"),
        ({"max_momentum": 1.0}, ValueError, r"'max_momentum' must be in \[0, 1\), not 1.0"),
        ({"hessian": lambda: torch.zeros(2, 2)}, ValueError, "'hessian' gave zero"),
        ({"hessian": lambda: torch.full((2, 2), math.nan)}, ValueError, "not finite at Lanczos step 1"),
        ({"hessian": lambda: torch.zeros(2, 3)}, ValueError, "'operator' must be square"),
    ],
)
def test_a_bad_option_is_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        SLQLearningRate(_group(), **{"hessian": lambda: torch.eye(2), **options})


def test_momentum_needs_an_optimizer_that_has_it() -> None:
    adam = torch.optim.Adam([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="group 0 of Adam has none"):
        SLQLearningRate(adam, lambda: torch.eye(2))
    SLQLearningRate(adam, lambda: torch.eye(2), learn_momentum=False)
    with pytest.raises(TypeError):
        SLQLearningRate("SGD", lambda: torch.eye(2))  # type: ignore[arg-type]

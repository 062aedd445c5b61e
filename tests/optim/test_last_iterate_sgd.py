"""Mirror steps against a convex solver and written-out formulas, step sizes against tables, and the theorems' bounds."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import cvxpy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from corollary.optim import CompositeMirrorDescent, LastIterateLR
from corollary.optim.last_iterate_sgd import COMPOSITES, _onto_simplex, _psi, _to_dual, _to_primal

PAIRS = [(mirror, h) for mirror, names in COMPOSITES.items() for h in names]
ETA, WEIGHT, RADIUS, LOW, HIGH = 0.4, 0.3, 0.8, -0.2, 0.5


def _start(mirror: str, n: int = 5, seed: int = 0) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(n)) if mirror == "entropy" else rng.normal(size=n)


def _solved(mirror: str, h: str | None, x: np.ndarray[Any, Any], g: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The step as a convex program: argmin h(y) + ⟨g, y⟩ + D_ψ(y, x) / η, ∇ψ by central differences."""
    y = cvxpy.Variable(len(x))
    psi: dict[str, tuple[Any, Any]] = {
        "euclidean": (cvxpy.sum_squares(y) / 2, lambda v: (v**2).sum() / 2),
        "p_norm": (cvxpy.square(cvxpy.norm(y, 1.5)), lambda v: (np.abs(v) ** 1.5).sum() ** (2 / 1.5)),
        "power": (2 / 3 * cvxpy.power(cvxpy.norm(y, 2), 3), lambda v: 2 / 3 * (v**2).sum() ** 1.5),
        "entropy": (-cvxpy.sum(cvxpy.entr(y)), lambda v: (v * np.log(v)).sum()),
    }
    term, value = psi[mirror]
    step = 1e-6 * np.eye(len(x))
    slope = np.array([(value(x + e) - value(x - e)) / 2e-6 for e in step])
    objective = g @ y + (term - slope @ y) / ETA
    constraints = [y >= 0, cvxpy.sum(y) == 1] if mirror == "entropy" else []
    if h == "l1":
        objective += WEIGHT * cvxpy.norm(y, 1)
    elif h == "mirror":
        objective += WEIGHT * term
    elif h == "box":
        constraints += [y >= LOW, y <= HIGH]
    elif h == "ball":
        constraints += [cvxpy.norm(y, 2) <= RADIUS]
    elif h == "simplex":
        constraints += [y >= 0, cvxpy.sum(y) == RADIUS]
    cvxpy.Problem(cvxpy.Minimize(objective), constraints).solve(solver=cvxpy.CLARABEL)
    return np.asarray(y.value)


def _options(mirror: str, h: str | None) -> dict[str, Any]:
    return {
        "lr": ETA, "mirror": mirror, "composite": h, "weight": WEIGHT, "radius": RADIUS, "low": LOW, "high": HIGH,
    }  # fmt: skip


def _stepped(x: Any, g: Any, **options: Any) -> Tensor:
    param = nn.Parameter(torch.as_tensor(x).clone())
    param.grad = torch.as_tensor(g).clone()
    CompositeMirrorDescent([param], **options).step()
    return param.detach()


@pytest.mark.parametrize(("mirror", "h"), PAIRS)
def test_a_step_is_what_a_convex_solver_finds(mirror: str, h: str | None) -> None:
    for seed in range(3):
        x, g = _start(mirror, seed=seed), np.random.default_rng(seed + 10).normal(size=5)
        ours = _stepped(x, g, **_options(mirror, h)).numpy()
        np.testing.assert_allclose(ours, _solved(mirror, h, x, g), atol=2e-4)


@pytest.mark.parametrize("mirror", list(COMPOSITES))
@given(seed=st.integers(0, 10**6), order=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_the_two_maps_are_inverse_and_the_first_is_the_gradient(mirror: str, seed: int, order: float) -> None:
    group = {"mirror": mirror, "order": {"p_norm": 1.05 + 0.95 * order, "power": 2 + 4 * order}.get(mirror, 2.0)}
    x = torch.from_numpy(_start(mirror, seed=seed)).unsqueeze(0).requires_grad_()
    [slope] = torch.autograd.grad(_psi(x, group).sum(), x)
    dual = _to_dual(x.detach(), group)
    torch.testing.assert_close(dual, slope - (1 if mirror == "entropy" else 0), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(_to_primal(dual, group), x.detach(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("mirror", ["euclidean", "p_norm", "power", "entropy"])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_each_mirror_is_uniformly_convex_as_the_theorems_ask(mirror: str, seed: int) -> None:
    """D(x, y) >= ‖x - y‖^q / q: q = 2 in the norms 2, p and 1; q = order for the power."""
    group = {"mirror": mirror, "order": {"p_norm": 1.3, "power": 3.5}.get(mirror, 2.0)}
    x, y = (torch.from_numpy(_start(mirror, seed=s)).unsqueeze(0) for s in (seed, seed + 1))
    y.requires_grad_()
    base = _psi(y, group).sum()
    [slope] = torch.autograd.grad(base, y)
    divergence = float((_psi(x, group).sum() - base - (slope * (x - y)).sum()).detach())
    q = 3.5 if mirror == "power" else 2.0
    norm = float(torch.linalg.vector_norm((x - y).detach(), {"p_norm": 1.3, "entropy": 1.0}.get(mirror, 2.0)))
    assert divergence >= norm**q / q * (1 - 1e-9)


@given(seed=st.integers(0, 10**6), total=st.floats(0.1, 10))
@settings(max_examples=50, deadline=None)
def test_the_projection_onto_the_simplex_has_a_multiplier(seed: int, total: float) -> None:
    """y = max(x - τ, 0) with one τ and the right sum: the optimality conditions, which have one solution."""
    x = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3
    y = _onto_simplex(x, total)
    torch.testing.assert_close(y.sum(1), torch.full((3,), total, dtype=torch.float64))
    for row, image in zip(x, y, strict=True):
        tau = (row - image)[image > 0]
        assert float(tau.max() - tau.min()) < 1e-9
        assert bool((row[image == 0] <= tau.max() + 1e-9).all())


@pytest.mark.parametrize(("mirror", "h"), PAIRS)
def test_problems_side_by_side_are_the_problems_alone(mirror: str, h: str | None) -> None:
    xs = np.stack([_start(mirror, 6, seed) for seed in range(4)]).reshape(2, 2, 2, 3)
    gs = np.random.default_rng(0).normal(size=xs.shape)
    together = _stepped(xs, gs, batch_dims=2, **_options(mirror, h))
    for i, j in np.ndindex(2, 2):
        torch.testing.assert_close(together[i, j], _stepped(xs[i, j], gs[i, j], **_options(mirror, h)), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("mirror", "h"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_near_and_keeps_its_dtype(mirror: str, h: str | None, dtype: torch.dtype) -> None:
    x, g = torch.from_numpy(_start(mirror)).to(dtype), torch.from_numpy(_start("euclidean", seed=3)).to(dtype)
    ours = _stepped(x, g, **_options(mirror, h))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), _stepped(x.double(), g.double(), **_options(mirror, h)), rtol=2e-2, atol=5e-3)


def test_from_zero_and_back_to_zero_nothing_becomes_nan() -> None:
    for mirror in ("p_norm", "power"):
        moved = _stepped(torch.zeros(3), torch.tensor([1.0, 0.0, -2.0]), mirror=mirror, lr=0.1)
        assert moved.isfinite().all()
        assert (moved.sign() == torch.tensor([-1.0, 0.0, 1.0])).all()
        assert (_stepped(torch.zeros(3), torch.zeros(3), mirror=mirror) == 0).all()
        assert (_stepped(torch.ones(3), torch.zeros(3), mirror=mirror, composite="l1", weight=1e3) == 0).all()
    far = _stepped(torch.tensor([0.5, 0.5]), torch.tensor([1e4, 0.0]), mirror="entropy", lr=1.0)
    again = _stepped(far.clamp_min(1e-45), torch.tensor([0.0, 1e4]), mirror="entropy", lr=1.0)
    assert far.tolist() == [0.0, 1.0]
    assert again.isfinite().all()


def test_the_composite_value_is_h() -> None:
    x = torch.tensor([[0.5, -2.0], [1.0, 0.0]], dtype=torch.float64)
    for options, wanted in (
        ({"composite": "l1", "weight": 0.5}, 1.75),
        ({"composite": "mirror", "weight": 0.5}, 5.25 / 4),
        ({"composite": "mirror", "weight": 3.0, "mirror": "power"}, 2 * 5.25**1.5),
        ({"composite": "mirror", "weight": 3.0, "mirror": "power", "batch_dims": 1}, 2 * (4.25**1.5 + 1)),
        ({"composite": "box"}, 0.0),
    ):
        optimizer = CompositeMirrorDescent([nn.Parameter(x.clone())], **options)  # type: ignore[arg-type]
        assert optimizer.composite_value().item() == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "'lr' must be at least 0, not -1.0"),
        ({"mirror": "hyperbolic"}, "'mirror' must be one of euclidean, p_norm, power, entropy, not 'hyperbolic'"),
        ({"mirror": "p_norm", "composite": "box"}, "'composite' with mirror 'p_norm' must be one of"),
        ({"mirror": "p_norm", "order": 2.5}, r"'order' must be in \(1, 2\], not 2.5"),
        ({"mirror": "power", "order": 1.5}, "'order' must be at least 2 and finite, not 1.5"),
        ({"order": 3.0}, "'order' must be left out with mirror 'euclidean', not 3.0"),
        ({"weight": -1.0}, "'weight' must be at least 0 and finite, not -1.0"),
        ({"composite": "box", "low": 1.0, "high": 0.0}, "'high' must be at least 'low' = 1.0, not 0.0"),
        ({"composite": "ball", "radius": 0.0}, "'radius' must be above 0 and finite, not 0.0"),
        ({"batch_dims": 2}, r"'params\[0\]' has 1 dimensions; 'batch_dims' asks for at least 2"),
        ({"mirror": "entropy"}, r"'params\[0\]' must start inside the probability simplex"),
    ],
)
def test_a_bad_option_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CompositeMirrorDescent([nn.Parameter(torch.ones(3))], **options)


def test_bad_parameters_are_named_and_leave_no_group() -> None:
    optimizer = CompositeMirrorDescent([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match=r"'params\[0\]' is empty"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(0, 2))], "mirror": "power", "order": None})
    with pytest.raises(TypeError, match=r"'params\[0\]' is torch.complex64"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1


# ------------------------------------------------------------------------------------------------------------ step sizes


def _rates(steps: int, lr: float = 1.0, **options: Any) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=lr)
    schedule = LastIterateLR(optimizer, **options)
    found = []
    for _ in range(steps):
        found.append(float(schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
    return found


def test_rates_by_hand() -> None:
    assert _rates(4, lr=6.0) == pytest.approx([6, 6 / 2**0.5, 6 / 3**0.5, 3])
    assert _rates(3, lr=6.0, total_steps=9, decay="constant") == pytest.approx([2, 2, 2])
    assert _rates(10, lr=27.0, total_steps=9) == pytest.approx([9, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    assert _rates(3, lr=27.0, total_steps=9, smoothness=1 / 16) == pytest.approx([8, 8, 7])
    assert _rates(8, tail_index=1.5)[7] == pytest.approx(1 / 4)
    assert _rates(1, total_steps=8, tail_index=1.5)[0] == pytest.approx(1 / 4)
    assert _rates(3, strong_convexity=2.0) == pytest.approx([1 / 2, 1 / 3, 1 / 4])
    assert _rates(3, strong_convexity=2.0, smoothness=3.0) == pytest.approx([1 / 8, 1 / 9, 1 / 10])
    assert _rates(5, strong_convexity=2.0, smoothness=3.0, total_steps=3) == pytest.approx(
        [1 / 8, 1 / 8, 1 / 9, 1 / 10, 1 / 11]
    )


@given(
    mu=st.floats(0.01, 10) | st.just(0.0), smooth=st.floats(0.01, 10), total=st.integers(1, 50) | st.none(), lr=st.floats(0.01, 1)
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_rates_keep_to_the_lemmas_conditions(mu: float, smooth: float, total: int | None, lr: float) -> None:
    """Never above 1 / (2L) nor 1 / μ, and never rising."""
    rates = _rates(20, lr=lr, total_steps=total, strong_convexity=mu, smoothness=smooth)
    assert max(rates) <= min(1 / (2 * smooth), 1 / mu if mu else math.inf) * (1 + 1e-9)
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(rates))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"total_steps": 0}, "'total_steps' must be an integer of at least 1, or None, not 0"),
        ({"total_steps": 2.0}, "'total_steps' must be an integer"),
        ({"strong_convexity": -1.0}, "'strong_convexity' must be at least 0 and finite, not -1.0"),
        ({"smoothness": math.inf}, "'smoothness' must be at least 0 and finite, not inf"),
        ({"tail_index": 1.0}, r"'tail_index' must be in \(1, 2\], not 1.0"),
        ({"tail_index": 1.5, "strong_convexity": 1.0}, "'tail_index' must be 2 where 'strong_convexity' is above 0"),
        ({"decay": "cosine"}, "'decay' must be 'linear' or 'constant', not 'cosine'"),
    ],
)
def test_a_bad_schedule_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _rates(1, **options)


# --------------------------------------------------------------------------------------------------------------- theorems


def test_without_noise_the_last_iterate_of_the_linear_decay_keeps_zamani_and_glineurs_bound() -> None:
    """Subgradient descent on max_i |x_i|, convex and 1-Lipschitz: f(last) - f* <= 1 R / sqrt(T) for η = R, with T = N steps."""
    for total in (4, 16, 64, 256):
        x = nn.Parameter(torch.linspace(1, 2, 8, dtype=torch.float64))
        distance = float(x.detach().norm())
        optimizer = CompositeMirrorDescent([x], lr=distance)
        schedule = LastIterateLR(optimizer, total)
        for _ in range(total):
            gradient = torch.zeros_like(x)
            place = int(x.detach().abs().argmax())
            gradient[place] = x.detach()[place].sign()
            x.grad = gradient
            optimizer.step()
            schedule.step()
        assert float(x.detach().abs().max()) <= distance / math.sqrt(total) * (1 + 1e-9)


def test_a_quadratic_with_noise_has_the_variance_of_the_exact_recursion() -> None:
    """x' = (1 - η_t) x - η_t ξ from x = 1: the mean and variance of 20,000 runs follow their closed recursions."""
    generator = torch.Generator().manual_seed(0)
    x = nn.Parameter(torch.ones(20_000, 1, dtype=torch.float64))
    optimizer = CompositeMirrorDescent([x], lr=1.0, batch_dims=1)
    schedule = LastIterateLR(optimizer, strong_convexity=1.0, smoothness=1.0)
    mean, variance = 1.0, 0.0
    for _ in range(40):
        rate = float(optimizer.param_groups[0]["lr"])
        mean, variance = (1 - rate) * mean, (1 - rate) ** 2 * variance + rate**2
        x.grad = x.detach() + torch.randn(x.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
        schedule.step()
    assert float(x.detach().mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / 20_000))
    assert float(x.detach().var()) == pytest.approx(variance, rel=0.05)

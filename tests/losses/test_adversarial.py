"""Projected gradient, TRADES and the smooth adversarial comp-sum loss against closed forms and loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence

from corollary.losses import (
    SmoothAdversarialCompSumLoss,
    TradesLoss,
    comp_sum_loss,
    kl_shift,
    margin_shift,
    pgd,
    smooth_adversarial_comp_sum_loss,
    trades_loss,
)


def logits(seed: int, n: int = 6, classes: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z, moved = (2 * torch.randn(n, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    return z, moved, torch.randint(classes, (n,), generator=generator)


def linear(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(12, 2).double()


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_pgd_reaches_the_worst_point_of_a_linear_model(norm: str) -> None:
    """Two classes, linear scores: the loss is largest at a corner of the cube, or along the gradient in the ball."""
    model, x = linear(), torch.rand(5, 12, dtype=torch.float64)
    y = torch.tensor([0, 1, 0, 1, 1])
    direction = (model.weight[1 - y] - model.weight[y]).detach()
    step = direction.sign() if norm == "inf" else direction / direction.norm(dim=1, keepdim=True)
    found = pgd(model, x, y, eps=0.3, step_size=0.1, steps=40, norm=norm, clip=None, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, x + 0.3 * step, rtol=0, atol=1e-4 if norm == "2" else 1e-12)


@given(st.sampled_from(["inf", "2"]), st.floats(0.01, 2), st.integers(1, 4), st.booleans(), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_pgd_stays_in_the_ball_and_the_range(norm: str, eps: float, steps: int, start: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.rand(4, 3, 2, 2, generator=generator), torch.randint(2, (4,), generator=generator)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    found = pgd(
        model, x, y, eps=eps, step_size=eps, steps=steps, norm=norm, random_start=start, restarts=2, generator=generator
    )
    moved = (found - x).flatten(1)
    assert float(moved.norm(p=2 if norm == "2" else torch.inf, dim=1).max()) <= eps * (1 + 1e-5) + 1e-6
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    assert all(p.grad is None for p in model.parameters())
    assert not found.requires_grad


def test_pgd_restarts_keep_the_worst_and_repeat_with_the_generator() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))
    x, y = torch.rand(30, 6), torch.randint(3, (30,))

    def attack(restarts: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return pgd(model, x, y, eps=0.5, step_size=0.2, steps=2, restarts=restarts, generator=generator)

    def loss(point: Tensor) -> Tensor:
        return comp_sum_loss(model(point), y, reduction="none").detach()

    assert torch.equal(attack(3), attack(3))
    assert bool((loss(attack(4)) >= loss(attack(1)) - 1e-6).all())
    assert float((loss(attack(4)) - loss(attack(1))).max()) > 1e-3


def test_pgd_attacks_stacked_models_as_it_attacks_each() -> None:
    models, x, y = [linear(0), linear(1)], torch.rand(4, 12, dtype=torch.float64), torch.tensor([0, 1, 1, 0])

    def together(points: Tensor) -> Tensor:
        return torch.stack([model(point) for model, point in zip(models, points, strict=True)])

    def loss(z: Tensor, target: Tensor) -> Tensor:
        return comp_sum_loss(z.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)

    for norm in ("inf", "2"):
        setting = {"eps": 0.2, "step_size": 0.1, "steps": 3, "norm": norm, "random_start": False}
        both = pgd(together, x.expand(2, -1, -1), y.expand(2, -1), loss=loss, **setting)  # type: ignore[arg-type]
        alone = torch.stack([pgd(model, x, y, **setting) for model in models])  # type: ignore[arg-type]
        torch.testing.assert_close(both, alone)


def test_pgd_names_bad_input() -> None:
    model, x, y = linear(), torch.rand(3, 12, dtype=torch.float64), torch.tensor([0, 1, 1])
    good = {"eps": 0.1, "step_size": 0.1, "steps": 1}
    cases = [({"eps": 0.0}, "eps must be above 0"), ({"steps": 0}, "steps must be at least 1, got 0")]
    cases += [({"norm": "1"}, "norm is '1'; allowed: inf, 2"), ({"step_size": math.nan}, "step_size must be above 0")]
    cases += [({"restarts": 0}, "restarts must be at least 1"), ({"loss": lambda z, _: z.sum()}, "one value per sample")]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            pgd(model, x, y, **{**good, **change})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"begin with the shape of y, \(3,\)"):
        pgd(model, x[:2], y, **good)  # type: ignore[arg-type]


def test_shifts_against_loops() -> None:
    z, moved, y = logits(0)
    for i, c in enumerate(y.tolist()):
        terms = [((moved[i, c] - moved[i, k]) - (z[i, c] - z[i, k])).item() ** 2 for k in range(4) if k != c]
        assert margin_shift(z, moved, y)[i].item() == pytest.approx(math.sqrt(sum(terms)))
    expected = kl_divergence(Categorical(logits=z), Categorical(logits=moved))
    torch.testing.assert_close(kl_shift(z, moved), expected)


@pytest.mark.parametrize("tau", [0.0, 1.0, 1.5])
def test_smooth_loss_and_trades_are_their_terms(tau: float) -> None:
    z, moved, y = logits(1)
    smooth = SmoothAdversarialCompSumLoss(tau, rho=0.5, nu=0.3, reduction="none")(z, moved, y)
    gaps = torch.exp((z - z.gather(1, y[:, None])) / 0.5).sum(1) - 1
    clean = gaps.log1p() if tau == 1 else ((1 + gaps) ** (1 - tau) - 1) / (1 - tau)
    torch.testing.assert_close(smooth, clean + 0.3 * margin_shift(z, moved, y))
    cross_entropy = -torch.log_softmax(z, 1).gather(1, y[:, None])[:, 0]
    expected = cross_entropy + 2.5 * kl_divergence(Categorical(logits=z), Categorical(logits=moved))
    torch.testing.assert_close(TradesLoss(2.5, reduction="none")(z, moved, y), expected)


@given(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0]), st.floats(0.1, 5), st.integers(2, 6), st.integers(0, 999))
@settings(max_examples=100, deadline=None)
def test_smooth_loss_bounds_the_adversarial_margin_loss(tau: float, rho: float, classes: int, seed: int) -> None:
    """With ``nu = sqrt(C - 1) / rho`` it is above the comp-sum rho-margin loss of every attacked point."""
    z, moved, y = logits(seed, classes=classes)
    margins = moved.gather(1, y[:, None]) - moved
    inside = (1 - margins / rho).clamp(0, 1).sum(1) - 1  # the true class's own margin 0 adds 1
    attacked = inside.log1p() if tau == 1 else ((1 + inside) ** (1 - tau) - 1) / (1 - tau)
    nu = math.sqrt(classes - 1) / rho
    bound = smooth_adversarial_comp_sum_loss(z, moved, y, tau=tau, rho=rho, nu=nu, reduction="none")
    assert bool((attacked <= bound + 1e-9 * bound.abs()).all())


def test_unmoved_points_cost_nothing_and_have_a_gradient() -> None:
    z, _, y = logits(2)
    z.requires_grad_()
    loss = smooth_adversarial_comp_sum_loss(z, z.detach(), y, nu=5.0)
    torch.testing.assert_close(loss, comp_sum_loss(z, y))
    loss.backward()
    assert z.grad is not None
    assert bool(z.grad.isfinite().all())


@pytest.mark.parametrize("loss", [smooth_adversarial_comp_sum_loss, trades_loss])
def test_bad_pairs_are_named(loss: object) -> None:
    z, moved, y = logits(3)
    assert callable(loss)
    with pytest.raises(ValueError, match=r"adversarial_logits must be shaped like logits, \(6, 4\), got \(5, 4\)"):
        loss(z, moved[:5], y)
    with pytest.raises(ValueError, match=r"logits must have shape \(N, C\)"):
        loss(z[None], moved[None], y)
    with pytest.raises(TypeError, match=r"class indices \(torch.int64\), got torch.float64"):
        loss(z, moved, torch.softmax(z, 1))
    with pytest.raises(ValueError, match=r"target holds class -100; allowed: 0 to 3$"):
        loss(z, moved, y.clone().fill_(-100))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="rho must be above 0"):
        SmoothAdversarialCompSumLoss(rho=0)
    with pytest.raises(ValueError, match="nu must be at least 0"):
        SmoothAdversarialCompSumLoss(nu=-1)
    with pytest.raises(ValueError, match="beta must be at least 0"):
        TradesLoss(-1)

"""Comp-sum losses against their definition written as loops, against torch, and against the paper's theorems."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from corollary.losses import CompSumLoss, comp_sum_bound, comp_sum_loss, comp_sum_transform
from corollary.papers.losses.comp_sum import _conditional_best, _reachable, _scores

TAUS = (0.0, 0.3, 0.9, 1.0, 1.2, 1.7, 2.0, 3.0)


def phi(tau: float, u: float) -> float:
    return math.log(1 + u) if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau)


def definition(scores: Tensor, y: int, tau: float) -> float:
    """``Phi^tau(sum_{y' != y} exp(h_y' - h_y))``, term by term."""
    h = scores.tolist()
    return phi(tau, sum(math.exp(h[k] - h[y]) for k in range(len(h)) if k != y))


def batch(seed: int = 0, shape: tuple[int, ...] = (7, 5)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return logits, torch.randint(shape[1], shape[:1] + shape[2:], generator=generator)


@pytest.mark.parametrize("tau", TAUS)
def test_definition(tau: float) -> None:
    logits, target = batch()
    expected = [definition(h, int(y), tau) for h, y in zip(logits, target, strict=True)]
    torch.testing.assert_close(comp_sum_loss(logits, target, tau=tau, reduction="none"), torch.tensor(expected).double())
    assert comp_sum_loss(logits[0], target[0], tau=tau).item() == pytest.approx(expected[0])


@pytest.mark.parametrize("tau", TAUS)
def test_weight_ignore_index_and_probabilities(tau: float) -> None:
    logits, target = batch(1)
    target[2] = target[5] = -100
    weight = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0], dtype=torch.float64)
    terms = [(float(weight[y]), definition(h, int(y), tau)) for h, y in zip(logits, target, strict=True) if y != -100]
    expected = sum(w * v for w, v in terms) / sum(w for w, _ in terms)
    assert comp_sum_loss(logits, target, tau=tau, weight=weight).item() == pytest.approx(expected)
    assert comp_sum_loss(logits, target, tau=tau).item() == pytest.approx(sum(v for _, v in terms) / len(terms))
    assert comp_sum_loss(logits, target, tau=tau, reduction="none")[2] == 0

    share = torch.softmax(logits.flip(0), 1)
    rows = zip(logits, share, strict=True)
    soft = [sum(float(q[y] * weight[y]) * definition(h, y, tau) for y in range(5)) for h, q in rows]
    torch.testing.assert_close(
        comp_sum_loss(logits, share, tau=tau, weight=weight, reduction="none"), torch.tensor(soft).double()
    )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("tau", [1.0, 1.0 + 1e-13])
def test_cross_entropy_at_one(tau: float, reduction: str) -> None:
    logits, target = batch(2, (4, 5, 3))
    target[0, 1] = 4 if target[0, 1] != 4 else 3
    weight = torch.rand(5, dtype=torch.float64)
    ignore = int(target[1, 1])
    ours = comp_sum_loss(logits, target, tau=tau, weight=weight, ignore_index=ignore, reduction=reduction)
    theirs = F.cross_entropy(logits, target, weight, ignore_index=ignore, reduction=reduction)
    torch.testing.assert_close(ours, theirs)


def test_named_members() -> None:
    logits, target = batch(3)
    p = torch.softmax(logits, 1)
    own, one_hot = p.gather(1, target[:, None])[:, 0], F.one_hot(target, 5)
    gap = (logits - logits.gather(1, target[:, None])).exp()
    torch.testing.assert_close(comp_sum_loss(logits, target, tau=0, reduction="none"), gap.sum(1) - 1)
    torch.testing.assert_close(comp_sum_loss(logits, target, tau=1.7, reduction="none"), (1 - own**0.7) / 0.7)
    torch.testing.assert_close(comp_sum_loss(logits, target, tau=2, reduction="none"), (p - one_hot).abs().sum(1) / 2)


@pytest.mark.parametrize("tau", TAUS)
def test_gradient_closed_form(tau: float) -> None:
    logits, target = batch(4)
    logits.requires_grad_()
    comp_sum_loss(logits, target, tau=tau, reduction="sum").backward()
    p = torch.softmax(logits.detach(), 1)
    own = p.gather(1, target[:, None])
    torch.testing.assert_close(logits.grad, own ** (tau - 1) * (p - F.one_hot(target, 5)))


@given(st.floats(0, 3), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_continuous_and_decreasing_in_tau(tau: float, seed: int) -> None:
    logits, target = batch(seed)
    here = comp_sum_loss(logits, target, tau=tau, reduction="none")
    near = comp_sum_loss(logits, target, tau=tau + 1e-7, reduction="none")
    assert bool((near <= here).all())
    assert bool(((here - near) <= 1e-5 * (1 + here) ** 2).all())


@given(st.floats(0, 1), st.integers(0, 50), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_convex_up_to_one(tau: float, seed: int, share: float) -> None:
    (left, target), (right, _) = batch(seed), batch(seed + 100)
    between = comp_sum_loss(share * left + (1 - share) * right, target, tau=tau, reduction="none")
    ends = [comp_sum_loss(h, target, tau=tau, reduction="none") for h in (left, right)]
    assert bool((between <= share * ends[0] + (1 - share) * ends[1] + 1e-9 * (1 + between.abs())).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [0.0, 0.5, 0.999, 1.0, 1.5, 2.0])
def test_extreme_logits(dtype: torch.dtype, tau: float) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]] * 3, dtype=dtype, requires_grad=True)
    loss = comp_sum_loss(logits, torch.tensor([0, 1, 2]), tau=tau, reduction="none")
    loss.sum().backward()
    assert logits.grad is not None
    assert bool(loss.isfinite().all())
    assert bool(logits.grad.isfinite().all())
    assert loss[0] == 0
    assert bool((loss[1] >= loss[2]).item())
    if tau > 1:  # the bound 1 / (tau - 1) is reached, and a hopeless sample no longer pulls
        torch.testing.assert_close(loss[1], torch.tensor(1 / (tau - 1), dtype=dtype))
        assert logits.grad[1].abs().max() == 0
    else:  # a wrong sample is pulled from the class it takes to its own
        assert logits.grad[1, 0] > 0
        assert logits.grad[1, 1] < 0


def test_sum_exponential_is_exact_below_saturation_and_grows_above() -> None:
    gap = torch.tensor([1.0, 20.0, 80.0, 84.0, 90.0, 1e3, 1e5], requires_grad=True)
    logits = torch.stack([torch.zeros_like(gap), gap], 1)
    loss = comp_sum_loss(logits, torch.zeros(7, dtype=torch.int64), tau=0, reduction="none")
    torch.testing.assert_close(loss[:4], gap[:4].detach().exp(), rtol=1e-5, atol=0)
    assert bool((loss.diff() > 0).all())
    assert bool(loss.isfinite().all())
    (slope,) = torch.autograd.grad(loss.sum(), gap)
    assert bool((slope > 0).all())


def test_transform_closed_forms() -> None:
    beta = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(comp_sum_transform(beta, 0, 4), 1 - (1 - beta**2).sqrt())
    torch.testing.assert_close(comp_sum_transform(beta, 2, 4), beta / 4)
    assert comp_sum_transform(torch.tensor(1.0), 1, 4).item() == pytest.approx(math.log(2))
    for tau in (1 - 1e-6, 1 + 1e-6):
        torch.testing.assert_close(comp_sum_transform(beta, tau, 4), comp_sum_transform(beta, 1, 4), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tau", TAUS)
def test_bound_inverts_the_transform_and_has_the_quadratic_majorant(tau: float) -> None:
    beta = torch.linspace(0, 1, 101, dtype=torch.float64)
    excess = comp_sum_transform(beta, tau, 5)
    torch.testing.assert_close(comp_sum_bound(excess, tau, 5), beta, rtol=1e-6, atol=1e-7)
    assert comp_sum_bound(torch.tensor([0.0, 1e6]), tau, 5).tolist() == [0.0, 1.0]
    simple = (
        (2**tau * (2 - tau) * excess).sqrt()
        if tau < 1
        else (2 * 5 ** (tau - 1) * excess).sqrt()
        if tau < 2
        else (tau - 1) * 5 ** (tau - 1) * excess
    )
    assert bool((beta <= simple + 1e-9).all())


@pytest.mark.parametrize("tau", [0.0, 0.4, 1.0])
def test_transform_is_the_least_regret_of_two_classes(tau: float) -> None:
    """Brute force: over the shares that a wrong prediction may give, the regret is least at the transform."""
    for beta in (0.1, 0.5, 0.9):
        p = torch.tensor([(1 + beta) / 2, (1 - beta) / 2], dtype=torch.float64)
        share = torch.linspace(1e-6, 1 - 1e-6, 1_000_001, dtype=torch.float64)
        values = torch.stack([share, 1 - share])
        losses = -values.log() if tau == 1 else (values ** (tau - 1) - 1) / (1 - tau)
        risk = (p[:, None] * losses).sum(0)
        wrong = risk[share <= 0.5].min() - risk.min()
        assert wrong.item() == pytest.approx(comp_sum_transform(torch.tensor(beta), tau, 2).item(), rel=1e-5)


@given(st.sampled_from([0.0, 0.5, 1.0, 1.3, 1.8, 2.0, 2.5]), st.integers(2, 5), st.integers(0, 10_000))
@settings(max_examples=150, deadline=None)
def test_conditional_regret_is_bounded(tau: float, classes: int, seed: int) -> None:
    """One input, all scores allowed: the theorem's inequality."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(classes, generator=generator, dtype=torch.float64) ** 2
    p = p / p.sum()
    scale = 10 ** torch.empty(400, 1, dtype=torch.float64).uniform_(-3, 1, generator=generator)
    scores = scale * torch.randn(400, classes, generator=generator, dtype=torch.float64)
    risk = comp_sum_loss(scores, p.expand(400, -1), tau=tau, reduction="none")
    best = _conditional_best(p, tau)
    excess = (risk - best).clamp(min=0)
    zero_one = p.max() - p[scores.argmax(1)]
    assert bool((zero_one <= comp_sum_bound(excess, tau, classes) + 1e-7).all())


def test_saturation_edge_near_one_in_half_precision() -> None:
    logits = torch.tensor([[0.0, 3.0]], dtype=torch.float16)
    torch.testing.assert_close(comp_sum_loss(logits, torch.tensor([0]), tau=1 - 1e-5), comp_sum_loss(logits, torch.tensor([0])))


def test_bad_input_is_named() -> None:
    logits, target = batch()
    for tau in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="tau must be at least 0"):
            CompSumLoss(tau)
    with pytest.raises(ValueError, match=r"weight must have shape \(5,\).*got \(4,\)"):
        comp_sum_loss(logits, target, weight=torch.ones(4))
    with pytest.raises(ValueError, match="target holds class 9; allowed: 0 to 4, or ignore_index=-100"):
        comp_sum_loss(logits, target.clone().fill_(9), tau=1.5)
    with pytest.raises(ValueError, match="probabilities must be shaped like logits"):
        comp_sum_loss(logits, torch.rand(7))
    with pytest.raises(TypeError, match="target must be a tensor, got list"):
        comp_sum_loss(logits, [0] * 7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="beta must lie in"):
        comp_sum_transform(torch.tensor(1.5), 1, 3)
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        comp_sum_bound(torch.tensor(0.5), 1, 1)
    with pytest.raises(ValueError, match="excess must be at least 0"):
        comp_sum_bound(torch.tensor(-0.5), 1, 3)


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.5])
def test_second_derivative(tau: float) -> None:
    logits, target = batch(5)
    logits.requires_grad_()
    torch.autograd.gradgradcheck(lambda h: comp_sum_loss(h, target, tau=tau), (logits,))


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.5])
def test_autocast_gives_the_dtype_that_torch_gives(tau: float) -> None:
    logits, target = batch(6)
    half, weight = logits.to(torch.bfloat16), torch.ones(5)
    with torch.autocast("cpu", torch.bfloat16):
        for wanted in (target, torch.softmax(half, 1)):
            assert comp_sum_loss(half, wanted, tau=tau).dtype == F.cross_entropy(half, wanted).dtype
    assert comp_sum_loss(half, target, tau=tau, weight=weight).dtype == torch.bfloat16  # a weight of another dtype is taken


def test_weight_moves_with_the_module() -> None:
    module = CompSumLoss(0.5, weight=torch.ones(5))
    assert module.to(torch.float64).weight is not None
    assert "5 classes" in repr(module)
    assert list(module.state_dict()) == ["weight"]


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5, 2.0])
def test_best_conditional_risk_is_what_a_fit_of_the_scores_finds(tau: float) -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    scores = p.log().clone().requires_grad_()
    optimizer = torch.optim.Adam([scores], lr=0.05)
    for _ in range(2000):
        optimizer.zero_grad()
        comp_sum_loss(scores, p, tau=tau).backward()
        optimizer.step()
    found = comp_sum_loss(scores.detach(), p, tau=tau).item()
    assert found == pytest.approx(_conditional_best(p, tau).item(), abs=1e-6 if tau < 2 else 1e-3)


def test_reachable_predictions_are_those_that_lines_make() -> None:
    """Many random lines make every listed prediction, and never another."""
    x = torch.tensor([[-1.5, -0.2, 0.4, 2.0]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    lines = torch.randn(1, 200_000, 3, 2, generator=generator, dtype=torch.float64)
    made = {tuple(row) for row in _scores(lines, x).argmax(-1)[0].unique(dim=0).tolist()}
    assert made == {tuple(row) for row in _reachable(4, 3).tolist()}

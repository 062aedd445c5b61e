"""Fira and GaLore against the authors' package and arithmetic."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from corollary.models import MLP
from corollary.optim import Fira, GaLore, low_rank_groups
from corollary.optim.residuals import NormScaled

SHAPES = ((12, 7), (7, 12), (9, 9))


def weights(seed=0, dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(*shape, generator=generator, dtype=dtype)) for shape in shapes]


def descend(optimizer, params, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) + p.detach()
        optimizer.step()
    return [p.detach().clone() for p in params]


def test_galore_equals_galore_torch():
    """Ten steps in float64 against the authors' package; it decomposes in float32, which is all that separates the two."""
    from galore_torch import GaLoreAdamW

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = weights()
        group = {"params": theirs, "rank": 3, "update_proj_gap": 100, "scale": 0.25, "proj_type": "std"}
        expected = descend(GaLoreAdamW([group], lr=0.01, eps=1e-15), theirs, 10)
    ours = weights()
    got = descend(GaLore(ours, 0.01, eps=1e-15, rank=3, projector="svd"), ours, 10)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() < 1e-6


def fira_by_hand(params, steps, lr, rank, gap, seed=1):
    """The authors' loop over one parameter after the other, with their order of operations, written anew for numpy."""
    generator = torch.Generator().manual_seed(seed)
    params = [p.detach().numpy().copy() for p in params]
    states = [{} for _ in params]
    for t in range(steps):
        for p, s in zip(params, states, strict=True):
            g = torch.randn(p.shape, generator=generator, dtype=torch.float64).numpy() + p
            right = p.shape[0] >= p.shape[1]
            if t % gap == 0:
                u, _, vh = np.linalg.svd(g, full_matrices=False)
                q = vh[:rank].T if right else u[:, :rank]
                s["q"] = q * np.sign(q[np.abs(q).argmax(0), range(rank)])
            q = s["q"]
            low = g @ q if right else q.T @ g
            s["m"] = 0.9 * s.get("m", 0) + 0.1 * low
            s["v"] = 0.999 * s.get("v", 0) + 0.001 * low**2
            normed = s["m"] / (np.sqrt(s["v"]) + 1e-15)
            axis = 0 if low.shape[0] < low.shape[1] else 1
            factor = np.linalg.norm(normed, axis=axis, keepdims=True) / (np.linalg.norm(low, axis=axis, keepdims=True) + 1e-8)
            rest = (g - (low @ q.T if right else q @ low)) * factor
            size = np.linalg.norm(rest)
            if "size" in s:
                limiter = max(size / (s["size"] + 1e-8), 1.01) / 1.01
                rest, size = rest / limiter, size / limiter
            s["size"] = size
            rate = lr * math.sqrt(1 - 0.999 ** (t + 1)) / (1 - 0.9 ** (t + 1))
            p -= rate * ((normed @ q.T if right else q @ normed) + rest)
    return params


def test_fira_equals_the_authors_arithmetic_across_refreshes():
    ours = weights()
    expected = fira_by_hand(ours, 12, 0.01, rank=3, gap=5)
    got = descend(Fira(ours, 0.01, eps=1e-15, rank=3, update_proj_gap=5, projector="svd"), ours, 12)
    for a, b in zip(got, expected, strict=True):
        assert np.abs(a.numpy() - b).max() < 1e-9


def test_trains_a_model_as_adamw_does():
    x, y = torch.randn(256, 20, generator=torch.Generator().manual_seed(0)), torch.arange(256) % 5
    ends = []
    for kind in ("fira", "adamw"):
        torch.manual_seed(0)
        model = MLP(20, [64], 5)
        if kind == "fira":
            optimizer = Fira(low_rank_groups(model, rank=4), lr=0.02, seed=0)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
        for _ in range(60):
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ends.append(loss.item())
    assert ends[0] < 0.5 * math.log(5), "it hardly learnt"
    assert ends[1] < 0.5 * math.log(5), "the positive control hardly learnt"


def test_the_residual_never_grows_faster_than_its_limit():
    """Theorem of the limiter: whatever the gradients, ‖S_t‖ <= γ ‖S_{t-1}‖ (up to the 1e-8 that guards the division)."""
    [weight] = weights(shapes=[(8, 6)])
    optimizer = Fira([weight], 0.01, rank=2, growth_limit=1.05, projector="svd")
    generator = torch.Generator().manual_seed(3)
    norms = []
    for step in range(30):
        size = 1e4 if step in (10, 20) else 1.0
        weight.grad = size * torch.randn(8, 6, generator=generator, dtype=torch.float64)
        optimizer.step()
        norms.append(float(optimizer.state[weight]["residual_norm"]))
    assert all(b <= 1.05 * a + 1e-6 for a, b in itertools.pairwise(norms))


def test_first_step_has_full_rank_and_galores_has_not():
    for kind, expected in ((Fira, 6), (GaLore, 2)):
        weight = nn.Parameter(torch.zeros(8, 6, dtype=torch.float64))
        optimizer = kind([weight], 0.1, rank=2, projector="svd")
        weight.grad = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        assert int(torch.linalg.matrix_rank(weight.detach())) == expected


def test_scale_of_the_residual_does_not_depend_on_the_gradients_size():
    """φ R is unchanged when the gradient is multiplied: Adam's direction is, and so is the ratio times the residual."""
    ends = []
    for size in (1.0, 1000.0):
        weight = nn.Parameter(torch.zeros(8, 6, dtype=torch.float64))
        optimizer = Fira([weight], 0.1, eps=0.0, rank=2, projector="svd")
        weight.grad = size * torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        ends.append(weight.detach())
    assert (ends[0] - ends[1]).abs().max() < 1e-6


def test_growth_limit_is_checked():
    with pytest.raises(ValueError, match=r"'growth_limit' must be at least 1, or None, not 0\.5"):
        Fira(weights(), rank=2, growth_limit=0.5)
    assert Fira(weights(), rank=2, growth_limit=None).residual == NormScaled(None)

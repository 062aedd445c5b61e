"""TriAdaptLoRA and its growth against the rules written out by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from corollary.adapt import LoRA, RankGrowth, TriAdaptLoRA, adapt, load_adapter, save_adapter


def model(layers=4, **options):
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers))).double()
    return adapt(net, TriAdaptLoRA(**{"rank": 1, "max_rank": 5, **options}))


def cores(net):
    return [m.adapters["default"] for m in net]


def by_hand(norms, ranks, blocks, last, count, target, total, warmup, increment, threshold, limit):
    """One decision of the authors' allocator, over plain lists: the layers that grow, in order."""
    scores = [n / b - p for n, b, p in zip(norms, blocks, last, strict=True)]
    left = target - sum(ranks)
    progress = (count - warmup) / (total - warmup)
    if threshold == "linear":
        k = int(left * progress)
    elif threshold == "exponential":
        k = int(math.exp(progress * math.log(left)))
    else:
        k = threshold
    open_layers = [i for i in range(len(ranks)) if ranks[i] < limit]
    chosen = sorted(open_layers, key=lambda i: -scores[i])[: max(1, k)]
    grown = list(ranks)
    for i in chosen:
        add = min(increment, left, limit - grown[i])
        grown[i] += add
        left -= add
    return grown


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 50), threshold=st.sampled_from(["linear", "exponential", 2]), increment=st.integers(1, 3))
def test_growth_is_the_allocators(seed, threshold, increment):
    net = model()
    growth = RankGrowth(net, target_rank=3, total_steps=8, warmup=1, interval=2, increment=increment, threshold=threshold)
    generator = torch.Generator().manual_seed(seed)
    ranks, blocks, last = [1] * 4, [1] * 4, [0.0] * 4
    for count in range(1, 9):
        with torch.no_grad():
            for core in cores(net):
                core.lora_C.add_(torch.randn(5, 5, generator=generator, dtype=torch.float64))
        due = count > 1 and count % 2 == 0 and sum(ranks) < 12
        if due:
            norms = [np.linalg.norm(c.lora_C.detach().numpy()[:r, :r]) for c, r in zip(cores(net), ranks, strict=True)]
            grown = by_hand(norms, ranks, blocks, last, count, 12, 8, 1, increment, threshold, 5)
            last = [n / b for n, b in zip(norms, blocks, strict=True)]
            blocks = [b + (g > r) for b, g, r in zip(blocks, grown, ranks, strict=True)]
            ranks = grown
        growth.step()
        assert list(growth.ranks.values()) == ranks
        assert sum(ranks) <= 12


def test_what_rests_gets_no_gradient_and_changes_nothing():
    net = model(layers=1, rank=2)
    core = cores(net)[0]
    with torch.no_grad():
        core.lora_B.normal_()
    x = torch.randn(3, 6, dtype=torch.float64)
    before = net(x)
    before.square().sum().backward()
    assert not core.lora_C.grad[2:].any()
    assert not core.lora_C.grad[:, 2:].any()
    assert not core.lora_B.grad[:, 2:].any()
    assert not core.lora_A.grad[2:].any()
    with torch.no_grad():
        core.lora_A[2:] = 9
        core.lora_C[2:, :] = 9
        core.lora_C[:, 2:] = 9
    assert torch.equal(net(x), before)


def test_the_grown_rank_travels(tmp_path):
    net = model()
    growth = RankGrowth(net, target_rank=2, total_steps=4)
    for _ in range(4):
        growth.step()
    torch.manual_seed(0)
    other = load_adapter(
        nn.Sequential(*(nn.Linear(6, 6) for _ in range(4))).double(), save_adapter(net, tmp_path / "a.safetensors")
    )
    assert [c.rank for c in cores(other)] == [c.rank for c in cores(net)]
    again = RankGrowth(other, target_rank=2, total_steps=4)
    again.load_state_dict(growth.state_dict())
    assert again.count == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_rank": 0}, "'target_rank' must be at least 1"),
        ({"interval": 0}, "'interval' must be at least 1"),
        ({"warmup": 9}, "'warmup' must be at least 0 and below 'total_steps' = 4, not 9"),
        ({"threshold": "cubic"}, "'threshold' must be 'linear', 'exponential' or a number"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        RankGrowth(model(), **{"target_rank": 2, "total_steps": 4, **options})
    with pytest.raises(ValueError, match="not of TriAdaptLoRA"):
        RankGrowth(adapt(nn.Linear(3, 3), LoRA(rank=1)), target_rank=2, total_steps=4)
    with pytest.raises(ValueError, match="'max_rank' must be an int of at least 'rank' = 3, not 2"):
        TriAdaptLoRA(rank=3, max_rank=2)

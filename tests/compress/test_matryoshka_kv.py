"""MatryoshkaKV against loops over heads, tokens and coordinates in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from corollary.compress import (
    MatryoshkaAttention,
    MatryoshkaCache,
    cayley,
    decode,
    drawn_kv_ranks,
    inverse_cayley,
    kv_distillation_loss,
    kv_ranks,
    matryoshka_kv,
    search_kv_ranks,
    set_kv_ranks,
)
from corollary.models import GPT


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = GPT(40, dim=16, depth=2, heads=2, context=12).double()
    for parameter in net.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.4)
    return net


@pytest.fixture
def tokens():
    return torch.randint(40, (5, 12), generator=torch.Generator().manual_seed(1))


def turned(x, position, d):
    """One vector behind its rotary turn."""
    out = x.copy()
    for i in range(d // 2):
        angle = position * 10000.0 ** (-2 * i / d)
        out[i] = x[i] * math.cos(angle) - x[i + d // 2] * math.sin(angle)
        out[i + d // 2] = x[i + d // 2] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def naive_attention(layer, x, ranks):
    """Attention of one row (tokens, dim) whose keys and values are rebuilt from their leading coordinates."""
    heads, d = layer.heads, layer.head_dim
    weights = {n: getattr(layer, f"{n}_proj").weight.detach().numpy() for n in "qkvo"}
    bases = [cayley(s).detach().numpy() for s in (layer.key_skew, layer.value_skew)]
    means = [m.detach().numpy() for m in (layer.key_mean, layer.value_mean)]
    out = np.zeros_like(x)
    for t in range(len(x)):
        mixed = []
        for h in range(heads):
            own = slice(h * d, (h + 1) * d)
            q = turned(weights["q"][own] @ x[t], t, d)
            keys, values = [], []
            for s in range(t + 1):
                for rows, basis, mean, rank, vector in (
                    (keys, bases[0][h], means[0][h], int(ranks[0][h]), turned(weights["k"][own] @ x[s], s, d)),
                    (values, bases[1][h], means[1][h], int(ranks[1][h]), weights["v"][own] @ x[s]),
                ):
                    kept = [basis[:, c] @ (vector - mean) for c in range(rank)]
                    rows.append(mean + sum((a * basis[:, c] for c, a in enumerate(kept)), np.zeros(d)))
            e = np.array([math.exp(q @ k / math.sqrt(d)) for k in keys])
            mixed.append(sum(w * v for w, v in zip(e / e.sum(), values, strict=True)))
        out[t] = weights["o"] @ np.concatenate(mixed)
    return out


def test_at_full_ranks_it_is_the_model(model, tokens):
    small = matryoshka_kv(model, [tokens])
    torch.testing.assert_close(small(tokens), model(tokens), atol=1e-8, rtol=1e-8)
    assert sum(p.numel() for p in small.parameters() if p.requires_grad) == 2 * 2 * 2 * 8 * 9
    assert not any(isinstance(m, MatryoshkaAttention) for m in model.modules())


def test_cut_attention_by_loops(model, tokens):
    small = matryoshka_kv(model, [tokens])
    layer = small.blocks[0].attn
    with torch.no_grad():  # away from the start, where bases are principal components
        for parameter in (layer.key_skew, layer.value_skew, layer.key_mean, layer.value_mean):
            parameter.add_(0.3 * torch.randn_like(parameter))
    ranks = torch.tensor([[3, 0], [5, 8]])
    layer.ranks.copy_(ranks)
    x = torch.randn(1, 7, 16, dtype=torch.float64)
    np.testing.assert_allclose(
        layer(x)[0].detach().numpy(), naive_attention(layer, x[0].numpy(), ranks), rtol=1e-5, atol=1e-6
    )  # rotary tables are float32


def test_the_bases_start_as_principal_components(model, tokens):
    """Of all keys behind their turn and of all values, by numpy's covariance; in two batches as in one."""
    seen = []
    handle = model.blocks[1].attn.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().numpy()))
    small = matryoshka_kv(model, [tokens[:2], tokens[2:]])
    seen.clear()
    model(tokens)
    handle.remove()
    layer, inputs = small.blocks[1].attn, seen[0]
    for h in range(2):
        own = slice(8 * h, 8 * h + 8)
        k, v = (p.weight.detach().numpy()[own] for p in (layer.k_proj, layer.v_proj))
        keys = np.array([turned(k @ row[t], t, 8) for row in inputs for t in range(12)])
        values = inputs.reshape(-1, 16) @ v.T
        for rows, skew, mean in ((keys, layer.key_skew, layer.key_mean), (values, layer.value_skew, layer.value_mean)):
            np.testing.assert_allclose(mean[h].detach().numpy(), rows.mean(0), atol=1e-6)
            vectors = np.linalg.eigh(np.cov(rows.T, bias=True))[1][:, ::-1]
            for r in (1, 3, 6):
                ours = cayley(skew)[h, :, :r].detach().numpy()
                np.testing.assert_allclose(ours @ ours.T, vectors[:, :r] @ vectors[:, :r].T, atol=1e-4)


def test_cayley_and_back():
    x = torch.randn(50, 6, 6, dtype=torch.float64)
    q = cayley(x)
    torch.testing.assert_close(q @ q.mT, torch.eye(6, dtype=torch.float64).expand(50, 6, 6))
    assert (torch.linalg.det(q) - 1).abs().max() < 1e-10
    again = cayley(inverse_cayley(q))
    torch.testing.assert_close((again.mT @ q).abs(), torch.eye(6, dtype=torch.float64).expand(50, 6, 6), atol=1e-4, rtol=0)
    assert cayley(torch.randn(2, 3, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_reflected_basis_is_the_same_but_for_signs():
    q = torch.linalg.qr(torch.randn(20, 5, 5, dtype=torch.float64)).Q
    again = cayley(inverse_cayley(q))
    torch.testing.assert_close((again.mT @ q).abs(), torch.eye(5, dtype=torch.float64).expand(20, 5, 5), atol=1e-4, rtol=0)


# ----------------------------------------------------------------------------------------------------------------- ranks


def test_drawn_ranks_are_levels_and_come_off(model, tokens):
    small = matryoshka_kv(model, [tokens])
    set_kv_ranks(small, 7)
    seen = set()
    for seed in range(30):
        with drawn_kv_ranks(small, torch.Generator().manual_seed(seed), levels=4) as drawn:
            assert torch.equal(kv_ranks(small), drawn)
            seen |= set(drawn.flatten().tolist())
    assert seen == {2, 4, 6, 8}
    assert set(kv_ranks(small).flatten().tolist()) == {7}
    with pytest.raises(RuntimeError, match="boom"), drawn_kv_ranks(small, torch.Generator()):
        raise RuntimeError("boom")
    assert set(kv_ranks(small).flatten().tolist()) == {7}


@pytest.mark.parametrize("step", [1, 3])
def test_the_search_finds_the_best_of_convex_costs(model, tokens, step):
    """Where each place's cost is convex in what is cut and costs add up, greedy is exact: compared with all allocations."""
    small = matryoshka_kv(GPT(40, dim=12, depth=1, heads=2, context=12).double(), [tokens])
    slopes = torch.rand(4, 6, generator=torch.Generator().manual_seed(step)).cumsum(1)

    def table(ranks):
        return float(sum(slopes[i, : 6 - int(r)].sum() for i, r in enumerate(ranks)))

    found = search_kv_ranks(small, lambda: table(kv_ranks(small).flatten()), 0.5, step=step)
    most = 0.5 * 24
    levels = [r for r in range(7) if (6 - r) % step == 0]
    best = min(table(r) for r in itertools.product(levels, repeat=4) if sum(r) <= most)
    assert int(found.sum()) <= most
    if step == 1:
        assert table(found.flatten()) == pytest.approx(best, rel=1e-12)
    assert torch.equal(found, kv_ranks(small))


def test_the_loss_by_a_loop():
    logits, teacher = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    targets = torch.randint(4, (2, 3))
    total = 0.0
    for i, j in itertools.product(range(2), range(3)):
        p, t = (np.exp(x[i, j].numpy()) / np.exp(x[i, j].numpy()).sum() for x in (logits, teacher))
        total += 0.3 * sum(t * np.log(t / p)) - 0.7 * np.log(p[targets[i, j]])
    assert kv_distillation_loss(logits, teacher, targets, 0.3).item() == pytest.approx(total / 6, rel=1e-12)


# ----------------------------------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize("parts", [(12,), (5, 7), (1,) * 12, (3, 1, 1, 7)])
def test_decoding_is_the_whole_row(model, tokens, parts):
    small = matryoshka_kv(model, [tokens])
    ranks = torch.tensor([[[3, 8], [0, 1]], [[8, 8], [2, 5]]])
    set_kv_ranks(small, ranks)
    cache = MatryoshkaCache(ranks, max_batch_size=6, max_cache_len=12, dtype=torch.float64)
    before = cache.nbytes
    with torch.no_grad():
        found = torch.cat([decode(small, part, cache) for part in tokens.split(parts, 1)], 1)
        torch.testing.assert_close(found, small(tokens))
    assert cache.nbytes == before == 6 * 12 * int(ranks.sum()) * 8
    cache.crop(4)
    with torch.no_grad():
        torch.testing.assert_close(decode(small, tokens[:, 4:], cache), small(tokens)[:, 4:])
    cache.reset()
    with torch.no_grad():
        torch.testing.assert_close(decode(small, tokens, cache), small(tokens))


def test_what_is_refused(model, tokens):
    small = matryoshka_kv(model, [tokens])
    with pytest.raises(TypeError, match="'model'"):
        matryoshka_kv(nn.Linear(2, 2), [tokens])
    with pytest.raises(ValueError, match="no batch"):
        matryoshka_kv(model, [])
    with pytest.raises(ValueError, match="no MatryoshkaAttention"):
        kv_ranks(model)
    for ranks in (9, -1, torch.ones(2, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="'ranks'"):
            set_kv_ranks(small, ranks)
    for budget in (0.0, 1.1):
        with pytest.raises(ValueError, match="'budget'"):
            search_kv_ranks(small, lambda: 0.0, budget)
    with pytest.raises(ValueError, match="'ranks'"):
        MatryoshkaCache(torch.ones(2, 3), max_batch_size=1, max_cache_len=1)
    cache = MatryoshkaCache(kv_ranks(small), max_batch_size=1, max_cache_len=4, dtype=torch.float64)
    with pytest.raises(ValueError, match="do not fit"):
        decode(small, tokens[:1], cache)
    assert cache.get_seq_length() == 0

"""Maestro's layers against loops, its penalty against its definition, its theorems against numpy's decomposition."""

import numpy as np
import pytest
import torch
from torch import nn

from corollary.compress import (
    MaestroConv2d,
    MaestroLinear,
    RankSampler,
    decompose,
    hierarchical_group_lasso,
    maestro_layers,
    ranks_set,
    shrink,
)
from corollary.models import GPT, ResNet


def naive_conv(x, weight, bias, stride, padding):
    """A convolution by its definition."""
    n, c, h, w = x.shape
    o, _, kh, kw = weight.shape
    padded = np.zeros((n, c, h + 2 * padding, w + 2 * padding))
    padded[:, :, padding : padding + h, padding : padding + w] = x
    oh, ow = (h + 2 * padding - kh) // stride + 1, (w + 2 * padding - kw) // stride + 1
    out = np.zeros((n, o, oh, ow))
    for i, j, y, z in np.ndindex(n, o, oh, ow):
        patch = padded[i, :, y * stride : y * stride + kh, z * stride : z * stride + kw]
        out[i, j, y, z] = (patch * weight[j]).sum() + bias[j]
    return out


@pytest.mark.parametrize("rank", [0, 1, 3, 6])
def test_convolution_equals_the_loop_with_the_truncated_kernel(rank):
    torch.manual_seed(0)
    layer = MaestroConv2d(2, 6, 3, stride=2, padding=1, dtype=torch.float64)
    layer.set_rank(rank)
    x = torch.randn(2, 2, 5, 7, dtype=torch.float64)
    u, v = layer.weight_out.detach().numpy(), layer.weight_in.detach().numpy()
    kernel = sum((np.outer(u[:, i], v[i]) for i in range(rank)), np.zeros((6, 18))).reshape(6, 2, 3, 3)
    expected = naive_conv(x.numpy(), kernel, layer.bias.detach().numpy(), 2, 1)
    assert np.abs(layer(x).detach().numpy() - expected).max() < 1e-12


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_linear_equals_the_sum_of_its_components(rank):
    torch.manual_seed(0)
    layer = MaestroLinear(5, 3, dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = layer.bias.detach().numpy() + sum(
        np.outer(x.numpy() @ layer.weight_in[i].detach().numpy(), layer.weight_out[:, i].detach().numpy()) for i in range(rank)
    )
    layer.set_rank(rank)
    assert np.abs(layer(x).detach().numpy() - expected).max() < 1e-12


def test_penalty_is_its_definition_and_has_gradients_at_zero():
    torch.manual_seed(0)
    model = nn.Sequential(MaestroLinear(5, 4, dtype=torch.float64), MaestroConv2d(2, 3, 3, dtype=torch.float64))
    model[0].set_rank(3)
    expected = 0.0
    for layer in model:  # both have three components in use
        u, v = layer.weight_out.detach().numpy(), layer.weight_in.detach().numpy()
        for i in range(3):
            expected += np.sqrt(sum((u[:, j] ** 2).sum() for j in range(i, 3)))
            expected += np.sqrt(sum((v[j] ** 2).sum() for j in range(i, 3)))
    assert abs(hierarchical_group_lasso(model).item() - expected) < 1e-12
    with torch.no_grad():
        model[0].weight_in[2].zero_()
        model[0].weight_out[:, 2].zero_()
    hierarchical_group_lasso(model).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_penalty_falls_on_what_comes_last():
    """With all components alike, the gradient's norm grows with the index: the tail is pushed out first."""
    layer = MaestroLinear(4, 4, dtype=torch.float64)
    with torch.no_grad():
        layer.weight_in.copy_(torch.eye(4))
        layer.weight_out.copy_(torch.eye(4))
    hierarchical_group_lasso(layer).backward()
    norms = layer.weight_in.grad.norm(dim=1)
    assert (norms.diff() > 0).all()


def test_sampler_draws_every_pair_once_and_skips_what_was_shrunk():
    model = nn.Sequential(MaestroLinear(4, 3), MaestroConv2d(1, 2, 3))
    sampler = RankSampler(model, seed=1)
    drawn = [sampler.draw() for _ in range(5)]
    assert {(id(layer), rank) for layer, rank in drawn} == {(id(m), r) for m in model for r in range(1, m.rank + 1)}
    model[0].set_rank(0)
    assert {sampler.draw()[1] for _ in range(2)} == {1, 2}
    model[1].set_rank(0)
    with pytest.raises(ValueError, match="no rank left to draw"):
        sampler.draw()
    with pytest.raises(KeyError), RankSampler(model := nn.Sequential(MaestroLinear(4, 3))):
        raise KeyError
    assert model[0].sampled is None, "a failed pass leaves the layer cut"


def train(layer, x, y, steps, lr, ordered=True, seed=0):
    sampler = RankSampler(layer, seed)
    optimizer = torch.optim.SGD(layer.parameters(), lr, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        if ordered:
            with sampler:
                out = layer(x)
        else:
            out = layer(x)
        (out - y).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("task", ["svd", "pca"])
def test_ordered_dropout_finds_the_truncated_decomposition(task):
    """Theorem 4.1 and its corollary, on small instances with a known gap between singular values."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, 4)))[0] for n in (6, 4))
    a = left @ np.diag([2.0, 1.3, 0.8, 0.4]) @ right.T
    torch.manual_seed(0)
    target = torch.as_tensor(a)
    layer = MaestroLinear(4, 6 if task == "svd" else 4, bias=False, dtype=torch.float64)
    x = torch.eye(4, dtype=torch.float64) if task == "svd" else target
    train(nn.Sequential(layer), x, target.T if task == "svd" else target, 3000, 0.02)
    u, s, vh = np.linalg.svd(a if task == "svd" else a.T @ a)
    for r in range(1, 5):
        best = (u[:, :r] * s[:r]) @ vh[:r] if task == "svd" else u[:, :r] @ u[:, :r].T
        assert np.abs(layer.truncated_weight(r).detach().numpy() - best).max() < 1e-4


def test_decomposing_a_model_changes_nothing_and_shrinking_cuts_what_is_nothing():
    torch.manual_seed(0)
    net = ResNet(1, 10, width=8).eval().double()
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    before = net(x)
    decompose(net, skip=["head"])
    assert (net(x) - before).abs().max() < 1e-10
    layers = maestro_layers(net)
    assert "head" not in layers
    assert len(layers) == 9
    with torch.no_grad():
        for layer in layers.values():
            layer.weight_in[2:] = 0
    assert set(shrink(net, 1e-8).values()) == {2}
    after = net(x)
    copy = decompose(ResNet(1, 10, width=8).eval().double(), skip=["head"])
    copy.load_state_dict(net.state_dict())
    assert [m.rank for m in maestro_layers(copy).values()] == [m.rank for m in layers.values()]
    assert torch.equal(copy(x), after)
    with ranks_set(net, dict.fromkeys(layers, 0)):
        assert all(m.active_rank == 0 for m in layers.values())
    assert torch.equal(net(x), after)


def test_what_cannot_be_decomposed_stays():
    tied = GPT(16, dim=8, depth=1, heads=2, context=4, tied=True)
    decompose(tied)
    assert type(tied.head) is nn.Linear
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Linear(3, 2))
    decompose(grouped)
    assert type(grouped[0]) is nn.Conv2d
    with pytest.raises(ValueError, match="no linear layer"):
        decompose(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="'skip' has the pattern 'haed'"):
        decompose(nn.Sequential(nn.Linear(3, 2)), skip=["haed"])


def test_bad_input():
    layer = nn.Sequential(MaestroLinear(4, 3))
    for call, message in (
        (lambda: MaestroLinear(4, 3, rank=4), r"'rank' must be in 1..3 .* not 4"),
        (lambda: layer[0].set_rank(5), r"'rank' must be in 0..3"),
        (lambda: shrink(layer, -1.0), "'threshold' must be at least 0, not -1.0"),
        (lambda: ranks_set(layer, {"1": 2}).__enter__(), "'ranks' names '1', which is no Maestro layer; there are: 0"),
        (lambda: RankSampler(nn.Linear(3, 2)), "no Maestro layer"),
    ):
        with pytest.raises(ValueError, match=message):
            call()

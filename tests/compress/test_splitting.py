"""Splitting layers: two layers of full rank are the one they came from, and ranks are what numpy says they are."""

import numpy as np
import pytest
import torch
from torch import nn

from corollary.compress import (
    MaestroConv2d,
    decompose,
    deploy,
    factorize,
    maestro_layers,
    split_layer,
    splittable,
    unfold_weight,
)
from corollary.models import GPT, ResNet


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 5), "padding": (2, 1), "stride": (1, 2), "bias": False},
        {"kernel_size": (5, 3), "padding": "same", "dilation": (1, 2)},
        {"kernel_size": 3, "stride": 2, "dilation": 2},
        {"kernel_size": 1},
    ],
)
def test_two_convolutions_of_full_rank_are_the_one(scheme, options):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, dtype=torch.float64, **options)
    u, s, vh = torch.linalg.svd(unfold_weight(layer.weight.detach(), scheme), full_matrices=False)
    pair = split_layer(layer, u * s, vh, scheme)
    x = torch.randn(2, 3, 11, 9, dtype=torch.float64)
    assert (pair(x) - layer(x)).abs().max() < 1e-12


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_ranks_are_the_least_that_keep_the_energy(scheme):
    torch.manual_seed(0)
    net = ResNet(3, 10, width=8).double()
    weights = {name: unfold_weight(layer.weight.detach(), scheme).numpy() for name, layer in splittable(net, ["head"])}
    split = factorize(net, energy=0.7, scheme=scheme, skip=["head"])
    assert split
    for name, matrix in weights.items():
        squares = np.linalg.svd(matrix, compute_uv=False) ** 2
        rank = next(r for r in range(1, len(squares) + 1) if squares[:r].sum() >= 0.7 * squares.sum())
        saves = rank * sum(matrix.shape) < matrix.size
        assert split.get(name) == (rank if saves else None)
        assert isinstance(net.get_submodule(name), nn.Sequential) == saves
    assert type(net.head) is nn.Linear


def test_an_exactly_low_rank_model_computes_the_same_afterwards():
    torch.manual_seed(0)
    net = GPT(16, dim=16, depth=1, heads=2, context=4).double()
    with torch.no_grad():
        for _, layer in splittable(net):
            u, s, vh = torch.linalg.svd(layer.weight)
            layer.weight.copy_((u[:, :3] * s[:3]) @ vh[:3])
    tokens = torch.arange(8).view(2, 4)
    before = net(tokens)
    assert set(factorize(net, energy=1 - 1e-12).values()) == {3}
    assert (net(tokens) - before).abs().max() < 1e-10
    assert all(layer.weight.shape[0] == 3 for name, layer in net.named_modules() if name.endswith("proj.down"))


def test_deploying_changes_nothing_and_takes_the_smaller_form():
    torch.manual_seed(0)
    net = decompose(ResNet(1, 10, width=8).eval().double())
    with torch.no_grad():
        for layer in maestro_layers(net).values():
            layer.weight_in.add_(torch.randn_like(layer.weight_in), alpha=0.1)
    names = list(maestro_layers(net))
    for name in names[:5]:
        net.get_submodule(name).set_rank(2)
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    before = net(x)
    deploy(net)
    assert (net(x) - before).abs().max() < 1e-10
    assert not any(isinstance(m, MaestroConv2d) for m in net.modules())
    dense = [type(net.get_submodule(name)) in (nn.Conv2d, nn.Linear) for name in names]
    assert dense == [False] * 5 + [True] * (len(names) - 5)


def test_rank_zero_is_deployed_as_zero():
    torch.manual_seed(0)
    net = decompose(nn.Sequential(nn.Linear(8, 8), nn.Conv2d(2, 4, 3)))
    deploy(net, {"0": 0, "1": 0})
    assert torch.equal(net[0](torch.randn(3, 8)), net[0][1].bias.expand(3, 8))
    assert torch.equal(net[1](torch.randn(3, 2, 3, 3)).flatten(1), net[1][1].bias.expand(3, 4))


def test_bad_input():
    net = ResNet(1, 10, width=4)
    for call, message in (
        (lambda: factorize(net, energy=1.5), r"'energy' must be in \(0, 1\], not 1.5"),
        (lambda: factorize(net, scheme="depth"), "'scheme' is 'depth'; allowed: channel, spatial"),
        (lambda: factorize(net, ranks={"haed": 2}), "'ranks' names 'haed', which cannot be split; there are: stem"),
        (lambda: factorize(net, ranks={"head": 0}), "'ranks' gives 'head' the rank 0"),
        (lambda: split_layer(nn.Linear(3, 2), torch.ones(3, 1), torch.ones(1, 3)), r"shapes \(2, r\) and \(r, 3\)"),
        (lambda: deploy(decompose(nn.Sequential(nn.Linear(3, 2))), {"1": 1}), "'ranks' names '1'"),
        (lambda: unfold_weight(torch.zeros(3)), r"\(out, in\) or \(N, C, h, w\), not \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()

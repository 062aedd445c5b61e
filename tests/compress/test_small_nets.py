"""The measuring code of the small networks: products counted by hand, caps kept, baselines whole where nothing is cut."""

import torch
from torch import nn

from corollary.compress import decompose
from corollary.papers.compress._small_nets import factorized, fresh, products, renew_norms, split_of
from corollary.papers.compress.maestro import cut_to


def test_products_are_those_of_the_formula():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(8 * 16, 10))
    assert products(net, torch.zeros(2, 3, 8, 8)) == 2 * (16 * 8 * 3 * 9 + 128 * 10)


def test_caps_are_kept_and_norms_are_those_of_the_data():
    split = split_of("digits", 0)
    net = fresh("digits", 0).eval()
    x = split.test_x[:1]
    full = products(net, x)
    smaller, share = factorized(net, split, 0.4, "channel", ("head",))
    assert share == products(smaller, x) / full
    assert 0.3 < share <= 0.4
    whole, all_of_it = factorized(net, split, 1.0, "channel", ("head",))
    assert all_of_it == 1.0
    renew_norms(net, split.train_x)
    assert (whole(split.test_x) - net(split.test_x)).abs().max() < 1e-4
    layered = decompose(fresh("digits", 0).eval(), skip=["head"])
    assert products(cut_to(layered, 0.3, x, full), x) <= 0.3 * full

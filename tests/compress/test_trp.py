"""Trained rank pruning against the authors' loop, written anew for numpy with eigenvectors in place of singular ones."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from corollary.compress import (
    TrainedRankPruning,
    energy_truncation,
    fold_weight,
    rank_pruning_groups,
    unfold_weight,
)
from corollary.models import GPT, ResNet


def matrix_of(weight, scheme):
    """Entry by entry: rows are output channels, or (input channel, row of the kernel)."""
    if weight.ndim == 2:
        return weight.copy()
    n, c, h, w = weight.shape
    out = np.empty((n, c * h * w) if scheme == "channel" else (c * h, n * w))
    for i, j, k, m in np.ndindex(n, c, h, w):
        if scheme == "channel":
            out[i, (j * h + k) * w + m] = weight[i, j, k, m]
        else:
            out[j * h + k, i * w + m] = weight[i, j, k, m]
    return out


def weight_of(matrix, shape, scheme):
    if len(shape) == 2:
        return matrix.copy()
    n, c, h, w = shape
    out = np.empty(shape)
    for i, j, k, m in np.ndindex(n, c, h, w):
        row, column = (i, (j * h + k) * w + m) if scheme == "channel" else (j * h + k, i * w + m)
        out[i, j, k, m] = matrix[row, column]
    return out


def truncate(a, energy):
    """From the eigenvectors of AᵀA, one direction after the other until the energy suffices."""
    values, vectors = np.linalg.eigh(a.T @ a)
    total, kept = np.trace(a.T @ a), 0.0
    t, n = np.zeros_like(a), np.zeros_like(a)
    for i in range(len(values) - 1, -1, -1):
        if kept >= energy * total:
            break
        v = vectors[:, i : i + 1]
        t += a @ v @ v.T
        n += a @ v @ v.T / np.sqrt(values[i])
        kept += values[i]
    return t, n


def loop(weights, steps, lr, momentum, period, energy, nuclear, scheme, seed):
    """cifar-TRP.py's loop: truncate before the forward pass, add the sub-gradient, SGD with momentum."""
    generator = torch.Generator().manual_seed(seed)
    weights = [w.copy() for w in weights]
    buffers = [None] * len(weights)
    for t in range(steps):
        for i, w in enumerate(weights):
            extra = 0.0
            if t % period == 0 and t > 0 and w.ndim > 1:
                cut, direction = truncate(matrix_of(w, scheme), energy)
                w = weight_of(cut, w.shape, scheme)
                extra = nuclear * weight_of(direction, w.shape, scheme)
            g = torch.randn(w.shape, generator=generator, dtype=torch.float64).numpy() + w + extra
            buffers[i] = g if buffers[i] is None else momentum * buffers[i] + g
            weights[i] = w - lr * buffers[i]
    if steps % period == 0:
        weights = [w if w.ndim == 1 else weight_of(truncate(matrix_of(w, scheme), energy)[0], w.shape, scheme) for w in weights]
    return weights


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((7, 5), (6,), (4, 3, 3, 2), (7, 5))
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]


def descend(optimizer, params, steps, generator):
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64) + p.detach()
        optimizer.step()


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
@pytest.mark.parametrize("steps", [10, 12])
def test_equals_the_authors_loop(scheme, steps):
    params = parameters()
    expected = loop([p.detach().numpy() for p in params], steps, 0.05, 0.9, 4, 0.7, 0.3, scheme, seed=1)
    options = {"period": 4, "energy": 0.7, "nuclear_weight": 0.3, "scheme": scheme}
    optimizer = TrainedRankPruning(params, torch.optim.SGD, lr=0.05, momentum=0.9, **options)
    descend(optimizer, params, steps, torch.Generator().manual_seed(1))
    for p, e in zip(params, expected, strict=True):
        assert np.abs(p.detach().numpy() - e).max() < 1e-10


def test_resumes_bit_by_bit_across_a_truncation():
    """Saved right after a truncation, when the nuclear direction waits for the next step."""
    whole = parameters()
    generator = torch.Generator().manual_seed(1)
    make = lambda ps: TrainedRankPruning(ps, torch.optim.AdamW, lr=0.05, period=4, energy=0.7, nuclear_weight=0.3)  # noqa: E731
    first = make(whole)
    descend(first, whole, 8, generator)
    rest = [nn.Parameter(p.detach().clone()) for p in whole]
    second = make(rest)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    at = generator.get_state()
    descend(first, whole, 7, generator)
    generator.set_state(at)
    descend(second, rest, 7, generator)
    assert all(torch.equal(a, b) for a, b in zip(whole, rest, strict=True))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(0.05, 1.0), st.integers(0, 10_000))
def test_truncation_is_the_least_rank_that_keeps_the_energy(m, n, energy, seed):
    a = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    t, direction = energy_truncation(a, energy)
    total = a.square().sum()
    rank = int(torch.linalg.matrix_rank(t))
    assert t.square().sum() >= (energy - 1e-12) * total
    if rank > 1:  # without its last direction the energy would not do
        u, s, vh = torch.linalg.svd(t)
        shorter = (u[:, : rank - 1] * s[: rank - 1]) @ vh[: rank - 1]
        assert shorter.square().sum() < (energy + 1e-12) * total
    # A sub-gradient G of the nuclear norm at T: <G, T> is the norm, and no singular value of G is above 1.
    assert abs((direction * t).sum() - torch.linalg.matrix_norm(t, "nuc")) < 1e-9 * (1 + total.sqrt())
    assert torch.linalg.matrix_norm(direction, 2) < 1 + 1e-9


def test_zero_matrix_and_stacks():
    t, direction = energy_truncation(torch.zeros(3, 2), 0.9)
    assert not t.any()
    assert not direction.any()
    stack = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for whole, one in zip(energy_truncation(stack, 0.6)[0], stack, strict=True):
        assert (whole - energy_truncation(one, 0.6)[0]).abs().max() < 1e-12


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_unfolding_is_the_loops_and_folding_undoes_it(scheme):
    weight = torch.randn(4, 3, 2, 5, dtype=torch.float64)
    matrix = unfold_weight(weight, scheme)
    assert (matrix.numpy() == matrix_of(weight.numpy(), scheme)).all()
    assert torch.equal(fold_weight(matrix, weight.shape, scheme), weight)


def test_groups_leave_embeddings_norms_and_what_is_skipped_alone():
    net = ResNet(1, 10, width=8)
    pruned, rest = rank_pruning_groups(net, skip=["head", "stem"])
    ids = {id(p) for p in pruned["params"]}
    assert ids == {id(m.weight) for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and "conv" in n}
    assert sum(p.numel() for g in (pruned, rest) for p in g["params"]) == sum(p.numel() for p in net.parameters())
    tied = GPT(16, dim=8, depth=1, heads=2, context=4, tied=True)
    assert all(p is not tied.head.weight for p in rank_pruning_groups(tied)[0]["params"])


def test_what_is_not_finite_is_left_for_its_owner_to_see():
    params = parameters()
    optimizer = TrainedRankPruning(params, torch.optim.SGD, lr=0.05, period=1)
    for p in params:
        p.grad = torch.zeros_like(p)
    params[0].grad[0, 0] = torch.nan
    optimizer.step()
    assert params[0].isnan().any()
    assert all(p.isfinite().all() for p in params[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"period": 0}, "'period' must be a whole number of at least 1, not 0"),
        ({"energy": 0.0}, r"'energy' must be in \(0, 1\], not 0.0"),
        ({"nuclear_weight": -1.0}, "'nuclear_weight' must be at least 0"),
        ({"scheme": "depth"}, "'scheme' is 'depth'; allowed: channel, spatial"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        TrainedRankPruning(parameters(), torch.optim.SGD, lr=0.1, **options)


def test_other_bad_input():
    with pytest.raises(TypeError, match="'base_optimizer' must be an optimizer class"):
        TrainedRankPruning(parameters())
    with pytest.raises(TypeError, match="leave out lr"):
        TrainedRankPruning(torch.optim.SGD(parameters(), lr=0.1), lr=0.2)
    with pytest.raises(ValueError, match="LBFGS"):
        TrainedRankPruning(parameters(), torch.optim.LBFGS)
    with pytest.raises(ValueError, match=r"'skip' has the pattern 'haed', which matches no module"):
        rank_pruning_groups(ResNet(1, 10, width=4), skip=["haed"])
    with pytest.raises(ValueError, match=r"\(out, in\) or \(N, C, h, w\), not \(3,\)"):
        unfold_weight(torch.zeros(3))

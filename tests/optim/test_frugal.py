"""FRUGAL's and BAdam's splits of the gradient."""

import pytest
import torch
from torch import nn

from corollary.optim import BAdam, Frugal, ProjectedAdamW
from corollary.optim.projectors import Blocks
from corollary.optim.residuals import PlainSGD

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


def test_all_columns_or_blocks_active_is_torchs_adamw():
    for projector, rank in (("columns", 1.0), ("blocks", 1.0)):
        ours, theirs = weights(), weights()
        got = descend(ProjectedAdamW(ours, 0.01, rank=rank, projector=projector, residual="sign"), ours, 8)
        expected = descend(torch.optim.AdamW(theirs, 0.01, weight_decay=0.0), theirs, 8)
        for a, b in zip(got, expected, strict=True):
            assert (a - b).abs().max() < 1e-12


def test_block_orders_take_turns():
    for order, wanted in (("ascending", [[0], [1], [2], [0]]), ("descending", [[2], [1], [0], [2]])):
        params = weights()
        optimizer = ProjectedAdamW(
            params, 0.01, rank=1, projector=Blocks(order), residual="sgd", update_proj_gap=2, moments="reset"
        )
        seen = []
        for _ in range(4):
            descend(optimizer, params, 2)
            seen.append([i for i, p in enumerate(params) if optimizer.state[p]["exp_avg"].numel()])
        assert seen == wanted
    params = weights()
    optimizer = ProjectedAdamW(params, 0.01, rank=2, projector=Blocks("random"), update_proj_gap=1, seed=0)
    counts = []
    for _ in range(5):
        descend(optimizer, params, 1)
        counts.append(sum(bool(optimizer.state[p]["active"]) for p in params))
    assert counts == [2] * 5


def test_density_and_presets():
    params = weights(shapes=[(8, 12)])
    optimizer = Frugal(params, 0.01, density=0.5, projector="columns", residual="sgd", residual_lr_scale=0.5, seed=0)
    descend(optimizer, params, 1)
    assert optimizer.state[params[0]]["exp_avg"].shape == (8, 6)
    assert optimizer.residual == PlainSGD(0.5)
    with pytest.raises(ValueError, match="a share in"):
        Frugal(params, density=1.5)


def test_first_step_by_hand():
    """Adam's first step is the sign times lr on the drawn columns, and the rule's on the others: with 'sign' no difference."""
    [weight] = weights(shapes=[(4, 6)])
    begin = weight.detach().clone()
    optimizer = Frugal([weight], 0.1, eps=0.0, density=0.5, projector="columns", residual_lr_scale=0.25, seed=2)
    weight.grad = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    rate = torch.full((6,), 0.025, dtype=torch.float64)
    rate[optimizer.state[weight]["indices"].long()] = 0.1
    assert (weight.detach() - (begin - rate * weight.grad.sign())).abs().max() < 1e-12


def test_inactive_blocks_have_no_state_and_still_move():
    params = weights()
    optimizer = Frugal(params, 0.1, density=0.34, projector="blocks", seed=0)
    begin = [p.detach().clone() for p in params]
    descend(optimizer, params, 1)
    sizes = [optimizer.state[p]["exp_avg"].numel() for p in params]
    assert sorted(sizes)[:2] == [0, 0]
    assert max(sizes) > 0
    assert all((p != b).all() for p, b in zip(params, begin, strict=True))


def test_badam_leaves_inactive_blocks_alone():
    params = weights()
    optimizer = BAdam(params, 0.1, active=1, order="ascending", update_proj_gap=2)
    begin = [p.detach().clone() for p in params]
    descend(optimizer, params, 4)
    assert [bool((p != b).any()) for p, b in zip(params, begin, strict=True)] == [True, True, False]


def test_bad_input_is_named():
    for bad in (0, 4):
        with pytest.raises(ValueError, match=r"active parameters and must be in|integer of at least 1"):
            BAdam(weights(), active=bad)
    with pytest.raises(ValueError, match="'order' must be"):
        BAdam(weights(), order="mirror")
    with pytest.raises(ValueError, match="'lr_scale'"):
        Frugal(weights(), residual_lr_scale=-1.0)


def test_draws_depend_on_seed_parameter_and_refresh_alone():
    """Two matrices draw differently; a new optimizer with the same seed draws the same, another seed does not."""
    drawn = []
    for seed in (0, 0, 1):
        params = weights(shapes=[(4, 40), (4, 40)])
        optimizer = Frugal(params, 0.1, density=0.25, projector="columns", update_proj_gap=1, seed=seed)
        history = []
        for _ in range(2):
            descend(optimizer, params, 1)
            history.append([optimizer.state[p]["indices"].tolist() for p in params])
        drawn.append(history)
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][0][0] != drawn[0][0][1]
    assert drawn[0][0][0] != drawn[0][1][0]


def test_blocks_train_a_module():
    torch.manual_seed(0)
    layer = nn.Linear(6, 3)
    optimizer = Frugal(layer.parameters(), 0.05, density=1.0)
    before = layer(torch.ones(1, 6)).square().sum()
    before.backward()
    optimizer.step()
    assert layer(torch.ones(1, 6)).square().sum() < before

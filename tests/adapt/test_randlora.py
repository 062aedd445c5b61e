"""RandLoRA against sums by hand and against peft."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from corollary.adapt import RandLoRA, adapt

peft = pytest.importorskip("peft")


@settings(max_examples=20, deadline=None)
@given(m=st.integers(1, 12), n=st.integers(1, 12), rank=st.integers(1, 5))
def test_the_update_has_full_rank_once_the_diagonals_differ(m, n, rank):
    model = adapt(nn.Linear(n, m).double(), RandLoRA(rank=rank))
    adapter = model.adapters["default"]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.5)
    assert np.linalg.matrix_rank(adapter.delta().detach().numpy()) == min(m, n)
    assert adapter.randlora_lambda.shape[0] == -(-min(m, n) // rank)


def test_equal_diagonals_leave_the_rank_of_one_basis():
    model = adapt(nn.Linear(12, 12).double(), RandLoRA(rank=3))
    adapter = model.adapters["default"]
    nn.init.ones_(adapter.randlora_lambda)
    assert np.linalg.matrix_rank(adapter.delta().detach().numpy()) == 3


@pytest.mark.parametrize("shape", [(12, 12), (12, 8), (8, 12)])
def test_equals_peft_given_its_bases_in_its_order(shape):
    """peft pairs row k N + j of its scaled A with column j r + k of B: with B's columns moved so, outputs are equal."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(shape[1], shape[0]))
    config = peft.RandLoraConfig(r=3, randlora_alpha=6, target_modules=["0"])
    import copy

    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    layer = theirs.base_model.model[0]
    ours = adapt(base, RandLoRA(rank=3, alpha=6), "0")
    adapter = ours[0].adapters["default"]
    bases, rank = adapter.randlora_lambda.shape
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        adapter.randlora_lambda.copy_(torch.randn(bases, rank, generator=generator))
        adapter.randlora_gamma.copy_(torch.randn(adapter.randlora_gamma.shape, generator=generator))
        layer.randlora_lambda.default.copy_(adapter.randlora_lambda.T)
        layer.randlora_gamma.default.copy_(adapter.randlora_gamma)
        adapter.randlora_A.copy_(layer.randlora_A.default[:, 0].float())
        flat = layer.randlora_B.default.float().flatten(1)  # their column i goes with their row i = k N + j
        adapter.randlora_B.copy_(flat.unflatten(1, (rank, bases)).transpose(1, 2))
    x = torch.randn(5, shape[1])
    assert (ours(x) - theirs(x)).abs().max() < 1e-3 * theirs(x).abs().max()  # their bases are in half precision


def test_the_bases_exist_once_for_all_layers():
    model = adapt(nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 10), nn.Linear(10, 20)), RandLoRA(rank=4))
    held = [m.adapters["default"] for m in model]
    assert len({a.randlora_A.untyped_storage().data_ptr() for a in held}) == 1
    assert len({a.randlora_B.untyped_storage().data_ptr() for a in held}) == 1

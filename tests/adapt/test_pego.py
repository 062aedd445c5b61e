"""PEGO's penalty against the dense products."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from corollary.adapt import PEGO, adapt, adapter_penalty


def moved(layer, **options):
    model = adapt(layer, PEGO(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


@settings(max_examples=20, deadline=None)
@given(m=st.integers(1, 6), n=st.integers(1, 6), group=st.integers(1, 4), rank=st.integers(1, 3))
def test_penalty_is_the_sum_over_dense_products(m, n, group, rank):
    model = moved(nn.Linear(n, m).double(), rank=rank, group_size=group, regularization=0.5)
    adapter = model.adapters["default"]
    a, b = adapter.lora_A.detach().numpy(), adapter.lora_B.detach().numpy()
    w = model.weight.detach().numpy()
    total = 0.0
    for i in range(group):
        total += np.abs(w @ (b[i] @ a[i]).T).sum()
        for j in range(i + 1, group):
            total += np.abs((b[i] @ a[i]) @ (b[j] @ a[j]).T).sum()
    assert abs(float(adapter_penalty(model).detach()) - 0.5 * total) < 1e-9 * max(1, total)


def test_orthogonal_modules_cost_nothing():
    """Rows of A outside the weight's row space and of the other's: every product vanishes."""
    layer = nn.Linear(6, 6).double()
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[:, :2] = torch.randn(6, 2, dtype=torch.float64)
    model = moved(layer, rank=2, group_size=2)
    with torch.no_grad():
        adapter = model.adapters["default"]
        adapter.lora_A.zero_()
        adapter.lora_A[0, :, 2:4] = torch.eye(2, dtype=torch.float64)
        adapter.lora_A[1, :, 4:6] = torch.eye(2, dtype=torch.float64)
    assert float(adapter_penalty(model).detach()) == 0.0


def test_the_penalty_trains_the_group_and_not_the_weight():
    model = moved(nn.Linear(5, 4).double())
    adapter_penalty(model).backward()
    assert model.weight.grad is None
    assert all(p.grad.any() for p in model.adapters["default"].parameters())
    assert adapt(nn.Linear(3, 3), PEGO(regularization=0.0)).adapters["default"].penalty(torch.eye(3)) is None


@pytest.mark.parametrize("options", [{"group_size": 0}, {"group_size": 2.0}, {"rank": 0}, {"regularization": float("nan")}])
def test_options_are_checked(options):
    with pytest.raises((ValueError, TypeError), match=f"'{next(iter(options))}' must be"):
        PEGO(**options)

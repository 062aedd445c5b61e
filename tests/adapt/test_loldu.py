"""LoLDU against elimination by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from corollary.adapt import LoLDU, adapt
from corollary.papers.adapt.loldu import eliminate


def model_of(weight, **options):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(weight))
    return adapt(layer, LoLDU(**options))


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 8), n=st.integers(1, 8), seed=st.integers(0, 9))
def test_factors_are_the_eliminations(m, n, seed):
    """P L, D and U equal Gaussian elimination entry by entry, and their product is the weight."""
    weight = np.random.default_rng(seed).normal(size=(m, n))
    adapter = model_of(weight).adapters["default"]
    order, lower, upper = eliminate(weight)
    placed = np.empty_like(lower)
    placed[order] = lower
    d = np.diag(upper)
    assert np.abs(adapter.left.numpy() - placed).max() < 1e-9
    assert np.abs(adapter.z.detach().numpy() - d).max() < 1e-9
    assert np.abs(adapter.right.numpy() - upper / d[:, None]).max() < 1e-7
    assert np.abs(adapter.left.numpy() * d @ adapter.right.numpy() - weight).max() < 1e-9


@pytest.mark.parametrize("weight", [np.zeros((4, 4)), np.ones((4, 3)), np.triu(np.ones((4, 4)), 1), np.eye(3)[[2, 0, 1]]])
def test_singular_weights_have_finite_factors_that_rebuild_them(weight):
    adapter = model_of(weight).adapters["default"]
    rebuilt = (adapter.left * adapter.start) @ adapter.right
    assert rebuilt.isfinite().all()
    assert np.abs(rebuilt.numpy() - weight).max() < 1e-12


def test_scale_and_diagonal_move_the_weight_as_the_product_rule_says():
    weight = np.random.default_rng(0).normal(size=(5, 6))
    model = model_of(weight, rank=4, alpha=2.0)
    adapter = model.adapters["default"]
    assert adapter.scaling_factor.item() == 0.5
    x = torch.randn(3, 6, dtype=torch.float64)
    model(x).sum().backward()
    full = np.ones((3, 5)).T @ x.numpy()
    along = np.einsum("mr,mn,rn->r", adapter.left.numpy(), full, adapter.right.numpy())
    assert np.abs(adapter.z.grad.numpy() - 0.5 * along).max() < 1e-10
    assert abs(float(adapter.scaling_factor.grad) - along @ adapter.z.detach().numpy()) < 1e-10


def test_options_are_checked():
    with pytest.raises(ValueError, match="'alpha' must be a finite number above 0, not 0"):
        LoLDU(alpha=0)
    with pytest.raises(ValueError, match="'rank' is 9, but the layer's matrix is 5 x 6"):
        model_of(np.ones((5, 6)), rank=9)

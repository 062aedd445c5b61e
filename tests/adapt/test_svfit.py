"""SVFit against the decomposition itself."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from corollary.adapt import SVFit, adapt, merge_adapters


def layer(m, n, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(n, m, bias=False).double()


@settings(max_examples=20, deadline=None)
@given(m=st.integers(1, 9), n=st.integers(1, 9), seed=st.integers(0, 5))
def test_trained_values_become_the_singular_values_of_the_merged_weight(m, n, seed):
    """Where the new values stay positive, they are the singular values of the new weight, beside the ones left alone."""
    rank = 1 + seed % min(m, n)
    model = adapt(layer(m, n, seed), SVFit(rank=rank))
    before = np.linalg.svd(model.weight.detach().numpy(), compute_uv=False)
    new = torch.rand(rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.1
    with torch.no_grad():
        model.adapters["default"].sigma.copy_(new)
    merge_adapters(model)
    after = np.linalg.svd(model.weight.detach().numpy(), compute_uv=False)
    wanted = sorted([*new.tolist(), *before[rank:]], reverse=True)
    assert np.abs(after - wanted).max() < 1e-10


def test_gradient_of_a_value_is_the_gradient_of_the_weight_along_its_vectors():
    model = adapt(layer(5, 7), SVFit(rank=3))
    x = torch.randn(4, 7, dtype=torch.float64)
    target = torch.randn(4, 5, dtype=torch.float64)
    (model(x) - target).square().sum().backward()
    weight = model.weight.detach().numpy()
    full = 2 * (x.numpy() @ weight.T - target.numpy()).T @ x.numpy()
    u, _, vt = np.linalg.svd(weight)
    wanted = [u[:, i] @ full @ vt[i] for i in range(3)]
    assert np.abs(model.adapters["default"].sigma.grad.numpy() - wanted).max() < 1e-10


def test_a_weight_of_low_rank_keeps_its_rank():
    """Zero singular values train too, along no direction: the left vector of a zero value is zero."""
    model = layer(6, 6)
    with torch.no_grad():
        model.weight.copy_(torch.outer(torch.arange(1.0, 7), torch.ones(6)))
    adapt(model, SVFit())
    adapter = model.adapters["default"]
    with torch.no_grad():
        adapter.sigma += 1
    assert adapter.delta().isfinite().all()
    assert adapter.delta().norm() < 10


def test_rank_is_checked():
    with pytest.raises(ValueError, match="'rank' is 6, but the layer's matrix is 5 x 7"):
        adapt(layer(5, 7), SVFit(rank=6))
    with pytest.raises(ValueError, match="'rank' must be at least 1"):
        SVFit(rank=0)

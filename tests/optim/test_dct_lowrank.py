"""DCT-AdamW's choice of waves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from corollary.linalg import dct_columns
from corollary.optim import DCTAdamW, ProjectedAdamW
from corollary.optim.projectors import DCT


def test_dct_keeps_the_strongest_waves_and_only_their_indices():
    basis = dct_columns(16, torch.arange(16), dtype=torch.float64)
    gradient = torch.randn(20, 3, dtype=torch.float64) @ basis[:, [2, 5, 11]].T + 1e-6 * torch.randn(
        20, 16, dtype=torch.float64
    )
    for matrix in (gradient, gradient.T.contiguous()):
        weight = nn.Parameter(torch.zeros_like(matrix))
        optimizer = ProjectedAdamW([weight], 0.01, rank=3, projector=DCT())
        weight.grad = matrix
        optimizer.step()
        assert optimizer.state[weight]["indices"].tolist() == [2, 5, 11]
        assert "basis" not in optimizer.state[weight]


@given(m=st.integers(1, 9), n=st.integers(1, 9), norm=st.sampled_from([1, 2]), seed=st.integers(0, 99), data=st.data())
@settings(max_examples=60, deadline=None)
def test_no_other_choice_of_waves_keeps_more(m, n, norm, seed, data):
    """Against all choices: the kept columns of the product with the matrix of cosines have the largest norms."""
    rank = data.draw(st.integers(1, min(m, n)))
    gradient = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    weight = nn.Parameter(torch.zeros_like(gradient))
    optimizer = DCTAdamW([weight], 0.1, rank=rank, norm=norm)
    weight.grad = gradient
    optimizer.step()
    tall = gradient if m >= n else gradient.T
    strengths = (tall @ dct_columns(tall.shape[1], torch.arange(tall.shape[1]), dtype=torch.float64)).abs().pow(norm).sum(0)
    kept = strengths[optimizer.state[weight]["indices"].long()].sum()
    assert kept >= strengths.sort(descending=True).values[:rank].sum() - 1e-9


def test_rotation_keeps_the_moments_of_waves_that_stay():
    basis = dct_columns(8, torch.arange(8), dtype=torch.float64)
    weight = nn.Parameter(torch.zeros(10, 8, dtype=torch.float64))
    optimizer = DCTAdamW([weight], 0.1, rank=2)
    generator = torch.Generator().manual_seed(0)
    for waves in ([1, 4], [4, 6]):
        before = optimizer.state[weight].get("exp_avg") if optimizer.state else None
        before = None if before is None else before.clone()
        low = torch.randn(10, 2, dtype=torch.float64, generator=generator)
        weight.grad = low @ basis[:, waves].T
        optimizer.step()
    state = optimizer.state[weight]
    assert state["indices"].tolist() == [4, 6]
    expected = torch.stack([0.9 * before[:, 1] + 0.1 * low[:, 0], 0.1 * low[:, 1]], dim=1)
    assert (state["exp_avg"] - expected).abs().max() < 1e-12


def test_norms_and_errors():
    with pytest.raises(ValueError, match="'norm' must be 1 or 2, not 3"):
        DCTAdamW([nn.Parameter(torch.zeros(3, 3))], rank=1, norm=3)
    with pytest.raises(ValueError, match=r"'rank' must be in 1\.\.3"):
        DCTAdamW([nn.Parameter(torch.zeros(3, 3))], rank=4)

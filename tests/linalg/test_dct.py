import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import fft

from corollary.linalg import dct, dct_columns


@given(n=st.integers(1, 70), rows=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_equals_scipy(n, rows, seed):
    x = np.random.default_rng(seed).normal(size=(rows, n))
    wanted = fft.dct(x, norm="ortho")
    assert np.abs(dct(torch.from_numpy(x)).numpy() - wanted).max() < 1e-12
    assert np.abs(dct(torch.from_numpy(x.T.copy()), dim=0).numpy() - wanted.T).max() < 1e-12
    basis = dct_columns(n, torch.arange(n), dtype=torch.float64)
    assert np.abs(x @ basis.numpy() - wanted).max() < 1e-12


def test_columns_are_orthonormal_and_lose_no_digits_at_large_length():
    n = 8192
    basis = dct_columns(n, torch.tensor([0, 1, 4095, 8190, 8191]), dtype=torch.float32)
    assert (basis.T @ basis - torch.eye(5)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_keeps_shape_and_dtype(dtype):
    x = torch.randn(2, 3, 5).to(dtype)
    assert dct(x, dim=1).shape == x.shape
    assert dct(x, dim=1).dtype == dtype


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="'x' must be a floating tensor"):
        dct(torch.arange(3))
    with pytest.raises(ValueError, match="at least one entry"):
        dct(torch.zeros(3, 0))
    with pytest.raises(TypeError, match="'indices' must be integers"):
        dct_columns(4, torch.tensor([0.5]))
    with pytest.raises(ValueError, match=r"'indices' must be in 0\.\.3"):
        dct_columns(4, torch.tensor([4]))
    with pytest.raises(ValueError, match="shape"):
        dct_columns(4, torch.zeros(1, 1, dtype=torch.int64))

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corollary.data import spectrum_matrix
from corollary.linalg import leading_right_vectors, randomized_right_vectors


@given(m=st.integers(1, 12), n=st.integers(1, 12), seed=st.integers(0, 50), data=st.data())
@settings(max_examples=50, deadline=None)
def test_projection_equals_numpy_svd(m, n, seed, data):
    rank = data.draw(st.integers(1, min(m, n)))
    a = np.random.default_rng(seed).normal(size=(m, n))
    v = leading_right_vectors(torch.from_numpy(a), rank).numpy()
    wanted = np.linalg.svd(a)[2][:rank].T
    assert np.abs(v @ v.T - wanted @ wanted.T).max() < 1e-8
    assert (v[np.abs(v).argmax(0), range(rank)] > 0).all(), "the sign is not settled"


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50)])
def test_randomized_captures_nearly_the_best_energy(shape):
    """Halko, Martinsson, Tropp, theorem 10.5: on a polynomial spectrum a few iterations come within a per mille of the best."""
    sigma = torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -1.0
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        a = spectrum_matrix(*shape, sigma, generator=generator)
        v = randomized_right_vectors(a, 8, generator=generator)
        assert (v.T @ v - torch.eye(8, dtype=torch.float64)).abs().max() < 1e-10
        assert (a @ v).square().sum() >= 0.999 * sigma[:8].square().sum()


def test_warm_start_beats_cold_on_a_drifting_matrix():
    generator = torch.Generator().manual_seed(0)
    sigma = 0.97 ** torch.arange(100, dtype=torch.float64)
    a = spectrum_matrix(100, 100, sigma, generator=generator)
    v = leading_right_vectors(a, 10)
    b = a + 1e-3 * torch.randn(100, 100, generator=generator, dtype=torch.float64)
    best = torch.linalg.svdvals(b)[:10].square().sum()
    cold = randomized_right_vectors(b, 10, n_iter=1, oversampling=0, generator=torch.Generator().manual_seed(1))
    warm = randomized_right_vectors(b, 10, n_iter=1, oversampling=0, start=v)
    assert (best - (b @ warm).square().sum()) < 0.01 * (best - (b @ cold).square().sum())


def test_exact_on_low_rank_and_ordered():
    generator = torch.Generator().manual_seed(0)
    sigma = torch.tensor([5.0, 3.0, 1.0], dtype=torch.float64)
    a = spectrum_matrix(20, 15, torch.cat([sigma, torch.zeros(12, dtype=torch.float64)]), generator=generator)
    v = randomized_right_vectors(a, 3, generator=generator)
    assert torch.allclose((a @ v).norm(dim=0), sigma, atol=1e-10)


def test_bad_input_is_named():
    for call in (leading_right_vectors, randomized_right_vectors):
        with pytest.raises(TypeError, match="'matrix' must be a floating"):
            call(torch.zeros(2, 2, dtype=torch.int64), 1)
        with pytest.raises(ValueError, match=r"'matrix' must have shape \(m, n\)"):
            call(torch.zeros(3), 1)
        for rank in (0, 3):
            with pytest.raises(ValueError, match=r"'rank' must be in 1\.\.2 .* not \d"):
                call(torch.ones(2, 5), rank)
        with pytest.raises(ValueError, match="finite"):
            call(torch.full((2, 2), math.nan), 1)
    with pytest.raises(ValueError, match="'start'"):
        randomized_right_vectors(torch.ones(3, 3), 1, start=torch.ones(2, 1))
    with pytest.raises(ValueError, match="'n_iter'"):
        randomized_right_vectors(torch.ones(3, 3), 1, n_iter=0)

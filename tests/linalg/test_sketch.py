"""Sketches against their definitions: unbiased Gram matrices, the bound on distortion, and the dense Hadamard matrix."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard

from corollary.linalg import count_sketch, gaussian_sketch, srht

SKETCHES = [count_sketch, gaussian_sketch, srht]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sketch", SKETCHES)
def test_gram_matrix_is_unbiased(sketch):
    a = torch.randn(100, 3, generator=_generator(), dtype=torch.float64)
    generator = _generator(1)
    grams = torch.stack([(s := sketch(a, 40, generator=generator)).mT @ s for _ in range(2000)])
    error = (grams.mean(0) - a.mT @ a).abs()
    assert (error < 5 * grams.std(0) / math.sqrt(2000)).all()


@pytest.mark.parametrize("sketch", SKETCHES)
def test_subspace_embedding(sketch):
    a = torch.linalg.qr(torch.randn(2000, 10, generator=_generator(), dtype=torch.float64)).Q
    values = torch.linalg.svdvals(sketch(a, 400, generator=_generator(2)))
    assert values.min() > 0.6
    assert values.max() < 1.4


@pytest.mark.parametrize("n", [1, 5, 8, 13])
def test_whole_srht_is_the_signed_hadamard_matrix(n):
    padded = 1 << (n - 1).bit_length()
    got = srht(torch.eye(n, dtype=torch.float64), padded, generator=_generator(3)).numpy() * math.sqrt(padded)
    # every row was sampled, in random order; one of them is H's row of ones times the signs, which undoes the signs
    rows = {tuple(row) for row in hadamard(padded)[:, :n]}
    assert any({tuple(r) for r in (got * row).round().astype(int)} == rows for row in got)


def test_count_sketch_rows_are_signed_sums_of_distinct_rows():
    a = torch.eye(30, dtype=torch.float64)
    s = count_sketch(a, 7, generator=_generator(4))
    assert (s.abs().sum(0) == 1).all()  # every row of a went to exactly one bucket, with sign +-1
    assert ((s == 0) | (s.abs() == 1)).all()


@pytest.mark.parametrize("sketch", SKETCHES)
def test_batches_share_one_sketch_and_dtype_is_kept(sketch):
    a = torch.randn(4, 16, 3, generator=_generator())
    batched = sketch(a, 8, generator=_generator(5))
    assert batched.dtype == torch.float32
    torch.testing.assert_close(batched[2], sketch(a[2], 8, generator=_generator(5)))


@pytest.mark.parametrize("sketch", SKETCHES)
def test_bad_input(sketch):
    with pytest.raises(TypeError, match=r"'a' must be a floating-point tensor, not torch.int64"):
        sketch(torch.ones(3, 2, dtype=torch.int64), 2)
    with pytest.raises(TypeError, match="not ndarray"):
        sketch(np.ones((3, 2)), 2)
    with pytest.raises(ValueError, match=r"'a' must have shape"):
        sketch(torch.ones(3), 2)
    with pytest.raises(ValueError, match="'size' must be at least 1, not 0"):
        sketch(torch.ones(3, 2), 0)


def test_srht_size_is_bounded():
    with pytest.raises(ValueError, match="at most 4"):
        srht(torch.ones(3, 2), 5)

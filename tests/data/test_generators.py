"""Matrices with a known truth: exact spectrum, exact rank, noise of the stated size, uniform directions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corollary.data import low_rank_matrix, spectrum_matrix


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 20), n=st.integers(1, 20), seed=st.integers(0, 999), data=st.data())
def test_spectrum_is_exact(m: int, n: int, seed: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.floats(0, 1e3), min_size=1, max_size=min(m, n)))
    matrix = spectrum_matrix(m, n, values, generator=seeded(seed))
    expected = np.zeros(min(m, n))
    expected[: len(values)] = sorted(values, reverse=True)
    assert matrix.shape == (m, n)
    np.testing.assert_allclose(np.linalg.svd(matrix.numpy(), compute_uv=False), expected, atol=1e-12 * max(1, *values))


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 20), n=st.integers(1, 20), seed=st.integers(0, 999), condition=st.floats(1, 1e4), data=st.data())
def test_rank_and_condition_are_exact(m: int, n: int, seed: int, condition: float, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    s = np.linalg.svd(low_rank_matrix(m, n, rank, condition=condition, generator=seeded(seed)).numpy(), compute_uv=False)
    assert s[0] == pytest.approx(1, rel=1e-10)
    assert s[rank - 1] == pytest.approx(1 / condition if rank > 1 else 1, rel=1e-8)
    assert (s[rank:] < 1e-12).all()
    if rank > 2:
        ratios = s[1:rank] / s[: rank - 1]
        np.testing.assert_allclose(ratios, ratios[0], rtol=1e-7)


def test_noise_has_the_stated_size() -> None:
    clean = low_rank_matrix(200, 150, 5, condition=3.0, generator=seeded(0))
    noisy = low_rank_matrix(200, 150, 5, condition=3.0, noise=0.5, generator=seeded(0))
    assert float((noisy - clean).norm() / clean.norm()) == pytest.approx(0.5, rel=0.02)


def test_directions_are_uniform() -> None:
    """The first left singular vector of a Haar factor has mean 0 and covariance I / m, its sign included."""
    u = torch.stack([spectrum_matrix(3, 2, [1.0], generator=seeded(i)) for i in range(4000)])
    torch.testing.assert_close(u.mean(0), torch.zeros(3, 2, dtype=u.dtype), atol=0.03, rtol=0)
    flat = u.flatten(1)
    torch.testing.assert_close(flat.T @ flat / 4000, torch.eye(6, dtype=u.dtype) / 6, atol=0.02, rtol=0)


def test_generator_and_dtype() -> None:
    one, two = (low_rank_matrix(5, 4, 2, noise=0.1, generator=seeded(3), dtype=torch.float32) for _ in range(2))
    assert torch.equal(one, two)
    assert one.dtype == torch.float32


@pytest.mark.parametrize(("arguments", "match"), [
    ({"rank": 5}, r"'rank' is 5; allowed: up to min\(m, n\) = 4"),
    ({"rank": 0}, "'rank' must be at least 1"),
    ({"rank": 2, "noise": -1.0}, "'noise' must be finite and at least 0"),
    ({"rank": 2, "condition": 0.5}, "'condition' must be finite and at least 1"),
    ({"rank": 2, "condition": float("nan")}, "'condition' must be finite"),
])  # fmt: skip
def test_bad_low_rank(arguments: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        low_rank_matrix(5, 4, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(("values", "match"), [
    ([], "allowed: one row of 1 to"), ([1.0] * 5, "allowed: one row of 1 to"), ([[1.0]], "allowed: one row of 1 to"),
    ([-1.0], "finite and at least 0"), ([float("inf")], "finite and at least 0"),
])  # fmt: skip
def test_bad_spectrum(values: list[float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        spectrum_matrix(5, 4, values)

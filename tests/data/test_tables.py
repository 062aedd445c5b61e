"""Digits and tables: shapes, scale, strata, determinism, and what the split rests on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_wine

from corollary.data import Split, digits, tabular


def test_digits_are_scikit_learns_images_in_unit_range() -> None:
    split = digits(seed=3)
    raw = load_digits()
    assert split.train_x.shape[1:] == (1, 8, 8)
    assert split.train_x.dtype == torch.float32
    assert split.train_y.dtype == torch.int64
    assert split.train_x.min() == 0
    assert split.train_x.max() == 1
    ours = torch.cat([split.train_x, split.test_x]).flatten(1).double() * 16
    labels = torch.cat([split.train_y, split.test_y])
    mine = sorted((tuple(x), y) for x, y in zip(ours.tolist(), labels.tolist(), strict=True))
    theirs = sorted((tuple(x), y) for x, y in zip(raw.data.tolist(), raw.target.tolist(), strict=True))
    assert mine == theirs


def test_digits_are_stratified() -> None:
    split = digits(seed=1, test_size=0.25)
    whole = np.bincount(load_digits().target) / 1797
    test = split.test_y.bincount(minlength=10).double().numpy() / len(split.test_y)
    assert np.abs(whole - test).max() < 2 / len(split.test_y)


def test_seed_decides_the_split() -> None:
    assert torch.equal(digits(seed=5).train_x, digits(seed=5).train_x)
    assert not torch.equal(digits(seed=5).train_x, digits(seed=6).train_x)
    assert torch.equal(digits(seed=5, flat=True).train_x, digits(seed=5).train_x.flatten(1))


@pytest.mark.parametrize(("name", "rows", "columns", "classes"), [
    ("breast_cancer", 569, 30, 2), ("wine", 178, 13, 3), ("iris", 150, 4, 3), ("diabetes", 442, 10, 0),
])  # fmt: skip
def test_tables(name: str, rows: int, columns: int, classes: int) -> None:
    split = tabular(name, seed=2)
    assert len(split.train_x) + len(split.test_x) == rows
    assert split.train_x.shape[1:] == (columns,)
    assert split.num_classes == classes
    torch.testing.assert_close(split.train_x.mean(0), torch.zeros(columns), atol=1e-5, rtol=0)
    torch.testing.assert_close(split.train_x.std(0, correction=0), torch.ones(columns), atol=1e-5, rtol=0)
    assert split.train_y.dtype == (torch.int64 if classes else torch.float32)
    if not classes:
        assert abs(float(split.train_y.mean())) < 1e-5


def test_test_part_is_standardized_by_the_training_part() -> None:
    split = tabular("wine", seed=0)
    raw = np.sort(load_wine().data[:, 0])
    # An affine map of the raw column: the training part alone has mean 0, so the test part has not.
    both = np.sort(torch.cat([split.train_x, split.test_x])[:, 0].double().numpy())
    slope, intercept = np.polyfit(raw, both, 1)
    assert np.abs(slope * raw + intercept - both).max() < 1e-5
    assert abs(float(split.test_x[:, 0].mean())) > 1e-4


@pytest.mark.parametrize("size", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_test_size_out_of_range(size: float) -> None:
    with pytest.raises(ValueError, match="test_size"):
        digits(test_size=size)


def test_too_small_a_part_and_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"digits cannot be split with test_size=0\.001"):
        digits(test_size=0.001)
    with pytest.raises(ValueError, match="allowed: breast_cancer, wine, diabetes, iris"):
        tabular("boston")


def test_split_refuses_what_does_not_fit() -> None:
    x, y = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="'test_x' has 3 samples and 'test_y' 2"):
        Split(x, y, x, y[:2])
    with pytest.raises(ValueError, match="one sample has shape"):
        Split(x, y, x[:, :1], y)


def test_split_moves_dtype_of_floats_only() -> None:
    split = digits().to(dtype=torch.float64)
    assert split.train_x.dtype == split.test_x.dtype == torch.float64
    assert split.train_y.dtype == torch.int64

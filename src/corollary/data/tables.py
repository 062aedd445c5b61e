"""Small real sets that ship with scikit-learn, as tensors: handwritten digits and four tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from corollary.data._checks import need_choice, need_fraction
from corollary.data.split import Split

TABLES = ("breast_cancer", "wine", "diabetes", "iris")


def split_indices(
    n: int, *, seed: int, test_size: float, labels: Tensor | None = None, where: str = "the data"
) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the test part, shuffled by ``seed``; stratified where ``labels`` are given.

    Raises:
        ValueError: where a part would be empty, or a class has too few samples to stand in both parts.
    """
    from sklearn.model_selection import train_test_split

    need_fraction("test_size", test_size)
    try:
        train, test = train_test_split(
            torch.arange(n).numpy(),
            test_size=test_size,
            random_state=seed,
            stratify=None if labels is None else labels.numpy(),
        )
    except ValueError as error:
        raise ValueError(f"{where} cannot be split with test_size={test_size}: {error}") from error
    return torch.from_numpy(train), torch.from_numpy(test)


def standardize(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both parts with the mean and standard deviation of the training part's columns taken out; constant columns become 0."""
    mean, std = train.mean(0), train.std(0, correction=0)
    std = torch.where(std > 0, std, torch.ones_like(std))
    return (train - mean) / std, (test - mean) / std


def digits(*, seed: int = 0, test_size: float = 0.3, flat: bool = False) -> Split:
    """Handwritten digits: 1,797 grey images of 8 by 8 pixels in 10 classes, stratified.

    Args:
        seed: decides which samples go to which part, and their order.
        test_size: share of the test part, in (0, 1).
        flat: give each image as one row.

    Returns:
        Images (n, 1, 8, 8), flat (n, 64), float32 in [0, 1]; labels int64 in 0 to 9.

    Raises:
        ValueError: where ``test_size`` leaves a part without every class.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998, as shipped by scikit-learn. All
    writers stand in both parts, so the test error is that of known handwritings.

    Example:
        >>> from corollary.data import digits
        >>> split = digits(seed=0)
        >>> split.train_x.shape, split.test_x.shape, split.train_y.dtype
        (torch.Size([1257, 1, 8, 8]), torch.Size([540, 1, 8, 8]), torch.int64)
    """
    from sklearn.datasets import load_digits

    raw: Any = load_digits()
    x = torch.from_numpy(raw.images).to(torch.float32).div_(16.0).unsqueeze(1)
    y = torch.from_numpy(raw.target).to(torch.int64)
    if flat:
        x = x.flatten(1)
    train, test = split_indices(len(x), seed=seed, test_size=test_size, labels=y, where="digits")
    return Split(x[train], y[train], x[test], y[test], tuple(str(name) for name in raw.target_names))


def tabular(name: str, *, seed: int = 0, test_size: float = 0.3) -> Split:
    """A small real table: ``breast_cancer`` (569 × 30), ``wine`` (178 × 13), ``iris`` (150 × 4) or ``diabetes`` (442 × 10).

    The first three are classifications, stratified. ``diabetes`` is a regression: its labels are float32, ``classes`` is
    empty, and the target is standardized as the inputs are, so that a mean squared error of 1 is that of the mean.

    Args:
        name: one of the four.
        seed: decides which samples go to which part, and their order.
        test_size: share of the test part, in (0, 1).

    Returns:
        Inputs (n, columns) float32, each column with mean 0 and variance 1 over the training part.

    Raises:
        ValueError: on another name, or a ``test_size`` that leaves a part without every class.

    Example:
        >>> from corollary.data import tabular
        >>> split = tabular("wine")
        >>> split.train_x.shape, split.classes
        (torch.Size([124, 13]), ('class_0', 'class_1', 'class_2'))
    """
    from sklearn import datasets

    need_choice("name", name, TABLES)
    raw: Any = getattr(datasets, f"load_{name}")()
    x = torch.from_numpy(raw.data).to(torch.float64)
    regression = name == "diabetes"
    y = torch.from_numpy(raw.target).to(torch.float64 if regression else torch.int64)
    train, test = split_indices(len(x), seed=seed, test_size=test_size, labels=None if regression else y, where=f"'{name}'")
    train_x, test_x = standardize(x[train], x[test])
    train_y, test_y = y[train], y[test]
    if regression:
        train_y, test_y = (part.to(torch.float32) for part in standardize(train_y, test_y))
    classes = () if regression else tuple(str(c) for c in raw.target_names)
    return Split(train_x.to(torch.float32), train_y, test_x.to(torch.float32), test_y, classes)

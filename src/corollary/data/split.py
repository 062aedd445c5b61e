"""The shape in which every labelled set arrives: training and test tensors side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """A labelled set, split into training and test part.

    Args:
        train_x: inputs, samples first; floating point.
        train_y: labels as int64 class numbers, or float32 targets for regression.
        test_x: inputs of the test part, same shape after the first axis.
        test_y: labels of the test part.
        classes: a name for each class number; empty for regression.

    Raises:
        ValueError: where inputs and labels differ in length, or train and test in the shape of one sample.

    Example:
        >>> import torch
        >>> from corollary.data import Split
        >>> split = Split(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]), torch.ones(2, 2), torch.tensor([0, 1]), ("a", "b"))
        >>> split.num_classes, split.to(dtype=torch.float64).train_x.dtype
        (2, torch.float64)
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            x, y = getattr(self, f"{part}_x"), getattr(self, f"{part}_y")
            if len(x) != len(y):
                raise ValueError(f"'{part}_x' has {len(x)} samples and '{part}_y' {len(y)}; they must be equal")
        train, test = tuple(self.train_x.shape[1:]), tuple(self.test_x.shape[1:])
        if train != test:
            raise ValueError(f"one sample has shape {train} in 'train_x' and {test} in 'test_x'; they must be equal")

    @property
    def num_classes(self) -> int:
        """How many classes there are; 0 for regression."""
        return len(self.classes)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Split:
        """The same split on another device; ``dtype`` changes what is floating point and leaves class numbers alone."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

        return Split(move(self.train_x), move(self.train_y), move(self.test_x), move(self.test_y), self.classes)

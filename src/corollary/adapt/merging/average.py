"""The mean of checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from corollary.adapt.merging.lazy import MergedCheckpoint, MergeError, Tensors


def average(
    base: Mapping[str, Tensor], checkpoints: Sequence[Mapping[str, Tensor]], *, weights: Sequence[float] | None = None
) -> MergedCheckpoint:
    r"""The (weighted) mean of checkpoints, tensor by tensor.

    .. math:: \theta = \sum_t w_t \theta_t \Big/ \sum_t w_t

    Args:
        base: what they were fine-tuned from; it gives names, dtypes and what is not floating, and no part of the mean.
        checkpoints: T mappings from name to tensor, with the base's names and shapes.
        weights: T numbers, not all zero; equal by default.

    Returns:
        A `MergedCheckpoint`: each tensor is merged when it is asked for.

    Raises:
        MergeError: where the checkpoints do not fit together, or ``weights`` are not T finite numbers with a sum above zero.

    When not to use it: for checkpoints that do not come from one pretrained model, whose weights have nothing in common.

    Example:
        >>> import torch
        >>> from corollary.adapt import average
        >>> average({"w": torch.zeros(2)}, [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 0.0])}])["w"]
        tensor([2., 1.])

    Source: M. Wortsman et al., Model soups, arXiv 2203.05482, section 2 (the uniform soup).
    """
    shares = [1.0] * len(checkpoints) if weights is None else [float(weight) for weight in weights]
    total = math.fsum(shares)
    if len(shares) != len(checkpoints) or not all(map(math.isfinite, shares)) or (shares and total <= 0):
        raise MergeError(f"'weights' must be {len(checkpoints)} finite numbers with a sum above 0, not {weights}")

    def combine(_: str, like: Tensor, tensors: Tensors) -> Tensor:
        mean = torch.zeros_like(like)
        for share, tensor in zip(shares, tensors, strict=True):
            mean.add_(tensor, alpha=share / total)
        return mean

    return MergedCheckpoint(base, checkpoints, combine)

"""Task vectors added to the model they came from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from corollary.adapt.merging.lazy import MergedCheckpoint, MergeError, Tensors

Scale = float | Sequence[float] | Mapping[str, Tensor]


def scales_for(scale: Scale, count: int, name: str) -> list[float] | Tensor:
    """The factor of each of ``count`` task vectors in one tensor.

    Raises:
        MergeError: where they are not ``count`` finite numbers.
    """
    if isinstance(scale, Mapping):
        if name not in scale:
            raise MergeError(f"'scale' has no factors for tensor '{name}'")
        factors = scale[name]
        if factors.shape != (count,) or not bool(factors.isfinite().all()):
            raise MergeError(f"'scale': '{name}' must be {count} finite numbers, not {factors.tolist()}")
        return factors
    numbers = [float(scale)] * count if isinstance(scale, (int, float)) else [float(factor) for factor in scale]
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise MergeError(f"'scale' must be one finite number or {count} of them, not {scale}")
    return numbers


def scaled_changes(start: Tensor, tensors: Tensors, factors: list[float] | Tensor) -> Tensor:
    """The sum of what became of one tensor on each task, less where it started, times the task's factor."""
    change = torch.zeros_like(start)
    for factor, tensor in zip(factors, tensors, strict=True):
        change += factor * (tensor - start)
    return change


def task_arithmetic(
    base: Mapping[str, Tensor], checkpoints: Sequence[Mapping[str, Tensor]], *, scale: Scale = 0.3
) -> MergedCheckpoint:
    r"""What fine-tuning changed, summed over the tasks and added to the base.

    .. math:: \theta = \theta_0 + \sum_t \lambda_t (\theta_t - \theta_0)

    Args:
        base: what the checkpoints were fine-tuned from, θ₀.
        checkpoints: T mappings from name to tensor, with the base's names and shapes.
        scale: λ for all tasks, T of them, or a mapping from each floating tensor's name to T of them, as `fit_adamerging` gives.

    Returns:
        A `MergedCheckpoint`: each tensor is merged when it is asked for.

    Raises:
        MergeError: where the checkpoints do not fit together, or ``scale`` does not fit them.

    When not to use it: where tasks pull the same weights in different directions, as they do more the more tasks there are; that
    is what `ties` and `concrete` are for.

    Example:
        >>> import torch
        >>> from corollary.adapt import task_arithmetic
        >>> base = {"w": torch.tensor([1.0, 1.0])}
        >>> task_arithmetic(base, [{"w": torch.tensor([2.0, 1.0])}, {"w": torch.tensor([1.0, 3.0])}], scale=0.5)["w"]
        tensor([1.5000, 2.0000])

    Source: G. Ilharco et al., Editing Models with Task Arithmetic, arXiv 2212.04089, section 2; λ = 0.3 is what the authors
    recommend where nothing can be tuned. Factors for each tensor: E. Yang et al., AdaMerging, arXiv 2310.02575, equation 5.
    """
    if not isinstance(scale, Mapping):
        scales_for(scale, len(checkpoints), "")

    def combine(name: str, start: Tensor, tensors: Tensors) -> Tensor:
        return start + scaled_changes(start, tensors, scales_for(scale, len(tensors), name))

    return MergedCheckpoint(base, checkpoints, combine)

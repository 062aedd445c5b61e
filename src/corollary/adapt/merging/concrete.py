"""Task vectors through a Concrete mask: merged within the subspace that the tasks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from corollary.adapt.merging.lazy import MergedCheckpoint, MergeError, Tensors, floating
from corollary.adapt.merging.masks import ConcreteMasks
from corollary.adapt.merging.task_arithmetic import Scale, scaled_changes, scales_for


def concrete(
    base: Mapping[str, Tensor],
    checkpoints: Sequence[Mapping[str, Tensor]],
    masks: ConcreteMasks,
    *,
    scale: Scale | None = None,
) -> MergedCheckpoint:
    r"""Task arithmetic, or AdaMerging, on task vectors that one learned mask has cleared of interference.

    .. math:: \theta = \theta_0 + \frac{m}{\bar m} \odot \sum_t \lambda_t (\theta_t - \theta_0)

    with the mean :math:`\bar m` taken over each tensor.

    Args:
        base: what the checkpoints were fine-tuned from, θ₀.
        checkpoints: T mappings from name to tensor, with the base's names and shapes, in the order of the fit.
        masks: what `fit_concrete_masks` gives. A floating tensor that it has no mask for, such as a buffer, is the base's: the
            fit never merged it either.
        scale: λ, as for `task_arithmetic`; the masks' own by default.

    Returns:
        A `MergedCheckpoint`: each tensor is merged when it is asked for.

    Raises:
        MergeError: where the checkpoints do not fit together, or the masks do not fit them.

    When not to use it: without unlabelled inputs of every task there is no mask to be had; then take `ties`.

    Example:
        >>> import torch
        >>> from corollary.adapt import ConcreteMasks, concrete
        >>> masks = ConcreteMasks({"w": torch.tensor([30.0, -30.0])}, {"w": torch.tensor([0.5, 0.5])}, how="binary")
        >>> tuned = [{"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([2.0, -3.0])}]
        >>> concrete({"w": torch.zeros(2)}, tuned, masks)["w"]
        tensor([3., 0.])

    Source: A. Tang et al., Concrete Subspace Learning, arXiv 2312.06173, section 3.2; github.com/tanganke/subspace_fusion.
    """
    if not isinstance(masks, ConcreteMasks):
        raise TypeError(f"'masks' must be ConcreteMasks, as fit_concrete_masks gives them, not {type(masks).__name__}")
    factors: Scale = masks.scales if scale is None else scale
    count = len(checkpoints)

    def combine(name: str, start: Tensor, tensors: Tensors) -> Tensor:
        if name not in masks:
            return start
        return start + masks.draw(name).to(start) * scaled_changes(start, tensors, scales_for(factors, count, name))

    merged = MergedCheckpoint(base, checkpoints, combine)
    masked = set(floating(merged.specs))
    for name in masks:
        if name not in masked:
            raise MergeError(f"'masks' has tensor '{name}', which the base has not, or not as a floating tensor")
        shape = _shape(masks, name)
        if shape != merged.specs[name].shape:
            raise MergeError(f"'masks': tensor '{name}' is {shape}, in the base it is {merged.specs[name].shape}")
        scales_for(factors, count, name)
    return merged


def _shape(masks: ConcreteMasks, name: str) -> tuple[int, ...]:
    shape = getattr(masks.logits, "shape", None)
    return tuple(shape(name) if callable(shape) else masks[name].shape)

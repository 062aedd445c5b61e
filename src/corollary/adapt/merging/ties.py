"""Trim, elect sign, merge: task vectors without their small entries and without those that pull the other way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from corollary.adapt.merging.lazy import MergedCheckpoint, MergeError, Tensors, check_checkpoints, floating, working_dtype
from corollary.adapt.merging.quantile import kth_magnitude

Progress = Callable[[str], None]


@dataclass(frozen=True)
class _Election:
    """What the trim and the sign of exact draws need to know of the whole."""

    thresholds: Sequence[float]
    majority: float


def ties(
    base: Mapping[str, Tensor],
    checkpoints: Sequence[Mapping[str, Tensor]],
    *,
    density: float = 0.2,
    scale: float = 1.0,
    scope: str = "checkpoint",
    mean: bool = True,
    progress: Progress | None = None,
) -> MergedCheckpoint:
    r"""TIES-merging: of each task vector the largest entries, and of those the ones that agree with the elected sign.

    With :math:`\hat\tau_t` the task vector :math:`\theta_t - \theta_0` whose smaller entries are set to zero:

    .. math::
        \gamma = \operatorname{sgn} \sum_t \hat\tau_t, \qquad
        A_j = \{t : \operatorname{sgn} \hat\tau_t^j = \gamma^j\}, \qquad
        \theta^j = \theta_0^j + \lambda \frac{1}{|A_j|} \sum_{t \in A_j} \hat\tau_t^j

    Args:
        base: what the checkpoints were fine-tuned from, θ₀.
        checkpoints: T mappings from name to tensor, with the base's names and shapes.
        density: share of each task vector's entries that is kept, in (0, 1].
        scale: λ.
        scope: over what the entries of a task vector are ranked: the whole ``"checkpoint"``, as in the paper, or each
            ``"tensor"`` by itself, as mergekit does. The checkpoint is read three times more for it (five for float64), however
            large it is, and never held; the threshold is exact.
        mean: divide by the number of agreeing tasks; without it their entries are summed, as the Concrete paper's code does.
        progress: called with the name of each tensor that is read to find the thresholds.

    Returns:
        A `MergedCheckpoint`: each tensor is merged when it is asked for. With ``scope="checkpoint"`` the thresholds are found
        before this function returns.

    Raises:
        MergeError: where the checkpoints do not fit together, an option is out of range, or a task vector is not finite.

    The authors' code is followed where the paper is silent: of d entries those are kept that are not below the
    :math:`(d - \lfloor d \cdot density \rfloor)`-th smallest magnitude, which is one more than density times d; where the sum
    of the trimmed entries is exactly zero, the sign is that of the majority of all other signs, and negative if there is none.

    When not to use it: with two tasks that hardly overlap, where `task_arithmetic` loses nothing to begin with.

    Example:
        >>> import torch
        >>> from corollary.adapt import ties
        >>> tuned = [{"w": torch.tensor([4.0, 0.1, 2.0, 1.0])}, {"w": torch.tensor([2.0, 0.2, -3.0, 0.5])}]
        >>> ties({"w": torch.zeros(4)}, tuned, density=0.5)["w"]
        tensor([ 3.0000,  0.0000, -3.0000,  0.7500])

    Source: P. Yadav et al., TIES-Merging, arXiv 2306.01708, Algorithm 1; github.com/prateeky2806/ties-merging.
    """
    if not 0 < density <= 1:
        raise MergeError(f"'density' must lie in (0, 1], not {density}")
    if not math.isfinite(scale):
        raise MergeError(f"'scale' must be a finite number, not {scale}")
    if scope not in ("checkpoint", "tensor"):
        raise MergeError(f"'scope' is '{scope}'; allowed: checkpoint, tensor")
    say = progress or (lambda _: None)
    whole = _elect(base, checkpoints, density, say) if scope == "checkpoint" else None

    def combine(name: str, start: Tensor, tensors: Tensors) -> Tensor:
        election = whole or _elect_tensor(name, start, tensors, density)
        positive = _sign(start, tensors, election)
        total, count = torch.zeros_like(start), torch.zeros_like(start)
        for threshold, tensor in zip(election.thresholds, tensors, strict=True):
            kept = _trim(tensor - start, threshold)
            kept = kept * torch.where(positive, kept > 0, kept < 0)
            total = total + kept
            count += kept != 0
        return start + scale * (total / count.clamp_(min=1) if mean else total)

    return MergedCheckpoint(base, checkpoints, combine)


def _rank(size: int, density: float) -> int:
    return max(1, size - int(size * density))


def _trim(change: Tensor, threshold: float) -> Tensor:
    return change * (change.abs() >= threshold)


@torch.no_grad()
def _sign(start: Tensor, tensors: Tensors, election: _Election) -> Tensor:
    """Where the elected sign is positive."""
    total = torch.zeros_like(start)
    for threshold, tensor in zip(election.thresholds, tensors, strict=True):
        total += _trim(tensor - start, threshold)
    return torch.where(total == 0, election.majority > 0, total > 0)


@torch.no_grad()
def _elect_tensor(name: str, start: Tensor, tensors: Tensors, density: float) -> _Election:
    k = _rank(start.numel(), density)
    if not start.numel():
        return _Election([0.0] * len(tensors), 0.0)
    thresholds = [
        float(_finite(tensor - start, name, i).abs().flatten().kthvalue(k).values) for i, tensor in enumerate(tensors)
    ]
    total = torch.zeros_like(start)
    for threshold, tensor in zip(thresholds, tensors, strict=True):
        total += _trim(tensor - start, threshold)
    return _Election(thresholds, float(total.sign().sum()))


@torch.no_grad()
def _elect(base: Mapping[str, Tensor], checkpoints: Sequence[Mapping[str, Tensor]], density: float, say: Progress) -> _Election:
    """Each task vector's threshold, and which sign is in the majority, in passes over checkpoints that are never held."""
    specs = check_checkpoints(base, checkpoints)
    names = [name for name in floating(specs) if 0 not in specs[name].shape]
    # One dtype for all, so that the ranks are of one kind of number.
    dtype = max((working_dtype(specs[name]) for name in names), key=lambda dtype: dtype.itemsize, default=torch.float32)
    k = _rank(sum(math.prod(specs[name].shape) for name in names), density)

    def changes(i: int) -> Iterator[Tensor]:
        for name in names:
            say(name)
            start = base[name].to(working_dtype(specs[name]))
            yield _finite(checkpoints[i][name].to(start) - start, name, i).to(dtype)

    if not names:
        return _Election([0.0] * len(checkpoints), 0.0)
    thresholds = [kth_magnitude(lambda i=i: changes(i), k, dtype) for i in range(len(checkpoints))]  # type: ignore[misc]
    majority = 0.0
    for name in names:
        say(name)
        start = base[name].to(working_dtype(specs[name]))
        total = torch.zeros_like(start)
        for threshold, tensor in zip(thresholds, Tensors(checkpoints, name, start), strict=True):
            total += _trim(tensor - start, threshold)
        majority += float(total.sign().sum(dtype=torch.float64))
    return _Election(thresholds, majority)


def _finite(change: Tensor, name: str, i: int) -> Tensor:
    if not bool(change.isfinite().all()):
        raise MergeError(f"checkpoints[{i}]: tensor '{name}' less the base's is not finite; entries cannot be ranked")
    return change

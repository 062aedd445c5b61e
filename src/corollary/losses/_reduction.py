"""What classification losses share: the checks of logits and targets, and the reduction over samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")
# For torch's losses where no class index means "ignore this sample".
NO_INDEX = torch.iinfo(torch.int64).min
T = TypeVar("T")


def need_reduction(reduction: str) -> None:
    """Raise ``ValueError`` unless ``reduction`` is one that torch's losses know."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; allowed: {', '.join(REDUCTIONS)}")


def need_number(name: str, value: float, *, least: float = 0.0, strict: bool = False) -> None:
    """Raise ``ValueError`` unless ``least <= value`` (``<`` where ``strict``) and ``value`` is finite."""
    # Written so that NaN fails both comparisons.
    if not ((value > least if strict else value >= least) and value < float("inf")):
        raise ValueError(f"{name} must be {'above' if strict else 'at least'} {least:g} and finite, got {value!r}")


def class_dim(logits: Tensor) -> int:
    """The dimension of the classes: 0 for one sample (C,), else 1, as torch's cross-entropy has it."""
    return 0 if logits.ndim == 1 else 1


def need_logits(logits: Tensor, name: str = "logits") -> int:
    """Check that ``logits`` are floating, shaped (C,), (N, C) or (N, C, d1, ...), and not empty; gives C."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(logits).__name__}")
    if not logits.is_floating_point():
        raise TypeError(f"{name} must be floating, got {logits.dtype}")
    if logits.ndim == 0:
        raise ValueError(f"{name} must have shape (C,), (N, C) or (N, C, d1, ...), got a scalar")
    if logits.numel() == 0:
        raise ValueError(f"{name} is empty: shape {tuple(logits.shape)}; give at least one sample and one class")
    return logits.shape[class_dim(logits)]


def need_target(logits: Tensor, target: Tensor, *, probabilities: bool = True) -> None:
    """Check that ``target`` holds class indices (int64) or, where allowed, probabilities shaped like ``logits``."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    if target.is_floating_point():
        if not probabilities:
            raise TypeError(f"target must hold class indices (torch.int64), got {target.dtype}")
        if target.shape != logits.shape:
            raise ValueError(
                f"target with probabilities must be shaped like logits, {tuple(logits.shape)}, got {tuple(target.shape)}"
            )
        return
    if target.dtype != torch.int64:
        allowed = "torch.int64 (class indices)" + (" or floating (probabilities)" if probabilities else "")
        raise TypeError(f"target must be {allowed}, got {target.dtype}")
    dim = class_dim(logits)
    want = logits.shape[:dim] + logits.shape[dim + 1 :]
    if target.shape != want:
        raise ValueError(f"target must have shape {tuple(want)} for logits {tuple(logits.shape)}, got {tuple(target.shape)}")


def need_weight(weight: Tensor | None, classes: int) -> None:
    """Check that ``weight`` has one entry for each class."""
    if weight is not None and weight.shape != (classes,):
        raise ValueError(f"weight must have shape ({classes},), one entry for each class, got {tuple(weight.shape)}")


def index_guard(call: Callable[[], T], target: Tensor, classes: int, ignore_index: int) -> T:
    """Run ``call``; where torch finds a class index out of bounds on the CPU, say which and what is allowed.

    The bounds are not checked beforehand, because that would read the targets once more and, on a GPU, wait for them.
    """
    if torch.compiler.is_compiling():
        return call()
    try:
        return call()
    except IndexError as error:
        bad = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
        ignored = "" if ignore_index == NO_INDEX else f", or ignore_index={ignore_index}"
        raise ValueError(f"target holds class {int(bad.flatten()[0])}; allowed: 0 to {classes - 1}{ignored}") from error


def kept(target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """The weight of each sample for index targets: its class's weight, and 0 where it is ignored."""
    mask = target != ignore_index
    if weight is None:
        return mask.to(dtype)
    return weight.to(dtype)[torch.where(mask, target, 0)] * mask


def reduce_loss(loss: Tensor, reduction: str, total: Tensor | float | None = None) -> Tensor:
    """Per-sample losses reduced; ``mean`` divides by ``total`` (by their number without one)."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.mean() if total is None else loss.sum() / total


def arguments(**values: Any) -> str:
    """Arguments as ``repr`` shows them, the unset ones left out."""
    return ", ".join(f"{name}={value!r}" for name, value in values.items() if value is not None)

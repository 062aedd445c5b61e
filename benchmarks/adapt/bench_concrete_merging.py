"""Merging tensor by tensor against the same formulas over whole checkpoints in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Bench
from corollary.adapt import ConcreteMasks, MergedCheckpoint, average, concrete, task_arithmetic, ties

Checkpoint = dict[str, Tensor]


def _consume(merge: Callable[..., MergedCheckpoint], *given: object) -> None:
    merged = merge(*given)
    for name in merged:
        merged[name]


def _flat(checkpoint: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in checkpoint.values()])


def _split(flat: Tensor, like: Mapping[str, Tensor]) -> Checkpoint:
    parts = flat.split([tensor.numel() for tensor in like.values()])
    return {name: part.view(like[name].shape) for (name, part) in zip(like, parts, strict=True)}


def _flat_average(_: Checkpoint, tuned: list[Checkpoint]) -> Checkpoint:
    return _split(torch.stack([_flat(t) for t in tuned]).mean(0), tuned[0])


def _flat_task_arithmetic(base: Checkpoint, tuned: list[Checkpoint]) -> Checkpoint:
    start = _flat(base)
    return _split(start + 0.3 * torch.stack([_flat(t) - start for t in tuned]).sum(0), base)


def _flat_ties(base: Checkpoint, tuned: list[Checkpoint]) -> Checkpoint:
    start = _flat(base)
    changes = torch.stack([_flat(t) - start for t in tuned])
    d = changes.shape[1]
    kept = changes * (changes.abs() >= changes.abs().kthvalue(d - int(0.2 * d), dim=1, keepdim=True).values)
    sign = kept.sum(0).sign()
    sign = torch.where(sign == 0, sign.sum().sign(), sign)
    agreeing = kept * torch.where(sign > 0, kept > 0, kept < 0)
    return _split(start + agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1), base)


def _dense_concrete(base: Checkpoint, tuned: list[Checkpoint], masks: ConcreteMasks) -> Checkpoint:
    drawn = {name: masks.draw(name) for name in base}
    vectors = [{name: t[name] - base[name] for name in base} for t in tuned]
    return {name: base[name] + drawn[name] * sum(0.3 * v[name] for v in vectors) for name in base}


def cases() -> list[Bench]:
    """Four checkpoints of 12 layers, 512 wide, in memory: the streaming gives up no time for the memory that it saves."""
    torch.manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(512, 1024) for i in range(12)}
    tuned = [{name: t + 0.01 * torch.randn_like(t) for name, t in base.items()} for _ in range(4)]
    masks = ConcreteMasks(
        {name: torch.randn_like(t) for name, t in base.items()}, {name: torch.full((4,), 0.3) for name in base}
    )
    rows: list[tuple[Callable[..., MergedCheckpoint], Callable[..., object], tuple[object, ...]]] = [
        (average, _flat_average, ()),
        (task_arithmetic, _flat_task_arithmetic, ()),
        (ties, _flat_ties, ()),
        (concrete, _dense_concrete, (masks,)),
    ]
    return [
        Bench(
            f"corollary.adapt.{ours.__name__}",
            "4 checkpoints of 6.3 million parameters, float32",
            partial(_consume, ours, base, tuned, *more),
            {"whole checkpoints in memory": partial(peer, base, tuned, *more)},
            rounds=5,
            warmup=1,
        )
        for ours, peer, more in rows
    ]

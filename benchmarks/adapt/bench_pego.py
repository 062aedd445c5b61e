"""PEGO against peft's LoRA of as many trained numbers."""

from __future__ import annotations

from benchmarks.adapt.steps import against_lora
from benchmarks.harness import Bench
from corollary.adapt import PEGO


def cases() -> list[Bench]:
    """Four modules of rank 2; the penalty, which is no part of the forward pass, is not timed."""
    return [against_lora("corollary.adapt.PEGO", PEGO(rank=2, group_size=4), 8, what="without the penalty")]

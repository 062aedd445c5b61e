"""LoLDU against peft's LoRA."""

from __future__ import annotations

from benchmarks.adapt.steps import against_lora
from benchmarks.harness import Bench
from corollary.adapt import LoLDU


def cases() -> list[Bench]:
    """Equal rank, and the whole diagonal."""
    return [
        against_lora("corollary.adapt.LoLDU", LoLDU(rank=8), 8),
        against_lora("corollary.adapt.LoLDU", LoLDU(), 384, what="the whole diagonal"),
    ]

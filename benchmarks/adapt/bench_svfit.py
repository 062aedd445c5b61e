"""SVFit and LoRA against peft's LoRA."""

from __future__ import annotations

from benchmarks.adapt.steps import against_lora
from benchmarks.harness import Bench
from corollary.adapt import LoRA, SVFit


def cases() -> list[Bench]:
    """Equal rank, and SVFit over all singular values."""
    return [
        against_lora("corollary.adapt.LoRA", LoRA(rank=8), 8),
        against_lora("corollary.adapt.SVFit", SVFit(rank=8), 8),
        against_lora("corollary.adapt.SVFit", SVFit(), 384, what="all singular values"),
    ]

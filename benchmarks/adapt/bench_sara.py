"""SaRA against peft's LoRA of as many trained numbers."""

from __future__ import annotations

from benchmarks.adapt.steps import against_lora
from benchmarks.harness import Bench
from corollary.adapt import SaRA


def cases() -> list[Bench]:
    """A tenth of the weights, and LoRA of the rank that trains as many numbers."""
    return [against_lora("corollary.adapt.SaRA", SaRA(fraction=0.1), 25, what="a tenth of the weights")]

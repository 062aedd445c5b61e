"""SNNK's layer against a dense one with its activation, and its adapter against peft's LoRA."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.adapt.steps import TOKENS, WIDTH, against_lora, step
from benchmarks.harness import Bench
from corollary.adapt import SNNKAdapter, SNNKLinear
from corollary.claims.timing import keep_freed_memory


def cases() -> list[Bench]:
    """The layer with features for an eighth of its input's width, and the adapter of as many numbers as the rank."""
    keep_freed_memory()
    torch.manual_seed(0)
    layer = SNNKLinear(WIDTH, WIDTH, WIDTH // 8, activation="relu")
    return [
        Bench(
            component="corollary.adapt.SNNKLinear",
            setting=f"forward and backward, {WIDTH} to {WIDTH}, {TOKENS} tokens, {WIDTH // 8} features",
            ours=step(layer),
            peers={"torch.nn.Linear and ReLU": step(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()))},
            rounds=15,
            warmup=3,
        ),
        against_lora("corollary.adapt.SNNKAdapter", SNNKAdapter(num_features=16), 16, what="16 features"),
    ]

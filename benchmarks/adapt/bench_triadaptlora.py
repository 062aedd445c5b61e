"""TriAdaptLoRA against peft's LoRA and AdaLoRA."""

from __future__ import annotations

import copy

import peft
import torch

from benchmarks.adapt.steps import NAMES, TOKENS, WIDTH, Block, against_lora, step
from benchmarks.harness import Bench
from corollary.adapt import TriAdaptLoRA, adapt


def cases() -> list[Bench]:
    """Equal rank."""
    torch.manual_seed(0)
    block = Block()
    config = peft.AdaLoraConfig(init_r=8, target_r=8, total_step=100, target_modules=list(NAMES))
    return [
        against_lora("corollary.adapt.TriAdaptLoRA", TriAdaptLoRA(rank=8, max_rank=8), 8),
        Bench(
            component="corollary.adapt.TriAdaptLoRA",
            setting=f"forward and backward of a block of width {WIDTH}, {TOKENS} tokens, rank 8",
            ours=step(adapt(copy.deepcopy(block), TriAdaptLoRA(rank=8, max_rank=8), NAMES)),
            peers={"peft AdaLora": step(peft.get_peft_model(copy.deepcopy(block), config))},  # type: ignore[arg-type]
            rounds=9,
            warmup=2,
        ),
    ]

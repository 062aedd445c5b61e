"""RandLoRA and VeRA against peft's versions and against peft's LoRA."""

from __future__ import annotations

import copy

import peft
import torch

from benchmarks.adapt.steps import NAMES, TOKENS, WIDTH, Block, against_lora, step
from benchmarks.harness import Bench
from corollary.adapt import RandLoRA, VeRA, adapt


def _against_own(component: str, config: RandLoRA | VeRA, peer: str, theirs: peft.PeftConfig) -> Bench:
    torch.manual_seed(0)
    block = Block()
    return Bench(
        component=component,
        setting=f"forward and backward of a block of width {WIDTH}, {TOKENS} tokens, rank {config.rank}",
        ours=step(adapt(copy.deepcopy(block), config, NAMES)),
        peers={peer: step(peft.get_peft_model(copy.deepcopy(block), theirs))},  # type: ignore[arg-type]
        rounds=9,
        warmup=2,
    )


def cases() -> list[Bench]:
    """Each against its own version in peft, and against LoRA of as wide factors."""
    names = list(NAMES)
    return [
        _against_own(
            "corollary.adapt.RandLoRA", RandLoRA(rank=16), "peft RandLora", peft.RandLoraConfig(r=16, target_modules=names)
        ),
        against_lora("corollary.adapt.RandLoRA", RandLoRA(rank=16), 384, what="24 bases of rank 16"),
        _against_own("corollary.adapt.VeRA", VeRA(rank=256), "peft Vera", peft.VeraConfig(r=256, target_modules=names)),
        against_lora("corollary.adapt.VeRA", VeRA(rank=256), 256),
    ]

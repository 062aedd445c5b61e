"""LoRA-SB and LoRA-XS against peft's LoRA."""

from __future__ import annotations

import torch

from benchmarks.adapt.steps import NAMES, WIDTH, Block, against_lora
from benchmarks.harness import Bench
from corollary.adapt import LoRASB, LoRAXS, mean_gradients


def cases() -> list[Bench]:
    """Equal rank."""
    torch.manual_seed(0)
    block = Block()
    gradients = mean_gradients(block, lambda x: block(x).square().mean(), [torch.randn(64, WIDTH)], NAMES)
    return [
        against_lora("corollary.adapt.LoRASB", LoRASB(rank=16), 16, calibration=gradients),
        against_lora("corollary.adapt.LoRAXS", LoRAXS(rank=16), 16),
    ]

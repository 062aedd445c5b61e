"""O3's forward pass with loaded weights, and its adapter's training step, against peft's LoRA."""

from __future__ import annotations

import copy

import peft
import torch

from benchmarks.adapt.steps import NAMES, WIDTH, Block, against_lora
from benchmarks.harness import Bench
from corollary.adapt import OrthogonalLoRA, SoftLoading, add_request

ROWS = 512


class Half(torch.nn.Module):
    """A detector that takes no time, so that the loading alone is measured."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linspace(0, 1, len(x))


def cases() -> list[Bench]:
    torch.manual_seed(0)
    block, x = Block(), torch.randn(ROWS, WIDTH)
    ours = add_request(copy.deepcopy(block), OrthogonalLoRA(rank=8), NAMES, name="first")
    loading = SoftLoading(ours, {"first": Half()})
    theirs = peft.get_peft_model(copy.deepcopy(block), peft.LoraConfig(r=8, lora_alpha=8, target_modules=list(NAMES)))  # type: ignore[arg-type]

    def loaded() -> None:
        with torch.no_grad():
            loading(x)

    def plain() -> None:
        with torch.no_grad():
            theirs(x)

    return [
        against_lora("corollary.adapt.OrthogonalLoRA", OrthogonalLoRA(rank=8), 8),
        Bench(
            component="corollary.adapt.SoftLoading",
            setting=f"forward of a block of width {WIDTH}, {ROWS} inputs each with its weight, rank 8, detector left out",
            ours=loaded,
            peers={"peft LoRA of one weight": plain},
        ),
    ]

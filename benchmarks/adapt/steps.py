"""One forward and backward pass through a Transformer block of MiniLM's size, with an adapter of ours and with peft's LoRA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn

from benchmarks.harness import Bench
from corollary.adapt import AdapterConfig, adapt
from corollary.claims.timing import keep_freed_memory

WIDTH, TOKENS = 384, 512


class Block(nn.Module):
    """The linear layers of a Transformer block, one after the other, on many tokens: what adapters sit on and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, width) to the same."""
        x = x + self.out(self.value(x) * torch.tanh(self.query(x) + self.key(x)))
        y: Tensor = x + self.down(torch.relu(self.up(x)))
        return y


NAMES = ("query", "key", "value", "out", "up", "down")


def step(model: nn.Module) -> Callable[[], None]:
    """A forward and backward pass, gradients of what trains included."""
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    trained = [p for p in model.parameters() if p.requires_grad]

    def run() -> None:
        for parameter in trained:
            parameter.grad = None
        model(x).sum().backward()

    return run


def against_lora(component: str, config: AdapterConfig, rank: int, *, what: str = "", **options: Any) -> Bench:
    """The bench of one configuration against peft's LoRA of a rank; ``options`` go to `adapt`."""
    keep_freed_memory()
    torch.manual_seed(0)
    block = Block()
    ours = adapt(copy.deepcopy(block), config, NAMES, **options)
    theirs = peft.get_peft_model(copy.deepcopy(block), peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(NAMES)))  # type: ignore[arg-type]
    return Bench(
        component=component,
        setting=f"forward and backward of a block of width {WIDTH}, {TOKENS} tokens{what and ', ' + what}, against rank {rank}",
        ours=step(ours),
        peers={"peft LoRA": step(theirs)},
        rounds=15,
        warmup=3,
    )

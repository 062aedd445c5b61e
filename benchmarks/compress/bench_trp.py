"""Twenty steps of trained rank pruning, one truncation among them, against plain SGD and against SGD with a decomposition by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from benchmarks.harness import Bench
from corollary.claims.timing import keep_freed_memory
from corollary.compress import TrainedRankPruning

PERIOD = 20


def steps(width: int, make: Callable[[list[nn.Parameter]], Optimizer], by_hand: bool = False) -> Callable[[], None]:
    """As many steps as a period has, on two square weights with fixed gradients."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(width, width) / math.sqrt(width)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.randn(width, width) * 1e-4
    optimizer = make(weights)

    @torch.no_grad()
    def run() -> None:
        for _ in range(PERIOD):
            optimizer.step()
        if by_hand:
            for weight in weights:
                u, s, vh = torch.linalg.svd(weight, full_matrices=False)
                rank = int((s.square().cumsum(0) < 0.9 * s.square().sum()).sum()) + 1
                weight.copy_((u[:, :rank] * s[:rank]) @ vh[:rank])

    return run


def cases() -> list[Bench]:
    """Two widths."""
    keep_freed_memory()
    return [
        Bench(
            component="corollary.compress.TrainedRankPruning",
            setting=f"{PERIOD} steps, one truncation, two {width} x {width} float32 weights",
            ours=steps(width, lambda p: TrainedRankPruning(p, SGD, lr=1e-3, momentum=0.9, period=PERIOD)),
            peers={
                "torch.optim.SGD": steps(width, lambda p: SGD(p, lr=1e-3, momentum=0.9)),
                "torch.optim.SGD, torch.linalg.svd by hand": steps(
                    width, lambda p: SGD(p, lr=1e-3, momentum=0.9), by_hand=True
                ),
            },
            rounds=5,
            warmup=1,
        )
        for width in (256, 512)
    ]

"""Fifty steps of the projected optimizers, one refresh among them, against galore_torch's and against AdamW."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from galore_torch import GaLoreAdamW
from torch import nn
from torch.optim import AdamW, Optimizer

from benchmarks.harness import Bench
from corollary.claims.timing import keep_freed_memory
from corollary.optim import Fira, GaLore, ProjectedAdamW

GAP, RANK = 50, 64


def fifty_steps(width: int, make: Callable[[list[nn.Parameter]], Optimizer]) -> Callable[[], None]:
    """As many steps as there are between two refreshes, on the square layers of an MLP, with fixed gradients."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(width, width) / math.sqrt(width)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.randn(width, width)
    optimizer = make(weights)

    def run() -> None:
        for _ in range(GAP):
            optimizer.step()

    return run


def galore_torch_adamw(params: list[nn.Parameter]) -> Optimizer:
    """The peer with the options that ours has here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        group = {"params": params, "rank": RANK, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}
        return GaLoreAdamW([group], lr=1e-3)


def _bench(name: str, width: int, make: Callable[[list[nn.Parameter]], Optimizer]) -> Bench:
    return Bench(
        component=f"corollary.optim.{name}",
        setting=f"50 steps, one refresh, rank {RANK}, two {width} x {width} float32 weights",
        ours=fifty_steps(width, make),
        peers={
            "galore_torch.GaLoreAdamW": fifty_steps(width, galore_torch_adamw),
            "torch.optim.AdamW": fifty_steps(width, lambda p: AdamW(p, lr=1e-3)),
        },
        rounds=5,
        warmup=1,
    )


def cases() -> list[Bench]:
    """Both presets at two widths, and the exact decomposition once for comparison."""
    keep_freed_memory()
    benches = []
    for width in (512, 1024):
        benches.append(_bench("GaLore", width, lambda p: GaLore(p, rank=RANK, update_proj_gap=GAP, seed=0)))
        benches.append(_bench("Fira", width, lambda p: Fira(p, rank=RANK, update_proj_gap=GAP, seed=0)))
    benches.append(
        _bench("ProjectedAdamW", 512, lambda p: ProjectedAdamW(p, rank=RANK, update_proj_gap=GAP, projector="svd", seed=0))
    )
    return benches

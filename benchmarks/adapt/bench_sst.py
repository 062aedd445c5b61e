"""A step of SST's layer against a dense one and against peft's LoRA of as many trained numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim import Adam

from benchmarks.harness import Bench
from corollary.adapt import SparseSpectralTraining, to_sst

WIDTH, ROWS, RANK = 768, 512, 48


def stepping(model: nn.Module, x: torch.Tensor, *, sst: bool = False) -> Callable[[], None]:
    """Forward, backward and Adam, with a draw every 200 steps for SST, which is none in what is timed."""
    optimizer = Adam([p for p in model.parameters() if p.requires_grad], 1e-4)
    training = SparseSpectralTraining(model, optimizer, interval=200) if sst else None

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if training is not None:
            training.count = 0  # without draws, whose cost is measured by itself
            training.step()

    return step


def layers() -> nn.Module:
    """Two square layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


def cases() -> list[Bench]:
    """A step, and what a draw and a new decomposition cost beside it."""
    x = torch.randn(ROWS, WIDTH)
    lora = get_peft_model(layers(), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0", "2"]))
    model = to_sst(layers(), RANK)
    training = SparseSpectralTraining(model, Adam(model.parameters(), 1e-4), interval=1)

    def draw() -> None:
        training.count = 1
        training.restart()

    def decompose() -> None:
        training.count = WIDTH // RANK
        training.restart()

    shape = f"two layers of {WIDTH} x {WIDTH}, {ROWS} rows, rank {RANK}, float32"
    return [
        Bench(
            component="corollary.adapt.SSTLinear",
            setting=f"step of Adam, {shape}",
            ours=stepping(to_sst(layers(), RANK), x, sst=True),
            peers={"torch.nn.Linear": stepping(layers(), x), "peft.LoraConfig": stepping(lora, x)},
        ),
        Bench(
            component="corollary.adapt.SparseSpectralTraining",
            setting=f"a draw, {shape}",
            ours=draw,
            peers={"a step of torch.nn.Linear": stepping(layers(), x)},
            memory=False,
        ),
        Bench(
            component="corollary.adapt.SparseSpectralTraining",
            setting=f"a new decomposition and a draw, {shape}",
            ours=decompose,
            peers={"a step of torch.nn.Linear": stepping(layers(), x)},
            rounds=3,
            warmup=1,
            memory=False,
        ),
    ]

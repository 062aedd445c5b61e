"""Choosing a subspace by cosine waves against decompositions, and steps of DCT-AdamW against galore_torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness import Bench
from benchmarks.optim.bench_fira import GAP, fifty_steps, galore_torch_adamw
from corollary.claims.timing import keep_freed_memory
from corollary.linalg import dct, leading_right_vectors, randomized_right_vectors
from corollary.optim import DCTAdamW


def _choose(gradient: Tensor, rank: int) -> Tensor:
    return dct(gradient).norm(dim=0).topk(rank).indices


def cases() -> list[Bench]:
    """One refresh at width 1024, and fifty steps with one refresh."""
    keep_freed_memory()
    gradient = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    return [
        Bench(
            component="corollary.optim.DCTAdamW",
            setting="choosing 64 of 1024 directions of a 1024 x 1024 float32 gradient",
            ours=lambda: _choose(gradient, 64),
            peers={
                "torch.linalg.svd": lambda: leading_right_vectors(gradient, 64),
                "torch.svd_lowrank": lambda: torch.svd_lowrank(gradient, q=64),
                "corollary.linalg.randomized_right_vectors": lambda: randomized_right_vectors(gradient, 64),
            },
            rounds=5,
            warmup=1,
        ),
        Bench(
            component="corollary.optim.DCTAdamW",
            setting="50 steps, one refresh, rank 64, two 512 x 512 float32 weights",
            ours=fifty_steps(512, lambda p: DCTAdamW(p, rank=64, update_proj_gap=GAP, moments="keep", seed=0)),
            peers={"galore_torch.GaLoreAdamW": fifty_steps(512, galore_torch_adamw)},
            rounds=5,
            warmup=1,
        ),
    ]

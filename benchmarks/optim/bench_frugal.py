"""Steps of Frugal and BAdam against galore_torch's and AdamW, one refresh in fifty."""

from __future__ import annotations

from torch.optim import AdamW

from benchmarks.harness import Bench
from benchmarks.optim.bench_fira import GAP, fifty_steps, galore_torch_adamw
from corollary.claims.timing import keep_freed_memory
from corollary.optim import BAdam, Frugal


def cases() -> list[Bench]:
    """Columns and blocks at a quarter of the state, and BAdam with one of two weights active."""
    keep_freed_memory()
    width = 512
    peers = {
        "galore_torch.GaLoreAdamW": fifty_steps(width, galore_torch_adamw),
        "torch.optim.AdamW": fifty_steps(width, lambda p: AdamW(p, lr=1e-3)),
    }
    return [
        Bench(
            component="corollary.optim.Frugal",
            setting=f"50 steps, one refresh, {projector}, density {density}, two {width} x {width} float32 weights",
            ours=fifty_steps(
                width, lambda p, d=density, j=projector: Frugal(p, density=d, projector=j, update_proj_gap=GAP, seed=0)
            ),
            peers=peers,
            rounds=5,
            warmup=1,
        )
        for projector, density in (("columns", 0.25), ("blocks", 0.5))
    ] + [
        Bench(
            component="corollary.optim.BAdam",
            setting=f"50 steps, one turn, one of two {width} x {width} float32 weights active",
            ours=fifty_steps(width, lambda p: BAdam(p, active=1, update_proj_gap=GAP, seed=0)),
            peers=peers,
            rounds=5,
            warmup=1,
        )
    ]

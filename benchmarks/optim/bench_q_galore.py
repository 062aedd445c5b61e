"""Q-GaLore's steps against galore_torch's and AdamW's, and its codes against the blockwise formats of bitsandbytes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from bitsandbytes import functional as bnb
from galore_torch import GaLoreAdamW
from torch import nn
from torch.optim import AdamW, Optimizer

from benchmarks.harness import Bench
from corollary.claims.timing import keep_freed_memory
from corollary.linalg import dequantize, quantize
from corollary.optim import Int8Weight, QGaLore

GAP, RANK, GROUP = 50, 64, 256


def fifty_steps(width: int, make: Callable[[list[nn.Parameter]], Optimizer], *, int8: bool = False) -> Callable[[], None]:
    """As many steps as there are between two refreshes, on the square layers of an MLP, with fixed gradients."""
    torch.manual_seed(0)
    values = [torch.randn(width, width) / math.sqrt(width) for _ in range(2)]
    weights = [nn.Parameter(Int8Weight.from_float(value) if int8 else value) for value in values]
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


def _steps(width: int, int8: bool) -> Bench:
    def ours(params: list[nn.Parameter]) -> Optimizer:
        return QGaLore(params, rank=RANK, update_proj_gap=GAP, seed=0)

    return Bench(
        component="corollary.optim.QGaLore",
        setting=f"50 steps, at most one refresh, rank {RANK}, two {width} x {width} weights in {'8 bits' if int8 else 'float32'}",
        ours=fifty_steps(width, ours, int8=int8),
        peers={
            "galore_torch.GaLoreAdamW": fifty_steps(width, galore_torch_adamw),
            "torch.optim.AdamW": fifty_steps(width, lambda p: AdamW(p, lr=1e-3)),
        },
        rounds=3,
        warmup=1,
    )


def _codes(bits: int) -> list[Bench]:
    """Both directions: bitsandbytes has a step for each block too, codes from a table, and no zero point."""
    torch.manual_seed(0)
    x = torch.randn(1024, 1024)
    stored = quantize(x, bits, group_size=GROUP)
    if bits == 8:
        packed, state = bnb.quantize_blockwise(x, blocksize=GROUP)
        forward, back = (lambda: bnb.quantize_blockwise(x, blocksize=GROUP)), (lambda: bnb.dequantize_blockwise(packed, state))
        peer = "bitsandbytes blockwise 8-bit"
    else:
        packed, state = bnb.quantize_4bit(x, blocksize=GROUP, quant_type="nf4")
        forward, back = (
            (lambda: bnb.quantize_4bit(x, blocksize=GROUP, quant_type="nf4")),
            (lambda: bnb.dequantize_4bit(packed, state)),
        )
        peer = "bitsandbytes NF4"
    name = "corollary.optim.Int8Weight" if bits == 8 else "corollary.optim.QGaLore"
    return [
        Bench(name, f"quantize 1024 x 1024 to {bits} bits", lambda: quantize(x, bits, group_size=GROUP), {peer: forward}),
        Bench(
            name,
            f"dequantize 1024 x 1024 of {bits} bits",
            lambda: dequantize(stored, x.shape, bits, group_size=GROUP),
            {peer: back},
        ),
    ]


def cases() -> list[Bench]:
    """Steps with weights in 8 bits and in float32, then both formats both ways."""
    keep_freed_memory()
    return [_steps(512, int8=True), _steps(512, int8=False), _steps(1024, int8=True), *_codes(8), *_codes(4)]

"""Factoring a weight by its features and plainly, against torch.linalg.svd, and streaming the moments that it needs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness import Bench
from corollary.claims.timing import keep_freed_memory
from corollary.compress import SVD, LoRD, calibrate, compress
from corollary.linalg import weighted_low_rank


def whitened_svd(weight: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The usual way: square root and inverse square root of the inputs' moment, then a full decomposition."""
    values, vectors = torch.linalg.eigh(moment)
    root = values.clamp_min(1e-12).sqrt()
    u, s, vh = torch.linalg.svd(weight.double() @ (vectors * root), full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank] @ (vectors / root).T


def plain_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """torch.linalg.svd in the weight's own float32, cut."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]


def cases() -> list[Bench]:
    """Square and oblong matrices of a small Transformer, and a model's whole calibration."""
    keep_freed_memory()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    benches = []
    for m, n in ((384, 384), (1536, 384), (384, 1536)):
        weight = torch.randn(m, n, generator=generator)
        x = torch.randn(2 * n, n, generator=generator, dtype=torch.float64)
        moment = x.T @ x / len(x)
        rank = min(m, n) // 4
        benches.append(
            Bench(
                component="corollary.compress.LoRD",
                setting=f"factors of rank {rank} in the inputs' metric, {m} x {n}",
                ours=lambda w=weight, c=moment, r=rank: weighted_low_rank(w, c).factors(r),  # type: ignore[misc]
                peers={
                    "torch.linalg.svd of the whitened weight, float64": lambda w=weight, c=moment, r=rank: whitened_svd(w, c, r)  # type: ignore[misc]
                },
                rounds=5,
                warmup=1,
            )
        )
        benches.append(
            Bench(
                component="corollary.compress.SVD",
                setting=f"factors of rank {rank}, {m} x {n}",
                ours=lambda w=weight, r=rank: weighted_low_rank(w).factors(r),  # type: ignore[misc]
                peers={"torch.linalg.svd, float32": lambda w=weight, r=rank: plain_svd(w, r)},  # type: ignore[misc]
                rounds=5,
                warmup=1,
            )
        )
    benches.append(_forward(512))
    return benches


def _forward(width: int) -> Bench:
    """The factored layer itself at half of the weights, batch of 32 rows."""
    layer = nn.Linear(width, 4 * width).eval()
    x = torch.randn(32, width)
    lord = compress(layer, LoRD(ratio=0.5), calibration=calibrate(layer, [torch.randn(2048, width)]))
    plain = compress(layer, SVD(ratio=0.5))

    def call(model: nn.Module) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.inference_mode():
                return model(x)

        return run

    return Bench(
        component="corollary.compress.LoRD",
        setting=f"forward of 32 rows, half of the weights, {4 * width} x {width}",
        ours=call(lord),
        peers={"nn.Linear, dense": call(layer), "SVD of the same ratio": call(plain)},
    )

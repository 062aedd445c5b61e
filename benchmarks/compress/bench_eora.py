"""Compensating a pruned weight, against the paper's formula with its inverse and against peft's CorDA, which decomposes alike."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness import Bench
from corollary.claims.timing import keep_freed_memory
from corollary.compress import PackedLinear, round_to_nearest, two_four
from corollary.linalg import weighted_low_rank


def with_inverse(delta: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The authors' steps: eigendecomposition in float64, inverse, and a decomposition in float32."""
    values, vectors = torch.linalg.eigh(moment)
    values[values < 0] = values[values > 0].min()
    scaled = vectors @ torch.diag(values.sqrt())
    inverse = torch.linalg.inv(scaled).float()
    u, s, vh = torch.linalg.svd(delta @ scaled.float(), full_matrices=False)
    root = torch.diag(s[:rank].sqrt())
    return u[:, :rank] @ root, root @ (vh[:rank] @ inverse)


def corda(weight: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """What peft's CorDA computes for a layer: the weight times the covariance, decomposed, times the covariance's inverse."""
    covariance = moment.float()
    u, s, vh = torch.linalg.svd(weight @ covariance, full_matrices=False)
    vh = vh @ torch.linalg.inv(covariance)
    return u[:, :rank] * s[:rank].sqrt(), s[:rank].sqrt()[:, None] * vh[:rank]


def cases() -> list[Bench]:
    """Three shapes of a small Transformer, packing, and a packed layer's forward."""
    keep_freed_memory()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    benches = []
    for m, n in ((384, 384), (1536, 384), (384, 1536)):
        weight = torch.randn(m, n, generator=generator)
        delta = weight - two_four(weight)
        x = torch.randn(2 * n, n, generator=generator, dtype=torch.float64)
        moment = x.T @ x / len(x)
        benches.append(
            Bench(
                component="corollary.compress.EoRA",
                setting=f"compensation of rank 32, {m} x {n}",
                ours=lambda d=delta, c=moment: weighted_low_rank(d, c, damping=1e-6).factors(32),  # type: ignore[misc]
                peers={
                    "the paper's formula, with an inverse": lambda d=delta, c=moment: with_inverse(d, c, 32),  # type: ignore[misc]
                    "peft CorDA's formula": lambda d=delta, c=moment: corda(d, c, 32),  # type: ignore[misc]
                },
                rounds=5,
                warmup=1,
            )
        )
    weight = torch.randn(1536, 384, generator=generator)
    layer, x = PackedLinear(384, 1536, bits=4), torch.randn(32, 384, generator=generator)
    dense = torch.nn.Linear(384, 1536, bias=False)
    benches.append(
        Bench(
            component="corollary.compress.Quantize",
            setting="4 bits, groups of 64, pack 1536 x 384",
            ours=lambda: layer.pack(weight),
            peers={"rounding alone, without packing": lambda: round_to_nearest(weight)},
        )
    )

    def run(model: torch.nn.Module) -> Tensor:
        with torch.inference_mode():
            return model(x)

    benches.append(
        Bench(
            component="corollary.compress.Quantize",
            setting="forward of 32 rows, 4 bits unpacked at every call, 1536 x 384",
            ours=lambda: run(layer),
            peers={"nn.Linear, dense": lambda: run(dense)},
        )
    )
    return benches

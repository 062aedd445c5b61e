"""Intruder dimensions from Gram matrices, against the decompositions that the authors' code takes."""

from __future__ import annotations

import torch
from benchmarks.harness import Bench
from torch import Tensor

from corollary.analysis import intruder_dimensions


def authors(base: Tensor, tuned: Tensor) -> int:
    """Both weights decomposed in float32, and all products of left vectors."""
    left_0, left = (torch.linalg.svd(w, full_matrices=False)[0] for w in (base, tuned))
    largest = (left.T @ left_0).abs().max(dim=1).values
    return int((largest[:10] < 0.5).sum())


def cases() -> list[Bench]:
    found = []
    for m, n in ((384, 384), (1536, 384), (1024, 1024), (30522, 384)):
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(m, n, generator=generator)
        tuned = base + torch.randn(m, 4, generator=generator) @ torch.randn(4, n, generator=generator)
        found.append(
            Bench(
                "corollary.analysis.intruder_dimensions",
                f"{m} by {n}, float32",
                lambda base=base, tuned=tuned: intruder_dimensions(base, tuned),
                {"authors' code": lambda base=base, tuned=tuned: authors(base, tuned)},
                rounds=3,
            )
        )
    return found

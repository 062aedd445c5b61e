"""Measures of hidden states against the decompositions they stand in for, and against the authors' own steps."""

from __future__ import annotations

import torch
from benchmarks.harness import Bench
from torch import Tensor

from corollary.analysis import matrix_entropy, matrix_nuclear_norm, nuclear_norm


def normalized(x: Tensor) -> Tensor:
    rows = x - x.mean(0)
    return rows / rows.norm(dim=1, keepdim=True)


def authors_norm(x: Tensor) -> Tensor:
    """The column norms as the authors' code takes them, from a normalized copy."""
    columns = torch.sqrt(torch.sum(torch.pow(normalized(x), 2), dim=0))
    return torch.sort(columns, descending=True)[0][: min(x.shape)].sum() / len(x)


def entropy_by(x: Tensor, spectrum_of: str) -> Tensor:
    """Matrix entropy from the d-by-d covariance: by torch.svd as the authors, or by eigenvalues."""
    rows = normalized(x)
    covariance = rows.T @ rows / len(x)
    spectrum = torch.svd(covariance)[1] if spectrum_of == "svd" else torch.linalg.eigvalsh(covariance).clamp_min(0)
    return torch.special.entr(spectrum).sum()


def cases() -> list[Bench]:
    found = []
    for tokens, features in ((128, 384), (512, 768), (1024, 1024)):
        x = torch.randn(tokens, features, generator=torch.Generator().manual_seed(0))
        setting = f"{tokens} tokens, width {features}, float32"
        found += [
            Bench(
                "corollary.analysis.matrix_nuclear_norm",
                setting,
                lambda x=x: matrix_nuclear_norm(x),
                {
                    "authors' code": lambda x=x: authors_norm(x),
                    "torch.linalg.svdvals": lambda x=x: torch.linalg.svdvals(normalized(x)).sum(),
                    "matrix entropy, eigvalsh": lambda x=x: entropy_by(x, "eigvalsh"),
                },
                rounds=5,
            ),
            Bench(
                "corollary.analysis.matrix_entropy",
                setting,
                lambda x=x: matrix_entropy(x),
                {"torch.svd": lambda x=x: entropy_by(x, "svd"), "eigvalsh, d by d": lambda x=x: entropy_by(x, "eigvalsh")},
                rounds=3,
            ),
        ]
    for n in (512, 1024, 2048, 4096):  # the sizes of the paper's comparison with matrix entropy
        x = torch.randn(n, n, generator=torch.Generator().manual_seed(0))
        found.append(
            Bench(
                "corollary.analysis.matrix_nuclear_norm",
                f"against matrix entropy, n = {n}, float32",
                lambda x=x: matrix_nuclear_norm(x),
                {
                    "matrix entropy by torch.svd, as the paper": lambda x=x: entropy_by(x, "svd"),
                    "matrix entropy, ours": lambda x=x: matrix_entropy(x),
                },
                rounds=3 if n <= 1024 else 1,
                warmup=1 if n <= 1024 else 0,
                memory=False,
            )
        )
    x = torch.randn(512, 768, generator=torch.Generator().manual_seed(0))
    found.append(
        Bench(
            "corollary.analysis.nuclear_norm",
            "512 tokens, width 768, float32",
            lambda: nuclear_norm(x),
            {"torch.linalg.svdvals": lambda: torch.linalg.svdvals(normalized(x)).sum()},
            rounds=3,
        )
    )
    return found

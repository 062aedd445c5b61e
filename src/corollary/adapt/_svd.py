"""Leading singular triplets of a frozen weight, the same on every machine up to rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from corollary.linalg import leading_right_vectors


def leading_triplets(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, rank), σ (rank,) falling, and Vᵀ (rank, n), in the matrix's dtype; the largest entry of each right vector is positive.

    Computed in float32 at least. The left vector of a singular value that is zero is zero.
    """
    working = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
    right = leading_right_vectors(working, rank)
    scaled = working @ right
    sigma = scaled.norm(dim=0)
    left = scaled / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)
    return left.contiguous().to(matrix.dtype), sigma.to(matrix.dtype), right.T.contiguous().to(matrix.dtype)

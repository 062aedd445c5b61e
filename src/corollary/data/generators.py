"""Matrices with a known truth: a given spectrum, or a given rank under noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from corollary.data._checks import need_count


def _orthonormal(rows: int, columns: int, generator: torch.Generator | None, dtype: torch.dtype) -> Tensor:
    """Orthonormal columns, uniform (Haar) over all such matrices."""
    q, r = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=dtype))
    # QR fixes the signs by convention; without this the distribution would not be invariant under rotation.
    factor: Tensor = q * r.diagonal().sgn()
    return factor


def spectrum_matrix(
    m: int,
    n: int,
    singular_values: Tensor | Sequence[float],
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    r"""A random matrix :math:`U \operatorname{diag}(s) V^\top` with exactly the given singular values.

    :math:`U` and :math:`V` have orthonormal columns drawn uniformly. Fewer than ``min(m, n)`` values leave the rest at zero.

    Args:
        m: rows.
        n: columns.
        singular_values: at most ``min(m, n)`` finite values of at least 0, in any order.
        generator: a CPU generator; without one torch's global one is used.
        dtype: float64 or float32.

    Returns:
        (m, n), on the CPU.

    Raises:
        ValueError: where there are too many values, none, or one is negative or not finite.

    Example:
        >>> import torch
        >>> from corollary.data import spectrum_matrix
        >>> a = spectrum_matrix(6, 4, [3.0, 2.0, 0.5], generator=torch.Generator().manual_seed(0))
        >>> torch.linalg.svdvals(a).round(decimals=6) + 0.0
        tensor([3.0000, 2.0000, 0.5000, 0.0000], dtype=torch.float64)
    """
    need_count("m", m)
    need_count("n", n)
    s = torch.as_tensor(singular_values, dtype=dtype)
    if s.dim() != 1 or not 0 < len(s) <= min(m, n):
        raise ValueError(
            f"'singular_values' has shape {tuple(s.shape)}; allowed: one row of 1 to min(m, n) = {min(m, n)} values"
        )
    if not bool(torch.isfinite(s).all()) or bool((s < 0).any()):
        raise ValueError("'singular_values' must be finite and at least 0")
    return (_orthonormal(m, len(s), generator, dtype) * s) @ _orthonormal(n, len(s), generator, dtype).mT


def low_rank_matrix(
    m: int,
    n: int,
    rank: int,
    *,
    noise: float = 0.0,
    condition: float = 1.0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    r"""A matrix of given rank, with Gaussian noise: :math:`L + E`.

    The nonzero singular values of :math:`L` fall geometrically from 1 to ``1 / condition``; the entries of :math:`E` are
    independent, with :math:`\mathbb{E}\|E\|_F^2 = \mathrm{noise}^2\,\|L\|_F^2`.

    Args:
        m: rows.
        n: columns.
        rank: rank of :math:`L`, at most ``min(m, n)``.
        noise: size of the noise relative to :math:`L`, at least 0; with 0 the matrix has exactly this rank.
        condition: largest over smallest nonzero singular value of :math:`L`, at least 1.
        generator: a CPU generator; without one torch's global one is used.
        dtype: float64 or float32.

    Returns:
        (m, n), on the CPU.

    Raises:
        ValueError: where ``rank``, ``noise`` or ``condition`` is out of range.

    Example:
        >>> import torch
        >>> from corollary.data import low_rank_matrix
        >>> a = low_rank_matrix(20, 10, 3, condition=4.0, generator=torch.Generator().manual_seed(0))
        >>> torch.linalg.svdvals(a)[:3]
        tensor([1.0000, 0.5000, 0.2500], dtype=torch.float64)
    """
    need_count("m", m)
    need_count("n", n)
    need_count("rank", rank)
    if rank > min(m, n):
        raise ValueError(f"'rank' is {rank}; allowed: up to min(m, n) = {min(m, n)}")
    if not 0 <= noise < float("inf"):
        raise ValueError(f"'noise' must be finite and at least 0, not {noise!r}")
    if not 1 <= condition < float("inf"):
        raise ValueError(f"'condition' must be finite and at least 1, not {condition!r}")
    s = torch.logspace(0, -1, rank, base=float(condition), dtype=dtype) if rank > 1 else torch.ones(1, dtype=dtype)
    matrix = spectrum_matrix(m, n, s, generator=generator, dtype=dtype)
    if noise:
        deviation = noise * float(s.norm()) / (m * n) ** 0.5
        matrix = matrix + deviation * torch.randn(m, n, generator=generator, dtype=dtype)
    return matrix

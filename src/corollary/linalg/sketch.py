"""Random matrices S that shrink the rows of a tall matrix A and keep its geometry: ``(SA)ᵀ(SA) ≈ AᵀA``.

Each function returns ``S A`` with ``E[SᵀS] = I``; S itself is never formed. They differ in cost for an n × d matrix and s rows:

====================  =================  ==========================================================
`count_sketch`        n d                each row of A goes, with a random sign, to one of s buckets
`srht`                n d log n          random signs, fast Walsh-Hadamard transform, s sampled rows
`gaussian_sketch`     n d s              dense Gaussian S: the best constants, the highest price
====================  =================  ==========================================================
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _check(a: Tensor, size: int) -> None:
    if not isinstance(a, Tensor) or not a.is_floating_point():
        raise TypeError(f"'a' must be a floating-point tensor, not {a.dtype if isinstance(a, Tensor) else type(a).__name__}")
    if a.ndim < 2 or a.shape[-2] < 1:
        raise ValueError(f"'a' must have shape (..., n, d) with n >= 1, not {tuple(a.shape)}")
    if size < 1:
        raise ValueError(f"'size' must be at least 1, not {size}")


def _signs(n: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    bits = torch.randint(2, (n, 1), generator=generator, device=generator.device if generator else like.device)
    return (2 * bits - 1).to(like)


def count_sketch(a: Tensor, size: int, *, generator: torch.Generator | None = None) -> Tensor:
    """CountSketch: add each row of ``a``, with a random sign, into one random bucket of ``size``.

    A subspace embedding of d dimensions for ``size`` of order d² in the worst case; of order d, as in practice, where the
    rows are incoherent (none carries a direction alone). One pass over ``a``.

    Args:
        a: shape (..., n, d), floating. All matrices of a batch share one hash and one set of signs.
        size: rows s of the result.
        generator: source of randomness.

    Returns:
        Shape (..., s, d), dtype and device of ``a``.

    Raises:
        TypeError, ValueError: ``a`` is no floating tensor of at least two dimensions, or ``size`` is below 1.

    Example:
        >>> a = torch.ones(1000, 2)
        >>> count_sketch(a, 50, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([50, 2])

    Source: Clarkson and Woodruff, "Low rank approximation and regression in input sparsity time", arXiv 1207.6365.
    """
    _check(a, size)
    n = a.shape[-2]
    device = generator.device if generator else a.device
    bucket = torch.randint(size, (n,), generator=generator, device=device).to(a.device)
    out = a.new_zeros(*a.shape[:-2], size, a.shape[-1])
    return out.index_add_(-2, bucket, a * _signs(n, a, generator))


def gaussian_sketch(a: Tensor, size: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Gaussian sketch: ``S a`` with independent entries of S from N(0, 1/size).

    Args, returns and errors are those of `count_sketch`. S is formed, at ``size`` × n numbers.

    Example:
        >>> gaussian_sketch(torch.ones(100, 2), 20, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([20, 2])
    """
    _check(a, size)
    device = generator.device if generator else a.device
    s = torch.randn(size, a.shape[-2], generator=generator, device=device, dtype=a.dtype).to(a.device)
    return (s @ a) / math.sqrt(size)


def srht(a: Tensor, size: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Subsampled randomized Hadamard transform: ``sqrt(N/s) P H D a`` with signs D, Hadamard H, sampling P.

    The transform spreads every row evenly, so that a uniform sample of rows serves coherent matrices too. ``a`` is padded with
    zero rows to N, the next power of two. Rows are sampled without replacement.

    Args, returns and errors are those of `count_sketch`; ``size`` may be at most N.

    Example:
        >>> a = torch.eye(8)[:, :2]
        >>> torch.linalg.matrix_norm(srht(a, 8, generator=torch.Generator().manual_seed(0))).round(decimals=4)
        tensor(1.4142)

    Source: Tropp, "Improved analysis of the subsampled randomized Hadamard transform", arXiv 1011.1595.
    """
    _check(a, size)
    n = a.shape[-2]
    padded = 1 << (n - 1).bit_length()
    if size > padded:
        raise ValueError(f"'size' must be at most {padded} (the rows of 'a' padded to a power of two), not {size}")
    x = torch.nn.functional.pad(a * _signs(n, a, generator), (0, 0, 0, padded - n))
    half = 1
    while half < padded:  # one butterfly of the fast transform over all pairs at once
        top, bottom = x.reshape(*x.shape[:-2], -1, 2, half, x.shape[-1]).unbind(-3)
        x = torch.stack((top + bottom, top - bottom), dim=-3).flatten(-4, -2)
        half *= 2
    device = generator.device if generator else a.device
    rows = torch.randperm(padded, generator=generator, device=device)[:size].to(a.device)
    return x.index_select(-2, rows) / math.sqrt(size)

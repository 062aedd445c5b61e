"""Leading singular vectors of a matrix: exactly, and by randomized subspace iteration that can start warm."""

from __future__ import annotations

import torch
from torch import Tensor


def leading_right_vectors(matrix: Tensor, rank: int) -> Tensor:
    """The ``rank`` leading right singular vectors, from the full singular value decomposition.

    Args:
        matrix: shape (m, n), floating and finite; float16 and bfloat16 are decomposed in float32.
        rank: how many, 1 to min(m, n).

    Returns:
        Shape (n, rank), orthonormal columns in falling order of their singular value, the largest entry of each positive; dtype
        and device of ``matrix``.

    Raises:
        TypeError, ValueError: a matrix that is not floating, two-dimensional or finite, or a rank out of range.

    Example:
        >>> a = torch.diag(torch.tensor([1.0, 3.0, 2.0]))
        >>> leading_right_vectors(a, 1).abs().flatten()
        tensor([0., 1., 0.])
    """
    wide = _checked(matrix, rank)
    vectors: Tensor = torch.linalg.svd(wide, full_matrices=False).Vh[:rank].T
    return _signed(vectors.contiguous()).to(matrix.dtype)


def randomized_right_vectors(
    matrix: Tensor,
    rank: int,
    *,
    start: Tensor | None = None,
    oversampling: int = 8,
    n_iter: int = 2,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""The leading right singular vectors by randomized subspace iteration, O(m n rank) instead of O(m n min(m, n)).

    From a block :math:`\Omega` of ``rank + oversampling`` columns, each iteration forms
    :math:`\Omega \leftarrow \mathrm{orth}(A^\top A\,\Omega)`; the answer is the leading part of :math:`\Omega` after a
    Rayleigh-Ritz rotation. The error of direction i falls by :math:`(\sigma_{k+1}/\sigma_i)^2` an iteration, k the block's width.
    A ``start`` near the answer, such as the subspace of an earlier gradient, saves iterations.

    Args:
        matrix: shape (m, n), floating and finite; float16 and bfloat16 are computed in float32.
        rank: how many, 1 to min(m, n).
        start: columns to begin with, shape (n, s), s ≤ rank + oversampling; the rest of the block is Gaussian.
        oversampling: extra columns carried along.
        n_iter: iterations, at least 1.
        generator: source of the Gaussian columns, on the CPU.

    Returns:
        Shape (n, rank), orthonormal columns in falling order, the largest entry of each positive; dtype and device of ``matrix``.

    Raises:
        TypeError, ValueError: as `leading_right_vectors`, or ``start`` of another length, or ``n_iter`` below 1.

    Example:
        >>> a = torch.diag(torch.tensor([10.0, 1.0, 0.5, 0.1]))
        >>> v = randomized_right_vectors(a, 1, generator=torch.Generator().manual_seed(0))
        >>> bool(v[0].abs() > 0.999)
        True

    Source: Halko, Martinsson, Tropp, "Finding structure with randomness", arXiv 0909.4061, Algorithm 4.4.
    """
    wide = _checked(matrix, rank)
    m, n = wide.shape
    if n_iter < 1 or oversampling < 0:
        raise ValueError(f"'n_iter' must be at least 1 and 'oversampling' at least 0, not {n_iter} and {oversampling}")
    width = min(rank + oversampling, m, n)
    given = 0
    if start is not None:
        if start.dim() != 2 or start.shape[0] != n or start.shape[1] > width:
            raise ValueError(f"'start' must have shape ({n}, at most {width}), not {tuple(start.shape)}")
        given = start.shape[1]
    block: Tensor = torch.randn(n, width - given, generator=generator, dtype=wide.dtype).to(wide.device)
    if start is not None:
        # Gaussian columns have norm √n: bring them to the size of the orthonormal ones beside them.
        block = torch.cat([start.to(wide), block.div_(n**0.5)], dim=1)
    for _ in range(n_iter):
        block = torch.linalg.qr(wide.T @ (wide @ block)).Q
    image = wide @ block
    # eigh gives rising order: the last columns lead.
    rotation: Tensor = torch.linalg.eigh(image.T @ image).eigenvectors[:, -rank:].flip(1)
    return _signed(block @ rotation).to(matrix.dtype)


def _signed(vectors: Tensor) -> Tensor:
    """Each column with its largest entry positive: a decomposition leaves the sign open, and libraries differ in it."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0).to(vectors.dtype)


def _checked(matrix: Tensor, rank: int) -> Tensor:
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        raise TypeError(
            f"'matrix' must be a floating tensor, not {matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__}"
        )
    if matrix.dim() != 2 or not matrix.numel():
        raise ValueError(f"'matrix' must have shape (m, n), m, n >= 1, not {tuple(matrix.shape)}")
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"'rank' must be in 1..{min(matrix.shape)} for a matrix of shape {tuple(matrix.shape)}, not {rank}")
    wide = matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix
    if not bool(wide.isfinite().all()):
        raise ValueError("'matrix' must be finite; it holds NaN or infinity")
    return wide

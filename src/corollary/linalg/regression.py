"""Many small least-squares problems at once: every row of a sparse matrix regressed on the factor rows it observes.

Row i of X observes the columns Ω_i. With a factor V (n × k) its regression is

    min_u  Σ_{j ∈ Ω_i} (X_ij − u·v_j)² + α ‖u‖²,

one of the m problems of an alternating-minimization half step. Two solvers:

- `solve_rows_exact` forms each k × k Gram matrix: time O(|Ω| k² + m k³).
- `solve_rows_refined` never does: a sketched preconditioner and conjugate gradients on all rows of a block at once, a few
  products with the observed rows of V: time O(|Ω| k) for each refinement.

Both take the rows in `ObservedBlocks`: blocks of nearly equal length whose rows of V fit the cache, so that there is no
Python loop over rows and never more than a block of the |Ω| × k gathered rows in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from corollary.linalg.sketch import count_sketch

Array = NDArray[Any]
Csr = Any  # scipy.sparse.csr_matrix or csr_array; scipy itself ships no types
BLOCK_BYTES = 1 << 20  # gathered rows of one block: about an L2 cache, because every refinement reads them twice
_SLACK = 1.125  # a block's longest row is at most this much longer than its shortest: the padding stays below an eighth


@dataclass(frozen=True)
class Block:
    """Rows of nearly equal length: their numbers (b,), observed columns (b, p) padded with n, values (b, p) padded with 0."""

    rows: Array
    columns: Array
    values: Array
    lengths: Array


class ObservedBlocks:
    """The observed entries of a sparse matrix, its rows sorted by length and cut into padded blocks.

    Memory is linear in the number of observed entries. Rows that observe nothing stand in no block.

    Args:
        matrix: CSR, shape (m, n), floating; every stored entry counts as observed, stored zeros too. No duplicates.
        width: columns k of the factor that will be gathered; sizes the blocks.
        block_bytes: bytes of gathered rows in one block. A single row may exceed it.

    Example:
        >>> from scipy import sparse
        >>> blocks = ObservedBlocks(sparse.csr_matrix(np.eye(3)), width=2)
        >>> [block.columns.shape for block in blocks.blocks]
        [(3, 1)]
    """

    def __init__(self, matrix: Csr, width: int, block_bytes: int = BLOCK_BYTES) -> None:
        self.shape: tuple[int, int] = matrix.shape
        self.dtype = matrix.dtype
        self.squared_norm = float(np.dot(matrix.data, matrix.data))
        self.observed = int(matrix.nnz)
        lengths = np.diff(matrix.indptr)
        order = np.argsort(lengths, kind="stable")
        ordered = lengths[order]
        begin = int(np.searchsorted(ordered, 1))
        self.blocks: list[Block] = []
        while begin < len(order):
            longest = max(int(ordered[begin] * _SLACK), ordered[begin])
            similar = int(np.searchsorted(ordered, longest, side="right"))
            fitting = begin + max(1, int(block_bytes // (longest * width * self.dtype.itemsize)))
            end = min(similar, fitting)
            self.blocks.append(self._pad(matrix, order[begin:end], ordered[begin:end]))
            begin = end

    @staticmethod
    def _pad(matrix: Csr, rows: Array, lengths: Array) -> Block:
        there = np.arange(lengths[-1]) < lengths[:, None]
        source = (matrix.indptr[rows][:, None] + np.arange(lengths[-1]))[there]
        columns = np.full(there.shape, matrix.shape[1], dtype=np.int32 if matrix.shape[1] < 2**31 else np.int64)
        values = np.zeros(there.shape, dtype=matrix.dtype)
        columns[there] = matrix.indices[source]
        values[there] = matrix.data[source]
        return Block(rows, columns, values, lengths)


@cache
def _threads() -> Any:
    """Limits the threads inside BLAS and LAPACK: a block is too small to gain from them, and on a busy machine they spin."""
    return ThreadpoolController()


class _Gather:
    """The factor's rows that a block observes, (b, p, k), in one buffer that all blocks share; padding gathers zeros."""

    def __init__(self, factor: Array, blocks: ObservedBlocks) -> None:
        self.padded = np.concatenate([factor, np.zeros((1, factor.shape[1]), factor.dtype)])
        largest = max((block.columns.size for block in blocks.blocks), default=0)
        self.buffer = np.empty(largest * factor.shape[1], factor.dtype)

    def __call__(self, block: Block) -> Array:
        shape = (*block.columns.shape, self.padded.shape[1])
        out = self.buffer[: int(np.prod(shape))].reshape(shape)
        # the indices are in range; "clip" is the mode in which numpy writes straight to the buffer
        return self.padded.take(block.columns, axis=0, out=out, mode="clip")


def _check(blocks: ObservedBlocks, factor: Array, start: Array | None) -> None:
    if factor.ndim != 2 or factor.shape[0] != blocks.shape[1]:
        raise ValueError(f"'factor' must have shape ({blocks.shape[1]}, k), not {factor.shape}")
    if factor.dtype != blocks.dtype:
        raise TypeError(f"'factor' must have the matrix's dtype {blocks.dtype}, not {factor.dtype}")
    if start is not None and start.shape != (blocks.shape[0], factor.shape[1]):
        raise ValueError(f"'start' must have shape ({blocks.shape[0]}, {factor.shape[1]}), not {start.shape}")


def solve_rows_exact(blocks: ObservedBlocks, factor: Array, *, alpha: float = 0.0) -> tuple[Array, float]:
    """All row regressions by batched normal equations and Cholesky.

    Args:
        blocks: the observed entries.
        factor: V, shape (n, k), the dtype of the matrix.
        alpha: ridge α. A ridge of ten rounding errors is always there, so that a row with fewer than k entries has a solution.

    Returns:
        The solutions, shape (m, k), zero for rows that observe nothing, and the sum of squared residuals.

    Raises:
        ValueError, TypeError: ``factor`` has another shape or dtype.

    Example:
        >>> from scipy import sparse
        >>> x = sparse.csr_matrix(np.array([[2.0, 4.0]]))
        >>> solve_rows_exact(ObservedBlocks(x, width=1), np.array([[1.0], [2.0]]))[0]
        array([[2.]])
    """
    _check(blocks, factor, None)
    k = factor.shape[1]
    gather = _Gather(factor, blocks)
    out = np.zeros((blocks.shape[0], k), factor.dtype)
    squared = 0.0
    jitter = 10 * np.finfo(factor.dtype).eps
    diagonal = np.arange(k)
    with _threads().limit(limits=1):
        for block in blocks.blocks:
            a = gather(block)
            gram = a.transpose(0, 2, 1) @ a
            trace = np.trace(gram, axis1=1, axis2=2)[:, None]
            gram[:, diagonal, diagonal] += alpha + jitter * trace + np.finfo(factor.dtype).tiny
            right = a.transpose(0, 2, 1) @ block.values[..., None]
            # torch's batched Cholesky takes 0.8 of the time of numpy's batched solve at k = 64 and of scipy's half
            lower, _ = torch.linalg.cholesky_ex(torch.from_numpy(gram))
            u = torch.cholesky_solve(torch.from_numpy(right), lower).numpy()
            out[block.rows] = u[..., 0]
            residual = block.values - (a @ u)[..., 0]
            squared += float(np.vdot(residual, residual))
    return out, squared


def solve_rows_refined(
    blocks: ObservedBlocks,
    factor: Array,
    start: Array | None = None,
    *,
    alpha: float = 0.0,
    preconditioner: str = "shared",
    oversampling: int = 8,
    tol: float = 1e-1,
    max_iter: int = 20,
    generator: torch.Generator | None = None,
) -> tuple[Array, float]:
    """All row regressions by a sketched preconditioner and iterative refinement, to relative accuracy ``tol``.

    ``shared``: the sample itself is the sketch. With the Gram matrix ``VᵀV = QΛQᵀ`` of the whole factor, once for all rows, the
    factor is whitened, ``W = VQΛ^(-1/2)``; row i's system ``W_iᵀW_i`` is then close to ``|Ω_i|/n`` times the identity as soon
    as V is incoherent and Ω_i a uniform sample of a few k columns. ``row``: a CountSketch to ``oversampling`` · k rows of each
    row's own system, inverted at O(k³) each, for coherent factors or sampling that is far from uniform; where ``start`` is None
    it starts from the sketch-and-solve solution. Both are then refined by preconditioned conjugate gradients on the
    least-squares problems (PCGLS), whose every iteration multiplies twice with the observed rows. A row that has converged
    rests while its block goes on.

    Args:
        blocks: the observed entries.
        factor: V, shape (n, k), the dtype of the matrix.
        start: warm start, shape (m, k); None starts from zero.
        alpha: ridge α.
        preconditioner: ``shared`` or ``row``.
        oversampling: a row's sketch has this many times k rows; a row with fewer entries is not sketched.
        tol: a row is done when its preconditioned gradient has shrunk by this factor from where it started.
        max_iter: refinements at most; 0 gives the start back.
        generator: source of randomness of the sketches.

    Returns:
        The solutions, shape (m, k), zero for rows that observe nothing, and the sum of squared residuals.

    Raises:
        ValueError, TypeError: a shape, dtype or name is wrong.

    Example:
        >>> from scipy import sparse
        >>> x = sparse.csr_matrix(np.array([[2.0, 4.0]]))
        >>> solve_rows_refined(ObservedBlocks(x, width=1), np.array([[1.0], [2.0]]), tol=1e-9)[0].round(6)
        array([[2.]])
    """
    _check(blocks, factor, start)
    if preconditioner not in ("shared", "row"):
        raise ValueError(f"'preconditioner' is {preconditioner!r}; allowed: 'shared', 'row'")
    n, k = factor.shape
    out = np.zeros((blocks.shape[0], k), factor.dtype)
    squared = 0.0
    with _threads().limit(limits=1):
        basis, scale = _whitening(factor)
        gather = _Gather((factor @ basis) * scale, blocks)
        ridge = (alpha * scale * scale).astype(factor.dtype)
        unscale = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
        y0 = None if start is None else (start @ basis) * unscale
        for block in blocks.blocks:
            a = gather(block)
            y = np.zeros((len(block.rows), k), factor.dtype) if y0 is None else y0[block.rows]
            inverse = None
            if preconditioner == "row":
                inverse, first = _row_sketch(a, block.values, ridge, oversampling * k, generator)
                y = first if y0 is None else y
            diagonal = 1 / (block.lengths[:, None].astype(factor.dtype) / n + ridge)
            squared += _pcgls(a, block.values, y, ridge, diagonal, inverse, tol, max_iter)
            out[block.rows] = y
    return (out * scale) @ basis.T, squared


def _whitening(factor: Array) -> tuple[Array, Array]:
    """Q and Λ^(-1/2) of VᵀV; directions that V lacks get the scale 0. Its O(n k²) is within O(|Ω| k), because |Ω| >= n k."""
    values, basis = np.linalg.eigh(factor.T @ factor)
    present = values > factor.shape[0] * np.finfo(factor.dtype).eps * max(values[-1], np.finfo(factor.dtype).tiny)
    return basis, np.divide(1, np.sqrt(np.abs(values)), out=np.zeros_like(values), where=present)


def _row_sketch(a: Array, b: Array, ridge: Array, size: int, generator: torch.Generator | None) -> tuple[Array, Array]:
    """Inverse of each row's sketched Gram matrix, and the sketch-and-solve solution."""
    joined = torch.from_numpy(np.concatenate([a, b[..., None]], axis=2))
    if size < a.shape[1]:
        joined = count_sketch(joined, size, generator=generator)
    sa, sb = joined[..., :-1], joined[..., -1:]
    gram = sa.mT @ sa
    small = 10 * torch.finfo(gram.dtype).eps * gram.diagonal(dim1=1, dim2=2).sum(1)
    gram.diagonal(dim1=1, dim2=2).add_(torch.from_numpy(ridge) + small[:, None] + torch.finfo(gram.dtype).tiny)
    lower, _ = torch.linalg.cholesky_ex(gram)
    inverse = torch.cholesky_inverse(lower)
    return inverse.numpy(), (inverse @ (sa.mT @ sb))[..., 0].numpy()


def _pcgls(
    a: Array, b: Array, y: Array, ridge: Array, diagonal: Array, inverse: Array | None, tol: float, max_iter: int
) -> float:
    """Refine ``y`` (b, k) in place by preconditioned CGLS on every row's system at once; the sum of squared residuals."""
    transposed = a.transpose(0, 2, 1)

    def precondition(g: Array) -> Array:
        return g * diagonal if inverse is None else (inverse @ g[..., None])[..., 0]

    info = np.finfo(y.dtype)
    floor = (10 * info.eps) ** 2 * np.einsum("bp,bp->b", b, b)  # below it a gradient is rounding
    residual = b - (a @ y[..., None])[..., 0]
    direction, gamma = np.zeros_like(y), np.ones(len(y), y.dtype)
    for step in range(max_iter):
        gradient = (transposed @ residual[..., None])[..., 0] - ridge * y
        z = precondition(gradient)
        after = np.einsum("bk,bk->b", gradient, z)
        if step == 0:
            floor = np.maximum(floor, tol * tol * after)
        active = after > floor
        if not active.any():
            break
        beta = np.divide(after, gamma, out=np.zeros_like(after), where=active)
        gamma = np.where(active, after, np.inf)  # a row that wakes up again starts from the gradient
        direction = z + beta[:, None] * direction
        moved = (a @ direction[..., None])[..., 0]
        curvature = np.einsum("bp,bp->b", moved, moved) + np.einsum("bk,k,bk->b", direction, ridge, direction)
        length = np.divide(after, curvature, out=np.zeros_like(after), where=active & (curvature > 0))[:, None]
        y += length * direction
        residual -= length * moved
    return float(np.vdot(residual, residual))

"""The best approximation of a matrix by one of low rank, in the metric of its inputs, of its outputs, or of both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.linalg import eigh
from torch import Tensor


@dataclass(frozen=True)
class LowRankSolution:
    """What `weighted_low_rank` found: the best factors of every rank at once.

    Attributes:
        energy: float64 (k,), falling, k = min(m, n): what each direction adds to the squared norm in the metric.
        matrix: what was approximated, as given.
        basis: float64 (m, k): the left factor of rank r is its first r columns.
        duals: float64 (m, k): the right factor of rank r is the first r columns' transpose times the matrix.
    """

    energy: Tensor
    matrix: Tensor
    basis: Tensor
    duals: Tensor

    def errors(self) -> Tensor:
        """The squared error in the metric of the best approximation of rank 0, 1, ..., k: float64 (k + 1,)."""
        tails = self.energy.flip(0).cumsum(0).flip(0)
        return torch.cat([tails, tails.new_zeros(1)])

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """B (m, rank) and A (rank, n), float64, with B A the best approximation; column i of B is as long as row i of A.

        Raises:
            ValueError: for a rank out of 1..min(m, n).
        """
        if not 1 <= rank <= len(self.energy):
            raise ValueError(
                f"'rank' must be in 1..{len(self.energy)} for a matrix of shape {tuple(self.matrix.shape)}, not {rank}"
            )
        left = self.basis[:, :rank]
        right = self.duals[:, :rank].T @ self.matrix.to(left.dtype)
        b, a = left.norm(dim=0), right.norm(dim=1)
        scale = torch.where((a > 0) & (b > 0), (b / a).sqrt(), torch.ones_like(a))  # a direction of nothing stays nothing
        return left / scale, right * scale[:, None]


def weighted_low_rank(
    matrix: Tensor,
    inputs: Tensor | None = None,
    outputs: Tensor | None = None,
    *,
    mean: Tensor | None = None,
    damping: float = 0.0,
) -> LowRankSolution:
    r"""The rank-r matrices nearest to M where what counts is its action on inputs, and the size of its outputs.

    With C the second moment of the inputs x, G the metric of the outputs, and the mean of the inputs taken off where it is given,
    the approximations of every rank r minimize

    .. math:: E\,\|L (M - M_r)(x - \mu)\|^2 = \|L (M - M_r) R\|_F^2, \qquad L^\top L = G,\quad R R^\top = C - \mu\mu^\top.

    The minimizer projects onto the leading eigenvectors of the outputs' own second moment, which needs no inverse of R:

    .. math:: M_r = L^{-1} U_r U_r^\top L M, \qquad (L M)(C - \mu\mu^\top)(L M)^\top = U \Lambda U^\top,

    and its error is the sum of the eigenvalues that are left out. So the same lines are the plain singular value decomposition
    (no moments), principal components of a layer's features (inputs alone), whitening by the inputs' eigenspace as in EoRA, where M
    is the error to make up for, and a Kronecker-factored second-order metric (both).

    Args:
        matrix: M, shape (m, n), floating and finite.
        inputs: C, shape (n, n), symmetric and positive semidefinite; (n,) where it is diagonal; None is the identity.
        outputs: G, shape (m, m) or (m,), likewise.
        mean: μ, shape (n,); needs ``inputs``.
        damping: adds this share of the mean of its diagonal to each moment's diagonal. It breaks ties among directions that the inputs
            never took, and it makes an ``outputs`` that is singular invertible.

    Returns:
        A `LowRankSolution`, computed in float64: the eigenvalues are squares, and in float32 half of the digits would be lost.

    Raises:
        TypeError: a matrix or moment that is not floating.
        ValueError: shapes that do not fit, NaN or infinity, a negative damping, or ``outputs`` that is singular without damping.

    When not to use it: for a few leading directions of a matrix with many thousands of rows and columns, where
    `randomized_right_vectors` takes a small part of the time.

    Example:
        >>> m = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> B, A = weighted_low_rank(m).factors(1)
        >>> (B @ A).round().tolist()
        [[2.0, 0.0], [0.0, 0.0]]
        >>> B, A = weighted_low_rank(m, torch.tensor([1.0, 9.0])).factors(1)  # the second input is three times larger
        >>> (B @ A).round().tolist()
        [[0.0, 0.0], [0.0, 1.0]]

    Sources: Eckart and Young (1936) for the plain case; Yu and Wu, "Compressing Transformers: Features Are Low-Rank, but Weights Are
    Not!", AAAI 2023, for the projection onto output features; Liu et al., "EoRA", arXiv 2410.21271, for that of an error.
    """
    m, n = _check_matrix(matrix)
    if damping < 0:
        raise ValueError(f"'damping' must be at least 0, not {damping}")
    if mean is not None and inputs is None:
        raise ValueError("'mean' needs 'inputs': the moment that it is taken off")
    work = matrix.detach().to(torch.float64)
    lower: Tensor | None = None
    if outputs is not None:
        metric, extra = _moment("outputs", outputs, m, damping)
        lower = _root(_damped(metric, extra))
        del metric
        work = _apply_root(lower, work)
    # The eigenproblem is taken on the shorter side; an orthonormal basis of the columns loses nothing.
    turned: Tensor | None = None
    if m > n:
        turned, work = torch.linalg.qr(work)
    weighted = work
    if inputs is not None:
        moment, extra = _moment("inputs", inputs, n, damping)
        weighted = work * moment if moment.ndim == 1 else work @ moment
        if extra:
            weighted = weighted.add_(
                work, alpha=extra
            )  # a wide layer's moment is larger than its matrix: no second one is made
        del moment
    gram = weighted @ work.T
    del weighted  # what is not needed any more makes room
    if mean is not None:
        if mean.shape != (n,) or not mean.is_floating_point():
            raise ValueError(f"'mean' must be floating of shape ({n},), not {mean.dtype} of {tuple(mean.shape)}")
        centre = work @ mean.detach().to(work)
        gram.addr_(centre, centre, alpha=-1)
    del work
    values, vectors = _eigh(gram)
    del gram
    energy, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    if turned is not None:
        vectors = turned @ vectors
    high, low = vectors.amax(0), vectors.amin(0)
    largest = torch.where(high >= -low, high, low)
    vectors.mul_(torch.where(largest < 0, -1.0, 1.0).to(vectors))  # a decomposition leaves the sign open
    if lower is None:
        return LowRankSolution(energy, matrix.detach(), vectors, vectors)
    if lower.ndim == 1:
        return LowRankSolution(energy, matrix.detach(), vectors / lower[:, None], vectors * lower[:, None])
    basis = torch.linalg.solve_triangular(lower.T, vectors, upper=True)
    return LowRankSolution(energy, matrix.detach(), basis, lower @ vectors)


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, rising, and eigenvectors of a symmetric matrix, which is overwritten; reads one triangle alone.

    torch's own solver divides and conquers, in two matrices of workspace beside the eigenvectors and a copy of what it is given. MRRR, as
    scipy has it, takes as long and no workspace that counts.
    """
    if gram.device.type != "cpu":
        found: tuple[Tensor, Tensor] = torch.linalg.eigh(gram)
        return found
    # The transpose is a view in the order of columns, which LAPACK can overwrite.
    values, vectors = eigh(gram.numpy().T, driver="evr", overwrite_a=True, check_finite=False)
    return torch.from_numpy(values), torch.from_numpy(vectors)


def _root(metric: Tensor) -> Tensor:
    """K with K Kᵀ the metric, so that L = Kᵀ; the square root of a diagonal."""
    if metric.ndim == 1:
        if not bool((metric > 0).all()):
            raise ValueError("'outputs' is singular; give 'damping' above 0")
        return metric.sqrt()
    lower, info = torch.linalg.cholesky_ex(metric)
    if int(info):
        raise ValueError("'outputs' is not positive definite; give 'damping' above 0")
    root: Tensor = lower
    return root


def _apply_root(lower: Tensor, matrix: Tensor) -> Tensor:
    return lower[:, None] * matrix if lower.ndim == 1 else lower.T @ matrix


def _damped(moment: Tensor, extra: float) -> Tensor:
    """The moment with something added to its diagonal."""
    if not extra:
        return moment
    if moment.ndim == 1:
        return moment + extra
    more = moment.clone()
    more.diagonal().add_(extra)
    return more


def _moment(name: str, moment: Tensor, size: int, damping: float) -> tuple[Tensor, float]:
    """A second moment in float64, checked, and what damping adds to its diagonal."""
    if not isinstance(moment, Tensor) or not moment.is_floating_point():
        raise TypeError(
            f"'{name}' must be a floating tensor, not {moment.dtype if isinstance(moment, Tensor) else type(moment).__name__}"
        )
    if moment.shape not in ((size,), (size, size)):
        raise ValueError(f"'{name}' must have shape ({size}, {size}) or ({size},), not {tuple(moment.shape)}")
    wide = moment.detach().to(torch.float64)
    if not _finite(wide):
        raise ValueError(f"'{name}' must be finite; it holds NaN or infinity")
    diagonal = wide if wide.ndim == 1 else wide.diagonal()
    if bool((diagonal < 0).any()):
        raise ValueError(f"'{name}' is no second moment: its diagonal holds {float(diagonal.min()):.3g}")
    return wide, damping * float(diagonal.mean())


def _finite(x: Tensor) -> bool:
    """Whether no entry is NaN or infinite, without a second tensor of that size."""
    low, high = torch.aminmax(x.detach())
    return bool(low.isfinite() & high.isfinite())


def _check_matrix(matrix: Tensor) -> tuple[int, int]:
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        raise TypeError(
            f"'matrix' must be a floating tensor, not {matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__}"
        )
    if matrix.ndim != 2 or not matrix.numel():
        raise ValueError(f"'matrix' must have shape (m, n), m, n >= 1, not {tuple(matrix.shape)}")
    if not _finite(matrix):
        raise ValueError("'matrix' must be finite; it holds NaN or infinity")
    return matrix.shape[0], matrix.shape[1]

"""The part of a gradient matrix that keeps optimizer state: projected down, and brought back up."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Subspace(ABC):
    """A linear subspace of m × n matrices at one step: down to coordinates, and back up.

    ``dim`` is the dimension of the matrix that becomes shorter: 1 where columns are combined, 0 where rows are.
    """

    dim: int

    @abstractmethod
    def project(self, matrix: Tensor) -> Tensor:
        """Coordinates of the matrix: shape (m, rank) for ``dim`` 1, (rank, n) for ``dim`` 0."""

    @abstractmethod
    def add_(self, out: Tensor, low: Tensor, alpha: float) -> None:
        """Add ``alpha`` times the matrix with coordinates ``low`` to ``out``, in place."""

    def residual_norm_sq(self, matrix: Tensor, low: Tensor) -> Tensor:
        """Squared norm of what the subspace leaves of each slice along the long dimension; kept in that dimension's shape.

        From ‖g‖² - ‖low‖² where the coordinates are orthonormal, so that the residual itself is never formed.
        """
        return (_slice_norm_sq(matrix, self.dim) - _slice_norm_sq(low, self.dim)).clamp_(min=0)

    @abstractmethod
    def carry(self, low: Tensor, earlier: Subspace) -> Tensor:
        """Coordinates here of the matrix that has coordinates ``low`` in an earlier subspace of the same kind and rank."""

    def similarity(self, earlier: Subspace) -> float:
        """How much of an earlier subspace is kept: 1 for all of it, near 0 for none."""
        raise NotImplementedError(f"{type(self).__name__} has no measure of similarity: use refresh='periodic'")


class Basis(Subspace):
    """Spanned by the columns of a matrix: G ↦ G B (``dim`` 1) or Bᵀ G (``dim`` 0).

    Args:
        basis: shape (length of ``dim``, rank).
        dim: which dimension of the gradient it acts on.
        orthonormal: False where rounding has bent the columns, as INT4 storage does.
    """

    def __init__(self, basis: Tensor, dim: int, *, orthonormal: bool = True) -> None:
        self.basis, self.dim, self.orthonormal = basis, dim, orthonormal

    def project(self, matrix: Tensor) -> Tensor:
        return matrix @ self.basis if self.dim else self.basis.T @ matrix

    def add_(self, out: Tensor, low: Tensor, alpha: float) -> None:
        if self.dim:
            out.addmm_(low, self.basis.T, alpha=alpha)
        else:
            out.addmm_(self.basis, low, alpha=alpha)

    def residual_norm_sq(self, matrix: Tensor, low: Tensor) -> Tensor:
        if self.orthonormal:
            return super().residual_norm_sq(matrix, low)
        # ‖g - B l‖² = ‖g‖² - 2 lᵀl + lᵀ(BᵀB) l with l = Bᵀg.
        gram = self.basis.float().T @ self.basis.float() if _half(self.basis) else self.basis.T @ self.basis
        wide = low.to(gram.dtype)
        turned = wide @ gram if self.dim else gram @ wide
        kept = (turned * wide).sum(self.dim, keepdim=True)
        return (_slice_norm_sq(matrix, self.dim) - 2 * _slice_norm_sq(low, self.dim) + kept).clamp_(min=0)

    def carry(self, low: Tensor, earlier: Subspace) -> Tensor:
        if not isinstance(earlier, Basis):
            raise TypeError(f"'earlier' must be a Basis, not {type(earlier).__name__}")
        turn = earlier.basis.T @ self.basis
        return low @ turn if self.dim else turn.T @ low

    def similarity(self, earlier: Subspace) -> float:
        """|cos| between the leading columns; the sign of a singular vector is arbitrary."""
        if not isinstance(earlier, Basis):
            raise TypeError(f"'earlier' must be a Basis, not {type(earlier).__name__}")
        a, b = self.basis[:, 0].float(), earlier.basis[:, 0].float()
        return float((a @ b).abs() / (a.norm() * b.norm()).clamp_min(1e-12))


class Selection(Subspace):
    """Some columns (``dim`` 1) or rows (``dim`` 0) of the matrix, as they are.

    Args:
        indices: which, integers, shape (rank,), without repetition.
        dim: 1 for columns, 0 for rows.
    """

    def __init__(self, indices: Tensor, dim: int) -> None:
        self.indices, self.dim = indices, dim

    def project(self, matrix: Tensor) -> Tensor:
        return matrix.index_select(self.dim, self.indices)

    def add_(self, out: Tensor, low: Tensor, alpha: float) -> None:
        out.index_add_(self.dim, self.indices, low.to(out.dtype), alpha=alpha)

    def carry(self, low: Tensor, earlier: Subspace) -> Tensor:
        if not isinstance(earlier, Selection):
            raise TypeError(f"'earlier' must be a Selection, not {type(earlier).__name__}")
        same = (earlier.indices[:, None] == self.indices[None, :]).to(low.dtype)
        return low @ same if self.dim else same.T @ low

    def similarity(self, earlier: Subspace) -> float:
        """The share of the indices that both have."""
        if not isinstance(earlier, Selection):
            raise TypeError(f"'earlier' must be a Selection, not {type(earlier).__name__}")
        return float(torch.isin(self.indices, earlier.indices).float().mean())


class Whole(Subspace):
    """The whole tensor, of any shape: plain Adam."""

    dim = 1

    def project(self, matrix: Tensor) -> Tensor:
        return matrix

    def add_(self, out: Tensor, low: Tensor, alpha: float) -> None:
        out.add_(low, alpha=alpha)

    def residual_norm_sq(self, matrix: Tensor, low: Tensor) -> Tensor:
        return torch.zeros_like(_slice_norm_sq(matrix, self.dim))

    def carry(self, low: Tensor, earlier: Subspace) -> Tensor:
        return low


class Nothing(Subspace):
    """The empty subspace: everything is residual, and there is no state."""

    dim = 1

    def project(self, matrix: Tensor) -> Tensor:
        return matrix[:, :0]

    def add_(self, out: Tensor, low: Tensor, alpha: float) -> None:
        pass

    def carry(self, low: Tensor, earlier: Subspace) -> Tensor:
        return low


def _half(x: Tensor) -> bool:
    return x.dtype in (torch.float16, torch.bfloat16)


def _slice_norm_sq(x: Tensor, dim: int) -> Tensor:
    """Squared norms along ``dim``, kept; in float32 for half precision."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32 if _half(x) else None)
    return norms.square_()

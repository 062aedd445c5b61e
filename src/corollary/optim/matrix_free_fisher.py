"""M-FAC's static algorithm: the inverse of a damped empirical Fisher matrix, kept in the room of its gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from corollary.linalg.fisher import check_gradient_rows, column_chunks, damped_cholesky, gram_matrix, wide_dtype


class MatrixFreeFisher:
    r"""The inverse of a damped empirical Fisher matrix: products, diagonal and single elements, without any d × d matrix.

    Of m gradients of length d,

    .. math::
        F = λ I + \frac{1}{m} \sum_{i=1}^m g_i g_i^\top, \qquad
        F^{-1} = \frac{1}{λ} I - \sum_{i=1}^m u_i u_i^\top

    The paper gets each uᵢ from its predecessors by the Sherman-Morrison formula, one gradient after another; u of this class are
    the same vectors, got all at once: with the scalar products S = G Gᵀ and S + mλ I = L Lᵀ they are the rows of
    U = L⁻¹ G / √λ. That is matrix products alone, with everything of size m × m in float64 whatever the gradients' dtype.

    ================================  ===========
    cost                              operations
    ================================  ===========
    set-up                            O(d m²)
    `solve`                           O(d m)
    `inverse_diagonal`                O(d m)
    `inverse_element`                 O(m)
    ================================  ===========

    Memory is that of U, m d entries in the gradients' dtype, and some megabytes of work space. Setting up ``in_place`` needs
    nothing else: U takes the place of the gradients.

    With ``block_size`` F is cut down to blocks of so many consecutive parameters on its diagonal, each inverted by itself: the
    paper's choice for large networks, where few gradients say little about parameters far apart. Set-up then costs
    O(d m² + (d / block_size) m³), so that blocks smaller than m cost more than they spare.

    Args:
        gradients: (m, d), real floating: one flattened gradient a row, of a sample or of a batch.
        damp: λ > 0. Entries of the diagonal of F⁻¹ lie in (0, 1/λ].
        block_size: parameters in a block; None keeps F whole.
        in_place: overwrite ``gradients``, which must not be used afterwards.

    Raises:
        TypeError: ``gradients`` is not real and floating.
        ValueError: ``gradients`` is no matrix, empty, or not finite; ``damp`` not above 0, or vanishing beside the gradients;
            ``block_size`` below 1; ``in_place`` for a tensor whose entries share memory or that requires gradients.

    When not to use it: m gradients span m directions, and in all others F⁻¹ is 1/λ, so with m far below the number of directions
    that matter λ decides alone. For d up to some thousands a dense solve is simpler.

    Deviations from the paper: Cholesky's factor in place of the recursion (see above). A diagonal entry that rounding has
    left too small is raised to 1 / (λ + tr(S)/m), which no entry of F⁻¹ is below.

    Example:
        >>> import torch
        >>> gradients = torch.randn(8, 50, dtype=torch.float64)
        >>> inverse = MatrixFreeFisher(gradients, damp=0.1)
        >>> fisher = 0.1 * torch.eye(50) + gradients.T @ gradients / 8
        >>> x = torch.randn(50, dtype=torch.float64)
        >>> torch.allclose(inverse.solve(x), torch.linalg.solve(fisher, x))
        True
        >>> torch.allclose(inverse.inverse_diagonal(), torch.linalg.inv(fisher).diagonal())
        True

    Reference:
        Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information",
        arXiv 2107.03356, the static algorithm.
    """

    def __init__(self, gradients: Tensor, damp: float = 1e-5, *, block_size: int | None = None, in_place: bool = False) -> None:
        check_gradient_rows(gradients)
        if not 0 < damp < math.inf:
            raise ValueError(f"'damp' must be above 0 and finite, not {damp}")
        if block_size is not None and block_size < 1:
            raise ValueError(f"'block_size' must be at least 1, or None, not {block_size}")
        overlaps = any(size > 1 and stride == 0 for size, stride in zip(gradients.shape, gradients.stride(), strict=True))
        if in_place and (gradients.requires_grad or overlaps):
            raise ValueError("'in_place' needs gradients of their own memory that require no gradients themselves")
        self.damp = float(damp)
        m, d = gradients.shape
        self.block_size = d if block_size is None else min(block_size, d)
        rows = gradients.detach()
        self._rows = rows if in_place else rows.clone(memory_format=torch.contiguous_format)
        self._floor = torch.empty(-(-d // self.block_size), dtype=torch.float32, device=rows.device)
        with torch.no_grad():
            self._set_up(m)

    @property
    def shape(self) -> torch.Size:
        """(d, d)."""
        return torch.Size((self._rows.shape[1],) * 2)

    @property
    def dtype(self) -> torch.dtype:
        """The gradients' dtype, and that of everything that comes out."""
        return self._rows.dtype

    @property
    def device(self) -> torch.device:
        """The gradients' device."""
        return self._rows.device

    @property
    def nbytes(self) -> int:
        """Bytes that the object holds."""
        return self._rows.nbytes + self._floor.nbytes

    def _set_up(self, m: int) -> None:
        size, whole = self.block_size, self.block_size >= self._rows.shape[1]
        shift = m * self.damp
        if whole:
            gram = gram_matrix(self._rows)
            self._check(gram)
            factor = damped_cholesky(gram, shift)
            self._floor.fill_(1 / (self.damp + float(gram.trace()) / m))
        for columns, wide in column_chunks(self._rows, multiple=1 if whole else size):
            if whole:
                solved = torch.linalg.solve_triangular(factor, wide, upper=False)
                self._rows[:, columns] = solved.div_(math.sqrt(self.damp))
                continue
            for part, width in self._parts(columns):
                blocks = (
                    wide[:, part.start - columns.start : part.stop - columns.start]
                    .reshape(len(self._rows), -1, width)
                    .transpose(0, 1)
                )
                gram = blocks @ blocks.mT
                self._check(gram)
                solved = torch.linalg.solve_triangular(damped_cholesky(gram, shift), blocks, upper=False)
                self._rows[:, part] = solved.div_(math.sqrt(self.damp)).transpose(0, 1).flatten(1)
                trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
                self._floor[part.start // size :][: len(gram)] = 1 / (self.damp + trace / m)

    def _check(self, gram: Tensor) -> None:
        if not gram.isfinite().all():
            raise ValueError("'gradients' must be finite; there are NaN or infinite entries")

    def _submatrix_solve(self, lost: Tensor, removed: Tensor) -> Tensor:
        """([F⁻¹]_QQ)⁻¹ w_Q, spread to (d,): with V = U on Q it is λ (w + Vᵀ (I - λ V Vᵀ)⁻¹ λ V w)."""
        groups: list[tuple[slice, int, Tensor]] = []  # columns, width of a block in them, V Vᵀ of each block
        if self.block_size >= len(lost):
            gram = torch.zeros(1, *(len(self._rows),) * 2, dtype=wide_dtype(self.device), device=self.device)
            for columns, wide in column_chunks(self._rows):
                wide *= removed[columns]
                gram[0].addmm_(wide, wide.T)
            groups.append((slice(0, len(lost)), len(lost), gram))
        else:
            for columns, wide in column_chunks(self._rows, multiple=self.block_size):
                for part, width in self._parts(columns):
                    blocks = wide[:, part.start - columns.start : part.stop - columns.start].reshape(len(self._rows), -1, width)
                    blocks = (blocks * removed[part].view(-1, width)).transpose(0, 1)
                    groups.append((part, width, blocks @ blocks.mT))
        result = lost * self.damp
        for part, width, gram in groups:
            blocks = self._rows[:, part].reshape(len(self._rows), -1, width).transpose(0, 1)
            inner = (blocks @ lost[part].view(-1, width, 1)).to(gram)
            rest = -gram
            rest.diagonal(dim1=-2, dim2=-1).add_(1 / self.damp)
            factor, info = torch.linalg.cholesky_ex(rest)
            if info.any():
                # No eigenvalue of F⁻¹, nor of a part of it, is below the floor, whatever rounding has made of it.
                values, vectors = torch.linalg.eigh(rest)
                floor = self._floor[part.start // self.block_size :][: len(blocks)].unsqueeze(1).to(values)
                inner = vectors @ ((vectors.mT @ inner) / values.maximum(floor).unsqueeze(2))
            else:
                inner = torch.cholesky_solve(inner, factor)
            result[part].add_((blocks.mT @ inner.to(self.dtype)).reshape(-1), alpha=self.damp)
        return result * removed

    def _parts(self, columns: slice | None = None) -> list[tuple[slice, int]]:
        """The whole blocks among the columns, and a last shorter one, each with its block size."""
        begin, end, size = (
            0 if columns is None else columns.start,
            self.shape[0] if columns is None else columns.stop,
            self.block_size,
        )
        full = begin + (end - begin) // size * size
        return [
            (part, width)
            for part, width in ((slice(begin, full), size), (slice(full, end), end - full))
            if part.start < part.stop
        ]

    def solve(self, x: Tensor) -> Tensor:
        """F⁻¹ x for one vector (d,), or for the columns of a matrix (d, k)."""
        d = self._rows.shape[1]
        if x.dim() not in (1, 2) or x.shape[0] != d:
            raise ValueError(f"'x' must be ({d},) or ({d}, k), not {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"'x' must be real and floating, not {x.dtype}")
        x = x.detach().to(device=self.device, dtype=self.dtype)
        result = x / self.damp
        for part, width in self._parts():
            if width == d:  # one block: two plain products
                return result.sub_(self._rows.T @ (self._rows @ x))
            blocks = self._rows[:, part].reshape(len(self._rows), -1, width).transpose(0, 1)
            pieces = x[part].reshape(len(blocks), width, -1)
            result[part] -= (blocks.mT @ (blocks @ pieces)).reshape(x[part].shape)
        return result

    def __matmul__(self, vectors: Tensor, /) -> Tensor:
        """The same as `solve`: the object is F⁻¹ as a `corollary.linalg.SymmetricOperator`."""
        return self.solve(vectors)

    def inverse_diagonal(self) -> Tensor:
        """The diagonal of F⁻¹, (d,)."""
        result = torch.empty(self._rows.shape[1], dtype=self.dtype, device=self.device)
        floor = self._floor.repeat_interleave(self.block_size)[: len(result)] if len(self._floor) > 1 else self._floor
        for columns, wide in column_chunks(self._rows):
            least = floor[columns] if len(floor) > 1 else floor
            result[columns] = (1 / self.damp - wide.square_().sum(0)).maximum(least)
        return result

    @torch.no_grad()
    def removal_step(self, weight: Tensor, removed: Tensor, *, joint: bool = True) -> Tensor:
        r"""The step δ that sets entries Q of the parameters to zero and moves the others to make up for it (optimal brain surgeon).

        .. math::
            δ = F^{-1} z, \quad z_Q = -\left([F^{-1}]_{QQ}\right)^{-1} w_Q, \quad z \text{ zero elsewhere}

        is the smallest in δᵀ F δ of all steps that take w_Q away. The matrix of size \|Q\| is inverted through one of m × m
        numbers: O(d m² + m³).

        Args:
            weight: w, (d,).
            removed: Q, bool (d,).
            joint: the smallest step for all of Q, as above. False sums the steps of each removal alone, z_i = -w_i / [F⁻¹]ᵢᵢ, as
                the authors' code does: O(d m), and too large a step where removed parameters depend on each other.

        Returns:
            δ (d,); weight + δ is zero on Q.
        """
        d = self._rows.shape[1]
        for name, given in (("weight", weight), ("removed", removed)):
            if tuple(given.shape) != (d,):
                raise ValueError(f"'{name}' must be ({d},), not {tuple(given.shape)}")
        if removed.dtype != torch.bool:
            raise TypeError(f"'removed' must be bool, not {removed.dtype}")
        lost = torch.where(removed, weight.detach(), 0).to(device=self.device, dtype=self.dtype)
        step = self.solve(-self._submatrix_solve(lost, removed) if joint else -lost / self.inverse_diagonal())
        step[removed] = -lost[removed]
        return step

    def inverse_element(self, i: int | Tensor, j: int | Tensor) -> Tensor:
        """Elements (i, j) of F⁻¹: a scalar for two integers, else of the shape to which the int64 indices broadcast."""
        d = self._rows.shape[1]
        pair = [torch.as_tensor(index, device=self.device) for index in (i, j)]
        shape = (pair[0] + pair[1]).shape
        for name, index in zip("ij", pair, strict=True):
            if index.dtype != torch.int64:
                raise TypeError(f"'{name}' must be an integer or int64, not {index.dtype}")
            if index.numel() and not (-d <= int(index.min()) and int(index.max()) < d):
                raise ValueError(f"'{name}' must lie in [-{d}, {d}), not {int(index.min())} to {int(index.max())}")
        row, column = (index.remainder(d).expand(shape) for index in pair)
        left, right = (self._rows[:, index.reshape(-1)].view(-1, *shape) for index in (row, column))
        products = (left * right).sum(0).mul_(row.floor_divide(self.block_size).eq(column.floor_divide(self.block_size)))
        return row.eq(column).to(self.dtype).div_(self.damp).sub_(products)

"""M-FAC's dynamic algorithm: the inverse of the empirical Fisher matrix of a sliding window of gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from corollary.linalg.fisher import damped_cholesky, gram_matrix, wide_dtype


class SlidingFisher:
    r"""The inverse of a damped empirical Fisher matrix whose gradients are exchanged one at a time.

    With the window's m gradients as the rows of G, S = G Gᵀ and K = (S + mλ I)⁻¹,

    .. math::
        F = λ I + \frac{1}{m} G^\top G, \qquad
        F^{-1} x = \frac{1}{λ} (x - G^\top K G x), \qquad
        F^{-1} g_k = m \, G^\top K e_k

    Exchanging a gradient gives S one new row and column, O(d m), and a new factor, O(m³). A product takes O(d m + m²); that with
    a gradient of the window needs no 1/λ, and so loses no digits where λ is small.

    A gradient may come in several pieces, one window for each, as a model's parameters do; nothing is ever concatenated. Pieces
    that are DTensors (as under ``fully_shard``) are worked on where they lie: the processes exchange m numbers an update.

    Args:
        windows: a window (m, \*shape) for each piece, contiguous, real and floating, all with the same m. They are written to,
            and may be zero at first: a gradient of zeros adds nothing but its share in m.
        damp: λ > 0.
        gram: S (m, m) in float64, where it is known; it is written to. None computes it from the windows.

    Attributes:
        gram: S, in float64.

    Raises:
        TypeError: a window, gradient or vector is not real and floating, or a window is a DTensor with another placement than
            Shard and Replicate.
        ValueError: windows that differ in m, are empty of rows or not contiguous; a ``gram`` of another shape; ``damp`` not
            above 0, or vanishing in the rounding of the gradients' scalar products.

    Deviations from the paper: it keeps two m × m matrices D and B, the triangular factors of the same matrix S + mλ I and their
    combinations; here it is Cholesky's factor, in float64 whatever the gradients' dtype.

    Example:
        >>> import torch
        >>> fisher = SlidingFisher([torch.zeros(3, 50, dtype=torch.float64)], damp=0.1)
        >>> gradients = torch.randn(5, 50, dtype=torch.float64)
        >>> for step, gradient in enumerate(gradients):
        ...     fisher.update(step % 3, [gradient])
        >>> dense = 0.1 * torch.eye(50) + gradients[2:].T @ gradients[2:] / 3
        >>> x = torch.randn(50, dtype=torch.float64)
        >>> torch.allclose(fisher.solve([x])[0], torch.linalg.solve(dense, x))
        True

    Reference:
        Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information",
        arXiv 2107.03356, the dynamic algorithm.
    """

    def __init__(self, windows: Sequence[Tensor], damp: float = 1e-5, *, gram: Tensor | None = None) -> None:
        if not 0 < damp < math.inf:
            raise ValueError(f"'damp' must be above 0 and finite, not {damp}")
        if not windows:
            raise ValueError("'windows' is empty; give at least one")
        for i, window in enumerate(windows):
            if not window.is_floating_point():
                raise TypeError(f"'windows[{i}]' must be real and floating, not {window.dtype}")
            if window.dim() < 2 or not len(window) or len(window) != len(windows[0]):
                raise ValueError(
                    f"'windows[{i}]' has shape {tuple(window.shape)}; allowed: (m, ...) with one m of at least 1 for all"
                )
            if not _local(window).is_contiguous():
                raise ValueError(f"'windows[{i}]' must be contiguous, because it is written to")
        self.windows = list(windows)
        self.damp = float(damp)
        self._rows = [_local(window).flatten(1) for window in self.windows]
        m, device = len(windows[0]), self._rows[0].device
        if gram is None:
            gram = torch.zeros(m, m, dtype=wide_dtype(device), device=device)
            for products, window in ((gram_matrix(r), w) for r, w in zip(self._rows, windows, strict=True)):
                gram += _over_mesh(products, window).to(device)
        elif tuple(gram.shape) != (m, m) or gram.dtype != wide_dtype(device):
            raise ValueError(f"'gram' must be ({m}, {m}) in {wide_dtype(device)}, not {tuple(gram.shape)} in {gram.dtype}")
        self.gram = gram
        self._factor: Tensor | None = None

    @torch.no_grad()
    def update(self, row: int, gradients: Sequence[Tensor | None]) -> None:
        """Put a gradient in the place of the window's ``row``-th, and factorize anew: O(d m + m³).

        Args:
            row: which gradient goes, from 0 to m - 1.
            gradients: the pieces of the new one, each of its window's shape without the first dimension; None stands for zeros.

        Raises:
            IndexError: there is no such row.
            ValueError: the pieces do not fit the windows, hold NaN or infinite entries, or are so large that ``damp`` vanishes
                beside them. Nothing has changed then.
        """
        if not 0 <= row < len(self.gram):
            raise IndexError(f"'row' must be from 0 to {len(self.gram) - 1}, not {row}")
        flat = self._flatten("gradients", gradients)
        parts = [
            None if g is None else torch.cat((self._wide(r @ g), self._square(g)))
            for r, g in zip(self._rows, flat, strict=True)
        ]
        *_, square = products = self._sum(parts, len(self.gram) + 1)
        if not products.isfinite().all():
            raise ValueError("'gradients' must be finite; there are NaN or infinite entries")
        gram, products = self.gram.clone(), products[:-1]
        products[row] = square
        gram[row] = products
        gram[:, row] = products
        self._factor = damped_cholesky(gram, len(gram) * self.damp)
        self.gram.copy_(gram)
        for rows, gradient in zip(self._rows, flat, strict=True):
            if gradient is None:
                rows[row].zero_()
            else:
                rows[row].copy_(gradient)

    @torch.no_grad()
    def solve(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """F⁻¹ x, piece by piece, of an x in the pieces of the windows: O(d m + m²)."""
        flat = self._flatten("vectors", vectors)
        weights = self._coefficients(self._products(flat))
        inner = self._combine(weights)
        return [
            _like(x.sub(y.view_as(x)).div_(self.damp).view_as(_local(v)), v)
            for x, y, v in zip((f for f in flat if f is not None), inner, vectors, strict=True)
        ]

    @torch.no_grad()
    def solve_row(self, row: int) -> list[Tensor]:
        """F⁻¹ gₖ of the window's own ``row``-th gradient, piece by piece, without a product with it: O(d m + m²)."""
        m = len(self.gram)
        if not 0 <= row < m:
            raise IndexError(f"'row' must be from 0 to {m - 1}, not {row}")
        unit = torch.zeros(m, dtype=self.gram.dtype, device=self.gram.device)
        unit[row] = m
        pieces = self._combine(self._coefficients(unit))
        return [_like(y.view(_local(w).shape[1:]), w, inner=True) for y, w in zip(pieces, self.windows, strict=True)]

    def _flatten(self, name: str, pieces: Sequence[Tensor | None]) -> list[Tensor | None]:
        if len(pieces) != len(self.windows):
            raise ValueError(f"'{name}' must have a tensor for each of the {len(self.windows)} windows, not {len(pieces)}")
        flat: list[Tensor | None] = []
        for i, (piece, window, rows) in enumerate(zip(pieces, self.windows, self._rows, strict=True)):
            if piece is not None and not piece.is_floating_point():
                raise TypeError(f"'{name}[{i}]' must be real and floating, not {piece.dtype}")
            if piece is not None and piece.shape != window.shape[1:]:
                raise ValueError(f"'{name}[{i}]' has shape {tuple(piece.shape)}; its window has {tuple(window.shape[1:])}")
            flat.append(None if piece is None else _local(piece).detach().reshape(-1).to(rows.dtype))
        return flat

    def _wide(self, products: Tensor) -> Tensor:
        return products.to(device=self.gram.device, dtype=self.gram.dtype)

    def _square(self, vector: Tensor) -> Tensor:
        return self._wide(torch.linalg.vector_norm(vector, dtype=wide_dtype(vector.device)).square().reshape(1))

    def _products(self, flat: Sequence[Tensor | None]) -> Tensor:
        """G x, in the Gram matrix's dtype."""
        parts = [None if x is None else self._wide(rows @ x) for rows, x in zip(self._rows, flat, strict=True)]
        return self._sum(parts, len(self.gram))

    def _sum(self, parts: Sequence[Tensor | None], length: int) -> Tensor:
        """The sum over pieces, and over the processes that hold parts of one: once for all pieces that lie alike."""
        totals: dict[Any, tuple[Tensor, Tensor]] = {}
        for part, window in zip(parts, self.windows, strict=True):
            if part is not None:
                key = _layout(window)
                totals[key] = (totals[key][0] + part if key in totals else part, window)
        total = self.gram.new_zeros(length)
        for part, window in totals.values():
            total += _over_mesh(part, window).to(total.device)
        return total

    def _coefficients(self, vector: Tensor) -> Tensor:
        """K times a vector of length m."""
        if self._factor is None:
            self._factor = damped_cholesky(self.gram, len(self.gram) * self.damp)
        return torch.cholesky_solve(vector.unsqueeze(1), self._factor).squeeze(1)

    def _combine(self, weights: Tensor) -> list[Tensor]:
        return [weights.to(device=rows.device, dtype=rows.dtype) @ rows for rows in self._rows]


def _layout(window: Any) -> Any:
    """Equal for windows whose pieces are summed over the same processes."""
    return (window.device_mesh, tuple(type(p) for p in window.placements)) if _is_distributed(window) else None


def _is_distributed(tensor: Any) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _local(tensor: Any) -> Tensor:
    """What of a tensor lies on this process: for a DTensor its shard, else the tensor itself."""
    if not _is_distributed(tensor):
        assert isinstance(tensor, Tensor)
        return tensor
    from torch.distributed.tensor import Replicate, Shard

    for placement in tensor.placements:
        if type(placement) not in (Shard, Replicate):
            raise TypeError(f"a DTensor must be placed as Shard or Replicate, not {placement}")
    local: Tensor = tensor.to_local()
    return local


def _over_mesh(local: Tensor, like: Any) -> Tensor:
    """The sum of what the processes that share the pieces of ``like`` have; replicas count once."""
    if not _is_distributed(like):
        return local
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    placements = [Partial() if isinstance(p, Shard) else Replicate() for p in like.placements]
    total: Tensor = DTensor.from_local(local, like.device_mesh, placements, run_check=False).full_tensor()
    return total


def _like(local: Tensor, model: Any, *, inner: bool = False) -> Tensor:
    """A shard as the DTensor it belongs to; ``inner`` takes the first dimension of ``model``, a window, away."""
    if not _is_distributed(model):
        return local
    from torch.distributed.tensor import DTensor, Shard

    shape = model.shape[1:] if inner else model.shape
    placements = [Shard(p.dim - 1) if inner and isinstance(p, Shard) else p for p in model.placements]
    stride = torch.empty(shape, device="meta").stride()
    made: Tensor = DTensor.from_local(local, model.device_mesh, placements, run_check=False, shape=shape, stride=stride)
    return made


def zeros_window(param: Tensor, m: int) -> Tensor:
    """A window of m gradients of zeros for a parameter: its device and layout, float32 for half precision."""
    dtype = torch.float32 if param.dtype in (torch.float16, torch.bfloat16) else param.dtype
    local = _local(param)
    rows = torch.zeros(m, *local.shape, dtype=dtype, device=local.device)
    if not _is_distributed(param):
        return rows
    from torch.distributed.tensor import DTensor, Shard

    made: Any = param
    shape = torch.Size((m, *param.shape))
    placements = [Shard(p.dim + 1) if isinstance(p, Shard) else p for p in made.placements]
    stride = torch.empty(shape, device="meta").stride()
    window: Tensor = DTensor.from_local(rows, made.device_mesh, placements, run_check=False, shape=shape, stride=stride)
    return window

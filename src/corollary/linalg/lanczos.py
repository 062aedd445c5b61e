"""Lanczos tridiagonalization: eigenvalues of a matrix that is known by its products alone, with bounds on their error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corollary.linalg.curvature import SymmetricOperator


@dataclass(frozen=True)
class Tridiagonal:
    r"""What `lanczos` gives: :math:`A Q = Q T + β_m q_{m+1} e_m^T` with orthonormal Q and tridiagonal T.

    Everything small is float64 on the CPU. With k start vectors each tensor has a leading dimension k; with one it has none.

    Attributes:
        diagonal: of T, (m,).
        off_diagonal: of T, (m - 1,), never negative.
        remainder: β_m, the norm of what the next step would add, (); zero where Q spans an invariant subspace.
        basis: Q (n, m) on the operator's device, or None if it was not kept.
    """

    diagonal: Tensor
    off_diagonal: Tensor
    remainder: Tensor
    basis: Tensor | None = None

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        r"""Ritz values θ, ascending, their weights, and their residual bounds; each (m,).

        The weight is the squared first entry of T's eigenvector: the share of the start vector along the Ritz vector. Within
        ``bounds[i]`` = β_m |last entry| of ``values[i]`` there is an eigenvalue of A.
        """
        values, vectors = self._eigh()
        return values, vectors[..., 0, :].square(), self.remainder.unsqueeze(-1) * vectors[..., -1, :].abs()

    def ritz_vectors(self) -> Tensor:
        """Ritz vectors as columns (n, m), in the order of the Ritz values; needs the basis."""
        if self.basis is None:
            raise ValueError("'basis' was not kept; call lanczos(..., keep_basis=True)")
        return self.basis @ self._eigh()[1].to(device=self.basis.device, dtype=self.basis.dtype)

    def dense(self) -> Tensor:
        """T itself, (m, m)."""
        return (
            torch.diag_embed(self.diagonal)
            + torch.diag_embed(self.off_diagonal, offset=1)
            + torch.diag_embed(self.off_diagonal, offset=-1)
        )

    def _eigh(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.dense())
        return values, vectors


@dataclass(frozen=True)
class Extremes:
    """What `extreme_eigenvalues` gives; small tensors are float64 on the CPU.

    Attributes:
        largest: the largest eigenvalues, the largest first, (l,).
        largest_bounds: residual bounds: each of ``largest`` lies at most so far from an eigenvalue, (l,).
        smallest: the smallest eigenvalues (the most negative), the smallest first, (s,).
        smallest_bounds: their residual bounds, (s,).
        steps: products with the operator that were made.
        converged: whether every bound is within the tolerance.
        largest_vectors: eigenvectors (n, l) on the operator's device, or None if not asked for.
        smallest_vectors: eigenvectors (n, s), likewise.
    """

    largest: Tensor
    largest_bounds: Tensor
    smallest: Tensor
    smallest_bounds: Tensor
    steps: int
    converged: bool
    largest_vectors: Tensor | None = None
    smallest_vectors: Tensor | None = None


def lanczos(
    operator: SymmetricOperator,
    steps: int,
    *,
    start: Tensor | None = None,
    keep_basis: bool = False,
    generator: torch.Generator | None = None,
) -> Tridiagonal:
    r"""Lanczos with full reorthogonalization, for one start vector or several side by side.

    From q_1 = start / ‖start‖,

    .. math::
        w = A q_j, \quad α_j = q_j^T w, \quad w ← (I - Q_j Q_j^T)\, w \text{ (twice)}, \quad β_j = ‖w‖, \quad q_{j+1} = w / β_j

    In exact arithmetic one subtraction would do; in floating point Q loses its orthogonality as soon as a Ritz value
    converges, and ghosts of eigenvalues appear. Projecting twice against the whole basis keeps it to rounding, at the price of
    holding it: ``steps`` × n × k numbers.

    Where the start spans an invariant subspace (β_j = 0), the chain goes on from a fresh random vector orthogonal to it with
    β_j = 0: T falls into blocks, further eigenvalues are found, and weights of the new block are zero, so that quadrature
    stays exact. After n steps the spectrum is complete.

    Args:
        operator: a square tensor, a `HessianOperator`, or anything with ``shape``, ``dtype``, ``device`` and ``@``;
            symmetric, which is not checked.
        steps: m; at most n are made.
        start: (n,) for one chain or (n, k) for k of them, multiplied together each step; Gaussian by default.
        keep_basis: return Q.
        generator: source of the default start and of fresh vectors, on the operator's device; torch's global one by default.

    Returns:
        A `Tridiagonal`. Half-precision operators are multiplied in their own dtype, with the basis in float32.

    Raises:
        ValueError: the operator is not square or is empty, ``steps`` is below 1, ``start`` has another length, is zero or
            not finite, or a product is not finite.

    Example:
        >>> import torch
        >>> values, weights, bounds = lanczos(torch.diag(torch.arange(1.0, 6.0)), 5, start=torch.ones(5)).ritz()
        >>> values.round(decimals=4).tolist(), weights.sum().round(decimals=4).item()
        ([1.0, 2.0, 3.0, 4.0, 5.0], 1.0)

    Reference:
        Golub and Van Loan, "Matrix Computations", 4th edition, chapter 10; Parlett, "The Symmetric Eigenvalue Problem".
    """
    n = _size(operator)
    if steps < 1:
        raise ValueError(f"'steps' must be at least 1, not {steps}")
    chain = _Chain(operator, min(steps, n), start, generator)
    while chain.made < chain.capacity:
        chain.extend()
    one = start is None or start.dim() == 1
    result = chain.tridiagonal(keep_basis)
    return _first(result) if one else result


def extreme_eigenvalues(
    operator: SymmetricOperator,
    *,
    largest: int = 1,
    smallest: int = 1,
    tol: float = 1e-6,
    max_steps: int = 200,
    start: Tensor | None = None,
    vectors: bool = False,
    generator: torch.Generator | None = None,
) -> Extremes:
    r"""Largest and smallest eigenvalues, by as many Lanczos steps as they need.

    Stops when every wanted Ritz value θ has a residual bound ‖A y - θ y‖ ≤ tol · max \|θ\|. Eigenvalues are approached from
    inside the spectrum; the error of a converged one is about its bound squared over its distance to the next. An eigenvalue
    that is repeated exactly is found once, as in any Krylov method, save where the chain has exhausted its invariant subspace
    and goes on from a fresh vector.

    Args:
        operator: as for `lanczos`.
        largest: how many from the top.
        smallest: how many from the bottom; together at most n.
        tol: relative to the spectrum's radius; not below what the dtype can resolve.
        max_steps: gives up here, with ``converged`` False: the bounds still hold.
        start: (n,); Gaussian by default.
        vectors: give the eigenvectors too.
        generator: as for `lanczos`.

    Returns:
        An `Extremes`.

    Raises:
        ValueError: as for `lanczos`; or ``largest`` or ``smallest`` is negative, both are 0, or together they exceed n or
            ``max_steps``.

    Example:
        >>> import torch
        >>> found = extreme_eigenvalues(torch.diag(torch.linspace(-1, 9, 101).double()), largest=2, tol=1e-9)
        >>> found.largest.round(decimals=6).tolist(), found.smallest.round(decimals=6).tolist(), found.converged
        ([9.0, 8.9], [-1.0], True)
    """
    n = _size(operator)
    wanted = largest + smallest
    if min(largest, smallest) < 0 or wanted < 1:
        raise ValueError(f"'largest' and 'smallest' must not be negative or both 0; they are {largest} and {smallest}")
    if wanted > min(n, max_steps):
        raise ValueError(f"'largest' + 'smallest' is {wanted}; at most n = {n} and 'max_steps' = {max_steps} can be found")
    if start is not None and start.dim() != 1:
        raise ValueError(f"'start' must be one vector ({n},), not of shape {tuple(start.shape)}")
    chain = _Chain(operator, min(max_steps, n), start, generator, room=32)
    check_at = wanted
    while True:
        while chain.made < min(check_at, chain.capacity):
            chain.extend()
        found = _first(chain.tridiagonal(False))
        values, _, bounds = found.ritz()
        m = len(values)
        picks = [*range(m - 1, m - 1 - largest, -1), *range(smallest)]
        floor = 4 * torch.finfo(operator.dtype).eps
        allowed = max(tol, floor) * float(values.abs().max())
        # An invariant subspace bounds its own Ritz values by 0, but what lies outside it must be looked at too.
        looked = chain.spent_at is None or chain.made >= chain.spent_at + wanted
        converged = chain.made == n or (looked and bool((bounds[picks] <= allowed).all()))
        if converged or chain.made == chain.capacity:
            break
        check_at = chain.made + max(1, chain.made // 5)  # solving T costs m³: not at every step
    top, bottom = picks[:largest], picks[largest:]
    basis = _first(chain.tridiagonal(True)).ritz_vectors() if vectors else None
    return Extremes(
        largest=values[top],
        largest_bounds=bounds[top],
        smallest=values[bottom],
        smallest_bounds=bounds[bottom],
        steps=chain.made,
        converged=converged,
        largest_vectors=None if basis is None else basis[:, top],
        smallest_vectors=None if basis is None else basis[:, bottom],
    )


class _Chain:
    """k Lanczos chains side by side, extended one step at a time."""

    def __init__(
        self,
        operator: SymmetricOperator,
        capacity: int,
        start: Tensor | None,
        generator: torch.Generator | None,
        room: int | None = None,
    ) -> None:
        self.operator, self.capacity, self.generator = operator, capacity, generator
        room = capacity if room is None else min(room, capacity)
        self.n = operator.shape[0]
        half = operator.dtype in (torch.float16, torch.bfloat16)
        self.dtype = torch.float32 if half else operator.dtype
        vectors = self._draw(1) if start is None else self._checked(start)
        self.k = vectors.shape[1]
        norms = vectors.norm(dim=0)
        if not bool(norms.isfinite().all() and (norms > 0).all()):
            raise ValueError("'start' must be finite and not zero")
        # Basis vectors are rows, so that each projection is one batched product over contiguous memory.
        self.basis = torch.empty(self.k, room + 1, self.n, dtype=self.dtype, device=operator.device)
        self.basis[:, 0] = (vectors / norms).T
        self.coefficients = torch.zeros(2, self.k, capacity, dtype=self.dtype, device=operator.device)
        self.scale = torch.zeros(self.k, dtype=self.dtype, device=operator.device)
        self.made = 0
        self.spent_at: int | None = None  # steps after which a chain first spanned an invariant subspace

    def extend(self) -> None:
        """One product and one more row and column of T."""
        j = self.made
        if j + 1 == self.basis.shape[1] <= self.capacity:
            more = min(j // 2 + 1, self.capacity + 1 - self.basis.shape[1])
            self.basis = torch.cat([self.basis, self.basis.new_empty(self.k, more, self.n)], dim=1)
        done = self.basis[:, : j + 1]
        q = self.basis[:, j].to(self.operator.dtype)
        # One vector goes as a vector: a matrix of one column would cost a batched backward pass.
        product = (self.operator @ q[0]).unsqueeze(0) if self.k == 1 else (self.operator @ q.T).T
        w = product.detach().to(self.dtype).contiguous()
        alpha = (w * self.basis[:, j]).sum(1)
        for _ in range(2):
            w = self._deflate(done, w)
        beta = w.norm(dim=1)
        if not bool((alpha.isfinite() & beta.isfinite()).all()):
            raise ValueError(f"'operator' gave a product that is not finite at Lanczos step {j + 1}")
        # The largest entry of T so far is within a factor 3 of its norm: what is far below it is rounding. What slips through
        # does no harm: projected twice, it is one more random direction, with a tiny β.
        self.scale = torch.maximum(self.scale, torch.maximum(alpha.abs(), beta))
        spent = beta <= 100 * torch.finfo(self.dtype).eps * self.scale
        if j + 1 == self.n:
            spent = torch.ones_like(spent)  # nothing is left outside the basis
        beta = beta.masked_fill(spent, 0.0)
        self.coefficients[0, :, j], self.coefficients[1, :, j] = alpha, beta
        self.made += 1
        if self.made == self.n:
            return
        if bool(spent.any()):
            self.spent_at = self.spent_at or self.made
            fresh = self._draw(self.k).T
            for _ in range(3):
                fresh = self._deflate(done, fresh)
                fresh = fresh / fresh.norm(dim=1, keepdim=True)
            w = torch.where(spent[:, None], fresh, w)
        self.basis[:, j + 1] = w / torch.where(spent, torch.ones_like(beta), beta)[:, None]

    def tridiagonal(self, keep_basis: bool) -> Tridiagonal:
        diagonal, off_diagonal = self.coefficients[:, :, : self.made].to("cpu", torch.float64)
        basis = self.basis[:, : self.made].mT if keep_basis else None
        return Tridiagonal(diagonal, off_diagonal[:, :-1], off_diagonal[:, -1], basis)

    def _deflate(self, basis: Tensor, w: Tensor) -> Tensor:
        """Each chain's w less its part in the span of the chain's basis."""
        if self.k == 1:  # a batch of one is slower than none
            return torch.addmv(w[0], basis[0].T, basis[0] @ w[0], alpha=-1).unsqueeze(0)
        w = w.unsqueeze(2)
        return torch.baddbmm(w, basis.mT, torch.bmm(basis, w), alpha=-1).squeeze(2)

    def _draw(self, k: int) -> Tensor:
        return torch.randn(self.n, k, dtype=self.dtype, device=self.operator.device, generator=self.generator)

    def _checked(self, start: Tensor) -> Tensor:
        if start.dim() not in (1, 2) or start.shape[0] != self.n or not start.numel():
            raise ValueError(f"'start' must be ({self.n},) or ({self.n}, k), not {tuple(start.shape)}")
        if start.is_complex():
            raise ValueError(f"'start' must be real, not {start.dtype}")
        vectors = start.detach().to(device=self.operator.device, dtype=self.dtype)
        return vectors.unsqueeze(1) if vectors.dim() == 1 else vectors


def _first(result: Tridiagonal) -> Tridiagonal:
    basis = None if result.basis is None else result.basis[0]
    return Tridiagonal(result.diagonal[0], result.off_diagonal[0], result.remainder[0], basis)


def _size(operator: SymmetricOperator) -> int:
    shape = tuple(operator.shape)
    if len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
        raise ValueError(f"'operator' must be square and not empty, not of shape {shape}")
    if not operator.dtype.is_floating_point:
        raise ValueError(f"'operator' must be real and floating, not {operator.dtype}")
    return int(shape[0])

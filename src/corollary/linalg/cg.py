"""Conjugate gradients for shifted symmetric systems that are known by their products alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from corollary.linalg.curvature import SymmetricOperator


@dataclass(frozen=True)
class CGResult:
    """What `conjugate_gradient` found.

    Args:
        solution: x, of the right-hand side's shape.
        residual: ‖b - (A + σI) x‖ of each column as the recurrence knows it: a scalar tensor, or (k,).
        iterations: products with A that were made.
        converged: whether every column reached its tolerance.
        negative_curvature: whether some direction p had pᵀ(A + σI)p ≤ 0; its column stopped before that step.
    """

    solution: Tensor
    residual: Tensor
    iterations: int
    converged: bool
    negative_curvature: bool


def conjugate_gradient(
    operator: SymmetricOperator,
    rhs: Tensor,
    *,
    shift: float = 0.0,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    x0: Tensor | None = None,
    rtol: float = 1e-6,
    atol: float = 0.0,
    max_iter: int | None = None,
) -> CGResult:
    r"""Solve (A + σI) x = b for a symmetric A, all columns of b at once.

    Each iteration costs one product with A and keeps four vectors a column. In exact arithmetic n iterations suffice, and
    after k of them the error in the norm of A + σI is at most :math:`2 ((\sqrt κ - 1) / (\sqrt κ + 1))^k` of the first.
    A column that met direction p with pᵀ(A + σI)p ≤ 0 stops there with the best it had; so does one that has converged.

    Args:
        operator: A (n, n): a square tensor, or anything with ``shape``, ``dtype``, ``device`` and ``@``.
        rhs: b, (n,) or (n, k); the solve runs in its dtype.
        shift: σ.
        preconditioner: gives an approximation of (A + σI)⁻¹ times (n,) or (n, k); symmetric positive definite.
        x0: where to start, of ``rhs``'s shape; zero by default.
        rtol, atol: a column has converged at a residual of at most max(rtol ‖b‖, atol).
        max_iter: most iterations; 10 n by default.

    Returns:
        A `CGResult`.

    Raises:
        ValueError: the operator is not square, shapes disagree, a tolerance is negative, or ``max_iter`` is below 1.
        TypeError: ``rhs`` is not floating point.

    When not to use it: where A is small and dense (``torch.linalg.solve``), or not symmetric.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> result = conjugate_gradient(matrix, torch.tensor([1.0, 2.0]))
        >>> result.solution, result.iterations
        (tensor([0.0909, 0.6364]), 2)

    Reference:
        Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems", 1952.
    """
    shape = tuple(operator.shape)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"'operator' must be square, not of shape {shape}")
    n = shape[0]
    if rhs.dim() not in (1, 2) or rhs.shape[0] != n:
        raise ValueError(f"'rhs' must be ({n},) or ({n}, k), not {tuple(rhs.shape)}")
    if not rhs.is_floating_point():
        raise TypeError(f"'rhs' must be floating point, not {rhs.dtype}")
    if x0 is not None and x0.shape != rhs.shape:
        raise ValueError(f"'x0' has shape {tuple(x0.shape)}; 'rhs' has {tuple(rhs.shape)}")
    if not (rtol >= 0 and atol >= 0):
        raise ValueError(f"'rtol' and 'atol' must be at least 0, not {rtol} and {atol}")
    if max_iter is not None and max_iter < 1:
        raise ValueError(f"'max_iter' must be at least 1, not {max_iter}")

    def apply(vectors: Tensor) -> Tensor:
        return (operator @ vectors).to(rhs.dtype) + shift * vectors

    def dot(left: Tensor, right: Tensor) -> Tensor:
        return (left * right).sum(0)

    def over(top: Tensor, bottom: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, top / torch.where(where, bottom, 1.0), 0.0)

    x = torch.zeros_like(rhs) if x0 is None else x0.to(rhs.dtype, copy=True)
    r = rhs.clone() if x0 is None else rhs - apply(x)
    z = r if preconditioner is None else preconditioner(r)
    p, rz = z.clone(), dot(r, z)
    goal = torch.linalg.vector_norm(rhs, dim=0).mul(rtol).clamp_min(atol)
    residual = torch.linalg.vector_norm(r, dim=0)
    active = residual > goal
    negative = torch.zeros_like(active)
    iterations = 0
    while iterations < (10 * n if max_iter is None else max_iter) and bool(active.any()):
        product = apply(p)
        iterations += 1
        curvature = dot(p, product)
        negative |= active & ~(curvature > 0)  # a NaN stops here too, instead of spreading
        active &= curvature > 0
        alpha = over(rz, curvature, active)
        x += alpha * p
        r = r - alpha * product
        z = r if preconditioner is None else preconditioner(r)
        before, rz = rz, dot(r, z)
        p = z + over(rz, before, active & (before != 0)) * p
        residual = torch.linalg.vector_norm(r, dim=0)
        active = active & (residual > goal)
    return CGResult(x, residual, iterations, bool((residual <= goal).all()), bool(negative.any()))

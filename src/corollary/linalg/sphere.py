"""Real spherical harmonics: values on directions, and the θ-factors that the transforms are built from.

The convention is e3nn's, so that coefficients pass between the two without change of order or sign: a vector is ``(x, y, z)``,
the polar axis is y, the azimuth runs from z to x, and degree l holds its 2l+1 components from m = -l to l,

    Y_lm = Θ_l|m|(θ) · (√2 sin|m|φ, 1, √2 cos mφ)   for m < 0, m = 0, m > 0,

without the Condon-Shortley sign and orthonormal on the sphere (e3nn's ``normalization="integral"``).
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def theta_factors(lmax: int, theta: Array) -> Array:
    """Θ_lm at angles from the polar axis, as an array ``(m, l, angle)`` with m and l from 0 to ``lmax``; zero where l < m.

    Orthonormal: 2π ∫ Θ_lm Θ_l'm sin θ dθ = δ_ll'. The three-term recurrence in l is stable and holds well past l = 1000.

    Example:
        >>> bool(np.allclose(theta_factors(1, np.array([0.3]))[:, :, 0], np.sqrt(3 / (4 * np.pi)) * np.array(
        ...     [[3**-0.5, np.cos(0.3)], [0, np.sin(0.3) / 2**0.5]])))
        True
    """
    cos, sin = np.cos(theta), np.sin(theta)
    out = np.zeros((lmax + 1, lmax + 1, len(theta)))
    top, down, lower = _recurrence(lmax)
    for m in range(lmax + 1):
        out[m, m] = top[m] * sin**m
        for degree in range(m + 1, lmax + 1):
            before = out[m, degree - 2] if degree >= 2 else 0.0
            out[m, degree] = down[degree, m] * (cos * out[m, degree - 1] - lower[degree, m] * before)
    out[np.abs(out) < 1e-100] = 0  # nothing to any sum, but products of such numbers are subnormal, which is slow
    return out


@lru_cache(maxsize=16)
def _recurrence(lmax: int) -> tuple[Array, Array, Array]:
    """Constants of the recurrence: Θ_mm / sin^m θ, and the two factors that lead from degrees l-1 and l-2 to l."""
    m = np.arange(1, lmax + 1)
    top = np.sqrt(np.cumprod(np.concatenate([[1.0], (2 * m + 1) / (2 * m)])) / (4 * np.pi))
    degree, order = np.meshgrid(np.arange(lmax + 1.0), np.arange(lmax + 1.0), indexing="ij")
    inside = degree > order
    down = np.sqrt(np.where(inside, 4 * degree**2 - 1, 0) / np.where(inside, degree**2 - order**2, 1))
    lower = np.sqrt(np.maximum((degree - 1) ** 2 - order**2, 0) / np.maximum(4 * (degree - 1) ** 2 - 1, 1))
    return top, down, lower


def spherical_harmonics(lmax: int, vectors: Tensor) -> Tensor:
    """Real orthonormal spherical harmonics of degrees 0 to ``lmax`` in the directions of vectors.

    Args:
        lmax: largest degree.
        vectors: floating tensor ``(..., 3)`` of any lengths. A zero vector has no direction: all its degrees above 0 are zero,
            which is the only equivariant choice, and its gradient is zero.

    Returns:
        Tensor ``(..., (lmax + 1)**2)`` in the order of the module, differentiable in every direction, the poles included.

    Example:
        >>> spherical_harmonics(1, torch.tensor([0.0, 2.0, 0.0])) * (4 * torch.pi) ** 0.5
        tensor([1.0000, 0.0000, 1.7321, 0.0000])
    """
    if not vectors.is_floating_point() or vectors.shape[-1:] != (3,):
        raise ValueError(f"vectors must be floating of shape (..., 3), not {vectors.dtype} of shape {tuple(vectors.shape)}")
    if lmax < 0:
        raise ValueError(f"lmax must be at least 0, not {lmax}")
    tables = harmonic_tables(lmax)
    return harmonics(vectors, *(t.to(vectors.device, vectors.dtype if t.is_floating_point() else t.dtype) for t in tables))


def harmonic_tables(lmax: int) -> tuple[Tensor, ...]:
    """Constants of `harmonics`, float64: the recurrence's factors (l, m), and which row and which order each component takes."""
    top, down, lower = _recurrence(lmax)
    degree = np.repeat(np.arange(lmax + 1), 2 * np.arange(lmax + 1) + 1)
    order = np.arange(len(degree)) - degree**2 - degree
    tables = down, -down * lower, np.diag(top), degree * (lmax + 1) + np.abs(order), order + lmax
    return tuple(torch.from_numpy(table) for table in tables)


def harmonics(vectors: Tensor, rise: Tensor, fall: Tensor, start: Tensor, row: Tensor, order: Tensor) -> Tensor:
    """`spherical_harmonics` with the constants given, for modules that keep them as buffers.

    Θ_lm = sin^m θ · Q_lm(cos θ), where Q follows the recurrence of `theta_factors` for all m at once, and sin^m θ (cos mφ, sin mφ)
    are the real and imaginary parts of (z + ix)^m. Everything is a polynomial of x, y, z: nothing is singular at the poles.
    """
    lmax, lead = len(start) - 1, vectors.shape[:-1]
    length = vectors.norm(dim=-1, keepdim=True)
    unit = torch.where(length == 0, 0, vectors / torch.where(length == 0, 1, length))
    # Directions lie along the last axis from here on: picking components is then picking whole rows, both ways.
    x, y, z = unit.reshape(math.prod(lead), 3).mT.contiguous()
    cos, sin = [torch.ones_like(x)], [torch.zeros_like(x)]
    for _ in range(lmax):
        cos, sin = [*cos, z * cos[-1] - x * sin[-1]], [*sin, z * sin[-1] + x * cos[-1]]
    azimuth = torch.stack([2**0.5 * s for s in sin[:0:-1]] + cos[:1] + [2**0.5 * c for c in cos[1:]])
    rows = [start[0][:, None].expand(lmax + 1, len(x))]
    for degree in range(1, lmax + 1):
        last = torch.addcmul(start[degree][:, None], rise[degree][:, None] * y, rows[-1])
        rows.append(torch.addcmul(last, fall[degree][:, None], rows[-2]) if degree > 1 else last)
    values = torch.cat(rows).index_select(0, row) * azimuth.index_select(0, order)
    # A zero vector's even degrees are not zero by themselves. NaN stays NaN.
    return torch.where((length == 0) & (row > 0), 0, values.mT.reshape(*lead, len(row)))


def wigner_3j(l1: int, l2: int, l3: int, m1: int, m2: int, m3: int) -> float:
    """Wigner's 3j symbol of integers by Racah's formula, in exact rational arithmetic up to one last square root.

    Example:
        >>> wigner_3j(1, 1, 2, 0, 0, 0) == (2 / 15) ** 0.5
        True
    """
    if m1 + m2 + m3 or not abs(l1 - l2) <= l3 <= l1 + l2 or abs(m1) > l1 or abs(m2) > l2 or abs(m3) > l3:
        return 0.0
    f = math.factorial
    shifts = (0, l2 - l3 - m1, l1 - l3 + m2), (l1 + l2 - l3, l1 - m1, l2 + m2)
    total = sum(
        Fraction((-1) ** k, math.prod(f(k - low) for low in shifts[0]) * math.prod(f(high - k) for high in shifts[1]))
        for k in range(max(shifts[0]), min(shifts[1]) + 1)
    )
    triangle = Fraction(f(l1 + l2 - l3) * f(l1 - l2 + l3) * f(-l1 + l2 + l3), f(l1 + l2 + l3 + 1))
    squared = triangle * math.prod(f(n + m) * f(n - m) for n, m in ((l1, m1), (l2, m2), (l3, m3))) * total**2
    return math.sqrt(squared) if (total > 0) == ((l1 - l2 - m3) % 2 == 0) else -math.sqrt(squared)


def gaunt_coefficients(lmax1: int, lmax2: int, lmax3: int) -> Tensor:
    """∫ Y_a Y_b Y_c over the sphere for all real harmonics of degrees up to the three limits, from Wigner 3j symbols.

    The complex integrals are √((2l₁+1)(2l₂+1)(2l₃+1)/4π) · (l₁ l₂ l₃; 0 0 0) · (l₁ l₂ l₃; m₁ m₂ m₃); a unitary change of basis
    makes them real. Exact to rounding and slow: O(L⁵) symbols of exact integers, a second at L = 6. For reference values.

    Returns:
        Float64 tensor ``((lmax1 + 1)**2, (lmax2 + 1)**2, (lmax3 + 1)**2)``.

    Example:
        >>> pairs = gaunt_coefficients(1, 1, 0)[1:, 1:, 0]                    # ∫ Y_1m Y_1m' Y_00
        >>> torch.allclose(pairs, torch.eye(3, dtype=torch.float64) / (4 * torch.pi) ** 0.5)
        True
    """
    out = np.zeros(((lmax1 + 1) ** 2, (lmax2 + 1) ** 2, (lmax3 + 1) ** 2))
    for l1 in range(lmax1 + 1):
        for l2 in range(lmax2 + 1):
            # The symbol with zero orders vanishes unless l1 + l2 + l3 is even, hence the step of 2.
            for l3 in range(abs(l1 - l2), min(l1 + l2, lmax3) + 1, 2):
                scale = math.sqrt((2 * l1 + 1) * (2 * l2 + 1) * (2 * l3 + 1) / (4 * math.pi)) * wigner_3j(l1, l2, l3, 0, 0, 0)
                block = np.zeros((2 * l1 + 1, 2 * l2 + 1, 2 * l3 + 1))
                for m1 in range(-l1, l1 + 1):
                    for m2 in range(max(-l2, -l3 - m1), min(l2, l3 - m1) + 1):
                        block[m1 + l1, m2 + l2, l3 - m1 - m2] = scale * wigner_3j(l1, l2, l3, m1, m2, -m1 - m2)
                real = np.einsum("abc,xa,yb,zc->xyz", block, _to_real(l1), _to_real(l2), _to_real(l3), optimize=True).real
                out[l1**2 : (l1 + 1) ** 2, l2**2 : (l2 + 1) ** 2, l3**2 : (l3 + 1) ** 2] = real
    return torch.from_numpy(out)


def _to_real(degree: int) -> npt.NDArray[np.complex128]:
    """Unitary matrix from complex harmonics (with the Condon-Shortley sign) to real ones (without)."""
    matrix = np.zeros((2 * degree + 1, 2 * degree + 1), dtype=np.complex128)
    matrix[degree, degree] = 1
    for m in range(1, degree + 1):
        sign = (-1) ** m
        matrix[degree + m, [degree + m, degree - m]] = np.array([sign, 1]) / math.sqrt(2)
        matrix[degree - m, [degree + m, degree - m]] = np.array([-1j * sign, 1j]) / math.sqrt(2)
    return matrix

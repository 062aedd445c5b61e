"""Products of functions on the sphere by way of the 2D Fourier basis: what the Gaunt operations share.

A spherical harmonic is Θ_lm(θ) times a cosine or sine of mφ, and Θ_lm is a cosine series of θ for even m and a sine series for
odd m. So a function of degree L has a 2D Fourier series with |u|, |v| <= L on the torus [0, 2π)², where coefficient (u, v)
takes part only in components of order ±v. A product of functions convolves the series; by the convolution theorem that is a
pointwise product on a torus grid fine enough for the sum of the degrees. The ways there and back differ in cost per function:

``fft``        conversion for each m, then a real 2D FFT of the torus, as in the paper             O(L³) + O(L² log L)
``separable``  conversion for each m fused with the θ-transform on the half torus 0 < θ < π, whose   O(L³)
               mirror image repeats it, then a small real Fourier matrix in φ
``dense``      all of that fused into one matrix                                                      O(L⁴)

At small L the constants decide: one dense matrix beats three small steps up to about L = 6, and a real Fourier matrix beats the
FFT at every L tried on CPU. That a plain grid simplifies the method was also found by Xie et al., arXiv:2506.13523.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from corollary.linalg.sphere import Array, Integers, theta_factors

METHODS = ("auto", "dense", "separable", "fft")
# Below this sum of input degrees one dense matrix to the grid beats the separable steps; measured on CPU, forward and backward.
_DENSE_UP_TO = 12


def degrees(lmax: int) -> Integers:
    """Degree of each of the ``(lmax + 1)**2`` components, in order."""
    return np.repeat(np.arange(lmax + 1), 2 * np.arange(lmax + 1) + 1)


def _orders(lmax: int) -> Integers:
    return np.concatenate([np.arange(-degree, degree + 1) for degree in range(lmax + 1)])


def _azimuth(lmax: int, points: int) -> Array:
    """(√2 sin|m|φ, 1, √2 cos mφ) on equispaced azimuths, as (point, m from -lmax to lmax)."""
    m, phi = np.arange(-lmax, lmax + 1), 2 * np.pi * np.arange(points)[:, None] / points
    return np.where(m < 0, 2**0.5 * np.sin(-m * phi), np.where(m > 0, 2**0.5 * np.cos(m * phi), 1.0))


def _to_fourier(band: int, nodes: int) -> tuple[Array, Array]:
    """Matrices (u, node) from values at θ_j = (j + 1/2)π / nodes to the coefficients of cos uθ and of sin uθ, u = 0..band."""
    u, theta = np.arange(band + 1)[:, None], (np.arange(nodes) + 0.5) * np.pi / nodes
    return np.where(u > 0, 2, 1) * np.cos(u * theta) / nodes, 2 * np.sin(u * theta) / nodes


def _moments(lmax: int, band: int) -> tuple[Array, Array]:
    """∫ Θ_lm(θ) (cos uθ, sin uθ) sin θ dθ over [0, π] as arrays (m, l, u), meant for even m and odd m in turn.

    For even m the cosine, for odd m the sine makes the integrand a polynomial of cos θ, so Gauss-Legendre is exact.
    """
    nodes, weights = np.polynomial.legendre.leggauss((band + lmax) // 2 + 1)
    theta = np.arccos(nodes)
    values, angle = theta_factors(lmax, theta) * weights, theta[:, None] * np.arange(band + 1)
    return values @ np.cos(angle), values @ np.sin(angle)


def _by_parity(even: Array, odd: Array) -> Array:
    """Rows of ``even`` for even m and of ``odd`` for odd m, where m is the first axis."""
    return np.where((np.arange(len(even)) % 2 == 0)[:, None, None], even, odd)


def _spectrum_rows(lmax: int) -> tuple[Integers, Array]:
    """Signed order m and sign of each row of a half spectrum: the real parts of v = 0..lmax, then the imaginary parts.

    √2(a cos vφ + b sin vφ) has the coefficient (a - ib)/√2 at e^{ivφ}. The θ-factors of odd v are sine series, whose
    coefficients at e^{iuθ} carry one more factor -i; so real and imaginary parts trade places there.
    """
    v = np.arange(lmax + 1)
    even = v % 2 == 0
    order = np.concatenate([np.where(even, v, -v), np.where(even, -v, v)])
    sign = np.concatenate([np.where(even, 1.0, -1.0), np.where(v > 0, -1.0, 0.0)])
    return order, sign


def _gather_in(lmax: int, order: Integers) -> Integers:
    """Component of (row of order m, degree l); where l < |m| any component of that row, because the tables are zero there."""
    degree = np.maximum(np.arange(lmax + 1), np.abs(order)[:, None])
    return (degree**2 + degree + order[:, None]).reshape(-1)


def _gather_out(lmax: int, order: Integers) -> Integers:
    """Position in (row, degree) of each component."""
    row = {int(m): i for i, m in reversed(list(enumerate(order)))}
    return np.array([row[int(m)] for m in _orders(lmax)]) * (lmax + 1) + degrees(lmax)


@lru_cache(maxsize=32)
def _synthesis(lmax: int, band: int, azimuths: int, method: str) -> dict[str, Tensor]:
    """Float64 tables from coefficients to values on the grid (``fft``: to the 2D Fourier half spectrum)."""
    if method == "fft":
        cos, sin = _to_fourier(lmax, lmax + 1)
        theta = (np.arange(lmax + 1) + 0.5) * np.pi / (lmax + 1)
        values = theta_factors(lmax, theta)
        half = _by_parity(values @ cos.T, values @ sin.T) / 2  # (m, l, u >= 0), coefficients at e^{iuθ} and ± at e^{-iuθ}
        table = np.zeros((lmax + 1, lmax + 1, 2 * band + 1))
        table[..., : lmax + 1] = half
        table[..., 0] *= 2
        if lmax:
            table[..., -lmax:] = (np.where(np.arange(lmax + 1) % 2 == 0, 1, -1)[:, None, None] * half)[..., :0:-1]
        order, sign = _spectrum_rows(lmax)
        scale = sign * np.where(order == 0, 1, 0.5**0.5)
        return _pack(rows=(scale[:, None, None] * table[np.abs(order)]).swapaxes(1, 2), gather=_gather_in(lmax, order))
    values = theta_factors(lmax, (np.arange(band + 1) + 0.5) * np.pi / (band + 1))
    azimuth = _azimuth(lmax, azimuths)
    if method == "dense":
        m, degree = _orders(lmax), degrees(lmax)
        return _pack(matrix=(azimuth.T[m + lmax][:, :, None] * values[np.abs(m), degree][:, None, :]).reshape(len(m), -1))
    order = np.arange(-lmax, lmax + 1)
    return _pack(rows=values[np.abs(order)].swapaxes(1, 2), azimuth=azimuth, gather=_gather_in(lmax, order))


@lru_cache(maxsize=32)
def _analysis(lmax: int, band: int, azimuths: int, method: str) -> dict[str, Tensor]:
    """Float64 tables from values on the grid (``fft``: the half spectrum) to coefficients."""
    even, odd = _moments(lmax, band)
    if method == "fft":
        order, sign = _spectrum_rows(lmax)
        mirror = np.where(np.arange(lmax + 1) % 2 == 0, 1, -1)[:, None, None]
        one = _by_parity(even, odd)
        both = np.concatenate([one, (mirror * one)[..., :0:-1]], -1)
        scale = 2 * np.pi * sign * np.where(order == 0, 1, 2**0.5)
        return _pack(rows=scale[:, None, None] * both[np.abs(order)], gather=_gather_out(lmax, order))
    cos, sin = _to_fourier(band, band + 1)
    values = 2 * np.pi / azimuths * _by_parity(even @ cos, odd @ sin)
    azimuth = _azimuth(lmax, azimuths)
    if method == "dense":
        m, degree = _orders(lmax), degrees(lmax)
        matrix = azimuth[:, None, m + lmax] * values[np.abs(m), degree].T[None]
        return _pack(matrix=matrix.reshape(-1, len(m)))
    order = np.arange(-lmax, lmax + 1)
    return _pack(rows=values[np.abs(order)], azimuth=azimuth.T, gather=_gather_out(lmax, order))


def _pack(**tables: Array | Integers) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(table)) for name, table in tables.items()}


class SphereProduct(nn.Module):
    """Base of the three operations: coefficients to a torus grid, a pointwise product there, and back."""

    def __init__(
        self,
        lmaxs: tuple[int, ...],
        lmax_out: int | None,
        channels: int | None,
        method: str,
        bandlimit: int | None,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        total = sum(lmaxs)
        for name, value, least in (
            *(("lmax", lmax, 0) for lmax in lmaxs),
            ("channels", 1 if channels is None else channels, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
        lmax_out = total if lmax_out is None else lmax_out
        if not 0 <= lmax_out <= total:
            raise ValueError(f"lmax_out must lie between 0 and {total}, the sum of the inputs' degrees; it is {lmax_out}")
        if method not in METHODS:
            raise ValueError(f"method is '{method}'; allowed: {', '.join(METHODS)}")
        self.lmax_out, self.channels = lmax_out, channels
        self.method = method if method != "auto" else ("dense" if total <= _DENSE_UP_TO else "separable")
        self.band = total if bandlimit is None else bandlimit
        if self.band < (least := max(*lmaxs, lmax_out)):
            raise ValueError(f"bandlimit must be at least {least}, the largest degree going in or out, not {bandlimit}")
        # Orders up to `band` occur in the product and those up to `lmax_out` are read: the rest may fold onto one another.
        self.azimuths = self.band + lmax_out + 1
        self.polar = 2 * self.band + 1 if self.method == "fft" else self.band + 1
        self.lmaxs = lmaxs
        self._inputs = sorted(set(lmaxs))
        factory = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        for name, table in self._tables().items():
            self.register_buffer(name, self._cast(table, **factory), persistent=False)

    def _tables(self) -> dict[str, Tensor]:
        tables = {f"out_{name}": t for name, t in _analysis(self.lmax_out, self.band, self.azimuths, self.method).items()}
        for lmax in self._inputs:
            found = _synthesis(lmax, self.band, self.azimuths, self.method)
            tables |= {f"in{lmax}_{name}": t for name, t in found.items()}
        for lmax in {*self._inputs, self.lmax_out}:
            tables[f"degree{lmax}"] = torch.from_numpy(degrees(lmax))
        return tables

    def _table(self, name: str) -> Tensor:
        table: Tensor = getattr(self, name)
        return table

    @staticmethod
    def _cast(table: Tensor, device: Any, dtype: torch.dtype) -> Tensor:
        return table.to(device, dtype if table.is_floating_point() else table.dtype, copy=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SphereProduct:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Tables are made anew from float64 in the new dtype, so .to(float32).to(float64) does not keep the rounding.
        for name, table in self._tables().items():
            moved = getattr(self, name)
            dtype = moved.dtype if moved.is_floating_point() else torch.get_default_dtype()
            setattr(self, name, self._cast(table, moved.device, dtype))
        return self

    def _weight(self, lmax: int, *count: int, device: Any, dtype: torch.dtype | None) -> nn.Parameter:
        shape = (*count, *(() if self.channels is None else (self.channels,)), lmax + 1)
        return nn.Parameter(torch.ones(shape, device=device, dtype=dtype))

    def _per_degree(self, weight: Tensor, lmax: int) -> Tensor:
        return weight.index_select(-1, self._table(f"degree{lmax}"))

    def _check(self, name: str, value: Tensor, lmax: int) -> None:
        dtype = self._table("out_matrix" if self.method == "dense" else "out_rows").dtype
        if value.dtype != dtype:
            raise TypeError(f"{name} is {value.dtype}, but the module is {dtype}; call .to({value.dtype}) on one of them")
        if self.method == "fft" and dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} is {dtype}; method 'fft' takes float32 and float64, the others take any floating dtype")
        wanted = (lmax + 1) ** 2
        if value.ndim == 0 or value.shape[-1] != wanted:
            raise ValueError(f"{name} must have shape (..., {wanted}) for lmax = {lmax}, not {tuple(value.shape)}")
        if self.channels is not None and (value.ndim < 2 or value.shape[-2] not in (1, self.channels)):
            raise ValueError(f"{name} must have shape (..., {self.channels}, {wanted}), not {tuple(value.shape)}")

    @staticmethod
    def _check_lead(**leads: torch.Size) -> None:
        """Leading axes must broadcast."""
        for sizes in zip_longest(*(lead[::-1] for lead in leads.values()), fillvalue=1):
            if len({size for size in sizes if size != 1}) > 1:
                shapes = ", ".join(f"{name} {tuple(lead)}" for name, lead in leads.items())
                raise ValueError(f"leading axes do not broadcast: {shapes}")

    def _to_grid(self, x: Tensor, lmax: int, ndim: int) -> Tensor:
        """Grid values of coefficients (*lead, K): (*lead, point) if dense, else (point, *lead) with lead of ndim axes."""
        if self.method == "dense":
            return x @ self._table(f"in{lmax}_matrix")
        lead = (1,) * (ndim - x.ndim + 1) + x.shape[:-1]
        rows, count = self._table(f"in{lmax}_rows"), math.prod(lead)
        x = x.reshape(count, x.shape[-1]).mT.index_select(0, self._table(f"in{lmax}_gather"))
        x = rows @ x.view(rows.shape[0], lmax + 1, count)
        if self.method == "fft":
            real, imag = x.view(2, lmax + 1, *x.shape[1:]).unbind()
            size = (self.polar, self.azimuths)
            grid: Tensor
            if count:
                grid = torch.fft.irfft2(torch.complex(real, imag), s=size, dim=(1, 0), norm="forward")
            else:  # MKL refuses an empty batch
                grid = real.sum((0, 1)).expand(self.azimuths, self.polar, 0)
        else:
            grid = self._table(f"in{lmax}_azimuth") @ x.view(2 * lmax + 1, self.polar * count)
        return grid.reshape(self.azimuths * self.polar, *lead)

    def _from_grid(self, grid: Tensor) -> Tensor:
        """Coefficients (*lead, K) of values on the grid."""
        if self.method == "dense":
            return grid @ self._table("out_matrix")
        lead, lmax = grid.shape[1:], self.lmax_out
        count = math.prod(lead)
        if self.method == "fft" and count:
            spectrum = torch.fft.rfft2(grid.reshape(self.azimuths, self.polar, count), dim=(1, 0), norm="forward")
            spectrum = spectrum[: lmax + 1]
            x = torch.cat([spectrum.real, spectrum.imag])
        elif self.method == "fft":
            x = grid.sum(0).reshape(0).expand(2 * (lmax + 1), self.polar, 0)
        else:
            x = self._table("out_azimuth") @ grid.reshape(self.azimuths, self.polar * count)
            x = x.view(2 * lmax + 1, self.polar, count)
        x = (self._table("out_rows") @ x).flatten(0, 1).index_select(0, self._table("out_gather"))
        return x.mT.contiguous().view(*lead, (lmax + 1) ** 2)

    def extra_repr(self) -> str:
        lmaxs = " x ".join(map(str, self.lmaxs))
        channels = "" if self.channels is None else f", channels={self.channels}"
        return f"lmax={lmaxs} -> {self.lmax_out}{channels}, method={self.method}"

"""exp as a polynomial whose value at q·k is a product of monomials of q and of k: degrees, weights, features, contractions."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.polynomial import chebyshev
from scipy.special import ive
from torch import Tensor

Array = np.ndarray[Any, np.dtype[np.float64]]

MAX_DEGREE = 60
_BUFFER = 1 << 19  # numbers of features held at a time: what stays in a core's cache, whatever the length


@lru_cache(maxsize=256)
def _series(bound: float) -> Array:
    """Chebyshev coefficients of exp on [-bound, bound], each times e^-bound, for degrees 0 to MAX_DEGREE + 30."""
    terms: Array = 2 * ive(np.arange(MAX_DEGREE + 31), bound)
    terms[0] /= 2
    return terms


def entry_error(bound: float, degree: int) -> float:
    """η with |f̃ - f| <= η f for every entry of the attention matrix, logits within ±bound; infinite where nothing is known."""
    # The dropped terms bound |p - exp|; relative to exp's least value e^-bound they are e^(2 bound) times the scaled ones.
    with np.errstate(over="ignore"):
        relative = float(_series(bound)[degree + 1 :].sum() * np.exp(2 * bound))
    return 2 * relative / (1 - relative) if relative < 1 else math.inf


def degree_for(bound: float, tolerance: float) -> int | None:
    return next((g for g in range(1, MAX_DEGREE + 1) if entry_error(bound, g) <= tolerance), None)


@lru_cache(maxsize=64)
def _multinomials(dim: int, degree: int) -> tuple[tuple[int, ...], Array]:
    """How many monomials each degree has, and n!/α! of each monomial in the order of `monomials`."""
    exponents = np.zeros((1, dim), dtype=np.int64)
    sizes, weights = [1], [np.ones(1)]
    factorials = np.array([math.factorial(n) for n in range(degree + 1)], dtype=np.float64)
    for n in range(1, degree + 1):
        levels = []
        for a in range(dim):
            level = exponents[: math.comb(a + n - 1, n - 1)].copy()
            level[:, a] += 1
            levels.append(level)
        exponents = np.concatenate(levels)
        sizes.append(len(exponents))
        weights.append(factorials[n] / factorials[exponents].prod(1))
    return tuple(sizes), np.concatenate(weights)


def monomial_weights(dim: int, degree: int, scale: float, bound: float) -> Array:
    """Weight of each monomial, so that Σ_α weight_α q^α k^α = p(scale q·k), p near e^-bound exp on [-bound, bound]."""
    sizes, multinomials = _multinomials(dim, degree)
    power = chebyshev.cheb2poly(_series(bound)[: degree + 1]) * (scale / bound) ** np.arange(degree + 1)
    weights: Array = np.repeat(power, sizes) * multinomials
    return weights


def monomials(x: Tensor, degree: int) -> Tensor:
    """All monomials of (N, d, C) up to a degree, (N, k, C): each degree is built from the one below, one coordinate at a time."""
    dim = x.shape[1]
    out = x.new_empty(x.shape[0], math.comb(dim + degree, degree), x.shape[2])
    out[:, 0] = 1
    start, position = 0, 1
    for n in range(1, degree + 1):
        below = start
        start = position
        for a in range(dim):
            # Those of the degree below that have no coordinate after a come first: multiplied by x_a, no monomial comes twice.
            count = math.comb(a + n - 1, n - 1)
            torch.mul(out[:, below : below + count], x[:, a : a + 1], out=out[:, position : position + count])
            position += count
    return out


def _chunks(x: Tensor, degree: int) -> range:
    features = x.shape[0] * math.comb(x.shape[1] + degree, degree)
    return range(0, x.shape[2], max(64, _BUFFER // features))


def contract(x: Tensor, y: Tensor, degree: int) -> Tensor:
    """Σ_l φ(x_l) ⊗ y_l, (N, k, channels of y): the sum over the sequence, made once."""
    steps = _chunks(x, degree)
    total = x.new_zeros(x.shape[0], math.comb(x.shape[1] + degree, degree), y.shape[1])
    for i in steps:
        total.baddbmm_(monomials(x[..., i : i + steps.step], degree), y[..., i : i + steps.step].mT)
    return total


def expand(x: Tensor, state: Tensor, degree: int, left: Tensor | None = None) -> Tensor:
    """φ(x_l)ᵀ state, (N, channels, L); with ``left`` its channels are (left, rest), and left_l is contracted with them."""
    steps = _chunks(x, degree)
    parts = []
    for i in steps:
        part = state.mT @ monomials(x[..., i : i + steps.step], degree)
        if left is not None:
            part = (part.reshape(len(x), left.shape[1], -1, part.shape[2]) * left[:, :, None, i : i + steps.step]).sum(1)
        parts.append(part)
    return torch.cat(parts, 2)

"""Gaunt tensor products: equivariant products, convolutions and many-body products through the 2D Fourier basis.

Luo, Chen, Krishnapriyan: Enabling Efficient Equivariant Operations in the Fourier Basis via Gaunt Tensor Products, ICLR 2024,
arXiv:2401.10216. Coefficients follow `corollary.linalg.sphere`, which is e3nn's order, axes and signs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from corollary.linalg.sphere import harmonic_tables, harmonics
from corollary.nn.torus import SphereProduct

HARMONICS = ("rise", "fall", "start", "row", "order")


class GauntTensorProduct(SphereProduct):
    r"""Product of two sets of irreps with Gaunt instead of Clebsch-Gordan coefficients.

    Two feature vectors are read as functions on the sphere, :math:`f = \sum_{lm} x_{lm} Y_{lm}`, multiplied, expanded again:

    .. math:: z_{lm} = w_l \sum_{l_1 m_1} \sum_{l_2 m_2} w_{l_1} x_{l_1 m_1}\, w_{l_2} y_{l_2 m_2}
              \int Y_{l_1 m_1} Y_{l_2 m_2} Y_{lm}\, dΩ

    It is equivariant under rotations, and under inversion where degree l has parity :math:`(-1)^l`. Instead of the
    :math:`O(L^6)` sum it takes the paper's road through the 2D Fourier basis in :math:`O(L^3)`; see `corollary.nn.torus`.

    Args:
        lmax1, lmax2: largest degrees of the inputs.
        lmax_out: largest degree of the output; default ``lmax1 + lmax2``, which loses nothing.
        channels: number of channels on the axis before the components; needed only for weights of their own per channel.
        weighted: whether to learn the factors :math:`w_{l_1}, w_{l_2}, w_l`, which start at 1.
        method: ``dense``, ``separable``, ``fft``, or ``auto``, which takes ``dense`` at small degrees and else ``separable``.
        bandlimit: largest degree that the grid resolves; default ``lmax1 + lmax2``, which makes the product exact. With less
            the product folds back (aliases): cheaper, and no longer equivariant.
        device, dtype: of the weights and tables.

    Shape:
        input1 ``(..., (lmax1 + 1)**2)`` and input2 ``(..., (lmax2 + 1)**2)``, whose leading axes broadcast, give
        ``(..., (lmax_out + 1)**2)``. With e3nn, multiplicities are blocks of the last axis: see `from_irreps`.

    Raises:
        ValueError: a wrong degree, method, channel count or last axis. TypeError: an input of another dtype than the module.

    The product is symmetric, so paths with odd :math:`l_1 + l_2 + l` (cross products, pseudotensors) do not occur, and all
    paths into one degree are summed: the output is :math:`O(L^2)` numbers, not :math:`O(L^4)`. Take e3nn's
    ``FullTensorProduct`` where each path by itself or the antisymmetric ones are needed; Xie et al. (arXiv:2506.13523) weigh
    this loss of expressivity against the speed.

    Example:
        >>> product = GauntTensorProduct(2, 2)
        >>> x, y = torch.randn(2, 10, 9)             # ten pairs of functions of degree up to 2
        >>> product(x, y).shape
        torch.Size([10, 25])
        >>> from corollary.linalg.sphere import spherical_harmonics
        >>> at = torch.randn(5, 3)                   # the product's values are the products of the values
        >>> f, g, fg = (coefficients @ spherical_harmonics(degree, at).mT
        ...             for coefficients, degree in ((x, 2), (y, 2), (product(x, y), 4)))
        >>> torch.allclose(f * g, fg, atol=1e-4)
        True

    Source: section 3.1, equation 4, and section 3.2.
    """

    def __init__(
        self,
        lmax1: int,
        lmax2: int,
        lmax_out: int | None = None,
        *,
        channels: int | None = None,
        weighted: bool = False,
        method: str = "auto",
        bandlimit: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((lmax1, lmax2), lmax_out, channels, method, bandlimit, device, dtype)
        self.lmax1, self.lmax2 = lmax1, lmax2
        factory = {"device": device, "dtype": dtype}
        self.weight1 = self._weight(lmax1, **factory) if weighted else None
        self.weight2 = self._weight(lmax2, **factory) if weighted else None
        self.weight_out = self._weight(self.lmax_out, **factory) if weighted else None

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """The product's coefficients ``(..., (lmax_out + 1)**2)``."""
        self._check("input1", input1, self.lmax1)
        self._check("input2", input2, self.lmax2)
        self._check_lead(input1=input1.shape[:-1], input2=input2.shape[:-1])
        if self.weight1 is not None and self.weight2 is not None:
            input1 = input1 * self._per_degree(self.weight1, self.lmax1)
            input2 = input2 * self._per_degree(self.weight2, self.lmax2)
        ndim = max(input1.ndim, input2.ndim) - 1
        out = self._from_grid(self._to_grid(input1, self.lmax1, ndim) * self._to_grid(input2, self.lmax2, ndim))
        return out if self.weight_out is None else out * self._per_degree(self.weight_out, self.lmax_out)


class GauntConvolution(SphereProduct):
    r"""Equivariant convolution's message: features times a spherical-harmonic filter of the edge's direction.

    .. math:: z = w \odot \big( (w' \odot x) \otimes_{Gaunt} (h \odot Y(\vec r / |\vec r|)) \big)

    where :math:`h` holds one radial weight for each degree of the filter, usually a small network of :math:`|\vec r|`, and
    :math:`w, w'` are the learnable factors per degree of `GauntTensorProduct`.

    Args:
        lmax_in: largest degree of the features.
        lmax_filter: largest degree of the filter.
        lmax_out: largest degree of the message; default ``lmax_in + lmax_filter``.
        channels: size of the features' axis before the components.
        weighted, method, bandlimit, device, dtype: as in `GauntTensorProduct`.

    Shape:
        features ``(..., channels, (lmax_in + 1)**2)``, vectors ``(..., 3)``, radial ``(..., channels or 1, lmax_filter + 1)``
        give ``(..., channels, (lmax_out + 1)**2)``.

    The filter depends on the direction alone; a zero vector keeps only its degree 0. Derivatives in ``vectors`` are exact in
    every direction. Deviation: eSCN's further saving, turning each edge onto an axis so that only m = 0 is left of the filter, is
    not taken. Rotating the features there and back costs :math:`O(L^3)` per channel as well, and the angles have no derivative
    at the poles; so the filter is taken to the grid as it is, once for all channels that share a radial weight.

    Example:
        >>> convolution = GauntConvolution(2, 3, 2, channels=8)
        >>> features, vectors = torch.randn(20, 8, 9), torch.randn(20, 3)      # twenty edges
        >>> convolution(features, vectors, torch.randn(20, 8, 4)).shape
        torch.Size([20, 8, 9])

    Source: section 3.3, equivariant convolutions.
    """

    def __init__(
        self,
        lmax_in: int,
        lmax_filter: int,
        lmax_out: int | None = None,
        *,
        channels: int,
        weighted: bool = False,
        method: str = "auto",
        bandlimit: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.lmax_filter = lmax_filter
        super().__init__((lmax_in, lmax_filter), lmax_out, channels, method, bandlimit, device, dtype)
        self.lmax_in = lmax_in
        self.weight_in = self._weight(lmax_in, device=device, dtype=dtype) if weighted else None
        self.weight_out = self._weight(self.lmax_out, device=device, dtype=dtype) if weighted else None

    def forward(self, features: Tensor, vectors: Tensor, radial: Tensor | None = None) -> Tensor:
        """Messages ``(..., channels, (lmax_out + 1)**2)``; without ``radial`` every degree of the filter has weight 1."""
        self._check("features", features, self.lmax_in)
        if vectors.dtype != features.dtype:
            raise TypeError(f"vectors is {vectors.dtype}, but features is {features.dtype}")
        if vectors.shape[-1:] != (3,):
            raise ValueError(f"vectors must have shape (..., 3), not {tuple(vectors.shape)}")
        if radial is not None:
            if radial.dtype != features.dtype:
                raise TypeError(f"radial is {radial.dtype}, but features is {features.dtype}")
            if radial.ndim < 2 or radial.shape[-1] != self.lmax_filter + 1 or radial.shape[-2] not in (1, self.channels):
                wanted = f"(..., {self.channels} or 1, {self.lmax_filter + 1})"
                raise ValueError(f"radial must have shape {wanted}, not {tuple(radial.shape)}")
        if self.weight_in is not None:
            features = features * self._per_degree(self.weight_in, self.lmax_in)
        self._check_lead(
            features=features.shape[:-2],
            vectors=vectors.shape[:-1],
            radial=torch.Size() if radial is None else radial.shape[:-2],
        )
        kernel = harmonics(vectors, *(self._table(f"harmonics_{name}") for name in HARMONICS)).unsqueeze(-2)
        if radial is not None:
            kernel = kernel * self._per_degree(radial, self.lmax_filter)
        ndim = max(features.ndim, kernel.ndim) - 1
        out = self._from_grid(self._to_grid(features, self.lmax_in, ndim) * self._to_grid(kernel, self.lmax_filter, ndim))
        return out if self.weight_out is None else out * self._per_degree(self.weight_out, self.lmax_out)

    def _tables(self) -> dict[str, Tensor]:
        tables = zip(HARMONICS, harmonic_tables(self.lmax_filter), strict=True)
        return super()._tables() | {f"harmonics_{name}": table for name, table in tables}


class GauntManyBody(SphereProduct):
    r"""Product of n sets of irreps, such as the n-body features of MACE: :math:`x_1 \otimes x_2 \otimes \dots \otimes x_n`.

    All factors are taken to one grid that resolves degree ``order * lmax``, multiplied there in pairs, pairs of pairs and so
    on, and taken back once. No intermediate product is expanded, so nothing is truncated on the way, and an order more costs
    one transform more.

    Args:
        lmax: largest degree of every factor.
        order: number of factors n, at least 1.
        lmax_out: largest degree of the output; default ``order * lmax``. A small one, as MACE wants, makes the grid smaller.
        channels, method, bandlimit, device, dtype: as in `GauntTensorProduct`.
        weighted: whether to learn weights per degree for each factor, ``(order, [channels,] lmax + 1)``, and for the output.

    Shape:
        ``order`` tensors ``(..., (lmax + 1)**2)``, or one that stands for all factors, give ``(..., (lmax_out + 1)**2)``.

    Deviation: the paper convolves the 2D Fourier series pairwise by divide and conquer, with a grid of its own for each pair;
    here the pairs are multiplied on the last, finest grid, which gives the same product.

    Example:
        >>> cube = GauntManyBody(2, 3, lmax_out=2)
        >>> x = torch.randn(10, 16, 9)
        >>> torch.allclose(cube(x), cube(x, x, x), atol=1e-5)
        True

    Source: section 3.3, equivariant many-body interactions.
    """

    def __init__(
        self,
        lmax: int,
        order: int,
        lmax_out: int | None = None,
        *,
        channels: int | None = None,
        weighted: bool = False,
        method: str = "auto",
        bandlimit: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(order, int) or order < 1:
            raise ValueError(f"order must be an integer of at least 1, not {order!r}")
        super().__init__((lmax,) * order, lmax_out, channels, method, bandlimit, device, dtype)
        self.lmax, self.order = lmax, order
        self.weight = self._weight(lmax, order, device=device, dtype=dtype) if weighted else None
        self.weight_out = self._weight(self.lmax_out, device=device, dtype=dtype) if weighted else None

    def forward(self, *inputs: Tensor) -> Tensor:
        """The product's coefficients ``(..., (lmax_out + 1)**2)`` of ``order`` inputs or of one input's power."""
        if len(inputs) not in (1, self.order):
            raise ValueError(f"inputs must be {self.order} tensors, or one for all of them, not {len(inputs)}")
        for i, value in enumerate(inputs):
            self._check(f"inputs[{i}]", value, self.lmax)
        self._check_lead(**{f"inputs[{i}]": value.shape[:-1] for i, value in enumerate(inputs)})
        ndim = max(value.ndim for value in inputs) - 1
        if self.weight is not None:
            factors = inputs * self.order if len(inputs) == 1 else inputs
            inputs = tuple(x * self._per_degree(w, self.lmax) for x, w in zip(factors, self.weight, strict=True))
        grids = [self._to_grid(x, self.lmax, ndim) for x in inputs]
        out = self._from_grid(_power(grids[0], self.order) if len(grids) == 1 else _product(grids))
        return out if self.weight_out is None else out * self._per_degree(self.weight_out, self.lmax_out)


def _product(factors: list[Tensor]) -> Tensor:
    """Product by halves, which keeps the tree of derivatives shallow."""
    if len(factors) == 1:
        return factors[0]
    half = len(factors) // 2
    return _product(factors[:half]) * _product(factors[half:])


def _power(x: Tensor, exponent: int) -> Tensor:
    if exponent == 1:
        return x
    half = _power(x, exponent // 2)
    return half * half * x if exponent % 2 else half * half


def from_irreps(values: Tensor, lmax: int, channels: int) -> Tensor:
    """Coefficients ``(..., channels, (lmax + 1)**2)`` of e3nn's flat ``channels x 0e + channels x 1o + channels x 2e + ...``.

    Example:
        >>> from_irreps(torch.arange(8), lmax=1, channels=2)
        tensor([[0, 2, 3, 4],
                [1, 5, 6, 7]])
    """
    wanted = channels * (lmax + 1) ** 2
    if values.shape[-1:] != (wanted,):
        raise ValueError(f"values must have shape (..., {wanted}), not {tuple(values.shape)}")
    blocks = torch.split(values, [channels * (2 * degree + 1) for degree in range(lmax + 1)], -1)
    return torch.cat([block.reshape(*block.shape[:-1], channels, -1) for block in blocks], -1)


def to_irreps(coefficients: Tensor) -> Tensor:
    """e3nn's flat layout of coefficients ``(..., channels, (lmax + 1)**2)``: the inverse of `from_irreps`.

    Example:
        >>> x = torch.randn(5, 3, 16)
        >>> torch.equal(from_irreps(to_irreps(x), lmax=3, channels=3), x)
        True
    """
    count = coefficients.shape[-1] if coefficients.ndim else 0
    lmax = round(count**0.5) - 1
    if coefficients.ndim < 2 or (lmax + 1) ** 2 != count or not count:
        raise ValueError(f"coefficients must have shape (..., channels, (lmax + 1)**2), not {tuple(coefficients.shape)}")
    blocks = torch.split(coefficients, [2 * degree + 1 for degree in range(lmax + 1)], -1)
    return torch.cat([block.flatten(-2) for block in blocks], -1)

"""Stochastic Lanczos quadrature: the spectral density, and traces of functions, of a matrix known by its products alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from corollary.linalg.curvature import SymmetricOperator
from corollary.linalg.hutchinson import PROBES
from corollary.linalg.lanczos import lanczos

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class TraceEstimate(NamedTuple):
    """An estimate and the standard error of it over the probes (NaN with one probe)."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class SpectralDensity:
    r"""The spectrum as k quadrature rules of m nodes each: :math:`\frac1k \sum_{ij} w_{ij} δ(λ - θ_{ij})`.

    Attributes:
        nodes: Ritz values θ, (k, m), float64 on the CPU.
        weights: w, (k, m), each row summing to 1.
        dimension: n, the size of the matrix.
    """

    nodes: Tensor
    weights: Tensor
    dimension: int

    def trace(self, function: Callable[[Tensor], Tensor] | None = None) -> TraceEstimate:
        r"""Estimate :math:`\operatorname{tr} f(A)`; f is the identity by default.

        Args:
            function: f, applied entry by entry to float64. It meets Ritz values only, all of them within the spectrum.

        Raises:
            ValueError: f gives another shape, or something not finite at a node that has weight.
        """
        values = self.nodes if function is None else function(self.nodes)
        if values.shape != self.nodes.shape:
            raise ValueError(f"'function' must keep the shape {tuple(self.nodes.shape)}, not give {tuple(values.shape)}")
        # A node that has no weight, from beyond an invariant subspace, must not spoil the sum: 0 · inf is NaN.
        values = torch.where(self.weights > 0, values, torch.zeros_like(values))
        if not bool(values.isfinite().all()):
            raise ValueError("'function' is not finite at a Ritz value; it must be defined on the whole spectrum")
        each = self.dimension * (self.weights * values).sum(1)
        k = len(each)
        return TraceEstimate(float(each.mean()), float(each.std() / math.sqrt(k)) if k > 1 else math.nan)

    def cdf(self, grid: Tensor) -> Tensor:
        """Share of the eigenvalues at or below each value of ``grid`` (g,), as a step function (g,)."""
        nodes, order = self.nodes.reshape(-1).sort()
        total = (self.weights.reshape(-1)[order] / len(self.nodes)).cumsum(0)
        place = torch.searchsorted(nodes, grid.detach().to("cpu", torch.float64).contiguous(), right=True)
        return torch.cat([total.new_zeros(1), total])[place]

    def density(self, grid: Tensor, width: float | None = None) -> Tensor:
        """The density at each value of ``grid`` (g,), each node widened to a Gaussian.

        Args:
            grid: eigenvalues at which to evaluate.
            width: standard deviation of the Gaussians; by default a hundredth of the range of the nodes.
        """
        if width is None:
            width = float(self.nodes.max() - self.nodes.min()) / 100 or 1.0
        if not width > 0:
            raise ValueError(f"'width' must be above 0, not {width}")
        at = grid.detach().to("cpu", torch.float64).unsqueeze(1)
        kernel = torch.exp(-0.5 * ((at - self.nodes.reshape(-1)) / width) ** 2) / (width * math.sqrt(2 * math.pi))
        return kernel @ self.weights.reshape(-1) / len(self.nodes)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"nodes": self.nodes.tolist(), "weights": self.weights.tolist(), "dimension": self.dimension}

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the density on a logarithmic scale, as spectra with outliers need."""
        import matplotlib.pyplot as plt

        axes: Axes = plt.gca() if ax is None else ax
        low, high = float(self.nodes.min()), float(self.nodes.max())
        margin = 0.05 * (high - low) or 1.0
        grid = torch.linspace(low - margin, high + margin, 500, dtype=torch.float64)
        axes.semilogy(grid.numpy(), self.density(grid).clamp_min(1e-10).numpy())
        axes.set_xlabel("eigenvalue")
        axes.set_ylabel("density")
        return axes


def spectral_density(
    operator: SymmetricOperator,
    *,
    steps: int = 64,
    samples: int = 8,
    probe: str = "rademacher",
    generator: torch.Generator | None = None,
    chunk: int = 16,
) -> SpectralDensity:
    r"""Estimate the spectral density of a symmetric matrix A by stochastic Lanczos quadrature.

    For a random unit vector z, :math:`n\, \mathbb E[z^T f(A) z] = \operatorname{tr} f(A)`, and m Lanczos steps from z give
    the Gauss quadrature of :math:`z^T f(A) z`, exact for polynomials f of degree 2m - 1:

    .. math::
        \operatorname{tr} f(A) ≈ \frac{n}{k} \sum_{i=1}^{k} \sum_{j=1}^{m} w_{ij} f(θ_{ij})

    with the Ritz values θ and the squared first entries w of the eigenvectors of each probe's tridiagonal matrix.

    Args:
        operator: a square tensor, a `HessianOperator`, or anything with ``shape``, ``dtype``, ``device`` and ``@``.
        steps: m; at most n are made.
        samples: k probes; the error that comes of chance falls as 1/√k.
        probe: 'rademacher' or 'gaussian'. Gaussian probes are scaled to unit length, which leaves them unbiased.
        generator: source of the probes, on the operator's device; torch's global one by default.
        chunk: how many probes run side by side; chunk × steps × n numbers are held.

    Returns:
        A `SpectralDensity`.

    Raises:
        ValueError: the operator is not square, an argument is below 1, ``probe`` is unknown, or a product is not finite.

    When not to use it: for a few extreme eigenvalues (`extreme_eigenvalues` gives bounds), or for the diagonal
    (`hutchinson_diagonal`).

    Example:
        >>> import torch
        >>> matrix = torch.diag(torch.linspace(1, 2, 200).double())
        >>> spectrum = spectral_density(matrix, steps=20, generator=torch.Generator().manual_seed(0))
        >>> estimate = spectrum.trace(torch.log)
        >>> abs(estimate.value - matrix.logdet().item()) < 0.01
        True

    Reference:
        Ubaru, Chen, Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", 2017; Ghorbani, Krishnan, Xiao,
        arXiv 1901.10159, for the spectra of networks.
    """
    if min(steps, samples, chunk) < 1:
        raise ValueError(f"'steps', 'samples' and 'chunk' must be at least 1, not {steps}, {samples} and {chunk}")
    if probe not in PROBES:
        raise ValueError(f"'probe' is '{probe}'; allowed: {', '.join(PROBES)}")
    shape = tuple(operator.shape)
    if len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
        raise ValueError(f"'operator' must be square and not empty, not of shape {shape}")
    n = shape[0]
    nodes, weights = [], []
    for begin in range(0, samples, chunk):
        z = torch.empty(n, min(chunk, samples - begin), dtype=torch.float32, device=operator.device)
        if probe == "rademacher":
            z.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
        else:
            z.normal_(generator=generator)
        values, shares, _ = lanczos(operator, steps, start=z, generator=generator).ritz()
        nodes.append(values)
        weights.append(shares)
    return SpectralDensity(torch.cat(nodes), torch.cat(weights), n)

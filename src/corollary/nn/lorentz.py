"""Linear layers and means on the hyperboloid, without a detour over tangent spaces."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def lorentz_inner(x: Tensor, y: Tensor) -> Tensor:
    r"""The Lorentzian product :math:`\langle x, y \rangle = -x_0 y_0 + \sum_{i \ge 1} x_i y_i` over the last axis, which is kept.

    Args:
        x, y: shape (..., n + 1), time first.

    Returns:
        Shape (..., 1). Points of the hyperboloid have -1 with themselves, and :math:`-2 - 2 \langle x, y \rangle` is their squared
        Lorentzian distance.

    Example:
        >>> import torch
        >>> lorentz_inner(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]))
        tensor([-1.])

    Reference:
        Chen et al., "Fully Hyperbolic Neural Networks", arXiv 2105.14686, section 2.
    """
    return (x[..., 1:] * y[..., 1:]).sum(-1, keepdim=True) - x[..., :1] * y[..., :1]


def lorentz_lift(x: Tensor) -> Tensor:
    r"""The exponential map at the hyperboloid's origin, :math:`(\cosh \|x\|,\ \sinh \|x\| \, x / \|x\|)`.

    Args:
        x: tangent vectors without their time, shape (..., n).

    Returns:
        Points, shape (..., n + 1).

    Example:
        >>> import torch
        >>> lorentz_lift(torch.zeros(2))
        tensor([1., 0., 0.])

    Reference:
        Chen et al., arXiv 2105.14686, section 2; the authors' ``expmap0``.
    """
    norm = x.norm(dim=-1, keepdim=True)
    small = norm < torch.finfo(x.dtype).eps
    ratio = torch.where(small, 1.0, torch.sinh(norm) / norm.masked_fill(small, 1.0))
    return torch.cat([torch.cosh(norm), ratio * x], -1)


def lorentz_mean(weights: Tensor, x: Tensor) -> Tensor:
    r"""Weighted means on the hyperboloid, :math:`s_i / \sqrt{|\langle s_i, s_i \rangle|}` with :math:`s_i = \sum_j w_{ij} x_j`.

    Args:
        weights: shape (rows, points), at least 0, such as a graph's adjacency with its diagonal; dense or sparse.
        x: points, shape (points, n + 1).

    Returns:
        Points, shape (rows, n + 1).

    Example:
        >>> import torch
        >>> lorentz_mean(torch.ones(1, 2), lorentz_lift(torch.tensor([[1.0], [-1.0]])))
        tensor([[1., 0.]])

    Reference:
        Law et al., "Lorentzian Distance Learning for Hyperbolic Representations"; Chen et al., arXiv 2105.14686, section 3.3.
    """
    total = weights @ x
    return total / lorentz_inner(total, total).abs().clamp_min(1e-8).sqrt()


class LorentzLinear(nn.Module):
    r"""A linear layer from hyperboloid to hyperboloid.

    With :math:`z = W \phi(x) + b` the new point is

    .. math:: t = e^{\lambda}\,\mathrm{sigmoid}(z_0) + 1.1, \qquad
        y = \Big(t,\ \sqrt{t^2 - 1}\;\frac{z_{1:}}{\|z_{1:}\|}\Big).

    Args:
        in_features, out_features: n + 1 and m + 1: lengths of points, their time included.
        bias: whether there is one.
        activation: φ, before the matrix; None for none.
        scale: :math:`e^\lambda` at the start; λ trains.

    Shape: (..., in_features) to (..., out_features).

    The matrix is an ``nn.Linear`` called ``linear``, so that whatever goes on a linear layer goes on this one's.

    Raises:
        ValueError: an input of another width, or ``out_features`` below 2.
        TypeError: an input that is not floating.

    Example:
        >>> import torch
        >>> from corollary.nn.lorentz import LorentzLinear, lorentz_inner, lorentz_lift
        >>> y = LorentzLinear(4, 3)(lorentz_lift(torch.randn(5, 3)))
        >>> bool(((lorentz_inner(y, y) + 1).abs() < 1e-3).all())
        True

    Reference:
        Chen et al., "Fully Hyperbolic Neural Networks", arXiv 2105.14686, section 3.1; the authors' ``LorentzLinear``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation: nn.Module | None = None,
        scale: float = 10.0,
    ) -> None:
        super().__init__()
        if out_features < 2:
            raise ValueError(f"'out_features' counts the time too, so it must be at least 2, not {out_features}")
        if not 0 < scale < math.inf:
            raise ValueError(f"'scale' must be a finite number above 0, not {scale}")
        self.linear = nn.Linear(in_features, out_features, bias)
        self.in_features = in_features
        self.activation = activation
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        bound = out_features**-0.5
        with torch.no_grad():
            self.linear.weight.uniform_(-bound, bound)
            self.linear.weight[:, 0] = 0  # all points are alike in time at first, as in the authors' code
            if bias:
                self.linear.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Points (..., in_features) to points (..., out_features)."""
        if not x.is_floating_point():
            raise TypeError(f"'x' must be floating, not {x.dtype}")
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"'x' has shape {tuple(x.shape)}; allowed: (..., {self.in_features})")
        z = self.linear(x if self.activation is None else self.activation(x))
        time = self.log_scale.exp() * z[..., :1].sigmoid() + 1.1
        space = z[..., 1:]
        length = ((time.square() - 1) / space.square().sum(-1, keepdim=True).clamp_min(1e-8)).sqrt()
        return torch.cat([time, length * space], -1)

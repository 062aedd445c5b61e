"""Scalable neural network kernels: a layer as a dot product of features, and a whole network bundled into one such layer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corollary.adapt.urf import RandomFeatureMap


class SNNKLinear(nn.Module):
    r"""A linear layer with its activation, f(W x + b), as a dot product of features: :math:`\Phi(x)\, \Psi^\top`.

    Φ is random and frozen (`urf_input`); Ψ (out × features) is what trains. It starts as the features of a linear layer's parameters
    (`urf_weight`), so that the layer starts as an unbiased estimate of f(W x + b), and may leave the set of those features in training.

    Args:
        in_features, out_features: as of ``nn.Linear``.
        num_features: dimension of Φ and Ψ: the layer trains ``out_features`` times it, whatever ``in_features``.
        activation: ``"cos"``, ``"sin"``, ``"gaussian"`` (exp(-z²/2)), or ``"relu"``: max(G x̂, 0) on both sides with x̂ = (x, 1), the
            authors' choice where they speak of ReLU; its mean is the arc-cosine kernel of order 1, not max(w·x + b, 0).
        bias: whether the layer that Ψ starts from has one.
        damping, balance: of `urf_input`.

    Input (..., in_features), output (..., out_features), in the parameters' dtype.

    Raises:
        ValueError, TypeError: for an argument out of range; for an input of another size or of no floating dtype.

    Deviations: the authors' layer keeps complex features and takes the real part of the product; real and imaginary part stand
    side by side here.

    When not to use it: in the place of a layer whose inputs or weights have large norms, where the estimate is noise until it is
    trained (see `urf_input`); nor where ``num_features`` would pass ``in_features``, since nothing is saved then.

    Example:
        >>> import torch
        >>> from corollary.adapt import SNNKLinear
        >>> _ = torch.manual_seed(0)
        >>> dense = torch.nn.Linear(4, 3)
        >>> layer = SNNKLinear.from_linear(dense, num_features=200_000, activation="sin")
        >>> x = 0.5 * torch.randn(5, 4)
        >>> bool((layer(x) - torch.sin(dense(x))).abs().max() < 0.05)
        True

    Reference:
        Sehanobish et al., "Scalable Neural Network Kernels", arXiv 2310.13225; the authors' ``NNK`` and ``NNK_Relu``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_features: int,
        *,
        activation: str = "cos",
        bias: bool = True,
        damping: float = 0.0,
        balance: float = 1.0,
    ) -> None:
        super().__init__()
        _need_sizes(in_features=in_features, out_features=out_features)
        self.features = RandomFeatureMap(activation, in_features, num_features, damping=damping, balance=balance)
        self.weight = nn.Parameter(torch.empty(out_features, num_features))
        self._start(nn.Linear(in_features, out_features, bias=bias))

    @torch.no_grad()
    def _start(self, linear: nn.Linear) -> None:
        self.weight.copy_(self.features.of_weight(linear.weight, linear.bias))

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, num_features: int, *, activation: str = "cos", damping: float = 0.0, balance: float = 1.0
    ) -> SNNKLinear:
        """The layer that stands for ``activation(linear(x))``, in the linear layer's dtype and on its device."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"'linear' must be an nn.Linear, not {type(linear).__name__}")
        layer = cls(
            linear.in_features, linear.out_features, num_features, activation=activation, damping=damping, balance=balance
        ).to(linear.weight)
        layer._start(linear)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return F.linear(self.features(x), self.weight)


class BundledSNNK(nn.Module):
    r"""A network bundled into one layer: the features of all its layers composed, and one matrix for all its parameters.

    With each layer a dot product, the next one's weights go over to its parameters' side:
    :math:`f(W_2 f(W_1 x)) \approx f(W_2 \Psi_1 \Phi_1(x)) \approx \Psi_2(W_2 \Psi_1)\, \Phi_2(\Phi_1(x))`, and so on. What is left is

    .. math:: y(x) = \Theta\, \Phi_L(\cdots \Phi_1(x)) + \beta,

    linear in all that trains, so that least squares have a closed form, `fit`, and no backpropagation is needed.

    Args:
        in_features, out_features: of the network.
        num_features: dimension of the features of each bundled layer, from the input on.
        activation, damping, balance: of every layer, as of `SNNKLinear`.

    Input (..., in_features), output (..., out_features), in the parameters' dtype.

    Raises:
        ValueError, TypeError: for an argument out of range; for an input of another size or of no floating dtype.

    When not to use it: where features have to be learnt; these are random, and only the last map of them is fitted.

    Example:
        >>> import torch
        >>> from corollary.adapt import BundledSNNK
        >>> _ = torch.manual_seed(0)
        >>> x = torch.rand(200, 3)
        >>> y = torch.sin(x.sum(1, keepdim=True))
        >>> network = BundledSNNK(3, 1, (64,)).fit(x, y, ridge=1e-6)
        >>> bool((network(x) - y).square().mean() < 1e-4)
        True

    Reference:
        Sehanobish et al., "Scalable Neural Network Kernels", arXiv 2310.13225, the section on bundling.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_features: Sequence[int],
        *,
        activation: str = "cos",
        damping: float = 0.0,
        balance: float = 1.0,
    ) -> None:
        super().__init__()
        _need_sizes(in_features=in_features, out_features=out_features)
        if isinstance(num_features, int | str) or not len(num_features):
            raise ValueError(f"'num_features' must hold one number for each bundled layer, not {num_features!r}")
        sizes = [in_features, *num_features]
        self.features = nn.Sequential(*(
            RandomFeatureMap(activation, d, m, damping=damping, balance=balance) for d, m in itertools.pairwise(sizes)
        ))  # fmt: skip
        self.weight = nn.Parameter(torch.randn(out_features, sizes[-1]) * sizes[-1] ** -0.5)
        self.bias = nn.Parameter(torch.zeros(out_features))

    @classmethod
    def from_linears(
        cls,
        linears: Sequence[nn.Linear],
        num_features: Sequence[int],
        *,
        activation: str = "cos",
        damping: float = 0.0,
        balance: float = 1.0,
    ) -> BundledSNNK:
        """The bundle of a network of these linear layers with ``activation`` between them, and none after the last one.

        Raises:
            ValueError: where layers do not fit, or there is not one number of features for each activation.
        """
        if len(linears) != len(num_features) + 1 or len(linears) < 2:
            raise ValueError(
                f"'num_features' holds {len(num_features)} for {len(linears)} layers; allowed: one less, at least 1"
            )
        for before, after in itertools.pairwise(linears):
            if before.out_features != after.in_features:
                raise ValueError(f"'linears': {before.out_features} outputs meet {after.in_features} inputs")
        first, last = linears[0], linears[-1]
        bundle = cls(
            first.in_features, last.out_features, num_features, activation=activation, damping=damping, balance=balance
        ).to(first.weight)
        with torch.no_grad():
            weight, bias = first.weight, first.bias
            for features, after in zip(bundle.features, linears[1:], strict=True):
                assert isinstance(features, RandomFeatureMap)
                weight, bias = after.weight @ features.of_weight(weight, bias), after.bias
            bundle.weight.copy_(weight)
            bundle.bias.copy_(torch.zeros_like(bundle.bias) if bias is None else bias)
        return bundle

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return F.linear(self.features(x), self.weight, self.bias)

    @torch.no_grad()
    def fit(self, x: Tensor, y: Tensor, *, ridge: float = 0.0) -> BundledSNNK:
        r"""Set the parameters to the minimum of :math:`\|y(X) - Y\|_F^2 + \lambda \|\Theta\|_F^2`, in closed form.

        .. math:: \Theta^\top = (\bar\Phi^\top \bar\Phi + \lambda I)^{-1} \bar\Phi^\top \bar Y, \qquad
            \beta = \mathrm{mean}(Y) - \Theta\, \mathrm{mean}(\Phi)

        with the means taken out of Φ and Y. It is computed from the singular value decomposition of the features, in float64; without
        a ridge, directions that the data do not determine get zero, so the solution of least norm.

        Args:
            x: (n, in_features).
            y: (n, out_features).
            ridge: λ ≥ 0, which leaves β alone.

        Returns:
            the module itself.

        Raises:
            ValueError: where shapes do not fit, there are no samples, the ridge is negative, or something is not finite.
        """
        if x.ndim != 2 or y.shape != (len(x), self.bias.numel()) or not len(x):
            wanted = f"(n, {self.features[0].in_features}) and (n, {self.bias.numel()}) with n at least 1"
            raise ValueError(f"'x' and 'y' have shapes {tuple(x.shape)} and {tuple(y.shape)}; allowed: {wanted}")
        if not 0 <= ridge < float("inf"):
            raise ValueError(f"'ridge' must be at least 0 and finite, not {ridge}")
        phi, y = self.features(x.to(self.weight)).double(), y.double()
        if not bool(phi.isfinite().all() & y.isfinite().all()):
            raise ValueError("'x' or 'y' is not finite, or the features of 'x' overflow: scale 'x' down or give more 'damping'")
        means = phi.mean(0), y.mean(0)
        u, s, vh = torch.linalg.svd(phi - means[0], full_matrices=False)
        # What is below the rounding of the features, which were computed in their own dtype, is noise.
        kept = s > s[0] * max(phi.shape) * torch.finfo(self.weight.dtype).eps
        filtered = torch.where(kept, s / (s.square() + ridge), 0.0)
        theta = (vh.T * filtered) @ (u.T @ (y - means[1]))
        self.weight.copy_(theta.T)
        self.bias.copy_(means[1] - means[0] @ theta)
        return self


def _need_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"'{name}' must be an int, not {type(size).__name__} ({size!r})")
        if size < 1:
            raise ValueError(f"'{name}' must be at least 1, not {size}")

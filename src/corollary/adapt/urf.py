"""Universal random features: one map of a layer's input and one of its parameters whose dot product is the layer, in the mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS = ("cos", "sin", "gaussian", "relu")
"""cos(z), sin(z), exp(-z²/2), and the arc-cosine kernel of order 1 in the place of max(z, 0)"""


def _need_matrix(name: str, x: Tensor, directions: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"'{name}' is {x.dtype}; allowed: a floating dtype")
    if x.ndim < 1 or x.shape[-1] != directions.shape[-1]:
        raise ValueError(f"'{name}' has shape {tuple(x.shape)}; its last dimension must be {directions.shape[-1]}")


def _need_frequencies(directions: Tensor, frequencies: Tensor, damping: float, balance: float) -> None:
    if directions.ndim != 2 or frequencies.shape != directions.shape[:1]:
        raise ValueError(
            f"'directions' has shape {tuple(directions.shape)} and 'frequencies' {tuple(frequencies.shape)}; allowed: (m, d), (m,)"
        )
    need_constants(damping, balance)


def need_constants(damping: float, balance: float) -> None:
    """Raise unless the two constants of the map are numbers of their range."""
    if not 0 <= damping < math.inf:
        raise ValueError(f"'damping' must be at least 0 and finite, not {damping}")
    if not 0 < balance < math.inf:
        raise ValueError(f"'balance' must be above 0 and finite, not {balance}")


def _log_constant(directions: Tensor, damping: float) -> Tensor | float:
    """What both sides share of Λ, (1 + 4M)^(d/4) exp(−M |g|²), and the average's m^-1/2, in logarithms."""
    m, d = directions.shape
    constant = d / 4 * math.log1p(4 * damping) - math.log(m) / 2
    return constant - damping * directions.square().sum(1) if damping else constant


def urf_input(x: Tensor, directions: Tensor, frequencies: Tensor, *, damping: float = 0.0, balance: float = 1.0) -> Tensor:
    r"""The features Φ(x) of a layer's input, which know nothing of its weights.

    An activation with an integrable Fourier transform is a mean of waves, :math:`f(z) = \mathbb{E}_\omega \Re(c\, e^{i\omega z})`, and
    each wave of :math:`w^\top x` is a Gaussian mean of a product of two functions, :math:`\Lambda_g(i\,\mathrm{sgn}(\omega) |\omega|^{1/2} x / t)`
    and :math:`\Lambda_g(|\omega|^{1/2} t w)`, with

    .. math:: \Lambda_g(z) = (1 + 4M)^{d/4} \exp\bigl(-M \|g\|^2 + \sqrt{1 + 4M}\, g^\top z - z^\top z / 2\bigr), \qquad g \sim N(0, I).

    Real and negative imaginary parts stand side by side, so that ``urf_input(x) @ urf_weight(w, b).T`` is the real part of the mean
    over the m draws: an unbiased estimate of f(w·x + b), whose error falls as m^-1/2.

    Args:
        x: (..., d), floating.
        directions: g, (m, d), standard normal.
        frequencies: ω, (m,), from the activation's spectrum: all 1 for cos and sin, standard normal for exp(-z²/2).
        damping: M ≥ 0; makes the second moment finite where norms are large, at (1 + 4M)^d / (1 + 8M)^(d/2) of it elsewhere.
        balance: t > 0; moves variance between the sides. With frequencies of 1 and M = 0 the best is (|x| / |w|)^(1/2).

    Returns:
        (..., 2m), in x's dtype.

    Raises:
        TypeError: ``x`` is not floating.
        ValueError: shapes do not fit, or a constant is out of range.

    Deviations: the paper leaves open how ω is shared out between the sides. Half of it on each keeps the second moment finite for a
    spectrum with Gaussian tails; all of it on the input does not.

    When not to use it: the second moment grows as exp(|ω| (|x|²/t² + t²|w|²)) without damping; inputs of large norm need to be
    scaled down first.

    Example:
        >>> import torch
        >>> from corollary.adapt import urf_input, urf_weight
        >>> g = torch.Generator().manual_seed(0)
        >>> x, w = torch.tensor([0.5, -0.3]), torch.tensor([[0.4, 0.8]])
        >>> directions, ones = torch.randn(100_000, 2, generator=g), torch.ones(100_000)
        >>> estimate = urf_input(x, directions, ones) @ urf_weight(w, directions, ones).T
        >>> bool((estimate - torch.cos(w @ x)).abs() < 0.01)
        True

    Reference:
        Sehanobish et al., "Scalable Neural Network Kernels", arXiv 2310.13225, universal random features; in the authors' code
        ``create_asym_feats``, which names equation 10.
    """
    _need_matrix("x", x, directions)
    _need_frequencies(directions, frequencies, damping, balance)
    directions, frequencies = directions.to(x.dtype), frequencies.to(x.dtype)
    size, sign = frequencies.abs(), frequencies.sign()
    wave = F.linear(x, directions) * (sign * size.sqrt() * (math.sqrt(1 + 4 * damping) / balance))
    norm = x.square().sum(-1, keepdim=True) * (size / (2 * balance**2))
    size = torch.exp(norm + _log_constant(directions, damping))
    return torch.cat([size * wave.cos(), -size * wave.sin()], -1)


def urf_weight(
    weight: Tensor,
    directions: Tensor,
    frequencies: Tensor,
    bias: Tensor | None = None,
    *,
    phase: float = 0.0,
    damping: float = 0.0,
    balance: float = 1.0,
) -> Tensor:
    r"""The features Ψ(w, b) of a layer's parameters, which know nothing of its input: the other side of `urf_input`.

    .. math:: \Psi(w, b) = m^{-1/2} \bigl[\lambda_j \cos(\omega_j b + \varphi),\ \lambda_j \sin(\omega_j b + \varphi)\bigr]_j,
        \qquad \lambda_j = \Lambda_{g_j}(|\omega_j|^{1/2}\, t\, w)

    Args:
        weight: (..., d), floating, such as the rows of a linear layer's weight.
        directions, frequencies, damping, balance: as `urf_input` gets them.
        bias: (...,) or None.
        phase: φ of the activation's wave: 0 for cos and exp(-z²/2), −π/2 for sin.

    Returns:
        (..., 2m), in the weight's dtype.

    Raises:
        TypeError: ``weight`` or ``bias`` is not floating.
        ValueError: shapes do not fit, or a constant is out of range.

    Example:
        >>> import torch
        >>> from corollary.adapt import urf_weight
        >>> urf_weight(torch.randn(3, 4), torch.randn(5, 4), torch.ones(5), torch.randn(3)).shape
        torch.Size([3, 10])

    Reference:
        Sehanobish et al., "Scalable Neural Network Kernels", arXiv 2310.13225, universal random features; in the authors' code
        ``create_asym_feats``, which names equation 10.
    """
    _need_matrix("weight", weight, directions)
    _need_frequencies(directions, frequencies, damping, balance)
    directions, frequencies = directions.to(weight.dtype), frequencies.to(weight.dtype)
    turn = frequencies.new_full((), phase)
    if bias is not None:
        if not bias.is_floating_point():
            raise TypeError(f"'bias' is {bias.dtype}; allowed: a floating dtype")
        if bias.shape != weight.shape[:-1]:
            raise ValueError(f"'bias' has shape {tuple(bias.shape)}; allowed: {tuple(weight.shape[:-1])}")
        turn = bias[..., None] * frequencies + phase
    share = frequencies.abs()
    exponent = F.linear(weight, directions) * (share.sqrt() * (math.sqrt(1 + 4 * damping) * balance))
    exponent = exponent - weight.square().sum(-1, keepdim=True) * (share * (balance**2 / 2))
    size = torch.exp(exponent + _log_constant(directions, damping))
    return torch.cat([size * turn.cos(), size * turn.sin()], -1)


class RandomFeatureMap(nn.Module):
    """Both sides of a layer's kernel with the random numbers that they share, drawn once and frozen.

    Args:
        activation: one of ``ACTIVATIONS``.
        in_features: d.
        num_features: dimension of the features. Waves take two numbers a draw, so it is even for all but ``"relu"``.
        damping, balance: of `urf_input`; without meaning for ``"relu"``.
        generator: what draws; None: torch's global one.
        persistent: whether the draws stand in the ``state_dict``.
    """

    directions: Tensor
    frequencies: Tensor

    def __init__(
        self,
        activation: str,
        in_features: int,
        num_features: int,
        *,
        damping: float = 0.0,
        balance: float = 1.0,
        generator: torch.Generator | None = None,
        persistent: bool = True,
    ) -> None:
        super().__init__()
        need_map(activation, num_features, damping, balance)
        self.activation, self.damping, self.balance = activation, damping, balance
        self.in_features, self.num_features = in_features, num_features
        m = num_features if activation == "relu" else num_features // 2
        # One more coordinate for the arc-cosine kernel's bias; a wave takes the bias as a phase, and ω in its place.
        drawn = torch.randn(m, in_features + 1, generator=generator)
        last = drawn[:, -1] if activation in ("relu", "gaussian") else torch.ones(m)
        self.register_buffer("directions", drawn[:, :-1].contiguous(), persistent=persistent)
        self.register_buffer("frequencies", last.clone(), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        """Φ(x) (..., num_features) of inputs (..., in_features)."""
        if self.activation == "relu":
            _need_matrix("x", x, self.directions)
            return F.linear(x, self.directions, self.frequencies).relu() / math.sqrt(self.num_features)
        return urf_input(x, self.directions, self.frequencies, damping=self.damping, balance=self.balance)

    def of_weight(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Ψ(w, b) (out, num_features) of a weight (out, in_features) and a bias (out,)."""
        if self.activation == "relu":
            _need_matrix("weight", weight, self.directions)
            seen = F.linear(weight, self.directions)
            if bias is not None:
                seen = seen + bias[..., None] * self.frequencies
            return seen.relu() / math.sqrt(self.num_features)
        phase = -math.pi / 2 if self.activation == "sin" else 0.0
        return urf_weight(
            weight, self.directions, self.frequencies, bias, phase=phase, damping=self.damping, balance=self.balance
        )

    def extra_repr(self) -> str:
        return f"{self.activation}, in_features={self.in_features}, num_features={self.num_features}"


def need_map(activation: str, num_features: int, damping: float, balance: float) -> None:
    """Raise unless a `RandomFeatureMap` can be made of these."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"'activation' is {activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    if isinstance(num_features, bool) or not isinstance(num_features, int):
        raise TypeError(f"'num_features' must be an int, not {type(num_features).__name__} ({num_features!r})")
    if num_features < 1 or (activation != "relu" and num_features % 2):
        raise ValueError(f"'num_features' must be at least 1, and even unless the activation is 'relu', not {num_features}")
    need_constants(damping, balance)

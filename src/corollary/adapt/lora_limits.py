"""Attention whose forward pass and LoRA gradient take nearly linear time, by the polynomial method, and its norm threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.polynomial import chebyshev
from scipy.special import ive
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_DEGREE = 60
_BUFFER = 1 << 19  # numbers of features held at a time: what stays in a core's cache, whatever the length


@lru_cache(maxsize=256)
def _series(bound: float) -> np.ndarray[Any, Any]:
    """Chebyshev coefficients of exp on [-bound, bound], each times e^-bound, for degrees 0 to MAX_DEGREE + 30."""
    terms = 2 * ive(np.arange(MAX_DEGREE + 31), bound)
    terms[0] /= 2
    return terms


def _entry_error(bound: float, degree: int) -> float:
    """η with |f̃ - f| <= η f for every entry of the attention matrix, logits within ±bound; infinite where nothing is known."""
    # The dropped terms bound |p - exp|; relative to exp's least value e^-bound they are e^(2 bound) times the scaled ones.
    with np.errstate(over="ignore"):
        relative = float(_series(bound)[degree + 1 :].sum() * np.exp(2 * bound))
    return 2 * relative / (1 - relative) if relative < 1 else math.inf


def _degree_for(bound: float, tolerance: float) -> int | None:
    return next((g for g in range(1, MAX_DEGREE + 1) if _entry_error(bound, g) <= tolerance), None)


@lru_cache(maxsize=64)
def _multinomials(dim: int, degree: int) -> tuple[tuple[int, ...], np.ndarray[Any, Any]]:
    """How many monomials each degree has, and n!/α! of each monomial in the order of `_features`."""
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


def _weights(dim: int, degree: int, scale: float, bound: float) -> np.ndarray[Any, Any]:
    """Weight of each monomial, so that Σ_α weight_α q^α k^α = p(scale q·k), p near e^-bound exp on [-bound, bound]."""
    sizes, multinomials = _multinomials(dim, degree)
    power = chebyshev.cheb2poly(_series(bound)[: degree + 1]) * (scale / bound) ** np.arange(degree + 1)
    weights: np.ndarray[Any, Any] = np.repeat(power, sizes) * multinomials
    return weights


def _features(x: Tensor, degree: int) -> Tensor:
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


class _PolynomialAttention(torch.autograd.Function):
    """Tensors are (N, channels, L); see `polynomial_attention` for the mathematics."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, degree: int, scale: float) -> Tensor:
        state = _contract(key, _extended(value), degree).mul_(weights)
        both = _expand(query, state, degree)
        out = both[:, :-1] / both[:, -1:]
        ctx.save_for_backward(query, key, value, weights, out, both[:, -1:].clone())
        ctx.degree, ctx.scale = degree, scale
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights, out, normalizer = ctx.saved_tensors
        degree: int = ctx.degree
        scaled = grad / normalizer
        # With u_j = (v_j, 1) and w_i = (dO_i, -dO_i·O_i) / Z_i, the gradient in the logits is p1 - p2 = e_ij (w_i · u_j).
        w = torch.cat([scaled, -(scaled * out).sum(1, keepdim=True)], 1)
        u = _extended(value)
        grads: list[Tensor | None] = [None, None, None]
        if ctx.needs_input_grad[0]:
            state = _contract(key, _outer(u, key), degree).mul_(weights)
            grads[0] = _expand(query, state, degree, w).mul_(ctx.scale)
        need_key, need_value = ctx.needs_input_grad[1:3]
        if need_key or need_value:
            parts = [_outer(w, query)] if need_key else []
            state = _contract(query, torch.cat([*parts, scaled], 1), degree).mul_(weights)
            split = state.shape[2] - value.shape[1]
            if need_key:
                grads[1] = _expand(key, state[..., :split], degree, u).mul_(ctx.scale)
            if need_value:
                grads[2] = _expand(key, state[..., split:], degree)
        return (*grads, None, None, None)


def _extended(value: Tensor) -> Tensor:
    return torch.cat([value, torch.ones_like(value[:, :1])], 1)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, :, None] * b[:, None]).flatten(1, 2)


def _chunks(x: Tensor, degree: int) -> range:
    features = x.shape[0] * math.comb(x.shape[1] + degree, degree)
    return range(0, x.shape[2], max(64, _BUFFER // features))


def _contract(x: Tensor, y: Tensor, degree: int) -> Tensor:
    """Σ_l φ(x_l) ⊗ y_l, (N, k, channels of y): the sum over the sequence, made once."""
    steps = _chunks(x, degree)
    total = x.new_zeros(x.shape[0], math.comb(x.shape[1] + degree, degree), y.shape[1])
    for i in steps:
        total.baddbmm_(_features(x[..., i : i + steps.step], degree), y[..., i : i + steps.step].mT)
    return total


def _expand(x: Tensor, state: Tensor, degree: int, left: Tensor | None = None) -> Tensor:
    """φ(x_l)ᵀ state, (N, channels, L); with ``left`` its channels are (left, rest), and left_l is contracted with them."""
    steps = _chunks(x, degree)
    parts = []
    for i in steps:
        part = state.mT @ _features(x[..., i : i + steps.step], degree)
        if left is not None:
            part = (part.unflatten(1, (left.shape[1], -1)) * left[:, :, None, i : i + steps.step]).sum(1)
        parts.append(part)
    return torch.cat(parts, 2)


@dataclass(frozen=True)
class NormThreshold:
    """How far attention is below the norm threshold; made by `norm_threshold`.

    Args:
        length: L, the number of keys.
        largest_entry: Γ, the largest absolute entry of queries and keys.
        root_log_length: √(log L). The theory has almost linear algorithms for Γ = o(√log L), and none above, if SETH holds.
        logit_bound: R, a bound on the absolute logits, from the largest norms of the queries and of the centred keys.
        tolerance: what was asked for.
        degree: the least one that guarantees the tolerance; None where 60 is too little.
        features: columns of the low-rank factors at this degree; None likewise.
        error: the guaranteed η, with :math:`|\\tilde f_{ij} - f_{ij}| \\le \\eta f_{ij}`; None likewise.
    """

    length: int
    largest_entry: float
    root_log_length: float
    logit_bound: float
    tolerance: float
    degree: int | None
    features: int | None
    error: float | None

    @property
    def within(self) -> bool:
        """Whether fewer features than tokens are enough: the factors then cost less than the matrix that they replace."""
        return self.features is not None and self.features < self.length

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "within": self.within}


def norm_threshold(query: Tensor, key: Tensor, *, tolerance: float = 1e-3, scale: float | None = None) -> NormThreshold:
    r"""Measure the norms that decide whether attention and its LoRA gradient can be had in less than quadratic time.

    With R the largest logit that the norms allow, the Chebyshev series of exp cut at degree g errs by at most
    :math:`\varepsilon = e^{R} \sum_{n>g} 2 I_n(R)` relative to exp, and each entry of the attention matrix by
    :math:`\eta = 2\varepsilon / (1 - \varepsilon)`. It takes :math:`\binom{d+g}{g}` features.

    Args:
        query, key: shapes (..., L, d), as in `polynomial_attention`.
        tolerance: relative error allowed for each entry of the attention matrix.
        scale: factor of the logits; default 1/√d.

    Raises:
        TypeError, ValueError: as `polynomial_attention`.

    Example:
        >>> q, k = torch.randn(2, 4096, 8, generator=torch.Generator().manual_seed(0))
        >>> norm_threshold(0.3 * q, 0.3 * k).within, norm_threshold(3 * q, 3 * k).within
        (True, False)

    Reference:
        Hu et al., "Computational Limits of Low-Rank Adaptation (LoRA) for Transformer-Based Models", arXiv 2406.03136: the shared
        bound on the norms of X, W and αBA/r. The degree is that of Aggarwal and Alman (2022), with its constants.
    """
    _check(query, key)
    if not tolerance > 0:
        raise ValueError(f"'tolerance' must be above 0, not {tolerance}")
    bound = _logit_bound(query, _centred(key), _scale(query, scale))
    degree = _degree_for(bound, tolerance)
    return NormThreshold(
        length=key.shape[-2],
        largest_entry=float(torch.stack([query.detach().abs().amax(), key.detach().abs().amax()]).amax()),
        root_log_length=math.sqrt(math.log(max(key.shape[-2], 1))),
        logit_bound=bound,
        tolerance=tolerance,
        degree=degree,
        features=None if degree is None else math.comb(query.shape[-1] + degree, degree),
        error=None if degree is None else _entry_error(bound, degree),
    )


def _scale(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def _centred(key: Tensor) -> Tensor:
    # Softmax does not see a vector that all keys share; without it their norms, and with them the degree, are smaller.
    return key - key.mean(-2, keepdim=True)


def _logit_bound(query: Tensor, key: Tensor, scale: float) -> float:
    norms = [x.detach().float().norm(dim=-1).amax().double() for x in (query, key)]
    bound = float(norms[0] * norms[1]) * abs(scale)
    if not math.isfinite(bound):
        raise ValueError("'query' or 'key' has entries that are not finite (NaN or infinity)")
    return max(bound, 1e-3)


def _check(query: Tensor, key: Tensor, value: Tensor | None = None) -> None:
    named = {"query": query, "key": key} | ({} if value is None else {"value": value})
    for name, x in named.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            came = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"'{name}' must be a floating tensor, not {came}")
        if x.ndim < 2 or 0 in x.shape:
            raise ValueError(f"'{name}' has shape {tuple(x.shape)}; allowed: (..., length, dim), no dimension of size 0")
        if x.dtype != query.dtype or x.device != query.device:
            raise TypeError(f"'{name}' is {x.dtype} on {x.device}; query is {query.dtype} on {query.device}: they must agree")
        if x.shape[:-2] != query.shape[:-2]:
            raise ValueError(f"'{name}' has leading shape {tuple(x.shape[:-2])}; query has {tuple(query.shape[:-2])}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"'key' has {key.shape[-1]} channels; allowed: as many as query, {query.shape[-1]}")
    if value is not None and value.shape[-2] != key.shape[-2]:
        raise ValueError(f"'value' has length {value.shape[-2]}; allowed: as long as key, {key.shape[-2]}")


def polynomial_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    tolerance: float = 1e-3,
    degree: int | None = None,
    scale: float | None = None,
    max_features: int = 20_000,
) -> Tensor:
    r"""Softmax attention and its gradient without an L x L matrix, each entry within a guaranteed relative error.

    A polynomial p near exp makes the attention matrix low-rank, :math:`f \approx D^{-1} U V^\top`, rows of U and V being the
    monomials of a query and of a key. The gradient in the logits,

    .. math:: p = p_1 - p_2, \qquad p_1 = f \odot (dO\,V^\top), \qquad p_2 = \operatorname{diag}(r) f, \quad r_i = dO_i \cdot O_i,

    is then a chain of low-rank matrices: :math:`p_1` is the row-wise Kronecker product of the factors of f and of
    :math:`dO\,V^\top`. Products with queries, keys and values contract it from the right, so that no factor is stored whole. For
    k features time is :math:`O(L k d^2)`, memory :math:`O(L d + k d^2)`. LoRA's gradient follows by the chain rule of the
    projections that gave query, key and value, which is linear in L: see `lora_attention_gradient`.

    Args:
        query: shape (..., L, d), floating; float16 and bfloat16 are computed in float32.
        key: shape (..., S, d), dtype and device of ``query``.
        value: shape (..., S, e), likewise.
        tolerance: largest relative error η of an entry of the attention matrix; the least degree that guarantees it is taken.
        degree: of the polynomial, instead of choosing it by ``tolerance``; then nothing is guaranteed.
        scale: factor of the logits; default 1/√d, as in `torch.nn.functional.scaled_dot_product_attention`.
        max_features: most monomials allowed.

    Returns:
        Shape (..., L, e), dtype of ``query``. In exact arithmetic it is within :math:`\eta \max_j |v_j|` of exact attention, and the
        gradient in a query within :math:`(3\eta + \eta^2)\, |scale| \max_j \|k_j\| \max_j |dO_i \cdot v_j|` of the exact one, keys
        centred. Round-off is multiplied by up to :math:`e^{2R}`, R bounding the logits.

    Raises:
        TypeError: an input that is not floating, or of another dtype or device than ``query``.
        ValueError: shapes that do not fit, no tokens, entries that are not finite in query or key, an option out of range, or norms
            above the threshold: more than ``max_features`` would be needed.

    Deviations: the keys' mean is taken off first, which softmax does not see. Degree and weights come from the norms that the inputs
    have, as constants for the gradient, and are shared by all leading dimensions. The gradient is the paper's chained approximation
    of the exact gradient; the derivative of the approximate output would have p' in the place of p.

    When not to use it: with a mask; with more than about 16 channels a head or logits beyond about 3, where features outnumber
    tokens (see `norm_threshold`); below a few thousand tokens, where exact attention is faster; for second derivatives.

    Example:
        >>> q, k, v = 0.5 * torch.randn(3, 1000, 4, generator=torch.Generator().manual_seed(0))
        >>> exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        >>> bool((polynomial_attention(q, k, v) - exact).abs().max() < 1e-3 * v.abs().max())
        True

    Reference:
        Hu et al., "Computational Limits of Low-Rank Adaptation (LoRA) for Transformer-Based Models", arXiv 2406.03136: the almost
        linear algorithm. Alman and Song, arXiv 2302.13214 and 2402.04497: the same for attention and for its gradient.
    """
    _check(query, key, value)
    factor = _scale(query, scale)
    if not math.isfinite(factor):
        raise ValueError(f"'scale' must be finite, not {scale}")
    key = _centred(key)
    bound = _logit_bound(query, key, factor)
    if degree is None:
        if not tolerance > 0:
            raise ValueError(f"'tolerance' must be above 0, not {tolerance}")
        chosen = _degree_for(bound, tolerance)
    elif not 1 <= degree <= MAX_DEGREE:
        raise ValueError(f"'degree' must be 1 to {MAX_DEGREE}, not {degree}")
    else:
        chosen = degree
    features = math.inf if chosen is None else math.comb(query.shape[-1] + chosen, chosen)
    if chosen is None or features > max_features:
        needed = f"more than degree {MAX_DEGREE}" if chosen is None else f"degree {chosen} and {features} features"
        raise ValueError(
            f"logits of up to {bound:.3g} in {query.shape[-1]} channels need {needed}; 'max_features' allows {max_features}: "
            "these norms are above the threshold, take exact attention or scale them down"
        )
    lead, out_dtype = query.shape[:-2], query.dtype
    work = torch.promote_types(out_dtype, torch.float32)
    flat = [x.to(work).reshape(-1, *x.shape[-2:]).mT.contiguous() for x in (query, key, value)]
    weights = torch.from_numpy(_weights(query.shape[-1], chosen, factor, bound)).to(flat[0])[:, None]
    out: Tensor = _PolynomialAttention.apply(*flat, weights, chosen, factor)  # type: ignore[no-untyped-call]
    return out.mT.reshape(*lead, query.shape[-2], value.shape[-1]).to(out_dtype)


class LoRAGradient(NamedTuple):
    """Loss and gradients that `lora_attention_gradient` gives."""

    loss: Tensor
    factors: dict[str, tuple[Tensor, Tensor]]


def lora_attention_gradient(
    x: Tensor,
    target: Tensor,
    weights: Mapping[str, Tensor],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    *,
    alpha: float = 1.0,
    tolerance: float = 1e-3,
    degree: int | None = None,
    scale: float | None = None,
    max_features: int = 20_000,
) -> LoRAGradient:
    r"""Loss of one attention head and its gradient in the LoRA factors, in nearly linear time.

    .. math:: \tfrac12 \big\| \operatorname{softmax}(\beta\, X W_Q^\top W_K X^\top)\, X W_V^\top - Y \big\|_F^2, \qquad
        W = W^\star + \tfrac{\alpha}{r} B A.

    Args:
        x: X, shape (..., L, D).
        target: Y, shape (..., L, e).
        weights: frozen :math:`W^\star` under 'query', 'key' and 'value', shapes (d, D), (d, D) and (e, D).
        factors: (A, B), shapes (r, D) and (out, r), of those projections that are adapted: all three, or only 'query' and 'value', ...
        alpha: LoRA's α; B A is multiplied by α/r.
        tolerance, degree, scale, max_features: as in `polynomial_attention`; scale is β.

    Returns:
        ``loss``, a scalar, and ``factors``, the gradients in (A, B) under the names of ``factors``.

    Raises:
        TypeError, ValueError: as `polynomial_attention`; names or shapes that do not fit.

    When not to use it: to train a model: put `polynomial_attention` in the place of its attention, and any adapter's gradient comes
    from autograd.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x, y = torch.randn(2, 500, 4, generator=g) / 2
        >>> weights = {name: torch.eye(4) for name in ("query", "key", "value")}
        >>> factors = {"query": (torch.randn(2, 4, generator=g), torch.zeros(4, 2))}
        >>> [tuple(grad.shape) for grad in lora_attention_gradient(x, y, weights, factors).factors["query"]]
        [(2, 4), (4, 2)]

    Reference:
        Hu et al., arXiv 2406.03136: the approximate LoRA gradient computation problem, partial and full adaptation.
    """
    names = ("query", "key", "value")
    if set(weights) != set(names) or not factors or not set(factors) <= set(names):
        raise ValueError(
            f"'weights' has {sorted(weights)} and 'factors' {sorted(factors)}; allowed: weights query, key and value, "
            "and factors for at least one of them"
        )
    named = [("'x'", x), ("'target'", target), *((f"weight of '{name}'", w) for name, w in weights.items())]
    for what, m in (*named, *((f"a factor of '{name}'", m) for name, pair in factors.items() for m in pair)):
        if not isinstance(m, Tensor) or not m.is_floating_point():
            raise TypeError(f"{what} must be a floating tensor, not {m.dtype if isinstance(m, Tensor) else type(m).__name__}")
    for name in names:
        wanted = ((weights[name].shape[0], x.shape[-1]),)
        given: tuple[Tensor, ...] = (weights[name],)
        if name in factors:
            rank = factors[name][0].shape[0]
            wanted, given = (*wanted, (rank, wanted[0][1]), (wanted[0][0], rank)), (*given, *factors[name])
        if [tuple(m.shape) for m in given] != list(wanted):
            came = ", ".join(str(tuple(m.shape)) for m in given)
            raise ValueError(f"weight and factors of '{name}' are {came}; allowed: (out, {x.shape[-1]}), (r, {x.shape[-1]}), (out, r)")
    leaves = {name: (a.detach().requires_grad_(), b.detach().requires_grad_()) for name, (a, b) in factors.items()}
    with torch.enable_grad():
        projected = {name: x.detach() @ weights[name].detach().mT for name in names}
        for name, (a, b) in leaves.items():
            projected[name] = projected[name] + alpha / a.shape[0] * (x.detach() @ a.mT @ b.mT)
        out = polynomial_attention(
            *(projected[name] for name in names), tolerance=tolerance, degree=degree, scale=scale, max_features=max_features
        )
        if target.shape != out.shape:
            raise ValueError(f"'target' has shape {tuple(target.shape)}; allowed: {tuple(out.shape)}, as the output")
        loss = (out - target).square().sum() / 2
    grads = torch.autograd.grad(loss, [m for pair in leaves.values() for m in pair])
    return LoRAGradient(loss.detach(), {name: (grads[2 * i], grads[2 * i + 1]) for i, name in enumerate(leaves)})

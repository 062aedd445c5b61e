"""Softmax attention whose forward and backward pass take nearly linear time, by the polynomial method."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from corollary.adapt._monomials import MAX_DEGREE, contract, degree_for, expand, monomial_weights


class _PolynomialAttention(torch.autograd.Function):
    """Tensors are (N, channels, L); see `polynomial_attention` for the mathematics."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, degree: int, scale: float) -> Tensor:
        state = contract(key, _extended(value), degree).mul_(weights)
        both = expand(query, state, degree)
        out = both[:, :-1] / both[:, -1:]
        ctx.save_for_backward(query, key, value, weights, out, both[:, -1:].clone())
        ctx.degree, ctx.scale = degree, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights, out, normalizer = ctx.saved_tensors
        degree: int = ctx.degree
        scaled = grad / normalizer
        # With u_j = (v_j, 1) and w_i = (dO_i, -dO_i·O_i) / Z_i, the gradient in the logits is p1 - p2 = e_ij (w_i · u_j).
        w = torch.cat([scaled, -(scaled * out).sum(1, keepdim=True)], 1)
        u = _extended(value)
        grads: list[Tensor | None] = [None, None, None]
        if ctx.needs_input_grad[0]:
            state = contract(key, _outer(u, key), degree).mul_(weights)
            grads[0] = expand(query, state, degree, w).mul_(ctx.scale)
        need_key, need_value = ctx.needs_input_grad[1:3]
        if need_key or need_value:
            parts = [_outer(w, query)] if need_key else []
            state = contract(query, torch.cat([*parts, scaled], 1), degree).mul_(weights)
            split = state.shape[2] - value.shape[1]
            if need_key:
                grads[1] = expand(key, state[..., :split], degree, u).mul_(ctx.scale)
            if need_value:
                grads[2] = expand(key, state[..., split:], degree)
        return (*grads, None, None, None)


def _extended(value: Tensor) -> Tensor:
    return torch.cat([value, torch.ones_like(value[:, :1])], 1)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, :, None] * b[:, None]).flatten(1, 2)


def _scale(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def centred(key: Tensor) -> Tensor:
    # Softmax does not see a vector that all keys share; without it their norms, and with them the degree, are smaller.
    return key - key.mean(-2, keepdim=True)


def logit_bound(query: Tensor, key: Tensor, scale: float) -> float:
    norms = [x.detach().float().norm(dim=-1).amax().double() for x in (query, key)]
    bound = float(norms[0] * norms[1]) * abs(scale)
    if not math.isfinite(bound):
        raise ValueError("'query' or 'key' has entries that are not finite (NaN or infinity)")
    return max(bound, 1e-3)


def check_attention(query: Tensor, key: Tensor, value: Tensor | None = None) -> None:
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
    check_attention(query, key, value)
    factor = _scale(query, scale)
    if not math.isfinite(factor):
        raise ValueError(f"'scale' must be finite, not {scale}")
    key = centred(key)
    bound = logit_bound(query, key, factor)
    if degree is None:
        if not tolerance > 0:
            raise ValueError(f"'tolerance' must be above 0, not {tolerance}")
        chosen = degree_for(bound, tolerance)
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
    weights = torch.from_numpy(monomial_weights(query.shape[-1], chosen, factor, bound)).to(flat[0])[:, None]
    out: Tensor = _PolynomialAttention.apply(*flat, weights, chosen, factor)  # type: ignore[no-untyped-call]
    return out.mT.reshape(*lead, query.shape[-2], value.shape[-1]).to(out_dtype)

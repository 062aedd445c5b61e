"""Attention that can be differentiated twice."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    r"""Scaled dot-product attention :math:`\mathrm{softmax}(q k^\top / \sqrt{d})\,v`, written out.

    The fused kernels behind ``scaled_dot_product_attention`` have no second derivative, which Hessian-vector products need;
    at the sizes of these networks the score matrix is small. For long sequences use the fused one.

    Args:
        q: queries (..., tokens, dim).
        k: keys (..., keys, dim).
        v: values (..., keys, dim).
        causal: a query sees the keys up to its own position; needs as many keys as queries.

    Returns:
        (..., tokens, dim).

    Source: Vaswani et al., Attention Is All You Need, arXiv 1706.03762, equation 1.

    Example:
        >>> import torch
        >>> from corollary.models.attention import attention
        >>> x = torch.eye(3)
        >>> attention(x, x, x, causal=True)[0]
        tensor([1., 0., 0.])
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if causal:
        tokens = q.shape[-2]
        future = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    return scores.softmax(-1) @ v

"""A small decoder-only Transformer in LLaMA's style."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corollary.models._checks import need_divisible, need_positive
from corollary.models.attention import attention


class RMSNorm(nn.Module):
    r"""Root mean square normalization: :math:`g \odot x / \sqrt{\mathrm{mean}(x^2) + \epsilon}` over the last axis.

    Written out rather than ``nn.RMSNorm``, because a fused kernel need not be differentiable twice.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467, equation 4.

    Example:
        >>> import torch
        >>> RMSNorm(2)(torch.tensor([3.0, 4.0])) * 12.5**0.5
        tensor([3.0000, 4.0000], grad_fn=<MulBackward0>)
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


def rope_tables(context: int, dim: int, base: float = 10000.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    r"""Cosines and sines of the angles :math:`t\,\theta_i`, :math:`\theta_i = b^{-2i/d}`: two (context, dim / 2) tensors."""
    need_positive(context=context, dim=dim)
    need_divisible("dim", dim, "the pair of coordinates", 2)
    theta = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(context, dtype=torch.float64)[:, None] * theta
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    r"""Turn the coordinate pairs :math:`(i, i + d/2)` of ``x`` (..., tokens, dim) by their position's angles.

    After this the product of a query at position :math:`s` and a key at :math:`t` depends on :math:`s - t` alone.

    Source: Su et al., RoFormer, arXiv 2104.09864, equation 34, with the coordinates paired as transformers' LLaMA does.
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[: x.shape[-2]], sin[: x.shape[-2]]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class CausalSelfAttention(nn.Module):
    """Multi-head attention with rotary positions in which a token sees itself and what stands before it."""

    cos: Tensor
    sin: Tensor

    def __init__(self, dim: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        cos, sin = rope_tables(context, dim // heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed = attention(apply_rope(q, self.cos, self.sin), apply_rope(k, self.cos, self.sin), v, causal=True)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class SwiGLU(nn.Module):
    r"""The gated feed-forward layer :math:`W_d\,(\mathrm{silu}(W_g x) \odot W_u x)`.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202, equation 6.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """Attention and feed-forward, each behind its own norm and added to what came in."""

    def __init__(self, dim: int, heads: int, context: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(dim)
        self.attn = CausalSelfAttention(dim, heads, context)
        self.mlp_norm = RMSNorm(dim)
        # Three matrices of 8/3 dim have as many weights as the two of 4 dim that they replace.
        self.mlp = SwiGLU(dim, 8 * math.ceil(dim / 3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class GPT(nn.Module):
    r"""A small language model in LLaMA's style: RMSNorm before each layer, rotary positions, SwiGLU, no biases, no dropout.

    Weights start from :math:`N(0, 0.02^2)`; the two matrices of a block that write into the residual stream start smaller
    by :math:`\sqrt{2\,\mathrm{depth}}`, so that the stream's variance does not grow with depth. Linear layers carry the names
    that transformers gives LLaMA's (``q_proj`` ... ``down_proj``). Everything can be differentiated twice.

    Args:
        vocab_size: number of tokens.
        dim: width of the residual stream.
        depth: number of blocks.
        heads: attention heads; ``dim / heads`` must be even.
        context: longest row of tokens.
        tied: use the embedding's matrix for the output as well.

    Attributes:
        head: the output ``nn.Linear``, without bias.
        num_features: what goes into it, ``dim``.

    Raises:
        TypeError: where tokens are not integers.
        ValueError: where sizes do not fit together, or a row is longer than ``context``.

    Sources: Touvron et al., LLaMA, arXiv 2302.13971, section 2.2; the scaled start is from Radford et al., Language Models are
    Unsupervised Multitask Learners (GPT-2), section 2.3.

    Example:
        >>> import torch
        >>> from corollary.models import GPT
        >>> net = GPT(256, dim=32, depth=2, heads=4, context=16)
        >>> net(torch.zeros(3, 16, dtype=torch.int64)).shape
        torch.Size([3, 16, 256])
    """

    def __init__(
        self, vocab_size: int, dim: int = 64, depth: int = 2, heads: int = 4, context: int = 64, tied: bool = False
    ) -> None:
        super().__init__()
        need_positive(vocab_size=vocab_size, dim=dim, depth=depth, heads=heads, context=context)
        need_divisible("dim", dim, "2 * heads", 2 * heads)
        self.context = context
        self.num_features = dim
        self.tied = tied
        self.embed = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, context) for _ in range(depth))
        self.norm = RMSNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if writes else 0.02)

    def features(self, tokens: Tensor) -> Tensor:
        """The last hidden states, normalized: (batch, tokens, dim)."""
        if tokens.dim() != 2:
            raise ValueError(f"'tokens' has shape {tuple(tokens.shape)}; allowed: (batch, tokens)")
        if tokens.is_floating_point():
            raise TypeError(f"'tokens' must hold integers, not {tokens.dtype}")
        if tokens.shape[1] > self.context:
            raise ValueError(f"'tokens' holds rows of {tokens.shape[1]}; allowed: up to 'context' = {self.context}")
        x: Tensor = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        hidden: Tensor = self.norm(x)
        return hidden

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, tokens, vocab_size) of the next token at each place of ``tokens`` (batch, tokens)."""
        out: Tensor = self.head(self.features(tokens))
        return out

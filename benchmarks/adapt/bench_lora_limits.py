"""Attention by the polynomial method, forward and backward, and LoRA's gradient through it, against torch's exact attention."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.harness import Bench
from corollary.adapt import lora_attention_gradient, norm_threshold, polynomial_attention
from corollary.claims.timing import keep_freed_memory

DIM, SIZE = 8, 0.25


def _attention(length: int) -> Bench:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (SIZE * torch.randn(1, 1, length, DIM, generator=generator) for _ in range(3))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    grad = torch.ones(1, 1, length, DIM)
    return Bench(
        component="corollary.adapt.polynomial_attention",
        setting=f"forward and backward, {length} tokens of {DIM} channels, logits up to {norm_threshold(q, k).logit_bound:.2f}, tolerance 1e-3",
        ours=lambda: torch.autograd.grad(polynomial_attention(*leaves), leaves, grad),
        peers={
            "torch.nn.functional.scaled_dot_product_attention, autograd": lambda: torch.autograd.grad(
                scaled_dot_product_attention(*leaves), leaves, grad
            )
        },
        rounds=5,
        warmup=1,
    )


def _lora(length: int) -> Bench:
    generator = torch.Generator().manual_seed(0)
    x, target = (SIZE * torch.randn(length, DIM, generator=generator) for _ in range(2))
    weights = {name: torch.eye(DIM) for name in ("query", "key", "value")}
    factors = {name: (torch.randn(2, DIM, generator=generator), torch.zeros(DIM, 2)) for name in weights}

    def exact() -> None:
        leaves = {name: [m.clone().requires_grad_() for m in pair] for name, pair in factors.items()}
        q, k, v = ((x @ weights[n].T + x @ a.T @ b.T / 2)[None, None] for n, (a, b) in leaves.items())
        loss = (scaled_dot_product_attention(q, k, v)[0, 0] - target).square().sum() / 2
        torch.autograd.grad(loss, [m for pair in leaves.values() for m in pair])

    return Bench(
        component="corollary.adapt.lora_attention_gradient",
        setting=f"loss and gradient of three rank-2 factors, {length} tokens of {DIM} channels, tolerance 1e-3",
        ours=lambda: lora_attention_gradient(x, target, weights, factors),
        peers={"torch.nn.functional.scaled_dot_product_attention, autograd": exact},
        rounds=5,
        warmup=1,
    )


def cases() -> list[Bench]:
    """Short, medium and long sequences."""
    keep_freed_memory()
    return [*(_attention(length) for length in (256, 1024, 4096, 16384)), _lora(16384)]

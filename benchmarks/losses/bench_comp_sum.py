"""Comp-sum losses against torch's cross-entropy, and one step of robust training against TRADES."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from benchmarks.harness import Bench
from torch import Tensor, nn

from corollary.losses import CompSumLoss, SmoothAdversarialCompSumLoss, TradesLoss, kl_shift, margin_shift, pgd
from corollary.models import MLP


def _forward_backward(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss(logits, target), logits)
    return gradient


def _robust_step(
    loss: nn.Module, shift: Callable[[Tensor, Tensor, Tensor], Tensor], network: MLP, x: Tensor, y: Tensor
) -> None:
    with torch.no_grad():
        clean = network(x)
    moved = pgd(network, x, y, eps=0.1, step_size=0.025, steps=5, loss=lambda z, t: shift(clean, z, t))
    network.zero_grad()
    loss(network(x), network(moved), y).backward()


def cases() -> list[Bench]:
    """Forward and backward of the loss at small and large sizes, then a whole step of robust training."""
    generator = torch.Generator().manual_seed(0)
    benches = []
    for n, classes in ((128, 10), (4096, 100), (256, 32_000)):
        logits = torch.randn(n, classes, generator=generator).requires_grad_()
        target = torch.randint(classes, (n,), generator=generator)
        peer = partial(_forward_backward, F.cross_entropy, logits, target)
        benches += [
            Bench(
                "corollary.losses.CompSumLoss",
                f"tau={tau:g}, forward and backward, {n} x {classes}, float32",
                partial(_forward_backward, CompSumLoss(tau), logits, target),
                {"torch cross_entropy": peer},
            )
            for tau in (1.0, 0.0, 1.5)
        ]
    network = MLP(784, [256, 256], 10)
    x, y = torch.rand(256, 784, generator=generator), torch.randint(10, (256,), generator=generator)
    benches.append(
        Bench(
            "corollary.losses.SmoothAdversarialCompSumLoss",
            "one training step with 5 steps of attack, perceptron 784-256-256-10, batch 256",
            partial(_robust_step, SmoothAdversarialCompSumLoss(), margin_shift, network, x, y),
            {"TRADES": partial(_robust_step, TradesLoss(), lambda a, b, _: kl_shift(a, b), network, x, y)},
        )
    )
    return benches

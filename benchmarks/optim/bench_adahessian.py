"""AdaHessian's step, backward included, against pytorch_optimizer's and against first-order steps, on a small LLaMA."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import pytorch_optimizer
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from benchmarks.harness import Bench
from corollary.claims.timing import keep_freed_memory
from corollary.models import GPT
from corollary.optim import AdaHessian

NAME = "corollary.optim.AdaHessian"


def step(make: Callable[[Iterable[Tensor]], Optimizer], steps: int = 1) -> Callable[[], None]:
    """``steps`` training steps on one batch, each method used as its documentation says."""
    torch.manual_seed(0)
    net = GPT(256, dim=48, depth=2, heads=4, context=32)
    tokens = torch.randint(256, (16, 33))
    optimizer = make(net.parameters())

    def run() -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            if isinstance(optimizer, AdaHessian):
                optimizer.backward(loss)
            else:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")
                    loss.backward(create_graph=isinstance(optimizer, pytorch_optimizer.AdaHessian))
            optimizer.step()

    return run


def _bench(interval: int) -> Bench:
    def ours(params: Iterable[Tensor]) -> Optimizer:
        return AdaHessian(params, lr=1e-3, hessian_interval=interval)

    def peer(params: Iterable[Tensor]) -> Optimizer:
        return pytorch_optimizer.AdaHessian(params, lr=1e-3, update_period=interval)

    return Bench(
        component=NAME,
        setting=f"LLaMA of 80,000 parameters, 512 tokens, {interval} step(s), Hessian refreshed once",
        ours=step(ours, interval),
        peers={
            "pytorch_optimizer.AdaHessian": step(peer, interval),
            "torch.optim.SGD": step(lambda p: torch.optim.SGD(p, lr=1e-3), interval),
            "torch.optim.AdamW": step(lambda p: torch.optim.AdamW(p, lr=1e-3), interval),
        },
    )


def cases() -> list[Bench]:
    """A refresh at every step, and at every fifth."""
    keep_freed_memory()
    return [_bench(interval) for interval in (1, 5)]

"""The norm test against a backward pass for each sample, AdaGrad-Norm's step and the sampler's epoch against torch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.utils.data import BatchSampler, RandomSampler

from benchmarks.harness import Bench
from corollary.claims.timing import keep_freed_memory
from corollary.models import MLP
from corollary.optim import AdaGradNorm, AdaptiveBatchSampler, norm_test


def _test() -> Bench:
    torch.manual_seed(0)
    net = MLP(64, [64], 10)
    x, y = torch.randn(256, 64), torch.randint(10, (256,))

    def loop() -> None:
        rows = []
        for i in range(len(x)):
            net.zero_grad()
            cross_entropy(net(x[i : i + 1]), y[i : i + 1]).backward()  # type: ignore[no-untyped-call]
            rows.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
        gradients = torch.stack(rows)
        float(gradients.var(0).sum() / gradients.mean(0).square().sum())

    def training_step() -> None:
        net.zero_grad()
        cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]

    return Bench(
        component="corollary.optim.norm_test",
        setting="MLP of 4,810 parameters, 256 samples, 64 gradients at a time",
        ours=lambda: norm_test(net, cross_entropy, [(x, y)], chunk_size=64),
        peers={"a backward pass for each sample": loop, "the training step's backward pass": training_step},
    )


def _step() -> Bench:
    def run(make: Callable[[Iterable[Tensor]], Optimizer]) -> Callable[[], None]:
        torch.manual_seed(0)
        net = MLP(512, [512, 512, 512], 10)
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        optimizer = make(net.parameters())
        return lambda: optimizer.step() and None

    return Bench(
        component="corollary.optim.AdaGradNorm",
        setting="step alone, 8 tensors of 790,000 parameters",
        ours=run(lambda p: AdaGradNorm(p, lr=1e-3)),
        peers={
            "torch.optim.Adagrad": run(lambda p: torch.optim.Adagrad(p, lr=1e-3)),
            "torch.optim.SGD": run(lambda p: torch.optim.SGD(p, lr=1e-3)),
        },
    )


def _epoch() -> Bench:
    n, size = 100_000, 64
    ours = AdaptiveBatchSampler(range(n), size, seed=0)
    return Bench(
        component="corollary.optim.AdaptiveBatchSampler",
        setting="one epoch of 100,000 indices by 64",
        ours=lambda: sum(1 for _ in ours),
        peers={
            "torch.utils.data.BatchSampler": lambda: sum(
                1 for _ in BatchSampler(RandomSampler(range(n)), size, drop_last=False)
            )
        },
    )


def cases() -> list[Bench]:
    """The test of one batch, a step of the optimizer, and an epoch of the sampler."""
    keep_freed_memory()
    return [_test(), _step(), _epoch()]

"""A step of LionK with the sign against the Lions at hand, and with other kappas against the sign."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import lion_pytorch
import pytorch_optimizer
import torch
from lion_pytorch.foreach import Lion as ForeachLion
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from benchmarks.harness import Bench
from corollary.claims.timing import keep_freed_memory
from corollary.models import GPT
from corollary.optim import GroupL2, Huber, LionK, Lp

NAME = "corollary.optim.LionK"
SETTING = "step on a LLaMA, 1,870,000 parameters in 39 tensors, float32"


def step(make: Callable[..., Optimizer]) -> Callable[[], object]:
    """One step with real gradients."""
    torch.manual_seed(0)
    net = GPT(256, dim=192, depth=4, heads=6, context=64)
    tokens = torch.randint(256, (8, 65))
    cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
    return make(net.parameters(), lr=1e-7, weight_decay=0.1).step


def cases() -> list[Bench]:
    """The sign against its peers; then each other kappa against torch's AdamW, for whoever chooses between them."""
    keep_freed_memory()
    peers = {
        "pytorch_optimizer.Lion": step(pytorch_optimizer.Lion),
        "lion_pytorch.Lion": step(lion_pytorch.Lion),
        "lion_pytorch.foreach.Lion": step(ForeachLion),
        "torch.optim.AdamW(foreach=True)": step(partial(torch.optim.AdamW, foreach=True)),
    }
    benches = [Bench(NAME, SETTING, step(LionK), peers, rounds=15)]
    for kappa in (Lp(2), GroupL2(), Huber(0.1)):
        adamw = {"torch.optim.AdamW(foreach=True)": step(partial(torch.optim.AdamW, foreach=True))}
        benches.append(Bench(NAME, f"{SETTING}, kappa {kappa!r}", step(partial(LionK, kappa=kappa)), adamw, rounds=15))
    return benches

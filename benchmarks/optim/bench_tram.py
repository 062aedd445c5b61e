"""Steps of SAM, ASAM and TRAM, backward passes included, against pytorch_optimizer's SAM and plain AdamW, on a small LLaMA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_optimizer
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.harness import Bench
from corollary.claims.timing import keep_freed_memory
from corollary.models import GPT
from corollary.optim import ASAM, SAM, TRAM

ADAMW = torch.optim.AdamW


def step(name: str) -> Callable[[], Any]:
    """One training step on one batch, each method used as its documentation says."""
    torch.manual_seed(0)
    net = GPT(256, dim=48, depth=2, heads=4, context=32)
    tokens = torch.randint(256, (32, 33))
    x, y = tokens[:, :-1], tokens[:, 1:].flatten()

    def both() -> tuple[Tensor, Tensor]:
        logits = net(x)
        loss = cross_entropy(logits.flatten(0, 1), y)
        loss.backward()
        return loss, logits

    if name in ("SAM", "ASAM"):
        optimizer: Any = (SAM if name == "SAM" else ASAM)(net.parameters(), ADAMW, lr=1e-3)
        return lambda: optimizer.step(lambda: both()[0])
    if name == "TRAM":
        tram = TRAM(net.parameters(), ADAMW, lr=1e-3)
        return lambda: tram.step(both, lambda: net(x[:4]))
    if name == "AdamW":
        plain = ADAMW(net.parameters(), lr=1e-3)
    else:
        plain = pytorch_optimizer.SAM(net.parameters(), ADAMW, adaptive=name == "peer ASAM", lr=1e-3)

    def closure() -> Tensor:
        plain.zero_grad()
        return both()[0]

    def run() -> None:
        closure()
        plain.step(*([] if name == "AdamW" else [closure]))

    return run


def cases() -> list[Bench]:
    """1,024 tokens a step; TRAM measures its trust region on an eighth of them."""
    keep_freed_memory()
    return [
        Bench(
            component=f"corollary.optim.{name}",
            setting="LLaMA of 80,000 parameters, 1,024 tokens, around AdamW",
            ours=step(name),
            peers={
                f"pytorch_optimizer.SAM{', adaptive' if name != 'SAM' else ''}": step(
                    "peer SAM" if name == "SAM" else "peer ASAM"
                ),
                "torch.optim.AdamW": step("AdamW"),
            },
        )
        for name in ("SAM", "ASAM", "TRAM")
    ]

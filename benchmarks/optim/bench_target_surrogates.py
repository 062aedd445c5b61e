"""SSO's step against torch's, where the loss's gradient is dear and where it is not; and the time to the same loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from benchmarks.harness import Bench
from corollary.data import digits
from corollary.models import MLP
from corollary.optim import SSO

NAME = "corollary.optim.SSO"


def _task(dear: int) -> tuple[MLP, Callable[[], Tensor], Callable[[Tensor], Tensor]]:
    """A linear model, its targets, and a loss that also simulates ``dear`` products of large matrices, as an oracle would."""
    torch.manual_seed(0)
    data = digits(seed=0, flat=True)
    x, y = data.train_x[:256], data.train_y[:256]
    model, big = MLP(64, [], 10), torch.randn(400, 400) / 20

    def loss(z: Tensor) -> Tensor:
        work = big
        for _ in range(dear):
            work = work @ big
        return cross_entropy(z, y) + 0 * work[0, 0]

    return model, lambda: model(x), loss


def _to_goal(dear: int, make: Callable[..., Optimizer], goal: float = 0.4) -> Callable[[], None]:
    """Steps from the same start until the loss is below the goal."""

    def run() -> None:
        model, targets, loss = _task(dear)
        optimizer = make(model.parameters())
        for _ in range(2000):
            if isinstance(optimizer, SSO):
                value = optimizer.step(lambda: (targets(), loss))
            else:
                optimizer.zero_grad()
                value = loss(targets())
                value.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            if float(value) < goal:
                return
        raise RuntimeError("the goal was not reached in 2000 steps")

    return run


def cases() -> list[Bench]:
    """From the same start to the same loss, with a cheap and with a dear oracle."""
    benches = []
    for dear in (0, 20):
        ours = _to_goal(dear, lambda p: SSO(p, lr=8.0, inner_steps=20, inner_options={"backtrack": 0.5, "expand": 2.0}))
        peers = {
            "torch.optim.SGD": _to_goal(dear, lambda p: torch.optim.SGD(p, lr=3.0)),
            "torch.optim.Adam": _to_goal(dear, lambda p: torch.optim.Adam(p, lr=0.1)),
        }
        setting = f"linear logits on 256 digits to a loss of 0.4, oracle of {dear} products of 400 by 400"
        benches.append(Bench(component=NAME, setting=setting, ours=ours, peers=peers, rounds=5, warmup=1))
    return benches

"""A step of SGD with a continual learner attached, against projecting by a dense matrix as GPM's authors do, and a plain step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness import Bench
from corollary.adapt import CUBER, EWC, GPM, ContinualLearner
from corollary.claims.timing import keep_freed_memory

WIDTH, ROWS, RANK = 512, 256, 64


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU(), nn.Linear(WIDTH, WIDTH, bias=False))
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    return net


def _inputs(seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, RANK, generator=g) @ torch.randn(RANK, WIDTH, generator=g)


def ten_steps(make: Callable[[nn.Module], ContinualLearner] | None) -> Callable[[], None]:
    """Ten steps on fixed gradients in a second task, whose inputs are the first one's."""
    net = _net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6)
    if make is not None:
        learner = make(net).attach(optimizer)
        learner.end_task(lambda: net(_inputs(0)).square().mean(1))
        learner.begin_task(lambda: net(_inputs(0)).square().mean(1))

    def run() -> None:
        for _ in range(10):
            optimizer.step()

    return run


def dense() -> Callable[[], None]:
    """The same with one (inputs, inputs) matrix for each layer, multiplied onto the gradient."""
    net = _net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6)
    memory = GPM(net)
    memory.end_task(lambda: net(_inputs(0)).square().mean(1))
    matrices = [basis @ basis.T for basis in memory.bases.values()]

    def run() -> None:
        for _ in range(10):
            for p, matrix in zip(net.parameters(), matrices, strict=True):
                assert p.grad is not None
                p.grad = p.grad - p.grad @ matrix
            optimizer.step()

    return run


def cases() -> list[Bench]:
    """Each learner on two square layers."""
    keep_freed_memory()
    makers: dict[str, Callable[[nn.Module], ContinualLearner]] = {
        "CUBER": CUBER,
        "GPM": GPM,
        "EWC": lambda net: EWC(net, chunk=1),
    }
    return [
        Bench(
            component=f"corollary.adapt.{name}",
            setting=f"10 steps of SGD, two {WIDTH} x {WIDTH} float32 weights, inputs of rank {RANK}",
            ours=ten_steps(make),
            peers={"GPM by dense projection matrices": dense(), "torch.optim.SGD alone": ten_steps(None)},
        )
        for name, make in makers.items()
    ]

"""A mirror step against SGD's, with and without the averaging that the last iterate makes needless."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from benchmarks.harness import Bench
from corollary.claims.timing import keep_freed_memory
from corollary.optim import CompositeMirrorDescent, LastIterateLR

OPTIMIZER, SCHEDULE = "corollary.optim.CompositeMirrorDescent", "corollary.optim.LastIterateLR"


def _model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4)))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def _ours(**options: Any) -> Callable[[], None]:
    optimizer = CompositeMirrorDescent(_model().parameters(), lr=1e-4, **options)
    return lambda: optimizer.step()  # type: ignore[no-any-return]


def _sgd(average: bool = False, shrink: bool = False) -> Callable[[], None]:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    mean = AveragedModel(model) if average else None

    @torch.no_grad()
    def run() -> None:
        optimizer.step()
        if shrink:
            for p in model.parameters():
                p.copy_(nn.functional.softshrink(p, 1e-6))
        if mean is not None:
            mean.update_parameters(model)

    return run


def _rows(mirror: str | None) -> Callable[[], None]:
    """4,096 problems of 100 weights on the simplex: one mirror step, or SGD and a softmax of free parameters."""
    points = nn.Parameter(torch.full((4096, 100), 0.01))
    points.grad = torch.randn_like(points)
    if mirror is None:
        optimizer: torch.optim.Optimizer = torch.optim.SGD([points], lr=1e-2)

        @torch.no_grad()
        def run() -> None:
            optimizer.step()
            torch.softmax(points, 1)

        return run
    optimizer = CompositeMirrorDescent([points], lr=1e-2, mirror=mirror, batch_dims=1)
    return lambda: optimizer.step() and None


def _schedule(ours: bool) -> Callable[[], None]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = LastIterateLR(optimizer, 10**9) if ours else LambdaLR(optimizer, lambda t: (10**9 - t) / 10**13.5)

    def run() -> None:
        optimizer.step()
        schedule.step()

    return run


def cases() -> list[Bench]:
    """Elementwise steps on a million parameters, rows on the simplex, and the schedule's own cost."""
    keep_freed_memory()
    return [
        Bench(
            component=OPTIMIZER,
            setting="step alone, euclidean, 8 tensors of 1,050,000 parameters",
            ours=_ours(),
            peers={"torch.optim.SGD": _sgd(), "torch.optim.SGD and AveragedModel": _sgd(average=True)},
        ),
        Bench(
            component=OPTIMIZER,
            setting="step alone, euclidean with l1, 8 tensors of 1,050,000 parameters",
            ours=_ours(composite="l1", weight=0.01),
            peers={"torch.optim.SGD and softshrink": _sgd(shrink=True)},
        ),
        Bench(
            component=OPTIMIZER,
            setting="step alone, entropy, 4,096 problems of 100 weights",
            ours=_rows("entropy"),
            peers={"torch.optim.SGD and softmax": _rows(None)},
        ),
        Bench(
            component=SCHEDULE,
            setting="step of SGD on one number, and of its schedule",
            ours=_schedule(True),
            peers={"torch.optim.lr_scheduler.LambdaLR": _schedule(False)},
            memory=False,
        ),
    ]

"""A schedule's step against torch's schedules, refinement against the authors' formula as they wrote it, and the recorder's cost."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.ndimage import median_filter
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler

from benchmarks.harness import Bench
from corollary.optim import GradNormRecorder, LinearDecay, RefinedSchedule, refine_schedule

STEPS = 1000


def _schedule(make: Callable[[Optimizer], LRScheduler]) -> Callable[[], None]:
    """A whole run of a schedule on four parameter groups, its building included."""

    def run() -> None:
        groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.1} for _ in range(4)]
        optimizer = torch.optim.SGD(groups)
        schedule = make(optimizer)
        optimizer.step()
        for _ in range(STEPS):
            schedule.step()

    return run


def _loop(norms: np.ndarray, smoothing: float = 0.1) -> Callable[[], np.ndarray]:
    """The same median and weights, with a loop over the steps for the products."""

    def run() -> np.ndarray:
        width = 2 * (int(smoothing * len(norms)) // 2) + 1
        padded = np.pad(norms, (0, 2 * width), mode="reflect")
        weights = median_filter(padded, size=width, mode="nearest")[: len(norms)] ** -2.0
        sums = np.append(np.flip(np.cumsum(np.flip(weights))), 0.0)
        out = np.zeros(len(norms))
        for t in range(len(norms)):
            out[t] = weights[t] * sums[t + 1]
        return out / out.max()

    return run


def _training(record: bool) -> Callable[[], None]:
    """Ten steps of AdamW on a perceptron of 220,000 parameters, with or without the recorder."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10))
    x, y = torch.randn(64, 256), torch.randint(10, (64,))
    optimizer = torch.optim.AdamW(net.parameters())
    if record:
        recorder = GradNormRecorder(optimizer, "l1")

    def run() -> None:
        for _ in range(10):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        if record:
            recorder.load_state_dict({"norm": "l1", "norms": torch.empty(0)})

    return run


def cases() -> list[Bench]:
    """Whole runs of the schedules, refinement of a long run, and training with the recorder."""
    rng = np.random.default_rng(0)
    norms = np.exp(np.cumsum(rng.normal(size=20_000)) / 200)
    multipliers = refine_schedule(torch.from_numpy(norms[:STEPS]))
    setting = f"{STEPS} steps, 4 groups"
    return [
        Bench(
            component="corollary.optim.LinearDecay",
            setting=setting,
            ours=_schedule(lambda optimizer: LinearDecay(optimizer, STEPS, warmup_steps=100)),
            peers={
                "torch.optim.lr_scheduler.LinearLR": _schedule(lambda optimizer: LinearLR(optimizer, 1.0, 0.0, STEPS)),
                "torch.optim.lr_scheduler.CosineAnnealingLR": _schedule(lambda optimizer: CosineAnnealingLR(optimizer, STEPS)),
            },
        ),
        Bench(
            component="corollary.optim.RefinedSchedule",
            setting=setting,
            ours=_schedule(lambda optimizer: RefinedSchedule(optimizer, multipliers)),
            peers={
                "torch.optim.lr_scheduler.LambdaLR": _schedule(
                    lambda optimizer: LambdaLR(optimizer, lambda step: float(multipliers[min(step, STEPS - 1)]))
                )
            },
        ),
        Bench(
            component="corollary.optim.refine_schedule",
            setting="20,000 norms, the median over 2,001",
            ours=lambda: refine_schedule(torch.from_numpy(norms)),
            peers={"loop over the steps": _loop(norms)},
        ),
        Bench(
            component="corollary.optim.GradNormRecorder",
            setting="10 steps of AdamW, 200,000 parameters, backward included",
            ours=_training(record=True),
            peers={"without recording": _training(record=False)},
        ),
    ]

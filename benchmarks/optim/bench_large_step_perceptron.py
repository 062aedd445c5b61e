"""Fitting to separation, against scikit-learn's perceptron, which steps by one sample at a time in compiled code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.linear_model import Perceptron

from benchmarks.harness import Bench
from corollary.optim import BatchPerceptron, LogisticGD, NormalizedLogisticGD

MODELS: dict[str, Callable[[], Any]] = {
    "BatchPerceptron": lambda: BatchPerceptron(),
    "NormalizedLogisticGD": lambda: NormalizedLogisticGD(100.0),
    "LogisticGD": lambda: LogisticGD(100.0),
}


def _bench(name: str, setting: str, x: Any, y: np.ndarray) -> Bench:
    def peer() -> None:
        model = Perceptron(shuffle=False, tol=None, max_iter=1)
        for _ in range(10_000):  # whole passes until nothing is wrong, as ours stop
            model.partial_fit(x, y, classes=[-1, 1])
            if model.score(x, y) == 1.0:
                return

    def ours() -> None:
        MODELS[name]().fit(x, y)

    return Bench(
        component=f"corollary.optim.{name}", setting=setting, ours=ours, peers={"sklearn.linear_model.Perceptron": peer}
    )


def cases() -> list[Bench]:
    """Two clouds with a gap between them, dense and sparse."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=100) / 10
    x = rng.normal(size=(5000, 100))
    y = np.where(x @ w > 0, 1, -1)
    x += 0.5 * y[:, None] * w
    hollow = sparse.random_array((5000, 2000), density=0.01, rng=rng, format="csr")
    v = rng.normal(size=2000)
    sides = np.where(hollow @ v > 0, 1, -1)
    gap = np.flatnonzero(np.abs(hollow @ v) > 0.5)
    made = []
    for name in MODELS:
        made.append(_bench(name, "5,000 x 100 dense, two classes, to separation", x, y))
        made.append(_bench(name, f"{len(gap):,} x 2,000 sparse (1 %), two classes, to separation", hollow[gap], sides[gap]))
    return made

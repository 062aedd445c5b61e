"""AdaHessian (arXiv 2006.00719): how its claims are measured."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from corollary.optim import AdaHessian
from corollary.testing import Case, Problem


def oracle(
    problem: Problem,
    steps: int,
    lr: float = 0.15,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-4,
    weight_decay: float = 0.0,
    hessian_power: float = 1.0,
    block_size: int = 1,
    average_conv_kernel: bool = True,
    signed: bool = False,
    hessian_interval: int = 1,
    n_samples: int = 1,
) -> list[list[NDArray[np.float64]]]:
    """AdaHessian entry by entry, with the exact diagonal in place of its estimate (equal where the Hessian is diagonal)."""
    assert problem.hessian_diagonal is not None
    assert n_samples >= 1
    params = [p.copy() for p in problem.start]
    means = [np.zeros(p.shape) for p in params]
    squares = [np.zeros(p.shape) for p in params]
    refreshes, path = 0, []
    for t in range(1, steps + 1):
        gradients, diagonals = problem.gradient(params), problem.hessian_diagonal(params)
        refresh = (t - 1) % hessian_interval == 0
        refreshes += refresh
        for p, g, d, m, v in zip(params, gradients, diagonals, means, squares, strict=True):
            blocks: dict[Any, list[tuple[int, ...]]] = {}
            for place, index in enumerate(np.ndindex(p.shape)):
                key: Any = place
                if p.ndim > 2 and average_conv_kernel:
                    key = index[:2]
                elif p.ndim == 2:
                    key = place // block_size
                blocks.setdefault(key, []).append(index)
            for members in blocks.values():
                average = sum(d[i] if signed else abs(d[i]) for i in members) / len(members)
                for i in members:
                    m[i] = betas[0] * m[i] + (1 - betas[0]) * g[i]
                    if refresh:
                        v[i] = betas[1] * v[i] + (1 - betas[1]) * average**2
                    scale = (v[i] / (1 - betas[1] ** refreshes)) ** (hessian_power / 2) + eps
                    p[i] -= lr * (m[i] / (1 - betas[0] ** t) / scale + weight_decay * p[i])
        path.append([p.copy() for p in params])
    return path


def backward(optimizer: Optimizer, loss: Tensor) -> None:
    """Gradients as AdaHessian makes them itself."""
    assert isinstance(optimizer, AdaHessian)
    optimizer.backward(loss)


CONFORMANCE = {
    "corollary.optim.AdaHessian": Case(
        AdaHessian,
        tags={
            "oracle": oracle,
            "options": (
                {},
                {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-2, "weight_decay": 0.1},
                {"hessian_power": 0.5, "block_size": 5},
                {"average_conv_kernel": False, "n_samples": 3},
                {"hessian_interval": 3, "signed": True, "block_size": 4},
            ),
            "backward": backward,
            "half_state": "float32",
            "fsdp2": "refused",
        },
    ),
}

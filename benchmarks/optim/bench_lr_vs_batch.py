"""Lanczos against ARPACK, on a dense matrix and on a network's Hessian; one learnt run against a grid of rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.harness import Bench
from corollary.claims.timing import keep_freed_memory
from corollary.data import digits
from corollary.linalg import HessianOperator, SymmetricOperator, extreme_eigenvalues
from corollary.models import MLP
from corollary.optim import SLQLearningRate

RATES = (0.03, 0.1, 0.3, 1.0, 3.0)


def _network(width: int) -> tuple[nn.Module, Callable[[int], torch.Tensor]]:
    torch.manual_seed(0)
    data = digits(flat=True)
    net = MLP(data.train_x.shape[1], [width], len(data.classes), activation=nn.Tanh)

    def loss(samples: int) -> torch.Tensor:
        rows = torch.randint(len(data.train_x), (samples,))
        return cross_entropy(net(data.train_x[rows]), data.train_y[rows])

    return net, loss


def _both_ends(setting: str, operator: SymmetricOperator, multiply: Callable[[NDArray[Any]], NDArray[Any]]) -> Bench:
    """Both ends of the spectrum to a residual of 1e-6 of its radius: ARPACK stops at the same bound."""
    n = operator.shape[0]
    peer = LinearOperator((n, n), matvec=multiply, dtype=np.float64 if operator.dtype == torch.float64 else np.float32)
    return Bench(
        component="corollary.linalg.extreme_eigenvalues",
        setting=setting,
        ours=lambda: extreme_eigenvalues(operator, tol=1e-6, vectors=True),
        peers={"scipy.sparse.linalg.eigsh": lambda: eigsh(peer, k=2, which="BE", tol=1e-6)},
    )


def _dense() -> Bench:
    noise = torch.randn(1500, 1500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = (noise + noise.T) / (2 * 1500) ** 0.5
    matrix[0, 0] += 5
    array = matrix.numpy()
    return _both_ends("Wigner matrix with an outlier, 1500 x 1500, float64", matrix, lambda v: array @ v)


def _hessian() -> Bench:
    net, loss = _network(64)
    hessian = HessianOperator(loss(1024), net.parameters())
    return _both_ends(
        "Hessian of an MLP of 4,800 parameters on 1,024 digits, float32",
        hessian,
        lambda v: (hessian @ torch.from_numpy(v.reshape(-1).astype(np.float32))).numpy(),
    )


def _train(steps: int, lr: float, momentum: float, learn: bool) -> None:
    net, loss = _network(32)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum)
    schedule = None
    if learn:
        schedule = SLQLearningRate(optimizer, lambda: HessianOperator(loss(64), net.parameters()), interval=50, lanczos_steps=8)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(64).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if schedule is not None:
            schedule.step()


def _grid(steps: int) -> None:
    for lr in RATES:
        _train(steps, lr, 0.9, False)


def cases() -> list[Bench]:
    """The two eigensolvers on both operators, and the learner's run against five of as many steps."""
    keep_freed_memory()
    return [
        _dense(),
        _hessian(),
        Bench(
            component="corollary.optim.SLQLearningRate",
            setting="200 steps of an MLP of 2,400 parameters on digits in batches of 64, 8 Hessian products each 50",
            ours=lambda: _train(200, 0.5, 0.0, True),
            peers={
                "grid of 5 rates, torch.optim.SGD": lambda: _grid(200),
                "one rate, torch.optim.SGD": lambda: _train(200, 0.3, 0.9, False),
            },
            rounds=5,
            memory=False,
        ),
    ]

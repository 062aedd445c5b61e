"""Logistic and softmax regression to a small gradient: the gradient-normalized Newton method against scipy's and torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.harness import Bench
from corollary.data import digits, tabular
from corollary.linalg import GaussNewtonOperator
from corollary.optim import GradientNormalizedNewton

NAME = "corollary.optim.GradientNormalizedNewton"
RIDGE, TOLERANCE = 1e-3, 1e-6


class Problem:
    """Cross-entropy with a ridge penalty, from zero to a gradient of norm ``TOLERANCE``, with every method on the same graph."""

    def __init__(self, x: Tensor, y: Tensor, classes: int) -> None:
        self.x, self.y, self.shape = x.double(), y, (classes, x.shape[1])

    def loss(self, logits: Tensor, weight: Tensor) -> Tensor:
        return cross_entropy(logits, self.y) + RIDGE / 2 * weight.square().sum()

    def outputs(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return self.x @ weight.T, weight

    def slope(self, weight: Tensor) -> float:
        [g] = torch.autograd.grad(self.loss(*self.outputs(weight)), [weight])
        return float(g.norm())

    def ours(self) -> None:
        weight = nn.Parameter(torch.zeros(self.shape, dtype=torch.float64))
        optimizer = GradientNormalizedNewton([weight], curvature="gauss_newton", tol=1e-4)
        for _ in range(100):
            optimizer.step(lambda: (self.outputs(weight), self.loss))
            if self.slope(weight) < TOLERANCE:
                return
        raise RuntimeError("the method did not arrive within 100 steps")

    def trust_ncg(self) -> None:
        def leaf(flat: np.ndarray[Any, Any]) -> Tensor:
            return torch.tensor(flat).view(self.shape).requires_grad_()

        def value(flat: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
            weight = leaf(flat)
            loss = self.loss(*self.outputs(weight))
            [g] = torch.autograd.grad(loss, [weight])
            return loss.item(), g.numpy().ravel()

        def product(flat: np.ndarray[Any, Any], vector: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            weight = leaf(flat)
            given: np.ndarray[Any, Any] = (
                GaussNewtonOperator(self.loss, self.outputs(weight), [weight]) @ torch.tensor(vector)
            ).numpy()
            return given

        start = np.zeros(self.shape).ravel()
        minimize(value, start, jac=True, hessp=product, method="trust-ncg", options={"gtol": TOLERANCE})

    def lbfgs(self) -> None:
        weight = nn.Parameter(torch.zeros(self.shape, dtype=torch.float64))
        optimizer = torch.optim.LBFGS(
            [weight],
            max_iter=1000,
            history_size=10,
            tolerance_grad=TOLERANCE / 10,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(*self.outputs(weight))
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]


def _bench(setting: str, problem: Problem) -> Bench:
    peers: dict[str, Callable[[], None]] = {
        "scipy.optimize.minimize(method='trust-ncg')": problem.trust_ncg,
        "torch.optim.LBFGS": problem.lbfgs,
    }
    return Bench(component=NAME, setting=setting, ours=problem.ours, peers=peers, rounds=5, warmup=1)


def cases() -> list[Bench]:
    """A table with two classes, and digits with ten."""
    table, images = tabular("breast_cancer", seed=0), digits(seed=0, flat=True)
    return [
        _bench("breast cancer, 60 weights, to a gradient of 1e-6", Problem(table.train_x, table.train_y, 2)),
        _bench("digits, 640 weights, to a gradient of 1e-6", Problem(images.train_x[:500], images.train_y[:500], 10)),
    ]

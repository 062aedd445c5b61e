"""The Grassmann head against plain linear heads and a loop over classes; Riemannian SGD against geoopt's."""

from __future__ import annotations

from collections.abc import Callable

import geoopt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Bench
from corollary.linalg import Grassmann, ManifoldParameter, Transposed
from corollary.nn import GrassmannLinear
from corollary.optim import RiemannianSGD


class LoopHead(nn.Module):
    """The head as its formula reads: one class after the other."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        unit = F.normalize(x, dim=-1)
        return torch.stack([25.0 * (unit @ basis.T).norm(dim=-1) for basis in self.weight], dim=-1)


def _head(head: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        head.zero_grad()
        x.grad = None
        head(x).sum().backward()

    return run


def _step(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    for p in optimizer.param_groups[0]["params"]:
        p.grad = 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    return lambda: optimizer.step()


def cases() -> list[Bench]:
    """Forward and backward of the head, and one optimizer step on its weight."""
    found = []
    torch.manual_seed(0)
    for batch, n, classes, dim in ((64, 512, 100, 8), (256, 256, 10, 8)):
        x = torch.randn(batch, n, requires_grad=True)
        head = GrassmannLinear(n, classes, dim)
        peers = {
            "torch.nn.Linear of as many weights": _head(nn.Linear(n, classes * dim, bias=False), x),
            "torch.nn.Linear of one vector a class": _head(nn.Linear(n, classes, bias=False), x),
            "loop over classes": _head(LoopHead(head.weight), x),
        }
        setting = f"forward and backward, batch {batch}, {n} features, {classes} classes of dimension {dim}, float32"
        found.append(Bench("corollary.nn.GrassmannLinear", setting, _head(head, x), peers))
    for classes, n, dim in ((100, 512, 8), (10, 128, 8)):
        manifold = Grassmann(n, dim)
        start = manifold.random_point(classes)
        rows = ManifoldParameter(start.mT.contiguous(), Transposed(manifold))  # as the head stores them
        ours = RiemannianSGD([rows], lr=0.1, momentum=0.9)
        theirs = {
            f"geoopt.optim.RiemannianSGD on {stiefel.__name__}": _step(
                geoopt.optim.RiemannianSGD([geoopt.ManifoldParameter(start.clone(), stiefel())], lr=0.1, momentum=0.9)
            )
            for stiefel in (geoopt.CanonicalStiefel, geoopt.EuclideanStiefel)
        }
        setting = f"step with momentum, {classes} subspaces of dimension {dim} in {n}, float32"
        found.append(Bench("corollary.optim.RiemannianSGD", setting, _step(ours), theirs))
    return found

"""M-FAC against dense solves with the whole Fisher matrix, against SGD's step, and its pruning against torch.nn.utils.prune."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune
from torch.optim import Optimizer

from benchmarks.harness import Bench
from corollary.claims.timing import keep_freed_memory
from corollary.data import digits
from corollary.models import MLP, ResNet
from corollary.optim import MFAC, MatrixFreeFisher, SlidingFisher, mfac_prune

D, M, DAMP = 2000, 64, 1e-3


def _dense(gradients: Tensor) -> Tensor:
    fisher = (gradients.T @ gradients).div_(len(gradients))
    fisher.diagonal().add_(DAMP)
    return fisher


def _static() -> Bench:
    torch.manual_seed(0)
    gradients, x = torch.randn(M, D), torch.randn(D)

    def dense() -> None:
        factor = torch.linalg.cholesky(_dense(gradients))
        torch.cholesky_solve(x.unsqueeze(1), factor)
        torch.cholesky_inverse(factor).diagonal()

    def ours() -> None:
        inverse = MatrixFreeFisher(gradients, DAMP)
        inverse.solve(x)
        inverse.inverse_diagonal()

    return Bench(
        component="corollary.optim.MatrixFreeFisher",
        setting=f"set-up, one product and the diagonal, {M} gradients of {D:,} numbers",
        ours=ours,
        peers={"dense Cholesky": dense},
    )


def _dynamic() -> Bench:
    torch.manual_seed(0)
    window, x = torch.randn(M, D), torch.randn(D)
    fisher = SlidingFisher([window.clone()], DAMP)

    def ours() -> None:
        fisher.update(0, [x])
        fisher.solve([x])

    def dense() -> None:
        window[0] = x
        torch.linalg.solve(_dense(window), x)

    return Bench(
        component="corollary.optim.SlidingFisher",
        setting=f"one gradient exchanged and one product, {M} gradients of {D:,} numbers",
        ours=ours,
        peers={"torch.linalg.solve": dense},
    )


def _step(make: Callable[[Iterable[Tensor]], Optimizer]) -> Callable[[], None]:
    torch.manual_seed(0)
    data, net = digits(), ResNet(1, 10, width=16)
    optimizer = make(net.parameters())

    def run() -> None:
        optimizer.zero_grad()
        cross_entropy(net(data.train_x[:64]), data.train_y[:64]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return run


def _training() -> Bench:
    return Bench(
        component="corollary.optim.MFAC",
        setting="ResNet of 77,000 parameters, 64 digits, backward included, window of 64 gradients",
        ours=_step(lambda p: MFAC(p, lr=1e-4, ngrads=64, damp=1e-2)),
        peers={"torch.optim.SGD": _step(lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9))},
    )


def _pruning() -> Bench:
    torch.manual_seed(0)
    data, net = digits(flat=True), MLP(64, [40, 20], 10)
    batches = [(data.train_x[i : i + 8], data.train_y[i : i + 8]) for i in range(0, 512, 8)]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    def ours() -> None:
        mfac_prune(copy.deepcopy(net), batches, loss, 0.7, damp=DAMP)

    def magnitude() -> None:
        model = copy.deepcopy(net)
        layers = [(module, "weight") for module in model.modules() if isinstance(module, nn.Linear)]
        prune.global_unstructured(layers, prune.L1Unstructured, amount=0.7)  # type: ignore[no-untyped-call]

    return Bench(
        component="corollary.optim.mfac_prune",
        setting="3,560 weights of a digits network to 70% sparsity, 64 gradients included",
        ours=ours,
        peers={"torch.nn.utils.prune.global_unstructured": magnitude},
    )


def cases() -> list[Bench]:
    """Both algorithms, the optimizer's step and one-shot pruning."""
    keep_freed_memory()
    return [_static(), _dynamic(), _training(), _pruning()]

"""What the claims on small convolutional networks share: the task, the training loop, products counted, norms estimated anew."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.flop_counter import FlopCounterMode

from corollary.compress import factorize
from corollary.data import Split, digits, image_patches
from corollary.models import ResNet

TASKS = ("digits", "patches")
BATCH = 64


@lru_cache(maxsize=16)
def split_of(task: str, seed: int) -> Split:
    """Handwritten digits, or 8-pixel patches of photographs, dealt out by the seed."""
    return digits(seed=seed % 2**31) if task == "digits" else image_patches(size=8, per_image=150, seed=seed)


def fresh(task: str, seed: int, width: int = 16) -> ResNet:
    """A residual network of two blocks for the task."""
    torch.manual_seed(seed)
    return ResNet(1 if task == "digits" else 3, 10, width=width, blocks=(1, 1))


def fit(
    net: nn.Module,
    optimizer: Optimizer,
    split: Split,
    epochs: int,
    seed: int,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    after_epoch: Callable[[], object] | None = None,
) -> None:
    """Train for some epochs, the learning rate rising and falling once; ``loss(x, y)`` is the cross-entropy by default."""
    steps = len(split.train_x) // BATCH
    inner = getattr(optimizer, "base_optimizer", optimizer)
    schedule = OneCycleLR(inner, [g["lr"] for g in inner.param_groups], total_steps=epochs * steps)
    generator = torch.Generator().manual_seed(seed)
    net.train()
    for _ in range(epochs):
        order = torch.randperm(len(split.train_x), generator=generator)[: steps * BATCH]
        for rows in order.view(steps, BATCH):
            x, y = split.train_x[rows], split.train_y[rows]
            optimizer.zero_grad()
            value = cross_entropy(net(x), y) if loss is None else loss(x, y)
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        if after_epoch is not None:
            after_epoch()
    net.eval()


@torch.no_grad()
def renew_norms(net: nn.Module, x: Tensor) -> None:
    """Running statistics of batch norms from one pass of the training inputs, as they are after a weight was changed."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    net.train()
    net(x)
    net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, split: Split) -> float:
    """Share of test samples that are right, in points of a hundred."""
    net.eval()
    return 100 * float((net(split.test_x).argmax(1) == split.test_y).double().mean())


@torch.no_grad()
def products(net: nn.Module, x: Tensor) -> int:
    """Multiply-adds of one forward pass over these inputs, counted by torch."""
    with FlopCounterMode(display=False) as counter:
        net(x)
    return int(counter.get_total_flops()) // 2


def factorized(net: nn.Module, split: Split, cap: float, scheme: str, skip: Sequence[str] = ()) -> tuple[nn.Module, float]:
    """A copy, factorized with the largest energy at which its products are at most ``cap`` times the net's; their share."""
    x = split.test_x[:1]
    full = products(net, x)

    def at(energy: float) -> tuple[nn.Module, float]:
        smaller = copy.deepcopy(net)
        factorize(smaller, energy=energy, scheme=scheme, skip=skip)
        return smaller, products(smaller, x) / full

    best = at(0.9999)
    low, high = 0.0, 0.9999
    if best[1] > cap:
        for _ in range(12):
            middle = (low + high) / 2
            found = at(middle)
            low, high = (middle, high) if found[1] <= cap else (low, middle)
            best = found if found[1] <= cap else best
    if best[1] > cap:
        best = at(1e-9)
    renew_norms(best[0], split.train_x)
    return best

"""A small LLaMA on the standard library's source, trained for a few hundred steps and then made smaller."""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from corollary.compress import deploy, factorize, maestro_layers
from corollary.data import TokenStream, stdlib_text
from corollary.models import GPT

RATIOS = (0.5, 0.25, 0.1)
CONTEXT, BATCH = 32, 16


def stream_of(seed: int) -> TokenStream:
    """The text, its blocks dealt out to training and validation by the seed."""
    return TokenStream(stdlib_text(1_000_000), context=CONTEXT, seed=seed % 2**31)


def fresh_gpt(seed: int) -> GPT:
    """Two blocks of width 64 over bytes."""
    torch.manual_seed(seed)
    return GPT(256, dim=64, depth=2, heads=4, context=CONTEXT)


def pretrain(
    net: GPT,
    optimizer: Optimizer,
    stream: TokenStream,
    steps: int,
    seed: int,
    *,
    extra: Callable[[], Tensor] | None = None,
    context: Callable[[], object] | None = None,
    every: Callable[[int], object] | None = None,
) -> None:
    """Train; ``context()`` enters a manager around each forward pass, ``extra()`` is added to the loss, ``every(step)`` comes after."""
    inner = getattr(optimizer, "base_optimizer", optimizer)
    schedule = OneCycleLR(inner, [g["lr"] for g in inner.param_groups], total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        x, y = stream.batch(BATCH, generator)
        optimizer.zero_grad()
        if context is None:
            out = net(x)
        else:
            with context():  # type: ignore[attr-defined]
                out = net(x)
        loss = cross_entropy(out.flatten(0, 1), y.flatten())
        if extra is not None:
            loss = loss + extra()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if every is not None:
            every(step)


@torch.no_grad()
def validation_loss(net: nn.Module, stream: TokenStream) -> float:
    """Nats a byte over 128 validation windows."""
    x, y = stream.windows("val", limit=128)
    return float(cross_entropy(net(x).flatten(0, 1), y.flatten()))


def block_weights(net: GPT) -> int:
    """Weights in the blocks, which is what is made smaller; embedding, output layer and norms stay."""
    return sum(p.numel() for p in net.blocks.parameters() if p.dim() > 1)


def factorized_gpt(net: GPT, ratio: float) -> GPT:
    """A copy, factorized with the largest energy at which the blocks have at most ``ratio`` of their weights."""
    full = block_weights(net)

    def at(energy: float) -> GPT:
        smaller = copy.deepcopy(net)
        factorize(smaller, energy=energy, skip=["head"])
        return smaller

    best, low, high = at(0.9999), 0.0, 0.9999
    if block_weights(best) <= ratio * full:
        return best
    best = at(1e-9)
    for _ in range(8):
        middle = (low + high) / 2
        found = at(middle)
        fits = block_weights(found) <= ratio * full
        low, high = (middle, high) if fits else (low, middle)
        best = found if fits else best
    return best


def cut_gpt(net: GPT, ratio: float, full: int) -> GPT:
    """A deployed copy of a model with Maestro layers, the least important components gone until ``ratio`` of ``full`` is left."""
    layers = maestro_layers(net)
    losses = []
    for name, layer in layers.items():
        importance = layer.importance()
        shares = importance / importance[:1].clamp_min(1e-30)
        losses += [(share, name) for share in shares[1:].tolist()]  # one component always stays
    order = [name for _, name in sorted(losses)]

    def without(count: int) -> GPT:
        gone = Counter(order[:count])
        smaller = copy.deepcopy(net)
        deploy(smaller, {name: layer.rank - gone[name] for name, layer in layers.items()})
        return smaller

    return without(bisect_left(range(len(order)), True, key=lambda count: block_weights(without(count)) <= ratio * full))

"""A forward pass with steering on, against one direction added by a hook, and against the bare model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Bench
from corollary.adapt import GACT
from corollary.claims.timing import keep_freed_memory
from corollary.models import GPT


def _model(width: int) -> tuple[GPT, Tensor]:
    torch.manual_seed(0)
    return GPT(256, dim=width, depth=6, heads=4, context=64).eval(), torch.randint(256, (8, 64))


def forward(width: int, layers: tuple[str, ...] = ()) -> Callable[[], Any]:
    """With these layers steered; with none where empty."""
    model, tokens = _model(width)
    if layers:
        GACT(model, ["blocks.*"]).fit(tokens, tokens.flip(1)).steer(0.5, layers)

    def run() -> None:
        with torch.no_grad():
            model(tokens)

    return run


def one_direction(width: int) -> Callable[[], Any]:
    """A hook on every layer that adds one vector: steering without probes."""
    model, tokens = _model(width)
    vector = torch.randn(width)
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: out + vector)

    def run() -> None:
        with torch.no_grad():
            model(tokens)

    return run


def cases() -> list[Bench]:
    """Two widths with all layers, and two of six layers as the paper advises."""
    keep_freed_memory()
    return [
        Bench(
            component="corollary.adapt.GACT",
            setting=f"forward of (8, 64) tokens, width {width}, {len(layers) if layers[0] != 'blocks.*' else 6} of 6 layers steered",
            ours=forward(width, layers),
            peers={"one direction added in every layer": one_direction(width), "the bare model": forward(width)},
        )
        for width, layers in ((128, ("blocks.*",)), (384, ("blocks.*",)), (384, ("blocks.2", "blocks.3")))
    ]

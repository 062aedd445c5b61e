"""Forward passes of Maestro's layers at an eighth of their rank against the dense layer and against two layers by hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness import Bench
from corollary.compress import MaestroConv2d, MaestroLinear


def forward(layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """One pass without gradients."""

    @torch.no_grad()
    def run() -> Tensor:
        out: Tensor = layer(x)
        return out

    return run


def cases() -> list[Bench]:
    """A linear layer and a convolution."""
    torch.manual_seed(0)
    linear = MaestroLinear(1024, 1024)
    linear.set_rank(128)
    x = torch.randn(256, 1024)
    conv = MaestroConv2d(64, 64, 3, padding=1)
    conv.set_rank(8)
    images = torch.randn(16, 64, 16, 16)
    return [
        Bench(
            component="corollary.compress.MaestroLinear",
            setting="forward, 256 rows, 1024 to 1024 at rank 128, float32",
            ours=forward(linear, x),
            peers={
                "torch.nn.Linear": forward(nn.Linear(1024, 1024), x),
                "two torch.nn.Linear": forward(nn.Sequential(nn.Linear(1024, 128, bias=False), nn.Linear(128, 1024)), x),
            },
        ),
        Bench(
            component="corollary.compress.MaestroConv2d",
            setting="forward, 16 images of 16 x 16, 64 to 64 channels, 3 x 3, at rank 8, float32",
            ours=forward(conv, images),
            peers={
                "torch.nn.Conv2d": forward(nn.Conv2d(64, 64, 3, padding=1), images),
                "two torch.nn.Conv2d": forward(
                    nn.Sequential(nn.Conv2d(64, 8, 3, padding=1, bias=False), nn.Conv2d(8, 64, 1)), images
                ),
            },
        ),
    ]

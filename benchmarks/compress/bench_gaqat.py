"""LSQ's quantizer against torch.ao's learnable one, and a step of GAQAT against one of SAM on the same quantized network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import MovingAverageMinMaxObserver
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize
from torch.optim import SGD

from benchmarks.harness import Bench
from corollary.claims.timing import keep_freed_memory
from corollary.compress import GAQAT, LSQConfig, LSQQuantizer, gaqat_groups, quantize_aware
from corollary.models import ResNet
from corollary.optim import SAM


def torch_ao(scale: float) -> nn.Module:
    """4 bits signed, its step learned, its gradient scaled."""
    peer: Any = _LearnableFakeQuantize(
        MovingAverageMinMaxObserver, -8, 7, scale, use_grad_scaling=True, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric
    )
    peer.enable_param_learning()
    return peer  # type: ignore[no-any-return]


def forward_backward(quantizer: nn.Module, x: Tensor) -> Callable[[], None]:
    """Output and both gradients."""
    leaf, upstream = x.clone().requires_grad_(), torch.randn_like(x)

    def run() -> None:
        leaf.grad = None
        quantizer(leaf).backward(upstream)

    return run


def forward(quantizer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """Output alone."""

    @torch.no_grad()
    def run() -> Tensor:
        out: Tensor = quantizer(x)
        return out

    return run


def step(gaqat: bool) -> Callable[[], None]:
    """One whole step, both passes, on a 4-bit residual network."""
    torch.manual_seed(0)
    net, x, y = ResNet(1, 10, width=16, blocks=(1, 1)), torch.rand(64, 1, 8, 8), torch.randint(0, 10, (64,))
    quantize_aware(net, LSQConfig(bits=4), x)
    options: Any = {"rho": 0.05, "model": net, "lr": 1e-3, "momentum": 0.9}
    optimizer = GAQAT(gaqat_groups(net), SGD, **options) if gaqat else SAM(net.parameters(), SGD, **options)

    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def run() -> None:
        optimizer.step(closure)

    return run


def cases() -> list[Bench]:
    """The quantizer without and with gradients, and the step."""
    keep_freed_memory()
    torch.manual_seed(0)
    x = torch.randn(512, 1024)
    ours, peer = LSQQuantizer(4), torch_ao(0.3)
    ours.scale.data.fill_(0.3)
    name = "torch.ao _LearnableFakeQuantize"
    return [
        Bench(
            "corollary.compress.LSQQuantizer",
            "forward, 512 x 1024, 4 bits, float32",
            forward(ours, x),
            {name: forward(peer, x)},
        ),
        Bench(
            "corollary.compress.LSQQuantizer",
            "forward and backward, 512 x 1024, 4 bits, float32",
            forward_backward(ours, x),
            {name: forward_backward(peer, x)},
        ),
        Bench(
            "corollary.compress.GAQAT",
            "one step, both passes: 4-bit ResNet of 20,000 weights, 64 images of 8 x 8",
            step(True),
            {"corollary.optim.SAM": step(False)},
        ),
    ]

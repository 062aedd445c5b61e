"""Steps of AdamP and SGDP against the authors' package, pytorch_optimizer's and the plain optimizers of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import adamp
import pytorch_optimizer
import torch
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from benchmarks.harness import Bench
from corollary.claims.timing import keep_freed_memory
from corollary.models import GPT, ResNet
from corollary.optim import SGDP, AdamP

Make = Callable[..., Optimizer]
SETTINGS = {
    "resnet": "step on a ResNet, 697,000 parameters in 47 tensors, float32",
    "llama": "step on a LLaMA, 1,870,000 parameters in 39 tensors, float32",
}


def step(make: Make, net: str) -> Callable[[], object]:
    """One step with real gradients; the rate is so small that weights stay at right angles to them."""
    torch.manual_seed(0)
    if net == "resnet":
        resnet = ResNet(3, 10, width=32, blocks=(2, 2, 2))
        cross_entropy(resnet(torch.randn(16, 3, 16, 16)), torch.randint(10, (16,))).backward()  # type: ignore[no-untyped-call]
        return make(resnet.parameters(), lr=1e-7, weight_decay=0.01).step
    gpt = GPT(256, dim=192, depth=4, heads=6, context=64)
    tokens = torch.randint(256, (8, 65))
    cross_entropy(gpt(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
    return make(gpt.parameters(), lr=1e-7, weight_decay=0.01).step


def _bench(component: str, net: str, ours: Make, peers: Mapping[str, Make]) -> Bench:
    return Bench(
        component=f"corollary.optim.{component}",
        setting=SETTINGS[net],
        ours=step(ours, net),
        peers={name: step(make, net) for name, make in peers.items()},
        rounds=15,
    )


def cases() -> list[Bench]:
    """Each optimizer on each network."""
    keep_freed_memory()
    adam: Mapping[str, Make] = {
        "adamp.AdamP": adamp.AdamP,
        "pytorch_optimizer.AdamP": pytorch_optimizer.AdamP,
        "pytorch_optimizer.AdamP(foreach=True)": partial(pytorch_optimizer.AdamP, foreach=True),
        "torch.optim.AdamW(foreach=True)": partial(torch.optim.AdamW, foreach=True),
    }
    sgd: Mapping[str, Make] = {
        "adamp.SGDP": partial(adamp.SGDP, momentum=0.9),
        "pytorch_optimizer.SGDP": partial(pytorch_optimizer.SGDP, momentum=0.9),
        "pytorch_optimizer.SGDP(foreach=True)": partial(pytorch_optimizer.SGDP, momentum=0.9, foreach=True),
        "torch.optim.SGD(foreach=True)": partial(torch.optim.SGD, momentum=0.9, foreach=True),
    }
    return [
        _bench(component, net, ours, peers)
        for component, ours, peers in (("AdamP", AdamP, adam), ("SGDP", partial(SGDP, momentum=0.9), sgd))
        for net in SETTINGS
    ]

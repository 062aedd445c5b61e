"""Gaunt products against e3nn and against the dense contraction, on the same inputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Bench
from corollary.nn import GauntConvolution, GauntManyBody, GauntTensorProduct
from corollary.papers.nn.gaunt import dense_sum, e3nn_full, e3nn_gaunt, e3nn_o3

Call = Callable[..., Tensor]


def _both(call: Call, *inputs: Tensor) -> dict[str, Callable[[], Any]]:
    """The call alone, without gradients, and with a backward pass through every input."""
    grad = torch.ones_like(call(*inputs))

    def forward() -> Tensor:
        with torch.no_grad():
            return call(*inputs)

    return {"forward": forward, "forward and backward": lambda: torch.autograd.grad(call(*inputs), inputs, grad)}


def _cases(component: str, setting: str, ours: Call, peers: dict[str, Call], *inputs: Tensor) -> list[Bench]:
    mine, theirs = _both(ours, *inputs), {name: _both(call, *inputs) for name, call in peers.items()}
    return [
        Bench(f"corollary.nn.{component}", f"{setting}, {pas}", call, {name: their[pas] for name, their in theirs.items()})
        for pas, call in mine.items()
    ]


def _inputs(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def _products() -> list[Bench]:
    cases = []
    for lmax in range(1, 9):
        peers: dict[str, Call] = {
            "e3nn.o3.FullTensorProduct": e3nn_full(lmax),
            "e3nn.o3.TensorProduct (Gaunt paths)": e3nn_gaunt(lmax),
            "dense Gaunt einsum": dense_sum(lmax),
        }
        shape = (64, (lmax + 1) ** 2)
        cases += _cases(
            "GauntTensorProduct", f"L={lmax}, batch 64", GauntTensorProduct(lmax, lmax), peers, *_inputs(shape, shape)
        )
    for lmax in (12, 16):
        shape, fft = (64, (lmax + 1) ** 2), GauntTensorProduct(lmax, lmax, method="fft")
        product = GauntTensorProduct(lmax, lmax)
        cases += _cases("GauntTensorProduct", f"L={lmax}, batch 64", product, {"method='fft'": fft}, *_inputs(shape, shape))
    return cases


def _convolutions() -> list[Bench]:
    """A message over 200 edges: e3nn's channelwise product with its own spherical harmonics as the filter."""
    o3, cases, channels = e3nn_o3(), [], 16
    for lmax in (2, 4, 6):
        features = o3.Irreps([(channels, (d, (-1) ** d)) for d in range(lmax + 1)])
        harmonics = o3.Irreps([(1, (d, (-1) ** d)) for d in range(lmax + 1)])
        # Each path needs an output of its own in e3nn's layout; "uvu" with one filter channel is its convolution.
        paths = [(i, j, k, "uvu", False) for i in range(lmax + 1) for j in range(lmax + 1)
                 for k in range(abs(i - j), min(i + j, lmax) + 1, 2)]  # fmt: skip
        theirs = o3.TensorProduct(features, harmonics, features, paths)

        def call(x: Tensor, vectors: Tensor, theirs: Any = theirs, harmonics: Any = harmonics) -> Tensor:
            kernel = o3.spherical_harmonics(harmonics, vectors, normalize=True, normalization="integral")
            out: Tensor = theirs(x.flatten(1), kernel)
            return out

        ours = GauntConvolution(lmax, lmax, lmax, channels=channels)
        peers: dict[str, Call] = {"e3nn.o3.TensorProduct": call}
        inputs = _inputs((200, channels, (lmax + 1) ** 2), (200, 3))
        cases += _cases("GauntConvolution", f"L={lmax}, 200 edges, {channels} channels", ours, peers, *inputs)
    return cases


def _many_bodies() -> list[Bench]:
    cases = []
    for lmax, order in ((2, 3), (3, 3), (3, 4)):
        steps = [GauntTensorProduct(n * lmax, lmax) for n in range(1, order)]
        e3nn_steps = e3nn_full(lmax) if order == 3 and lmax == 2 else None

        def one_by_one(x: Tensor, steps: list[GauntTensorProduct] = steps) -> Tensor:
            out = x
            for step in steps:
                out = step(out, x)
            return out

        peers: dict[str, Call] = {"repeated GauntTensorProduct": one_by_one}
        if e3nn_steps is not None:
            o3 = e3nn_o3()
            last = o3.FullTensorProduct(e3nn_steps.irreps_out, e3nn_steps.irreps_in1)
            peers["e3nn.o3.FullTensorProduct, twice"] = lambda x, first=e3nn_steps, last=last: last(first(x, x), x)
        ours = GauntManyBody(lmax, order)
        cases += _cases("GauntManyBody", f"L={lmax}, {order} factors, batch 64", ours, peers, *_inputs((64, (lmax + 1) ** 2)))
    return cases


def cases() -> list[Bench]:
    """Products at L = 1 to 8, and at 12 and 16 by both methods; convolutions; many-body products."""
    return _products() + _convolutions() + _many_bodies()

"""Where an adapter sits: one layer's weight as a matrix, and the products with factors that this kind of layer needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KINDS = ("linear", "conv1d", "conv2d", "embedding")


def _is_hf_conv1d(layer: nn.Module) -> bool:
    """transformers' Conv1D, a linear layer with its weight transposed, told without importing transformers."""
    return any(c.__name__ == "Conv1D" and c.__module__.partition(".")[0] == "transformers" for c in type(layer).__mro__)


@dataclass(frozen=True)
class Site:
    r"""The geometry of one adapted layer, without its weight.

    Every supported layer is a linear map of *patches* of its input, so its weight is a matrix M (out × in) and an update of it a
    matrix ΔM of that shape, whatever the layer's own layout:

    ==================================  ===============================  ==============================
    layer                               out                              in
    ==================================  ===============================  ==============================
    ``nn.Linear``                       ``out_features``                 ``in_features``
    transformers' ``Conv1D``            ``nf``                           ``nx``
    ``nn.Conv1d``, ``nn.Conv2d``        ``out_channels``                 ``in_channels / groups · kernel``
    ``nn.Embedding``                    ``embedding_dim``                ``num_embeddings``
    ==================================  ===============================  ==============================

    `reduce`, `scale`, `mix` and `expand` apply factors of ΔM to the layer's input one after the other, so that ΔM is never formed.

    Args:
        kind: one of ``KINDS``.
        weight_shape: shape of the layer's own weight.
        transposed: whether the weight is stored as in × out.
        stride, padding, dilation, groups: of a convolution.
        padding_mode: of a convolution; modes other than zeros are padded by hand, as torch does.
        pad: how much is padded by hand, in ``F.pad``'s order.
    """

    kind: str
    weight_shape: tuple[int, ...]
    transposed: bool = False
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    pad: tuple[int, ...] = ()

    @classmethod
    def of(cls, layer: nn.Module) -> Site:
        """The site of a layer; raises ``TypeError`` where the layer is of no supported kind."""
        if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
            raise TypeError(
                "the output projection of nn.MultiheadAttention is never called as a layer, so an adapter on it would do nothing"
            )
        if isinstance(layer, nn.Linear):
            return cls("linear", tuple(layer.weight.shape))
        if _is_hf_conv1d(layer):
            return cls("linear", tuple(layer.weight.shape), transposed=True)  # type: ignore[arg-type]
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            return cls(
                "conv1d" if isinstance(layer, nn.Conv1d) else "conv2d",
                tuple(layer.weight.shape),
                stride=tuple(layer.stride),
                padding=layer.padding if isinstance(layer.padding, str) else tuple(layer.padding),
                dilation=tuple(layer.dilation),
                groups=layer.groups,
                padding_mode=layer.padding_mode,
                pad=() if layer.padding_mode == "zeros" else tuple(layer._reversed_padding_repeated_twice),
            )
        if isinstance(layer, nn.Embedding):
            if layer.max_norm is not None:
                raise TypeError("an nn.Embedding with 'max_norm' rewrites its own weight in forward; adapters need it frozen")
            return cls("embedding", tuple(layer.weight.shape), transposed=True)
        raise TypeError(
            f"a {type(layer).__name__} cannot be adapted; supported: Linear, Conv1d, Conv2d, Embedding, transformers' Conv1D"
        )

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return self.weight_shape[1] if self.transposed else self.weight_shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the matrix."""
        return self.weight_shape[0] if self.transposed else math.prod(self.weight_shape[1:])

    def matrix(self, weight: Tensor) -> Tensor:
        """The layer's weight as its matrix (out, in); a view where that is possible."""
        return weight.t() if self.transposed else weight.flatten(1)

    def weight(self, matrix: Tensor) -> Tensor:
        """A matrix (out, in) in the layout of the layer's weight; a view."""
        return matrix.t() if self.transposed else matrix.reshape(self.weight_shape)

    # The factors of a grouped convolution are shared by its groups: channels of h are group by group, `rank` each.

    def _kernel(self, matrix: Tensor, spatial: Sequence[int]) -> Tensor:
        kernel = matrix.reshape(matrix.shape[0], -1, *spatial)
        return kernel.repeat(self.groups, *(1,) * (kernel.ndim - 1)) if self.groups > 1 else kernel

    def reduce(self, x: Tensor, a: Tensor) -> Tensor:
        """A · x of every patch of the layer's input, for A (rank, in). Channels last, but second for convolutions."""
        if self.kind == "linear":
            return F.linear(x, a)
        if self.kind == "embedding":
            return F.embedding(x, a.t())
        if self.pad:
            x, padding = F.pad(x, self.pad, mode=self.padding_mode), 0
        else:
            padding = self.padding  # type: ignore[assignment]
        convolve = F.conv1d if self.kind == "conv1d" else F.conv2d
        kernel = self._kernel(a, self.weight_shape[2:])
        return convolve(x, kernel, None, self.stride, padding, self.dilation, self.groups)

    def scale(self, h: Tensor, d: Tensor) -> Tensor:
        """diag(d) · h, for d (rank,) and h of `reduce`, or of (out,) and h of `expand`."""
        if not self.kind.startswith("conv"):
            return h * d
        d = d.repeat(h.shape[-len(self.stride) - 1] // d.numel())
        return h * d.reshape(-1, *(1,) * len(self.stride))

    def mix(self, h: Tensor, r: Tensor) -> Tensor:
        """R · h, for R (rank', rank)."""
        if not self.kind.startswith("conv"):
            return F.linear(h, r)
        convolve = F.conv1d if self.kind == "conv1d" else F.conv2d
        return convolve(h, self._kernel(r, (1,) * len(self.stride)), groups=self.groups)

    def expand(self, h: Tensor, b: Tensor) -> Tensor:
        """B · h, for B (out, rank): a change of the layer's output."""
        if not self.kind.startswith("conv"):
            return F.linear(h, b)
        convolve = F.conv1d if self.kind == "conv1d" else F.conv2d
        return convolve(h, b.reshape(*b.shape, *(1,) * len(self.stride)), groups=self.groups)

    def expand_add(self, out: Tensor, h: Tensor, b: Tensor) -> Tensor:
        """out + B · h, in one pass over ``out`` where the layer is linear."""
        if self.kind.startswith("conv") or out.dtype != h.dtype or torch.is_autocast_enabled(out.device.type):
            return out + self.expand(h, b).to(out.dtype)
        return torch.addmm(out.reshape(-1, out.shape[-1]), h.reshape(-1, h.shape[-1]), b.t()).view(out.shape)

    def dense(self, x: Tensor, matrix: Tensor) -> Tensor:
        """M · x for a dense M (out, in): what a method without factors falls back on."""
        if self.kind == "linear":
            return F.linear(x, matrix)
        if self.kind == "embedding":
            return F.embedding(x, matrix.t())
        if self.pad:
            x, padding = F.pad(x, self.pad, mode=self.padding_mode), 0
        else:
            padding = self.padding  # type: ignore[assignment]
        convolve = F.conv1d if self.kind == "conv1d" else F.conv2d
        return convolve(x, self.weight(matrix), None, self.stride, padding, self.dilation, self.groups)

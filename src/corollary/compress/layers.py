"""Factored layers: two ordinary layers, one after the other, in the place of one."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from corollary.adapt.site import Site
from corollary.compress.sites import is_transposed_linear


class Factored(nn.Sequential):
    r"""A layer of low rank, ``up(down(x))``: an ``nn.Sequential`` of two ordinary layers, so everything that works on those works here.

    ``down`` takes the input to ``rank`` channels and has no bias, ``up`` takes them to the output:

    ==================================  ==============================================  ===============================
    layer                               ``down``                                        ``up``
    ==================================  ==============================================  ===============================
    ``nn.Linear``                       ``nn.Linear(in, rank)``                         ``nn.Linear(rank, out)``
    transformers' ``Conv1D``            ``nn.Linear(in, rank)``                         ``nn.Linear(rank, out)``
    ``nn.Conv1d``, ``nn.Conv2d``        the same kernel, stride and padding, to rank    1 × 1 convolution
    ``nn.Embedding``                    ``nn.Embedding(num, rank)``                     ``nn.Linear(rank, dim)``
    ==================================  ==============================================  ===============================

    Made by `factored`, which other methods that build factored layers may call too.
    """

    down: nn.Module
    up: nn.Module

    def __init__(self, down: nn.Module, up: nn.Module, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = down, up
        self.in_features, self.out_features, self.rank = in_features, out_features, rank

    @property
    def bias(self) -> Tensor | None:
        """The bias of ``up``."""
        return cast("Tensor | None", self.up.bias)

    def matrix(self) -> Tensor:
        """The dense matrix (out, in) that the factors stand for."""
        down = cast(Tensor, self.down.weight)
        down = down.T if isinstance(self.down, nn.Embedding) else down.flatten(1)
        return cast(Tensor, self.up.weight).flatten(1) @ down


def factored(layer: nn.Module, rank: int, *, bias: bool | None = None) -> Factored:
    """A factored layer in the place of a dense one, its weights not yet set.

    Args:
        layer: Linear, Conv1d, Conv2d (one group), Embedding, or transformers' Conv1D.
        rank: channels between the two.
        bias: whether ``up`` has a bias; None: as the layer.

    Returns:
        A `Factored` on the layer's device and dtype.

    Raises:
        TypeError: for another kind of layer.

    Example:
        >>> import torch
        >>> factored(torch.nn.Linear(8, 6), 2)
        Factored(
          (down): Linear(in_features=8, out_features=2, bias=False)
          (up): Linear(in_features=2, out_features=6, bias=True)
        )
    """
    site = Site.of(layer)
    weight = cast(Tensor, layer.weight)
    where: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    wanted = getattr(layer, "bias", None) is not None if bias is None else bias
    n, m = site.in_features, site.out_features
    down: nn.Module
    up: nn.Module
    with torch.random.fork_rng(devices=[]):  # the start that torch draws is thrown away
        if isinstance(layer, nn.Linear) or is_transposed_linear(layer):
            down, up = nn.Linear(n, rank, bias=False, **where), nn.Linear(rank, m, bias=wanted, **where)
        elif isinstance(layer, nn.Embedding):
            down = nn.Embedding(n, rank, padding_idx=layer.padding_idx, sparse=layer.sparse, **where)
            up = nn.Linear(rank, m, bias=wanted, **where)
        elif isinstance(layer, nn.Conv1d | nn.Conv2d) and site.groups == 1:
            kind = nn.Conv1d if isinstance(layer, nn.Conv1d) else nn.Conv2d
            down = kind(
                layer.in_channels,
                rank,
                cast(Any, layer.kernel_size),
                cast(Any, layer.stride),
                cast(Any, layer.padding),
                cast(Any, layer.dilation),
                bias=False,
                padding_mode=cast(Any, layer.padding_mode),
                **where,
            )
            up = kind(rank, m, 1, bias=wanted, **where)
        else:
            raise TypeError(f"a {type(layer).__name__} cannot be factored")
    return Factored(down, up, n, m, rank).train(layer.training)


@torch.no_grad()
def set_factors(layer: Factored, up: Tensor, down: Tensor, bias: Tensor | None) -> Factored:
    """Copy B (out, rank), A (rank, in) and the bias (out,) into a factored layer, rounding to its dtype."""
    own_up, own_down = cast(Tensor, layer.up.weight), cast(Tensor, layer.down.weight)
    own_up.copy_(up.reshape(own_up.shape))
    own_down.copy_(down.T if isinstance(layer.down, nn.Embedding) else down.reshape(own_down.shape))
    if layer.bias is not None:
        layer.bias.copy_(layer.bias.new_zeros(()) if bias is None else bias)
    return layer

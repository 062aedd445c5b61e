"""What `factorize` and `deploy` did to a model, kept with it so that `save` and `load` bring it back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn

from corollary.compress.base import _REGISTRY, CompressConfig, Place, Registry, Spec, Step
from corollary.compress.layers import factored


@dataclass(frozen=True)
class Split(CompressConfig):
    """A record and not a method: layers that were split into two, by their rank and scheme.

    `factorize` and `deploy` leave one in the model. `save` writes it, and `load` makes the same layers on the original's classes.
    """

    def choose(self, places: Sequence[Place]) -> NoReturn:
        """Refuses: `compress` takes methods."""
        raise TypeError("'config' is a record of layers that were split; to split some, call factorize(model) or deploy(model)")

    def spec(self, place: Place, choice: int) -> NoReturn:
        """Refuses, as `choose`."""
        self.choose([place])

    def replace(self, place: Place, choice: int) -> NoReturn:
        """Refuses, as `choose`."""
        self.choose([place])

    def build(self, layer: nn.Module, spec: Spec) -> nn.Module:
        """Two empty layers in the place of a dense one."""
        if spec["scheme"] != "spatial":
            return factored(layer, int(spec["rank"]))
        if not isinstance(layer, nn.Conv2d):
            raise TypeError(f"a {type(layer).__name__} cannot be split spatially")
        return spatial_pair(layer, int(spec["rank"]))


def spatial_pair(layer: nn.Conv2d, rank: int) -> nn.Sequential:
    """An h × 1 convolution to ``rank`` channels and a 1 × w one, in the place of an h × w one; their weights are not yet set."""
    into, out, (h, w) = layer.in_channels, layer.out_channels, layer.kernel_size
    stride, dilation, padding = layer.stride, layer.dilation, layer.padding
    # 'same' and 'valid' say the same of either axis.
    tall, wide = (padding, padding) if isinstance(padding, str) else ((padding[0], 0), (0, padding[1]))
    kind: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    first = nn.Conv2d(into, rank, (h, 1), (stride[0], 1), tall, (dilation[0], 1), bias=False, **kind)
    second = nn.Conv2d(rank, out, (1, w), (1, stride[1]), wide, (1, dilation[1]), bias=layer.bias is not None, **kind)
    return nn.Sequential(first, second).train(layer.training)


def record_split(model: nn.Module, ranks: Mapping[str, int], scheme: str) -> None:
    """Note in a model that these layers were split, behind whatever was done to it before."""
    if not ranks:
        return
    layers: dict[str, Spec] = {}
    for name, rank in ranks.items():
        layers[name] = {"rank": rank, "scheme": scheme}
    registry = model.__dict__.setdefault(_REGISTRY, Registry())
    registry.steps.append(Step(Split(), layers))
    registry.report = None  # of an earlier call of compress, and no longer the whole

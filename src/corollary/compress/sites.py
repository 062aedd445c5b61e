"""Layers as matrices: which ones are compressed, what a layer's inputs are, and where a model holds it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corollary.adapt.inject import Target, find_targets
from corollary.adapt.site import Site, _is_hf_conv1d

__all__ = ["Target", "compressible", "holders", "input_rows", "replace_layer", "site_of"]


def site_of(name: str, layer: nn.Module) -> Site:
    """A layer's geometry; raises ``TypeError`` naming the layer where it cannot be compressed."""
    try:
        site = Site.of(layer)
    except TypeError as error:
        raise TypeError(f"'targets': '{name}': {str(error).replace('adapted', 'compressed')}") from error
    if site.groups > 1:
        raise TypeError(f"'targets': '{name}' is a convolution of {site.groups} groups, which is no one matrix")
    return site


def compressible(model: nn.Module, targets: Target | Sequence[Target] | None) -> dict[str, nn.Module]:
    """The layers to compress, in the model's order: what ``targets`` names, or every linear layer that shares no weight.

    Raises:
        TypeError: for a target of a kind that cannot be compressed.
        ValueError: where nothing matches, or a named layer shares its weight with another: factored, it would be stored twice.
    """
    uses: dict[int, int] = {}
    for _, _, parameter in _parameter_places(model):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    found = {}
    for name, layer in find_targets(model, targets).items():
        site_of(name, layer)
        weight = layer.weight
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise TypeError(
                f"'targets': the weight of '{name}' is no floating parameter; compress the layer before quantizing it"
            )
        if uses[id(weight)] > 1:
            if targets is not None:
                raise ValueError(
                    f"'targets': '{name}' shares its weight with another layer; factored, it would be stored twice"
                )
            continue
        found[name] = layer
    if not found:
        raise ValueError("'targets': every linear layer of the model shares its weight with another; name other layers")
    return found


def _parameter_places(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield module, key, parameter


def holders(model: nn.Module, layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every module and attribute that holds this layer: a layer that is used in two places is replaced in both."""
    return [(module, key) for module in model.modules() for key, child in module._modules.items() if child is layer]


def replace_layer(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put ``new`` wherever the layer of this name stands; gives the model, which is ``new`` where the layer was the model."""
    old = model.get_submodule(name)
    if old is model:
        return new
    new.train(old.training)
    for parent, key in holders(model, old):
        parent._modules[key] = new
    return model


def input_rows(site: Site, x: Tensor) -> Tensor:
    """What the layer's matrix is multiplied with, one row each: (rows, in). Patches for a convolution; not for an embedding."""
    if site.kind == "linear":
        return x.reshape(-1, x.shape[-1])
    one = site.kind == "conv1d"
    kernel = site.weight_shape[2:]
    if site.pad:
        x, padding = F.pad(x, site.pad, mode=site.padding_mode), (0,) * len(kernel)
    elif isinstance(site.padding, str):
        total = [d * (k - 1) if site.padding == "same" else 0 for d, k in zip(site.dilation, kernel, strict=True)]
        sides = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
        x, padding = F.pad(x, sides), (0,) * len(kernel)
    else:
        padding = site.padding
    if x.ndim == len(kernel) + 1:
        x = x[None]
    if one:  # torch unfolds images only
        patches = F.unfold(x[:, :, None], (1, *kernel), (1, *site.dilation), (0, *padding), (1, *site.stride))
    else:
        patches = F.unfold(x, kernel, site.dilation, padding, site.stride)
    return patches.mT.reshape(-1, site.in_features)


def is_transposed_linear(layer: nn.Module) -> bool:
    """Whether the layer is transformers' Conv1D."""
    return _is_hf_conv1d(layer)


def first_tensor(args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
    """A layer's input, given by place or by name."""
    given = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(given, torch.Tensor)
    return given

"""Adding adapters into the weights for inference without cost, and taking them out again, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from corollary.adapt.base import Adapter
from corollary.adapt.inject import AdapterDict, delete_adapter, entry_of, layers_of, registry_of, weight_of


def _refuse_shared(model: nn.Module, site: str, weight: nn.Parameter) -> None:
    shared = [
        f"{prefix}.{key}" if prefix else key
        for prefix, module in model.named_modules()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter is weight and (prefix, key) != (site, "weight")
    ]
    if shared:
        raise ValueError(f"the weight of '{site}' is tied to '{shared[0]}': merging would change both; untie them first")


@torch.no_grad()
def merge_adapters(model: nn.Module, names: str | Sequence[str] | None = None) -> nn.Module:
    r"""Add adapters into the weights: W ← W + ΔW, so that inference costs what the base model costs.

    The sum is formed in float32 at least and rounded once to the weight's dtype. The original weights are kept until
    `unmerge_adapters` puts them back, which so restores every bit; `merge_and_unload` lets go of them.

    Args:
        model: with adapters on it.
        names: adapters to merge; None: those that are active.

    Returns:
        ``model``.

    Raises:
        ValueError: for an unknown name, where an adapter is merged already, where a method cannot be merged, where a weight is
            tied to another module's, or where ΔW is not finite; the weights are then as before.

    Example:
        >>> import torch
        >>> from corollary.adapt import LoRA, adapt, merge_adapters, unmerge_adapters
        >>> model, x = adapt(torch.nn.Linear(4, 3), LoRA(rank=2)), torch.randn(5, 4)
        >>> out = model(x)
        >>> torch.allclose(merge_adapters(model)(x), out), torch.equal(unmerge_adapters(model)(x), out)
        (True, True)
    """
    registry = registry_of(model)
    if names is None:
        chosen = [n for n in registry.entries if any(n in adapters.active for _, _, adapters in layers_of(model, n))]
    else:
        chosen = [names] if isinstance(names, str) else list(names)
    plan: dict[str, tuple[nn.Module, AdapterDict, list[str]]] = {}
    for name in chosen:
        entry_of(model, name)
        for site, layer, adapters in layers_of(model, name):
            if name in adapters.merged:
                raise ValueError(f"adapter '{name}' is merged already")
            plan.setdefault(site, (layer, adapters, []))[2].append(name)
    summed = {}
    for site, (layer, adapters, own) in plan.items():
        weight = weight_of(layer)
        _refuse_shared(model, site, weight)
        total = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for name in own:
            adapter = adapters[name]
            assert isinstance(adapter, Adapter)
            try:
                total += adapter.site.weight(adapter.delta()).to(total.dtype)
            except NotImplementedError as error:
                method = type(registry.entries[name].config).__name__
                raise ValueError(f"{method} cannot be merged into the weight of '{site}': its change is no matrix") from error
        if not bool(total.isfinite().all()):
            raise ValueError(f"merging into '{site}' would give a weight that is not finite")
        summed[site] = total.to(weight.dtype)
    for site, (layer, adapters, own) in plan.items():
        weight = weight_of(layer)
        if adapters.original is None:
            adapters.original = weight.data
        weight.data = summed[site]
        adapters.merged = (*adapters.merged, *own)
    return model


def unmerge_adapters(model: nn.Module) -> nn.Module:
    """Put the original weights back, bit for bit; the adapters act again beside them. Nothing happens where none is merged."""
    for name in registry_of(model).entries:
        for _, layer, adapters in layers_of(model, name):
            if adapters.original is not None:
                weight = weight_of(layer)
                weight.data = adapters.original.to(weight.device)
                adapters.original, adapters.merged = None, ()
    return model


def merge_and_unload(model: nn.Module, names: str | Sequence[str] | None = None) -> nn.Module:
    """Merge adapters for good and take all of them off: a plain model with the keys that it had before `adapt`.

    Args:
        model: with adapters on it.
        names: adapters to merge; None: those that are active. The others are dropped.

    Example:
        >>> import torch
        >>> from corollary.adapt import LoRA, adapt, merge_and_unload
        >>> list(merge_and_unload(adapt(torch.nn.Linear(4, 3), LoRA(rank=2))).state_dict())
        ['weight', 'bias']
    """
    registry = registry_of(model)
    already = {n for n in registry.entries for _, _, adapters in layers_of(model, n) if n in adapters.merged}
    if names is None and already:
        names = [n for n in registry.entries if n not in already and any(n in a.active for _, _, a in layers_of(model, n))]
    merge_adapters(model, names)
    for name in registry.entries:
        for _, _, adapters in layers_of(model, name):
            adapters.original, adapters.merged = None, ()
    for name in list(registry.entries):
        delete_adapter(model, name)
    return model

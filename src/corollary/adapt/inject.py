"""Putting adapters on a model, choosing among them, and taking them off: the model's own code and keys stay as they are."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from corollary.adapt.base import Adapter, AdapterConfig
from corollary.adapt.site import Site, _is_hf_conv1d

_REGISTRY = "_corollary_adapters"
_ATTRIBUTE = "adapters"

Target = str | type[nn.Module]


class AdapterDict(nn.ModuleDict):
    """The adapters of one layer by name, which of them act, and which are merged into the layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.merged: tuple[str, ...] = ()
        self.original: Tensor | None = None  # the weight before merging; a plain attribute, so no state_dict shows it
        self.handle: Any = None

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """The layer's output with every active adapter's change."""
        if self.enabled:
            for name in self.active:
                if name not in self.merged:
                    out = self[name](x, out)
        return out


def _apply(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor:
    # A plain function, so that copies of the model call their own adapters.
    return cast(Tensor, cast(AdapterDict, layer.adapters)(args[0] if args else next(iter(kwargs.values())), out))


@dataclass
class Entry:
    """One named adapter of a model: its configuration, its layers, and the parameters outside that train with it."""

    config: AdapterConfig
    sites: tuple[str, ...]
    modules_to_save: tuple[str, ...]


@dataclass
class Registry:
    """What a model's root knows of its adapters; ``required`` is which parameters trained before the first adapter came."""

    entries: dict[str, Entry] = field(default_factory=dict)
    required: dict[str, bool] = field(default_factory=dict)
    frozen: bool = True


def registry_of(model: nn.Module) -> Registry:
    """The model's registry; raises ``ValueError`` where it has no adapters."""
    found = model.__dict__.get(_REGISTRY)
    if found is None:
        raise ValueError("'model' has no adapters; call adapt(model, ...) first, on this same module")
    return cast(Registry, found)


def entry_of(model: nn.Module, name: str) -> Entry:
    """One named adapter's entry; raises ``ValueError`` naming the adapters that there are."""
    entries = registry_of(model).entries
    if name not in entries:
        raise ValueError(f"no adapter '{name}'; there are: {', '.join(entries)}")
    return entries[name]


def layers_of(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, AdapterDict]]:
    """Name, layer and adapters of every layer that one named adapter sits on."""
    for site in entry_of(model, name).sites:
        layer = model.get_submodule(site)
        yield site, layer, cast(AdapterDict, getattr(layer, _ATTRIBUTE))


def weight_of(layer: nn.Module) -> nn.Parameter:
    """The parameter that a layer's adapters change."""
    return cast(nn.Parameter, layer.weight)


# --------------------------------------------------------------------------------------------------------------- targets


def _matches(name: str, module: nn.Module, target: Target) -> bool:
    if isinstance(target, str):
        return name == target or name.endswith("." + target) or re.fullmatch(target, name) is not None
    return isinstance(module, target)


def find_targets(model: nn.Module, targets: Target | Sequence[Target] | None) -> dict[str, nn.Module]:
    """The layers that ``targets`` names, in the model's order; see `adapt`."""
    candidates = {
        name: module
        for name, module in model.named_modules()
        if f".{_ATTRIBUTE}." not in f".{name}." and not isinstance(module, Adapter)
    }
    if targets is None:
        chosen = {
            name: module
            for name, module in candidates.items()
            if (isinstance(module, nn.Linear) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear))
            or _is_hf_conv1d(module)
        }
        if not chosen:
            raise ValueError("'targets' is None, and the model has no Linear layer; name the layers or a module type")
        return chosen
    given = [targets] if isinstance(targets, str | type) else list(targets)
    if not given:
        raise ValueError("'targets' is empty; give a name, a pattern or a module type, or None for all linear layers")
    chosen = {}
    for target in given:
        if not isinstance(target, str) and not (isinstance(target, type) and issubclass(target, nn.Module)):
            raise TypeError(f"'targets' holds {target!r}; it takes names, patterns and module types")
        try:
            found = {name: module for name, module in candidates.items() if _matches(name, module, target)}
        except re.error as error:
            raise ValueError(f"'targets' holds {target!r}, which is no layer's name and no valid pattern: {error}") from error
        if not found:
            supported = [name for name, module in candidates.items() if name and not list(module.children())]
            near = difflib.get_close_matches(str(target), supported, 3, 0.3) or supported[:3]
            raise ValueError(f"'targets': no module matches {target!r}; the model has for example: {', '.join(near)}")
        chosen.update(found)
    return {name: module for name, module in candidates.items() if name in chosen}


def _sites(
    model: nn.Module, config: AdapterConfig, targets: Target | Sequence[Target] | None
) -> dict[str, tuple[Site, Tensor]]:
    return {name: _site(name, layer, config) for name, layer in find_targets(model, targets).items()}


def _site(name: str, layer: nn.Module, config: AdapterConfig) -> tuple[Site, Tensor]:
    """A layer's geometry and weight; raises where this method cannot sit on it."""
    try:
        site = Site.of(layer)
    except TypeError as error:
        raise TypeError(f"'targets': '{name}': {error}") from error
    if site.kind not in config.supports:
        allowed = ", ".join(sorted(config.supports))
        raise TypeError(f"'targets': '{name}' is of kind {site.kind}; {type(config).__name__} takes: {allowed}")
    held = layer._modules.get(_ATTRIBUTE)
    if hasattr(layer, _ATTRIBUTE) and not isinstance(held, AdapterDict):
        raise ValueError(f"'targets': '{name}' has an attribute 'adapters' of its own")
    if isinstance(held, AdapterDict) and held.merged:
        raise ValueError(f"'targets': adapter '{held.merged[0]}' is merged into '{name}'; unmerge it first")
    weight = weight_of(layer)
    if not weight.is_floating_point():
        raise TypeError(f"'targets': the weight of '{name}' is {weight.dtype}; adapters need a floating dtype")
    return site, weight.detach()


def _patterns(model: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """Parameters of the modules (or with the names) that ``modules_to_save`` gives."""
    if isinstance(patterns, str):
        raise TypeError("'modules_to_save' must be a sequence of names, not one string")
    names = []
    for pattern in patterns:
        modules = {n for n, m in model.named_modules() if n and _matches(n, m, pattern)}
        found = [
            n
            for n, _ in model.named_parameters()
            if f".{_ATTRIBUTE}." not in n and (_matches(n, model, pattern) or any(n.startswith(m + ".") for m in modules))
        ]
        if not found:
            raise ValueError(f"'modules_to_save': no module or parameter matches '{pattern}'")
        names += found
    return tuple(dict.fromkeys(names))


# ------------------------------------------------------------------------------------------------------------- on and off


def adapt(
    model: nn.Module,
    config: AdapterConfig,
    targets: Target | Sequence[Target] | None = None,
    *,
    name: str = "default",
    modules_to_save: Sequence[str] = (),
    freeze: bool = True,
    calibration: Any = None,
) -> nn.Module:
    r"""Put an adapter on layers of a model: W x becomes (W + ΔW) x, with ΔW trained and W frozen.

    The model is changed in place and returned. Its classes, its code and the keys of its ``state_dict`` stay as they are; the
    adapter's tensors come beside them, as ``<layer>.adapters.<name>...``. The new adapter becomes the one that acts and trains;
    `set_adapters` chooses others, or several at once.

    Args:
        model: any module with Linear, Conv1d, Conv2d, Embedding or transformers' Conv1D layers.
        config: the method, such as ``LoRA(rank=8)``.
        targets: which layers. A string is a layer's full name, the end of it after a dot (``"query"``) or a regular expression of
            all of it; a type takes all its instances; a sequence takes what any of them takes. None: every linear layer.
        name: of the adapter, for a model that has several.
        modules_to_save: names or patterns of modules or parameters that train beside the adapter and are saved with it, such as a
            new classification head.
        freeze: whether all else stops training, until the last adapter is deleted. The first adapter's choice holds for all.
        calibration: what a method that starts from data needs; its configuration says what.

    Returns:
        ``model``.

    Raises:
        TypeError: where a target is of a kind that cannot be adapted, or the method cannot adapt.
        ValueError: where nothing matches, the name is taken or no name, or calibration is missing or not needed.

    Example:
        >>> import torch
        >>> from corollary.adapt import LoRA, adapt
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = adapt(model, LoRA(rank=2), targets="0")
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.adapters.default.lora_A', '0.adapters.default.lora_B']
    """
    if not isinstance(config, AdapterConfig):
        raise TypeError(f"'config' must be an adapter's configuration such as LoRA(rank=8), not {config!r}")
    registry = _registry(model, name, freeze)
    if config.needs_calibration and calibration is None:
        raise ValueError(f"{type(config).__name__} starts from data: give 'calibration'")
    if calibration is not None and not config.needs_calibration:
        raise ValueError(f"{type(config).__name__} takes no 'calibration'")
    sites = _sites(model, config, targets)
    saved = _patterns(model, modules_to_save)
    _put_on(model, registry, name, config, sites, saved, config.prepare(sites, calibration))
    return model


def adapt_sites(
    model: nn.Module, config: AdapterConfig, sites: Sequence[str], modules_to_save: Sequence[str], name: str
) -> nn.Module:
    """Put a saved adapter's modules on the layers of these full names, without calibration; the tensors come after.

    Raises:
        ValueError: where the model has no such layer or parameter.
    """
    registry = _registry(model, name, True)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for site in sites:
        if site not in modules:
            raise ValueError(f"the saved adapter sits on '{site}', and the model has no such layer")
    for parameter in modules_to_save:
        if parameter not in parameters:
            raise ValueError(f"the saved adapter holds '{parameter}', and the model has no such parameter")
    chosen = {site: _site(site, modules[site], config) for site in sites}
    _put_on(model, registry, name, config, chosen, tuple(modules_to_save), config.prepare(chosen, None))
    return model


def _registry(model: nn.Module, name: str, freeze: bool) -> Registry:
    if not isinstance(model, nn.Module):
        raise TypeError(f"'model' must be an nn.Module, not {type(model).__name__}")
    if not name.isidentifier():
        raise ValueError(f"'name' must be an identifier, because it becomes part of keys, not '{name}'")
    registry: Registry = model.__dict__.get(_REGISTRY) or Registry(
        required={n: p.requires_grad for n, p in model.named_parameters()}, frozen=freeze
    )
    if name in registry.entries:
        raise ValueError(f"the model has an adapter '{name}' already; delete it, or take another name")
    return registry


def _put_on(
    model: nn.Module,
    registry: Registry,
    name: str,
    config: AdapterConfig,
    sites: dict[str, tuple[Site, Tensor]],
    saved: tuple[str, ...],
    extras: Any,
) -> None:
    # All are built before the first one is put on: an error leaves the model as it was.
    built: dict[str, Adapter] = {}
    for site, (geometry, weight) in sites.items():
        try:
            built[site] = config.build(geometry, weight, extras.get(site))
        except ValueError as error:
            raise ValueError(f"'{site}': {error}") from error
    for site, adapter in built.items():
        layer = model.get_submodule(site)
        if not hasattr(layer, _ATTRIBUTE):
            adapters = AdapterDict()
            setattr(layer, _ATTRIBUTE, adapters)
            adapters.handle = layer.register_forward_hook(_apply, with_kwargs=True)
        cast(AdapterDict, layer.adapters)[name] = adapter.train(layer.training)
    registry.entries[name] = Entry(config, tuple(built), saved)
    model.__dict__[_REGISTRY] = registry
    set_adapters(model, name)


def set_adapters(model: nn.Module, names: str | Sequence[str]) -> None:
    """Choose which adapters act and train, and let the others rest; their changes add up. An empty sequence leaves the base model.

    Raises:
        ValueError: for a name that the model has not.

    Example:
        >>> import torch
        >>> from corollary.adapt import LoRA, adapt, set_adapters
        >>> model = adapt(adapt(torch.nn.Linear(4, 4), LoRA(rank=1), name="a"), LoRA(rank=2), name="b")
        >>> set_adapters(model, ["a", "b"])
    """
    chosen = (names,) if isinstance(names, str) else tuple(names)
    registry = registry_of(model)
    for name in chosen:
        entry_of(model, name)
    kept = {parameter for name in chosen for parameter in registry.entries[name].modules_to_save}
    if registry.frozen:
        for parameter_name, parameter in model.named_parameters():
            if parameter_name in registry.required:
                parameter.requires_grad_(parameter_name in kept)
    for name in registry.entries:
        for _, _, adapters in layers_of(model, name):
            adapters.active = tuple(n for n in chosen if n in adapters)
            # Indices and the like may be parameters of no gradient: only floating ones train.
            for parameter in adapters[name].parameters():
                parameter.requires_grad_(name in chosen and parameter.is_floating_point())


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context the model is the base model again; what is merged into weights stays merged.

    Example:
        >>> import torch
        >>> from corollary.adapt import LoRA, adapt, disable_adapters
        >>> base = torch.nn.Linear(4, 4)
        >>> x = torch.randn(2, 4)
        >>> before = base(x)
        >>> model = adapt(base, LoRA(rank=1))
        >>> torch.nn.init.ones_(model.adapters["default"].lora_B).shape
        torch.Size([4, 1])
        >>> with disable_adapters(model):
        ...     torch.equal(model(x), before)
        True
    """
    found = [m for m in model.modules() if isinstance(m, AdapterDict)]
    registry_of(model)
    before = [adapters.enabled for adapters in found]
    try:
        for adapters in found:
            adapters.enabled = False
        yield model
    finally:
        for adapters, enabled in zip(found, before, strict=True):
            adapters.enabled = enabled


def delete_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter off; with the last one the model is what it was, keys, hooks and ``requires_grad`` included.

    A merged adapter is unmerged first. What trained through ``modules_to_save`` keeps its values.

    Raises:
        ValueError: for a name that the model has not.
    """
    from corollary.adapt.merged import unmerge_adapters

    registry = registry_of(model)
    layers = list(layers_of(model, name))
    if any(name in adapters.merged for _, _, adapters in layers):
        unmerge_adapters(model)
    for _, layer, adapters in layers:
        del adapters[name]
        adapters.active = tuple(n for n in adapters.active if n != name)
        if not len(adapters):
            adapters.handle.remove()
            del layer._modules[_ATTRIBUTE]
    active = [n for n in registry.entries if n != name and any(n in d.active for _, _, d in layers_of(model, n))]
    del registry.entries[name]
    if registry.entries:
        set_adapters(model, active)
        return
    parameters = dict(model.named_parameters())
    for parameter, required in registry.required.items():
        if parameter in parameters:
            parameters[parameter].requires_grad_(required)
    del model.__dict__[_REGISTRY]


def adapter_penalty(model: nn.Module) -> Tensor:
    """The sum of what the active adapters' methods add to the training loss; zero where they add nothing."""
    total: Tensor | None = None
    for name in registry_of(model).entries:
        for _, layer, adapters in layers_of(model, name):
            if name in adapters.active:
                term = cast(Adapter, adapters[name]).penalty(weight_of(layer))
                if term is not None:
                    total = term if total is None else total + term
    return next(model.parameters()).new_zeros(()) if total is None else total

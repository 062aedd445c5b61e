"""Adapters as safetensors: the tensors, the configuration and the layers in one file, and back."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from corollary.adapt.base import AdapterConfig, config_from_dict
from corollary.adapt.inject import _REGISTRY, adapt_sites, delete_adapter, entry_of, layers_of

_FORMAT = "corollary-adapter"
_SAVED = "modules_to_save."


def adapter_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """One adapter's tensors by ``<layer>.<tensor>``, and what ``modules_to_save`` named by ``modules_to_save.<parameter>``.

    What the method makes anew from the frozen weights or from a seed is not among them. Detached, not copied.

    Raises:
        ValueError: for a name that the model has not.

    Example:
        >>> import torch
        >>> from corollary.adapt import LoRA, adapt, adapter_state_dict
        >>> model = adapt(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoRA(rank=2))
        >>> {key: tuple(tensor.shape) for key, tensor in adapter_state_dict(model).items()}
        {'0.lora_A': (2, 4), '0.lora_B': (3, 2)}
    """
    entry = entry_of(model, name)
    state = {
        _key(site, key): tensor.detach()
        for site, _, adapters in layers_of(model, name)
        for key, tensor in adapters[name].state_dict().items()
    }
    parameters = dict(model.named_parameters())
    return state | {_SAVED + key: parameters[key].detach() for key in entry.modules_to_save}


def _key(site: str, key: str) -> str:
    return f"{site}.{key}" if site else key


@torch.no_grad()
def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor], name: str = "default") -> None:
    """Copy tensors of `adapter_state_dict` into an adapter that the model has; every key must fit, or nothing is changed.

    Raises:
        ValueError: where a key is missing, unexpected or of another shape; the message names the first one.
    """
    own = adapter_state_dict(model, name)
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing:
        raise ValueError(f"'state' has no tensor '{missing[0]}' ({len(missing)} missing)")
    if unexpected:
        raise ValueError(f"'state' has a tensor '{unexpected[0]}' that the adapter has not ({len(unexpected)} unexpected)")
    for key, tensor in own.items():
        if tensor.shape != state[key].shape:
            raise ValueError(f"'state': '{key}' is {tuple(state[key].shape)}, the adapter's is {tuple(tensor.shape)}")
    for key, tensor in own.items():
        tensor.copy_(state[key])


def save_adapter(model: nn.Module, path: str | Path, name: str = "default") -> Path:
    """Write one adapter to a ``.safetensors`` file, its configuration and the names of its layers in the file's metadata.

    Args:
        model: with the adapter on it.
        path: of the file; its folder must exist. It is written beside itself first and then renamed.
        name: which adapter.

    Returns:
        The path.

    Raises:
        ValueError: for a name that the model has not, another suffix, or a missing folder.

    Example:
        >>> import tempfile, torch
        >>> from corollary.adapt import LoRA, adapt, load_adapter, save_adapter
        >>> model, x = adapt(torch.nn.Linear(4, 3), LoRA(rank=2)), torch.randn(5, 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_adapter(model, f"{folder}/adapter.safetensors")
        ...     same = load_adapter(model, path, name="again")
        >>> torch.equal(model.adapters["again"].lora_A, model.adapters["default"].lora_A)
        True
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"'path' must end in .safetensors, not '{path}'")
    if not path.parent.is_dir():
        raise ValueError(f"'path': there is no folder '{path.parent}'")
    entry = entry_of(model, name)
    metadata = {
        "format": _FORMAT,
        "version": "1",
        "method": type(entry.config).__name__,
        "config": json.dumps(entry.config.to_dict()),
        "sites": json.dumps(entry.sites),
        "modules_to_save": json.dumps(entry.modules_to_save),
    }
    state = {key: tensor.contiguous().clone() for key, tensor in adapter_state_dict(model, name).items()}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(state, temporary, metadata)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def read_adapter(path: str | Path) -> tuple[AdapterConfig, dict[str, Any], dict[str, Tensor]]:
    """Configuration, metadata (``sites``, ``modules_to_save``) and tensors of a saved adapter.

    Raises:
        ValueError: where the file is missing, is no safetensors file, or is no adapter of ours.
    """
    if not Path(path).is_file():
        raise ValueError(f"'path': there is no file '{path}'")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - a safetensors handle is no mapping
    except SafetensorError as error:
        raise ValueError(f"'path': '{path}' is not a valid safetensors file: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"'path': '{path}' holds no adapter of this library (a peft checkpoint? then use from_peft)")
    try:
        facts = {key: json.loads(metadata[key]) for key in ("config", "sites", "modules_to_save")}
        config = config_from_dict(metadata["method"], facts.pop("config"))
    except (KeyError, json.JSONDecodeError, TypeError, AttributeError) as error:
        raise ValueError(f"'path': the metadata of '{path}' is broken: {error!r}") from error
    return config, facts, state


def load_adapter(model: nn.Module, path: str | Path, name: str = "default") -> nn.Module:
    """Put a saved adapter on a model: the layers, the method and the tensors that `save_adapter` wrote.

    Args:
        model: with the layers that the adapter was saved from, by the same names.
        path: of the file.
        name: what it is called on this model.

    Returns:
        ``model``; the adapter is the one that acts.

    Raises:
        ValueError: where the file is missing or broken, or the model's layers do not fit; the model is then as before.
    """
    config, facts, state = read_adapter(path)
    adapt_sites(model, config, facts["sites"], facts["modules_to_save"], name)
    try:
        load_adapter_state_dict(model, state, name)
    except ValueError:
        delete_adapter(model, name)
        raise
    return model


def has_adapters(model: nn.Module) -> bool:
    """Whether any adapter sits on the model."""
    return _REGISTRY in model.__dict__

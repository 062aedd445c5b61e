"""Compressed models as safetensors with a small manifest, and back into a model of the original's classes."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from corollary.compress.base import _REGISTRY, CompressConfig, Registry, Step, config_from_dict, registry_of
from corollary.compress.sites import replace_layer
from corollary.data import load_safetensors

_FORMAT = "corollary-compressed"
MANIFEST = "compression.json"
WEIGHTS = "model.safetensors"


def manifest_of(steps: list[Step], report: Mapping[str, Any] | None, shared: Mapping[str, str]) -> dict[str, Any]:
    """The manifest's content: each step's method, settings and layers, tensors stored under another name, and the report."""
    return {
        "format": _FORMAT,
        "version": 1,
        "steps": [
            {"method": type(step.config).__name__, "settings": step.config.to_dict(), "layers": step.layers} for step in steps
        ],
        "shared": dict(shared),
        "report": report,
    }


def save(model: nn.Module, folder: str | Path) -> Path:
    """Write a compressed model: ``model.safetensors``, and ``compression.json`` that says how its layers are built.

    The manifest names for every step the method, its settings, and each replaced layer with what it was replaced by; tensors that
    the model shares are stored once; and it holds the report. `load` brings all of it back.

    Args:
        model: what `compress` gave, or `factorize` or `deploy` changed.
        folder: made where it is missing; files of these names in it are replaced. Each is written beside itself and renamed, the
            manifest last.

    Returns:
        The folder.

    Raises:
        ValueError: where the model was never compressed, or the folder's own folder is missing.

    Example:
        >>> import tempfile, torch
        >>> from corollary.compress import SVD, compress, load, save
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU())
        >>> small = compress(model, SVD(rank=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = load(save(small, folder), model)
        >>> x = torch.randn(3, 16)
        >>> torch.equal(again(x), small(x))
        True
    """
    registry = registry_of(model)
    folder = Path(folder)
    if not folder.parent.is_dir() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"'folder': '{folder}' is no folder, or its own folder is missing")
    folder.mkdir(exist_ok=True)
    first: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)
        if tensor.numel() and key in first:
            shared[name] = first[key]
            continue
        first[key] = name
        tensors[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    report = None if registry.report is None else registry.report.to_dict()
    text = json.dumps(manifest_of(registry.steps, report, shared), indent=1) + "\n"
    _write(folder / WEIGHTS, lambda path: save_file(tensors, path, {"format": "pt"}))
    _write(folder / MANIFEST, lambda path: Path(path).write_text(text, encoding="utf-8"))
    return folder


def _write(path: Path, write: Any) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_manifest(folder: str | Path) -> tuple[list[Step], dict[str, Any]]:
    """The steps of a saved model, and the whole manifest.

    Raises:
        ValueError: where it is missing, no JSON, or no manifest of ours.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"'path': there is no '{path}'; give the folder that save() or 'corollary compress' wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"'path': '{path}' is not valid JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"'path': '{path}' is no manifest of a compressed model")
    try:
        steps = [
            Step(config_from_dict(step["method"], step["settings"]), dict(step["layers"].items())) for step in content["steps"]
        ]
        dict(content["shared"].items())
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"'path': '{path}' is broken: {error}") from error
    return steps, content


@torch.no_grad()
def load(path: str | Path, model: nn.Module, *, strict: bool = True) -> nn.Module:
    """Bring a saved compressed model back, into a model of the original's classes; also inside ``transformers``.

    Args:
        path: the folder that `save` or ``corollary compress`` wrote.
        model: the uncompressed architecture; its weights do not matter. Build it from a config, or load the original.
        strict: refuse tensors that the model has no place for. Checkpoints of others hold some, such as saved positions.

    Returns:
        A compressed copy, with the model's own mode, device and dtype; ``model`` stays as it is.

    Raises:
        ValueError: where the folder is broken, a layer is missing in the model or of another shape, or tensors are missing or left
            over.

    Example:
        >>> import tempfile, torch
        >>> from corollary.compress import Quantize, compress, load, save
        >>> small = compress(torch.nn.Sequential(torch.nn.Linear(64, 4)), Quantize(bits=8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     load(save(small, folder), torch.nn.Sequential(torch.nn.Linear(64, 4)))[0].bits
        8
    """
    steps, content = read_manifest(path)
    new = copy.deepcopy(model)
    for step in steps:
        new = _rebuild(new, step.config, step.layers, path)
    with load_safetensors(path) as file:
        state = {name: file[name] for name in file}
    for alias, name in content["shared"].items():
        if name not in state:
            raise ValueError(f"'path': '{path}' says that '{alias}' is '{name}', which is not stored")
        state[alias] = state[name]
    own = new.state_dict()
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if not strict:
        state = {name: tensor for name, tensor in state.items() if name in own}
        unexpected = []
    if missing or unexpected:
        word, name = ("lacks", missing[0]) if missing else ("has a left-over", unexpected[0])
        raise ValueError(f"'path': '{path}' {word} tensor '{name}' ({len(missing)} missing, {len(unexpected)} left over)")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise ValueError(f"'model': '{name}' is {tuple(tensor.shape)}, and {tuple(state[name].shape)} was saved")
    new.load_state_dict(state)
    new.__dict__[_REGISTRY] = Registry(steps)
    return new


def _rebuild(model: nn.Module, config: CompressConfig, layers: Mapping[str, Any], path: str | Path) -> nn.Module:
    modules = dict(model.named_modules())
    for name, spec in layers.items():
        if name not in modules:
            raise ValueError(f"'path': '{path}' has layer '{name}', which the model has not")
        try:
            new = config.build(modules[name], spec)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"'path': layer '{name}' of '{path}' cannot be built on the model's: {error}") from error
        model = replace_layer(model, name, new)
    return model

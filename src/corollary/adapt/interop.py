"""LoRA-form adapters to and from peft's checkpoints, without peft itself."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from corollary.adapt.base import LowRankAdapter
from corollary.adapt.inject import adapt_sites, entry_of, layers_of
from corollary.adapt.lora import LoRA, LoRAAdapter

_PREFIX = "base_model.model."


def to_peft(model: nn.Module, folder: str | Path, name: str = "default", *, base_model: str = "") -> Path:
    """Write an adapter of LoRA's form (`LoRA`, `LoRAXS`, `VeRA` and others with `factors`) as a peft checkpoint.

    What the method does between or around the factors is multiplied into them, so that peft's outputs are equal.

    Args:
        model: with the adapter on it.
        folder: made if it is missing; ``adapter_config.json`` and ``adapter_model.safetensors`` are written into it, each whole.
        name: which adapter.
        base_model: what ``base_model_name_or_path`` says.

    Returns:
        The folder.

    Raises:
        ValueError: where the method has no factors, layers differ in rank, or the adapter trains modules of its own beside.

    Example:
        >>> import tempfile, torch
        >>> from corollary.adapt import LoRA, adapt, from_peft, to_peft
        >>> model = adapt(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoRA(rank=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = from_peft(model, to_peft(model, folder), name="back")
    """
    entry = entry_of(model, name)
    if entry.modules_to_save:
        raise ValueError("'modules_to_save' are not written to peft checkpoints; save them apart")
    tensors: dict[str, Tensor] = {}
    ranks, kinds = set(), set()
    for site, _, adapters in layers_of(model, name):
        adapter = adapters[name]
        if not isinstance(adapter, LowRankAdapter):
            raise ValueError(
                f"{type(entry.config).__name__} is not of the form B A, and peft's LoRA is; merge it and save the model"
            )
        if not site:
            raise ValueError("the adapter sits on the model itself; peft names layers within a model")
        b, a = (factor.detach() for factor in adapter.factors())
        ranks.add(a.shape[0])
        kinds.add("transposed" if adapter.site.transposed and adapter.site.kind == "linear" else "plain")
        if adapter.site.kind == "embedding":
            tensors[f"{_PREFIX}{site}.lora_embedding_A"], tensors[f"{_PREFIX}{site}.lora_embedding_B"] = a, b
            continue
        if adapter.site.groups > 1:
            raise ValueError(f"'{site}' is a grouped convolution, whose factors peft arranges otherwise")
        if adapter.site.kind.startswith("conv"):
            spatial = adapter.site.weight_shape[2:]
            a, b = a.reshape(a.shape[0], -1, *spatial), b.reshape(*b.shape, *(1,) * len(spatial))
        tensors[f"{_PREFIX}{site}.lora_A.weight"], tensors[f"{_PREFIX}{site}.lora_B.weight"] = a, b
    if len(ranks) > 1:
        raise ValueError(f"the layers have ranks {sorted(ranks)}; a peft checkpoint of this kind has one")
    rank = ranks.pop()
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model or None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": getattr(entry.config, "dropout", 0.0),
        "target_modules": list(entry.sites),
        "fan_in_fan_out": kinds == {"transposed"},
        "bias": "none",
        "use_rslora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
    _write(folder / "adapter_model.safetensors", save(state, {"format": "pt"}))
    _write(folder / "adapter_config.json", (json.dumps(config, indent=2) + "\n").encode())
    return folder


def _write(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def from_peft(model: nn.Module, folder: str | Path, name: str = "default") -> nn.Module:
    """Put a peft LoRA checkpoint on a model as our `LoRA`.

    Args:
        model: the base model that the checkpoint was made for, with the layers' names as peft saw them.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: what the adapter is called here.

    Returns:
        ``model``.

    Raises:
        ValueError: where a file is missing or broken, or the checkpoint does what our `LoRA` does not (DoRA, biases, ranks by
            pattern, other methods), or its layers do not fit the model; the model is then as before.
    """
    folder = Path(folder)
    config = _read_config(folder / "adapter_config.json")
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise ValueError(f"'folder': '{folder}' has no adapter_model.safetensors (pickled checkpoints are not read)")
    try:
        tensors = load_file(weights)
    except Exception as error:
        raise ValueError(f"'folder': '{weights}' is not a valid safetensors file: {error}") from error
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        site, side = _split(key)
        factors.setdefault(site, {})[side] = tensor.flatten(1)
    for site, pair in factors.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(f"'folder': the checkpoint has only factor {next(iter(pair))} of '{site}'")
        if pair["A"].shape[0] != config.rank or pair["B"].shape[1] != config.rank:
            raise ValueError(f"'folder': the factors of '{site}' are not of rank {config.rank}, as the configuration says")
    adapt_sites(model, config, list(factors), (), name)
    with torch.no_grad():
        for site, _, adapters in layers_of(model, name):
            adapter = adapters[name]
            assert isinstance(adapter, LoRAAdapter)
            pair = factors[site]
            for own, given in ((adapter.lora_A, pair["A"]), (adapter.lora_B, pair["B"])):
                if own.shape != given.shape:
                    from corollary.adapt.inject import delete_adapter

                    delete_adapter(model, name)
                    raise ValueError(
                        f"'folder': a factor of '{site}' is {tuple(given.shape)}; the model needs {tuple(own.shape)}"
                    )
                own.copy_(given)
    return model


def _split(key: str) -> tuple[str, str]:
    for ending, side in (
        (".lora_A.weight", "A"),
        (".lora_B.weight", "B"),
        (".lora_embedding_A", "A"),
        (".lora_embedding_B", "B"),
    ):
        if key.endswith(ending):
            return key.removeprefix(_PREFIX).removesuffix(ending), side
    raise ValueError(f"'folder': the checkpoint holds '{key}', which is no factor of a LoRA")


def _read_config(path: Path) -> LoRA:
    if not path.is_file():
        raise ValueError(f"'folder': there is no file '{path}'")
    try:
        given: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if given.get("peft_type") != "LORA":
            raise ValueError(f"'folder': the checkpoint's method is {given.get('peft_type')}; only LORA can be read")
        for key in ("use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "modules_to_save", "trainable_token_indices"):
            if given.get(key):
                raise ValueError(f"'folder': the checkpoint uses '{key}', which LoRA here has not")
        if given.get("bias", "none") != "none":
            raise ValueError(f"'folder': the checkpoint trains biases ('bias' is '{given['bias']}')")
        return LoRA(
            rank=given["r"],
            alpha=given["lora_alpha"],
            dropout=given.get("lora_dropout", 0.0),
            use_rslora=given.get("use_rslora", False),
        )
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"'folder': '{path}' is not a peft configuration: {error!r}") from error

"""Turn a model's linear layers to weights in 8 bits, saved and loaded as plain tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from corollary.linalg.quantize import Quantized
from corollary.optim.int8_weight import Int8Weight


def quantize_weights_(
    model: nn.Module, targets: Sequence[str] | None = None, *, group_size: int = 256, stochastic: bool = True
) -> nn.Module:
    """Hold the weights of a model's linear layers in 8 bits from now on, in place.

    Biases, embeddings and norms stay as they are. Make the optimizer afterwards: the parameters are new ones. The model's
    ``state_dict`` then has plain tensors ``weight.codes``, ``weight.scale`` and ``weight.zero`` in place of each ``weight``, which
    safetensors takes; ``load_state_dict`` reads these, and the floating ``weight`` of an unquantized model too.

    Args:
        model: any module.
        targets: parts of module names, such as "q_proj"; None takes every ``nn.Linear`` whose weight no other module shares.
        group_size: entries that share a step and a zero point.
        stochastic: False rounds updates to nearest.

    Returns:
        The model.

    Raises:
        ValueError: no linear layer is left to convert, a targeted weight is shared with another module, or a weight is not finite.

    Example:
        >>> import torch
        >>> model = quantize_weights_(torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh()))
        >>> sorted(model.state_dict())
        ['0.bias', '0.weight.codes', '0.weight.scale', '0.weight.zero']
        >>> model(torch.randn(4, 16)).sum().backward()
        >>> type(model[0].weight.grad).__name__
        'Tensor'

    Source: Zhang et al., "Q-GaLore", arXiv 2407.08296, section 3.4.
    """
    owners: dict[int, int] = {}
    for _, param in model.named_parameters(remove_duplicate=False):
        owners[id(param)] = owners.get(id(param), 0) + 1
    chosen: list[nn.Linear] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or isinstance(module.weight, Int8Weight):
            continue
        shared = owners[id(module.weight)] > 1
        if targets is None:
            wanted = not shared
        else:
            wanted = any(target in name for target in targets)
            if wanted and shared:
                raise ValueError(f"'targets' names {name!r}, whose weight another module shares: only linear layers read codes")
        if wanted:
            chosen.append(module)
    if not chosen:
        raise ValueError(f"the model has no linear layer to convert: 'targets' is {targets}")
    for module in chosen:
        weight = Int8Weight.from_float(module.weight.detach(), group_size=group_size, stochastic=stochastic)
        module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
        module.register_state_dict_post_hook(_to_plain)  # type: ignore[no-untyped-call]
        module.register_load_state_dict_pre_hook(_from_plain)  # type: ignore[no-untyped-call]
    return model


def _to_plain(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    weight = state.pop(f"{prefix}weight")
    state[f"{prefix}weight.codes"] = weight.codes.view(weight.shape)
    state[f"{prefix}weight.scale"] = weight.scale
    state[f"{prefix}weight.zero"] = weight.zero


def _from_plain(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    own = module.weight
    assert isinstance(own, Int8Weight)
    key = f"{prefix}weight"
    names = [f"{key}.{part}" for part in ("codes", "scale", "zero")]
    if all(name in state for name in names):
        codes, scale, zero = (state.pop(name) for name in names)
        groups = own.scale.numel()
        if codes.shape != own.shape or scale.numel() != groups:
            errors.append(
                f"{key!r} is saved with shape {tuple(codes.shape)} and {scale.numel()} groups; here it has {tuple(own.shape)} and "
                f"{groups} groups of {own.group_size}"
            )
            state[key] = own.detach()  # the error above stands; this keeps "missing key" from hiding it
            return
        state[key] = own._like(Quantized(codes.reshape(-1), scale, zero))
    elif key in state and not isinstance(state[key], Int8Weight) and state[key].shape == own.shape:
        # The weight of an unquantized model: to nearest, as when the layer was converted.
        state[key] = Int8Weight.from_float(state[key].to(own.dtype), group_size=own.group_size, stochastic=own.stochastic)

"""How many bytes an optimizer's state and a model's weights really take."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state, each storage counted once.

    What is counted are storages, so that a view of a larger tensor counts with all it keeps alive. Python numbers, such as a step
    count, are not counted.

    Args:
        optimizer: any ``torch.optim.Optimizer``; before its first step it mostly holds nothing.

    Returns:
        Number of bytes.

    Raises:
        TypeError: it is not an optimizer.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(10, 4))
        >>> optimizer = torch.optim.AdamW([weight], foreach=False)
        >>> weight.sum().backward(); optimizer.step()
        >>> state_bytes(optimizer)  # two moments of 40 floats, and a step count
        324
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"'optimizer' must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    return _distinct_bytes(list(optimizer.state.values()))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of a model, each storage counted once.

    A parameter that is held in parts, as `Int8Weight` in codes, steps and zero points, counts with what the parts take.

    Args:
        model: any module.

    Returns:
        Number of bytes; gradients are not counted.

    Raises:
        TypeError: it is not a module.

    Example:
        >>> import torch
        >>> from corollary.optim import quantize_weights_
        >>> layer = torch.nn.Linear(16, 32, bias=False)
        >>> weight_bytes(layer), weight_bytes(quantize_weights_(layer))  # 512 floats; 512 bytes and two groups of 4 + 1
        (2048, 522)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"'model' must be a torch.nn.Module, not {type(model).__name__}")
    return _distinct_bytes([*model.parameters(), *model.buffers()])


def _distinct_bytes(values: Any) -> int:
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            parts = getattr(value, "__tensor_flatten__", None)  # what a subclass made of other tensors has
            if parts is not None:
                visit([getattr(value, name) for name in parts()[0]])
                return
            storage = value.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)

    visit(values)
    return sum(storages.values())

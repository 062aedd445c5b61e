"""How many bytes an optimizer really keeps."""

from __future__ import annotations

from typing import Any

from torch import Tensor
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
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)

    for state in optimizer.state.values():
        visit(state)
    return sum(storages.values())

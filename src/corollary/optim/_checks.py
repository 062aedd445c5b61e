"""What every optimizer here checks of its parameters and options, and how it loads its state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def check_options(rows: Iterable[tuple[str, Any, bool, str]]) -> None:
    """Raise ``ValueError`` for the first row (name, value, is good, what is allowed) that is not good."""
    for name, value, good, allowed in rows:
        if not good:
            raise ValueError(f"'{name}' must be {allowed}, not {value}")


def refuse_params(params: Iterable[Tensor], name: str, *, distributed: str | None = None) -> None:
    """Refuse complex parameters and, where a reason is given, DTensors.

    Raises:
        TypeError: naming the parameter and the optimizer.
    """
    for i, param in enumerate(params):
        if param.is_complex():
            raise TypeError(f"'params[{i}]' is {param.dtype}; {name} takes real parameters (see torch.view_as_real)")
        if distributed is not None and is_distributed(param):
            raise TypeError(f"'params[{i}]' is a DTensor; {name} takes undistributed parameters: {distributed}")


def refuse_sparse(params: Iterable[Tensor], name: str) -> None:
    """Refuse gradients that are not dense.

    Raises:
        RuntimeError: naming the layout and the optimizer.
    """
    for param in params:
        if param.grad is not None and param.grad.layout is not torch.strided:
            raise RuntimeError(f"{name} needs dense gradients, not {param.grad.layout}: use nn.Embedding(sparse=False)")


def is_distributed(param: Tensor) -> bool:
    """Whether the parameter is a DTensor, as ``fully_shard`` makes them."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(param, DTensor)


def saved_states(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> list[tuple[Tensor, dict[str, Any]]]:
    """Each parameter of the optimizer with the state that is saved for it."""
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [(p, state_dict["state"].get(i, {})) for i, p in zip(ids, params, strict=False)]


def keep_dtypes(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Put loaded state back into the dtypes it was saved in: the base class casts all of it to the parameter's.

    Scalars stay on the CPU, everything else goes to its parameter's device.
    """
    for param, saved in saved_states(optimizer, state_dict):
        for key, value in saved.items():
            if isinstance(value, Tensor):
                device = param.device if value.dim() else value.device
                optimizer.state[param][key] = value.detach().to(device, copy=True)

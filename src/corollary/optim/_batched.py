"""What optimizers share that update all parameters of one device and dtype together with ``torch._foreach_*``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

State = dict[str, Any]


class BatchedOptimizer(Optimizer):
    """Base of optimizers whose step is one function of lists of parameters, gradients and states.

    A subclass gives `_check_group`, `_new_state` and `_update`. It gets from here: refusal of sparse gradients and complex
    parameters, a group that fails its check leaving the optimizer as it was, batches by device and dtype (or one parameter at
    a time with ``foreach=False``), float32 arithmetic for half precision, and a ``load_state_dict`` that keeps dtypes.
    """

    wide_state: ClassVar[bool] = True  # half precision is updated in float32 and keeps its state there

    def _check_group(self, group: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` where an option of the group is out of range."""
        raise NotImplementedError

    def _new_state(self, param: Tensor, dtype: torch.dtype, group: Mapping[str, Any]) -> State:
        """The state of a parameter that meets its first gradient; tensors with entries in ``dtype``."""
        raise NotImplementedError

    def _update(self, group: Mapping[str, Any], params: list[Tensor], grads: list[Tensor], states: list[State]) -> None:
        """Move ``params`` in place; one device and dtype, which is the state's too."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as ``torch.optim.Optimizer`` does, checking its parameters and options."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for i, param in enumerate(group["params"]):
                if param.is_complex():
                    raise TypeError(
                        f"'params[{i}]' is {param.dtype}; {type(self).__name__} takes real parameters (see torch.view_as_real)"
                    )
            self._check_group(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state, keeping the dtypes it was saved in; the next step equals that of the saved run bit by bit.

        Raises:
            ValueError: groups of another size, or state of another shape than its parameter.
        """
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        if len(saved_ids) == len(params):  # else the base class has its own words for it
            for i, (saved_id, param) in enumerate(zip(saved_ids, params, strict=True)):
                for key, value in state_dict["state"].get(saved_id, {}).items():
                    if isinstance(value, Tensor) and value.dim() and value.shape != param.shape:
                        raise ValueError(
                            f"'state_dict' has '{key}' of shape {tuple(value.shape)} for parameter {i}, "
                            f"which has shape {tuple(param.shape)}"
                        )
        super().load_state_dict(dict(state_dict))
        # The base class casts state to each parameter's dtype, which would round the float32 state of half precision.
        for saved_id, param in zip(saved_ids, params, strict=True):
            for key, value in state_dict["state"].get(saved_id, {}).items():
                if isinstance(value, Tensor):
                    device = param.device if value.dim() else torch.device("cpu")  # counters stay where float() is free
                    self.state[param][key] = value.to(device, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; gives what ``closure`` returned, or None.

        Args:
            closure: computes the loss and its gradients and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:  # all is checked before anything moves
            for param in group["params"]:
                if param.grad is not None and param.grad.layout is not torch.strided:
                    raise RuntimeError(
                        f"{type(self).__name__} needs dense gradients, not {param.grad.layout}: use nn.Embedding(sparse=False)"
                    )
        for group in self.param_groups:
            for params in self._batches(group):
                self._step_batch(group, params)
        return loss

    def _batches(self, group: Mapping[str, Any]) -> Iterator[list[Tensor]]:
        members = [p for p in group["params"] if p.grad is not None]
        if group["foreach"] is False:
            yield from ([p] for p in members)
            return
        kinds: dict[tuple[Any, ...], list[Tensor]] = {}
        for p in members:
            kinds.setdefault((p.device, p.dtype, is_distributed(p)), []).append(p)
        yield from kinds.values()

    def _step_batch(self, group: Mapping[str, Any], params: list[Tensor]) -> None:
        dtype = params[0].dtype
        wide = torch.float32 if self.wide_state and dtype in (torch.float16, torch.bfloat16) else dtype
        states = []
        for p in params:
            state = self.state[p]
            if not state:
                state.update(self._new_state(p, wide, group))
            states.append(state)
        grads = [p.grad for p in params if p.grad is not None]
        if wide == dtype:
            self._update(group, params, grads, states)
            return
        copies = [p.to(wide) for p in params]
        self._update(group, copies, [g.to(wide) for g in grads], states)
        torch._foreach_copy_(params, copies)


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor, as ``fully_shard`` makes of parameters."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def check_options(group: Mapping[str, Any], allowed: Mapping[str, tuple[bool, str]]) -> None:
    """Raise ``ValueError`` for the first option of ``allowed`` whose test is not true; ``betas[1]`` is read as such."""
    for name, (good, words) in allowed.items():
        if not good:
            key, _, index = name.partition("[")
            value = group[key][int(index[:-1])] if index else group[key]
            raise ValueError(f"'{name}' must be {words}, not {value}")

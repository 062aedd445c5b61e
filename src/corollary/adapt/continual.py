"""What the continual learners share: hooks on an optimizer's step, the inputs that layers saw, a state that can be resumed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

Loss = Callable[[], Tensor]


class ContinualLearner(ABC):
    """Base of methods that learn one task after another by changing an optimizer's steps, and nothing of the model.

    A subclass says in ``_before_step`` and ``_after_step`` what happens around a step, and in ``end_task`` what it remembers.

    Args:
        model: any module; neither its code, its forward nor its ``state_dict`` changes.

    Example:
        >>> from torch import nn
        >>> from corollary.adapt import GPM
        >>> model = nn.Linear(3, 2)
        >>> with GPM(model).attach(torch.optim.SGD(model.parameters(), lr=0.1)) as memory:
        ...     memory.num_tasks
        0
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"'model' must be a torch.nn.Module, not {type(model).__name__}")
        self.model = model
        self.num_tasks = 0
        self._handles: list[RemovableHandle] = []

    def attach(self, optimizer: Optimizer) -> Self:
        """Act on every ``optimizer.step()`` from now on, in place of an optimizer attached before; gives the learner itself.

        Start each task with a fresh optimizer (or a cleared state): momentum that an earlier task left would move the model
        where its memory says that it must not.
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"'optimizer' must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
        self.remove()
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]
        return self

    def remove(self) -> None:
        """Let go of the optimizer; its steps are its own again. What was remembered stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def begin_task(self, loss: Loss) -> None:
        """Say that a new task starts; ``loss`` gives its loss on some of its samples. Needed by methods that compare tasks."""
        return

    @abstractmethod
    def end_task(self, loss: Loss) -> None:
        """Remember the task that was just learnt; ``loss`` runs the model on some of its samples and gives the loss."""

    @abstractmethod
    def _before_step(self) -> None: ...

    def _after_step(self) -> None:
        return

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """All that is remembered, as flat tensors that safetensors can hold; references, as in ``nn.Module.state_dict``."""

    @abstractmethod
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over what another learner of an equal model remembered; raises ``ValueError`` naming what does not fit."""

    def memory_bytes(self) -> int:
        """Bytes of everything that is remembered."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state_dict().values())

    def _losses(self, loss: Loss) -> Tensor:
        """What ``loss`` gives, with a graph whatever the caller's grad mode."""
        if not callable(loss):
            raise TypeError(f"'loss' must be a function of no arguments that gives the loss, not {type(loss).__name__}")
        with torch.enable_grad():
            value = loss()
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
            raise TypeError(f"'loss' must give a floating tensor with the loss, not {_describe(value)}")
        if not bool(value.isfinite().all()):
            raise ValueError("'loss' gave NaN or infinity; allowed: finite losses")
        if not value.requires_grad:
            raise ValueError("'loss' gave a value without gradient; allowed: a loss of the model's parameters")
        return value


def _describe(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def covered_layers(model: nn.Module, exclude: Iterable[str]) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every trainable ``Linear`` and ``Conv2d`` by name, but those whose name matches a pattern of ``exclude``."""
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    names = [name for name, _ in model.named_modules()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"'exclude' has '{pattern}', which matches no module; there are: {', '.join(n for n in names if n)}"
            )
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and module.weight.requires_grad
        and not any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    if not layers:
        raise ValueError("'model' has no trainable Linear or Conv2d outside of 'exclude'; there is nothing to protect")
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            raise ValueError(f"layer '{name}' has groups={layer.groups}; allowed: 1, or name it in 'exclude'")
    return layers


def layer_inputs(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """What meets the layer's weights, one row each: (rows, columns of the weight), and a 1 for the bias where there is one."""
    if isinstance(layer, nn.Conv2d):
        if x.dim() == 3:
            x = x[None]
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        rows = F.unfold(x, layer.kernel_size, dilation=layer.dilation, stride=layer.stride).transpose(1, 2).flatten(0, 1)
    else:
        rows = x.reshape(-1, x.shape[-1])
    return rows if layer.bias is None else torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


def as_matrix(layer: nn.Linear | nn.Conv2d, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Weight and bias (or their gradients) as one matrix (outputs, inputs [+ 1])."""
    rows = weight.flatten(1)
    return (
        rows
        if layer.bias is None
        else torch.cat([rows, (layer.bias.new_zeros(len(rows)) if bias is None else bias)[:, None]], 1)
    )


@contextmanager
def collect_grams(layers: Mapping[str, nn.Linear | nn.Conv2d]) -> Iterator[dict[str, Tensor]]:
    """While open, add up each layer's Gram matrix of inputs, in float64: bounded memory, whatever runs through the model."""
    grams: dict[str, Tensor] = {}

    def watch(name: str, layer: nn.Linear | nn.Conv2d) -> RemovableHandle:
        # After the layer, not before: an input that does not fit is its to refuse.
        def hook(_: nn.Module, args: tuple[Any, ...], __: Any) -> None:
            rows = layer_inputs(layer, args[0].detach()).double()
            gram = rows.T @ rows
            grams[name] = grams[name] + gram if name in grams else gram

        return layer.register_forward_hook(hook)

    handles = [watch(name, layer) for name, layer in layers.items()]
    try:
        yield grams
    finally:
        for handle in handles:
            handle.remove()

"""What merging is fitted to where there are no labels: the entropy of the merged model's predictions on every task's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from corollary.adapt.merging.lazy import MergeError

Head = Callable[[Any], Tensor]


def softmax_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the softmax over the last dimension: (...,) of (..., classes)."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


class UnlabelledTasks:
    """The base model, the task vectors of its trainable parameters, and a stream of inputs for each task.

    Args:
        model: has the base's weights; it is left as it is.
        checkpoints: T mappings that hold the model's trainable parameters by name; what else they hold is not looked at.
        inputs: for each task a tensor (n, ...) from which batches are drawn, or an iterable of batches, such as a DataLoader,
            gone through again and again; of a batch that is a tuple or list the first part is taken, so that labels are ignored.
        heads: for each task what maps the model's output to logits; None where the model gives logits itself.
        batch_size: of the batches drawn from tensors.
        seed: of those draws.

    Raises:
        MergeError: where tasks, inputs and heads differ in number, a parameter is missing or of another shape, or there are no
            inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoints: Sequence[Mapping[str, Tensor]],
        inputs: Sequence[Tensor | Iterable[Any]],
        heads: Sequence[Head] | None,
        batch_size: int,
        seed: int,
    ) -> None:
        if not checkpoints:
            raise MergeError("'checkpoints' is empty; give at least one")
        for what, given in (("inputs", inputs), ("heads", heads)):
            if given is not None and len(given) != len(checkpoints):
                raise MergeError(f"'{what}' has {len(given)} entries for {len(checkpoints)} checkpoints; give one for each")
        if batch_size < 1:
            raise MergeError(f"'batch_size' must be at least 1, not {batch_size}")
        self.model = model
        self.heads: Sequence[Head] = heads or [lambda out: out] * len(checkpoints)
        self.base = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
        if not self.base:
            held = ", ".join(sorted({str(p.dtype) for p in model.parameters()})) or "nothing"
            raise MergeError(f"'model' has no trainable floating parameters, and so nothing to merge; it holds {held}")
        for i, checkpoint in enumerate(checkpoints):
            for name, parameter in self.base.items():
                if name not in checkpoint:
                    raise MergeError(f"checkpoints[{i}]: has no tensor '{name}', which the model has")
                if checkpoint[name].shape != parameter.shape:
                    came = tuple(checkpoint[name].shape)
                    raise MergeError(f"checkpoints[{i}]: tensor '{name}' is {came}, the model's is {tuple(parameter.shape)}")
                if not checkpoint[name].is_floating_point():
                    raise MergeError(f"checkpoints[{i}]: tensor '{name}' is {checkpoint[name].dtype}; it must be floating")
        self.vectors = {
            name: torch.stack([checkpoint[name].detach().to(start) - start for checkpoint in checkpoints])
            for name, start in self.base.items()
        }
        generator = torch.Generator().manual_seed(seed)
        self._streams = [_stream(i, given, batch_size, generator) for i, given in enumerate(inputs)]

    def __len__(self) -> int:
        return len(self._streams)

    def merged(self, scales: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Parameters merged by factors (T,) of each tensor, through masks where they are given; differentiable in both."""
        merged = {}
        for name, start in self.base.items():
            change = torch.tensordot(scales[name].to(start), self.vectors[name], 1)
            merged[name] = start + (change if masks is None else masks[name].to(start) * change)
        return merged

    def entropy(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The tasks' mean entropies on their next batches, summed."""
        total = torch.zeros(())
        for stream, head in zip(self._streams, self.heads, strict=True):
            out = functional_call(self.model, dict(parameters), (next(stream),))
            loss = softmax_entropy(head(out)).mean()
            total = total.to(loss.device) + loss
        return total


def _stream(i: int, given: Tensor | Iterable[Any], batch_size: int, generator: torch.Generator) -> Iterator[Any]:
    if isinstance(given, Tensor):
        if not len(given):
            raise MergeError(f"inputs[{i}]: is empty")
        return _draws(given, batch_size, generator)
    return _cycle(i, given)


def _draws(x: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        order = torch.randperm(len(x), generator=generator).to(x.device)
        for part in torch.split(order, batch_size):
            yield x[part]


def _cycle(i: int, given: Iterable[Any]) -> Iterator[Any]:
    while True:
        came = False
        for batch in given:
            came = True
            yield batch[0] if isinstance(batch, (tuple, list)) else batch
        if not came:
            raise MergeError(f"inputs[{i}]: gave no batch; an iterator that is used up must be given as a list or DataLoader")

"""What the adapters on a model cost: trained numbers, bytes, and the time and memory of a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from corollary.adapt.inject import layers_of, registry_of
from corollary.adapt.state import adapter_state_dict
from corollary.memory import peak_bytes


@dataclass(frozen=True)
class LayerCost:
    """One adapter on one layer: its trained numbers, and all its tensors in bytes, frozen ones included."""

    layer: str
    adapter: str
    method: str
    trainable: int
    bytes: int


@dataclass(frozen=True)
class AdapterReport:
    """What `adapter_report` found.

    Args:
        layers: one row an adapter and layer.
        trainable: numbers that train in the whole model, ``modules_to_save`` included.
        total: numbers of the whole model without the adapters.
        saved_bytes: tensors that `save_adapter` would write, over all adapters.
        step_seconds: median time of a step in seconds, where one was given.
        step_bytes: peak of what a step allocates, in bytes, where one was given.
    """

    layers: tuple[LayerCost, ...]
    trainable: int
    total: int
    saved_bytes: int
    step_seconds: float | None = None
    step_bytes: int | None = None

    @property
    def share(self) -> float:
        """Trained numbers over the base model's."""
        return self.trainable / self.total

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self) | {"share": self.share}

    def __str__(self) -> str:
        lines = [
            f"{self.trainable:,} of {self.total:,} parameters train ({100 * self.share:.3g}%); {self.saved_bytes:,} bytes to save"
        ]
        if self.step_seconds is not None and self.step_bytes is not None:
            lines.append(f"a step takes {1e3 * self.step_seconds:.3g} ms and allocates up to {self.step_bytes:,} bytes")
        lines += [
            f"  {row.layer or '(the model)'}: {row.adapter} {row.method}, {row.trainable:,} trained" for row in self.layers
        ]
        return "\n".join(lines)


def adapter_report(model: nn.Module, step: Callable[[], Any] | None = None, *, rounds: int = 5) -> AdapterReport:
    """Count what trains and what it costs; with ``step``, measure a training step too.

    Args:
        model: with adapters on it.
        step: does one training step (forward, backward, optimizer) when called; None measures nothing. It is called ``rounds`` + 2
            times, so the parameters move.
        rounds: timed calls.

    Returns:
        An `AdapterReport`.

    Raises:
        ValueError: where the model has no adapters, or ``rounds`` is below 1.

    Example:
        >>> import torch
        >>> from corollary.adapt import LoRA, adapt, adapter_report
        >>> report = adapter_report(adapt(torch.nn.Linear(100, 100), LoRA(rank=2)))
        >>> report.trainable, report.total, round(report.share, 3)
        (400, 10100, 0.04)
    """
    if rounds < 1:
        raise ValueError(f"'rounds' must be at least 1, not {rounds}")
    registry = registry_of(model)
    layers, inside = [], set()
    for name, entry in registry.entries.items():
        for site, _, adapters in layers_of(model, name):
            adapter = adapters[name]
            tensors = [*adapter.parameters(), *adapter.buffers()]
            inside |= {id(p) for p in adapter.parameters()}
            layers.append(
                LayerCost(
                    layer=site,
                    adapter=name,
                    method=type(entry.config).__name__,
                    trainable=sum(p.numel() for p in adapter.parameters() if p.requires_grad),
                    bytes=sum(t.numel() * t.element_size() for t in tensors),
                )
            )
    parameters = list(model.parameters())
    saved = sum(t.numel() * t.element_size() for name in registry.entries for t in adapter_state_dict(model, name).values())
    seconds: float | None = None
    peak: int | None = None
    if step is not None:
        step()
        times = []
        for _ in range(rounds):
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
        seconds, peak = statistics.median(times), peak_bytes(step)
    return AdapterReport(
        layers=tuple(layers),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters if id(p) not in inside),
        saved_bytes=saved,
        step_seconds=seconds,
        step_bytes=peak,
    )

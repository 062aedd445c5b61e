"""ReLoRA: low-rank updates that are merged into the weights and begun anew, so that their sum may have a high rank."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import Optimizer

from corollary.adapt.inject import layers_of, weight_of
from corollary.adapt.lora import LoRAAdapter
from corollary.adapt.restarts import PeriodicRestart


class ReLoRA(PeriodicRestart):
    r"""Merges a LoRA into the weights every so many steps and draws a new one: call ``step()`` after each step of the optimizer.

    .. math:: W \leftarrow W + s B A, \qquad A \sim \text{Kaiming}, \qquad B \leftarrow 0

    and what the optimizer remembers of A and B is dropped. The model's function does not change.

    Args:
        model: adapted with `LoRA`.
        optimizer: trains the adapter's parameters (and others, which are left alone).
        interval: steps between two restarts.
        warmup: steps after each restart over which ``factor`` rises to 1.
        name: of the adapter.

    Raises:
        ValueError: an argument out of range, or an adapter of another method.

    Deviation: the optimizer's memory is dropped as a whole; the authors prune 90 to 99.9 percent of it, and train all weights for a
    while first, which is left to the caller.

    When not to use it: after a restart B is 0, so that no gradient reaches A, and training has to leave a saddle again each time.

    Example:
        >>> import torch
        >>> from corollary.adapt import LoRA, ReLoRA, adapt
        >>> model = adapt(torch.nn.Linear(8, 8), LoRA(rank=1))
        >>> before = model.weight.detach().clone()
        >>> optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.1)
        >>> relora = ReLoRA(model, optimizer, interval=5, warmup=0)
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     (model(torch.randn(16, 8)) - 1).square().mean().backward()
        ...     optimizer.step()
        ...     relora.step()
        >>> int(torch.linalg.matrix_rank(model.weight - before)) > 1
        True

    Reference:
        Lialin et al., "ReLoRA: High-Rank Training Through Low-Rank Updates", arXiv 2307.05695, Algorithm 1.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, interval: int, warmup: int = 0, name: str = "default"
    ) -> None:
        super().__init__(optimizer, interval=interval, warmup=warmup)
        self._layers: list[tuple[nn.Module, LoRAAdapter]] = []
        for _, layer, adapters in layers_of(model, name):
            adapter = adapters[name]
            if not isinstance(adapter, LoRAAdapter):
                raise ValueError(f"'model': adapter '{name}' is not of LoRA")
            self._layers.append((layer, adapter))

    @torch.no_grad()
    def restart(self) -> None:
        """Merge, draw A anew, set B to 0, and drop what the optimizer remembers of both."""
        for layer, adapter in self._layers:
            weight_of(layer).add_(adapter.site.weight(adapter.delta()))
            if adapter.site.kind == "embedding":
                nn.init.normal_(adapter.lora_A)
            else:
                nn.init.kaiming_uniform_(adapter.lora_A, a=math.sqrt(5))
            adapter.lora_B.zero_()
            self.forget((adapter.lora_A, adapter.lora_B))

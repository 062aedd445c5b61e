"""O3's inference: adapters that unlearn are loaded for each input as far as detectors find it like what was unlearnt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from corollary.adapt.inject import layers_of
from corollary.adapt.orthogonal_lora import OrthogonalLoRAAdapter, requests_of


class SoftLoading(nn.Module):
    r"""A model whose adapters act on each input by the greatest weight that any request's detector gives it.

    .. math:: W h + w(x) \sum_t \frac{\alpha}{r} B_t A_t h, \qquad w(x) = \max_t w_t(x)

    Inputs like nothing that was unlearnt get w = 0, and with it the base model's output, to the bit.

    Args:
        model: with an `OrthogonalLoRA` for each request, all active; `add_request` puts them on.
        detectors: request's name to what gives weights (batch,) in [0, 1], an `OODDetector` or any module. One for every request.

    Called, it weighs the inputs with the detectors, which are called with the same arguments, and runs the model. For generation, or
    where detectors read something else than the model does, weigh once and hold:

    ``with loading.hold(weights): model.generate(...)``

    Gradients flow into detectors too; call it under ``torch.no_grad()`` to use it. Detectors run one after the other.

    Raises:
        ValueError, TypeError: requests and detectors differ; an adapter does not act; a weight is missing or no number in [0, 1].

    When not to use it: where who runs the model is not trusted with it: the weights still hold what was unlearnt. A layer that sees
    inputs in other rows than the model does (tokens of a batch sorted to experts) cannot be weighed by input.

    Example:
        >>> import torch
        >>> from corollary.adapt import OrthogonalLoRA, SoftLoading, add_request
        >>> class Negative(torch.nn.Module):
        ...     def forward(self, x):
        ...         return (x[:, 0] < 0).float()
        >>> model = add_request(torch.nn.Linear(2, 1), OrthogonalLoRA(rank=1), name="first")
        >>> _ = torch.nn.init.ones_(model.adapters["first"].lora_B)
        >>> loading = SoftLoading(model, {"first": Negative()})
        >>> x = torch.tensor([[1.0, 1.0], [-1.0, 1.0]])
        >>> with torch.no_grad():
        ...     (loading(x) == torch.nn.functional.linear(x, model.weight, model.bias)).flatten().tolist()
        [True, False]

    Reference:
        Gao et al., arXiv 2407.10223, section 3.3 and algorithm 2.
    """

    def __init__(self, model: nn.Module, detectors: Mapping[str, nn.Module]) -> None:
        super().__init__()
        requests = requests_of(model)
        if set(requests) != set(detectors):
            raise ValueError(f"'detectors' are for {sorted(detectors)}; the model's requests are {sorted(requests)}")
        self.model = model
        self.detectors = nn.ModuleDict({name: detectors[name] for name in requests})
        self._adapters()

    def _adapters(self) -> list[OrthogonalLoRAAdapter]:
        """Every request's adapters on every layer."""
        found = []
        for name in self.detectors:
            for site, _, adapters in layers_of(self.model, name):
                if name not in adapters.active:
                    raise ValueError(
                        f"adapter '{name}' does not act on '{site}'; set_adapters(model, [...]) with all requests first"
                    )
                found.append(cast(OrthogonalLoRAAdapter, adapters[name]))
        return found

    def weights(self, *args: Any, **kwargs: Any) -> Tensor:
        """w, the greatest weight of any detector, for every input: (batch,)."""
        return torch.stack([detector(*args, **kwargs) for detector in self.detectors.values()]).amax(0)

    @contextmanager
    def hold(self, weights: Tensor) -> Iterator[nn.Module]:
        """Within the context the model itself takes ``weights`` (batch,), whatever it is called with; after it, all is as before."""
        if not isinstance(weights, Tensor) or weights.ndim != 1 or not weights.is_floating_point():
            got = f"{weights.dtype} of shape {tuple(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(f"'weights' must be a floating tensor (batch,), not {got}")
        if not bool(((weights >= 0) & (weights <= 1)).all()):
            raise ValueError("'weights' must lie in [0, 1]")
        with self._gated(weights):
            yield self.model

    @contextmanager
    def _gated(self, weights: Tensor) -> Iterator[None]:
        adapters = self._adapters()
        before = [adapter.gate for adapter in adapters]
        try:
            for adapter in adapters:
                adapter.gate = weights
            yield
        finally:
            for adapter, gate in zip(adapters, before, strict=True):
                adapter.gate = gate

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives, each input with its weight."""
        with self._gated(self.weights(*args, **kwargs)):
            return self.model(*args, **kwargs)

"""Orthogonal LoRA: one adapter for each request of a sequence, kept out of the directions that earlier ones read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from corollary.adapt.base import AdapterConfig, need_finite, need_probability, need_rank
from corollary.adapt.base import cast as cast_input
from corollary.adapt.inject import Target, adapt, layers_of, registry_of, set_adapters
from corollary.adapt.lora import LoRAAdapter
from corollary.adapt.site import Site


class OrthogonalLoRAAdapter(LoRAAdapter):
    """ΔM = s B A, with a penalty against earlier A and a gate for each input; see `OrthogonalLoRA`."""

    def __init__(self, site: Site, weight: Tensor, config: OrthogonalLoRA) -> None:
        super().__init__(site, weight, config.rank, config.scaling, config.dropout)
        self.orthogonality = config.orthogonality
        # Plain attributes: neither belongs to a saved adapter. Parameters are held, not their data, so that `.to` is followed.
        self.earlier: tuple[nn.Parameter, ...] = ()
        self.gate: Tensor | None = None

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        if self.gate is None:
            return super().forward(x, out)
        h = self.site.reduce(cast_input(self.inner(x), self.lora_A), self.lora_A)
        if self.gate.ndim != 1 or len(self.gate) != len(h):
            raise ValueError(
                f"{tuple(self.gate.shape)} weights for a layer whose input has {len(h)} rows; allowed: one weight for each row"
            )
        # The thin side is the cheap one to scale.
        gate = (self.scaling * self.gate.to(h.dtype)).view(-1, *(1,) * (h.ndim - 1))
        return self.site.expand_add(out, h * gate, self.lora_B)

    def penalty(self, weight: Tensor) -> Tensor | None:
        """λ times the sum of squared entries of A_i Aᵀ over earlier requests i; None while this adapter rests."""
        if not self.orthogonality or not self.earlier or not self.lora_A.requires_grad:
            return None
        total = weight.new_zeros(())
        for a in self.earlier:
            total = total + (a.detach() @ self.lora_A.mT).square().sum()
        return self.orthogonality * total


@dataclass(frozen=True)
class OrthogonalLoRA(AdapterConfig):
    r"""The LoRA of O3: one for each request, its input directions orthogonal to those of the requests before.

    .. math:: W x + \sum_{i \le t} \frac{\alpha}{r} B_i A_i x, \qquad
        \mathcal{L}_t + \lambda \sum_{i < t} \|A_i A_t^\top\|_F^2

    with the factors of earlier requests fixed. Where the second term vanishes, request t reads what no earlier request reads, and
    so cannot undo it. `add_request` puts request t on and tells it of the earlier ones; `adapter_penalty` of the model is the
    second term: add it to the loss. By itself, given to `adapt`, it is a LoRA. `SoftLoading` then weighs it for each input.

    Args:
        rank: r.
        alpha: α; None takes ``rank``, a scaling of 1.
        dropout: of the layer's input on its way into A, in training.
        orthogonality: λ; 0 leaves a LoRA.

    Trains r (m + n) numbers a layer and request.

    Raises:
        ValueError, TypeError: where a field is out of range.

    Deviations: the paper's formula keeps a request orthogonal to the one before it; the authors' code, as here, to all before it.
    Their code trains on with one LoRA; here each request has its own. The penalty is summed over layers, theirs averaged over blocks.

    When not to use it: where requests outnumber the width over the rank: no direction is then left. The model's weights still hold
    what was unlearnt: whoever has them can take the adapters off.

    Example:
        >>> import torch
        >>> from corollary.adapt import OrthogonalLoRA, adapter_penalty, add_request
        >>> model = torch.nn.Linear(16, 8)
        >>> for name in ("first", "second"):
        ...     model = add_request(model, OrthogonalLoRA(rank=2), name=name)
        >>> adapter_penalty(model).item() > 0, [n for n, p in model.named_parameters() if p.requires_grad]
        (True, ['adapters.second.lora_A', 'adapters.second.lora_B'])

    Reference:
        Gao et al., "On Large Language Model Continual Unlearning" (first as "Practical Unlearning for Large Language Models"), arXiv
        2407.10223, equations 3 to 6; the authors' code for which factor and which requests.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    orthogonality: float = 0.1

    def __post_init__(self) -> None:
        need_rank(self.rank)
        need_probability("dropout", self.dropout)
        need_finite("orthogonality", self.orthogonality)
        if self.alpha is not None:
            need_finite("alpha", self.alpha)

    @property
    def scaling(self) -> float:
        """What the product is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def build(self, site: Site, weight: Tensor, extra: Any = None) -> OrthogonalLoRAAdapter:
        return OrthogonalLoRAAdapter(site, weight, self)


def requests_of(model: nn.Module) -> list[str]:
    """Names of the model's `OrthogonalLoRA` adapters, in the order in which they came."""
    return [name for name, entry in registry_of(model).entries.items() if isinstance(entry.config, OrthogonalLoRA)]


def add_request(
    model: nn.Module, config: OrthogonalLoRA, targets: Target | Sequence[Target] | None = None, *, name: str
) -> nn.Module:
    """Put the adapter of a new request on: it trains, and those of earlier requests act beside it and rest.

    Args:
        model: with or without adapters of earlier requests, on the same layers or others.
        config: of the new adapter; its ``orthogonality`` weighs the penalty against all earlier ones.
        targets: as for `adapt`.
        name: of the request.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: as `adapt` does; the model is then as before.

    Example:
        >>> import torch
        >>> from corollary.adapt import OrthogonalLoRA, add_request
        >>> model = add_request(torch.nn.Linear(8, 8), OrthogonalLoRA(rank=2), name="first")
        >>> model = add_request(model, OrthogonalLoRA(rank=2), name="second")
        >>> model.adapters.active
        ('first', 'second')
    """
    if not isinstance(config, OrthogonalLoRA):
        raise TypeError(f"'config' must be an OrthogonalLoRA, not {config!r}")
    adapt(model, config, targets, name=name)
    earlier = requests_of(model)[:-1]
    for _, _, adapters in layers_of(model, name):
        new = cast(OrthogonalLoRAAdapter, adapters[name])
        new.earlier = tuple(cast(OrthogonalLoRAAdapter, adapters[n]).lora_A for n in earlier if n in adapters)
    set_adapters(model, [*earlier, name])
    for old in earlier:
        for _, _, adapters in layers_of(model, old):
            adapters[old].requires_grad_(False)
    return model

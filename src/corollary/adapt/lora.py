"""LoRA: a trained product of two thin matrices beside a frozen weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from corollary.adapt.base import AdapterConfig, LowRankAdapter, cast, need_finite, need_probability, need_rank
from corollary.adapt.site import Site


class LoRAAdapter(LowRankAdapter):
    """ΔM = s B A with both factors trained; see `LoRA`."""

    def __init__(self, site: Site, weight: Tensor, rank: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__(site, dropout)
        self.scaling = scaling
        self.lora_A = nn.Parameter(weight.new_empty(rank, site.in_features))
        self.lora_B = nn.Parameter(weight.new_zeros(site.out_features, rank))
        # As in peft: A like a torch Linear's weight, or normal for an embedding, whose rows are looked up and not summed.
        if site.kind == "embedding":
            nn.init.normal_(self.lora_A)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.scaling * self.lora_B, self.lora_A

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        h = self.site.reduce(cast(self.inner(x), self.lora_A), self.lora_A)
        if self.scaling != 1:
            h = h * self.scaling  # the thin side is the cheap one to scale
        return self.site.expand_add(out, h, self.lora_B)


@dataclass(frozen=True)
class LoRA(AdapterConfig):
    r"""Low-rank adaptation: a frozen weight plus a trained product of thin factors.

    .. math:: W x + \frac{\alpha}{r} B A x, \qquad B \in \mathbb{R}^{m \times r},\ A \in \mathbb{R}^{r \times n}

    with B zero at the start, so that the model starts as it was. Give it to `adapt`.

    Args:
        rank: r. It may exceed the layer's sides, as in peft, and then buys nothing.
        alpha: α; None takes ``rank``, a scaling of 1.
        dropout: of the layer's input on its way into A, in training.
        use_rslora: scale by α / √r instead (rank stabilization).

    Trains r (m + n) numbers a layer, on every kind of layer. A convolution's A is a convolution to r channels and its B one of
    size 1; the factors of a grouped convolution are shared by its groups.

    Raises:
        ValueError, TypeError: where a field is out of range.

    When not to use it: where the update that the task needs has a high rank, as in teaching much new knowledge: see ``RandLoRA``.

    Example:
        >>> import torch
        >>> from corollary.adapt import LoRA, adapt
        >>> model = adapt(torch.nn.Linear(16, 8), LoRA(rank=2, alpha=4))
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        48

    Reference:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, equation 3; Kalajdzievski, arXiv
        2312.03732, for ``use_rslora``.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    use_rslora: bool = False

    def __post_init__(self) -> None:
        need_rank(self.rank)
        need_probability("dropout", self.dropout)
        if self.alpha is not None:
            need_finite("alpha", self.alpha)

    @property
    def scaling(self) -> float:
        """What the product is multiplied by."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def build(self, site: Site, weight: Tensor, extra: Any = None) -> LoRAAdapter:
        return LoRAAdapter(site, weight, self.rank, self.scaling, self.dropout)

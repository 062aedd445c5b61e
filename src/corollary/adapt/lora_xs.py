"""LoRA-XS: a small trained core between the frozen singular vectors of the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from corollary.adapt._svd import leading_triplets
from corollary.adapt.base import (
    AdapterConfig,
    LowRankAdapter,
    cast,
    need_finite,
    need_fitting_rank,
    need_probability,
    need_rank,
)
from corollary.adapt.site import Site


class LoRAXSAdapter(LowRankAdapter):
    """ΔM = s U R V with R alone trained; see `LoRAXS`."""

    lora_A: Tensor
    lora_B: Tensor

    def __init__(self, site: Site, left: Tensor, right: Tensor, core: Tensor, scaling: float, dropout: float = 0.0) -> None:
        super().__init__(site, dropout)
        self.scaling = scaling
        self.register_buffer("lora_B", left, persistent=False)
        self.register_buffer("lora_A", right, persistent=False)
        self.lora_R = nn.Parameter(core)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_B @ (self.scaling * self.lora_R), self.lora_A

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        h = self.site.mix(self.site.reduce(cast(self.inner(x), self.lora_A), self.lora_A), self.scaling * self.lora_R)
        return self.site.expand_add(out, h, self.lora_B)


@dataclass(frozen=True)
class LoRAXS(AdapterConfig):
    r"""LoRA-XS: a trained r × r core between the frozen leading singular vectors of the weight.

    .. math:: W x + \frac{\alpha}{r}\, U_r \Sigma_r\, R\, V_r^\top x, \qquad W = U \Sigma V^\top

    with R normal of standard deviation 1e-5 at the start. Give it to `adapt`.

    Args:
        rank: r, at most the layer's shorter side.
        alpha: α; None takes ``rank``.
        dropout: of the layer's input, in training.
        init_std: standard deviation of R at the start; 0 starts as the base model exactly.

    Trains r² numbers a layer. The singular vectors come from the frozen weight and are not saved.

    Raises:
        ValueError, TypeError: where a field is out of range, or ``rank`` exceeds a layer's shorter side.

    When not to use it: where nothing else asks for so few parameters; LoRA of the same rank fits more.

    Example:
        >>> import torch
        >>> from corollary.adapt import LoRAXS, adapt
        >>> model = adapt(torch.nn.Linear(16, 8), LoRAXS(rank=4))
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        16

    Reference:
        Bałazy et al., "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", arXiv 2405.17604, equation 2.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    init_std: float = 1e-5

    def __post_init__(self) -> None:
        need_rank(self.rank)
        need_probability("dropout", self.dropout)
        need_finite("init_std", self.init_std)
        if self.alpha is not None:
            need_finite("alpha", self.alpha)

    def build(self, site: Site, weight: Tensor, extra: Any = None) -> LoRAXSAdapter:
        need_fitting_rank(self.rank, site)
        u, s, vh = leading_triplets(site.matrix(weight), self.rank)
        core = self.init_std * torch.randn(self.rank, self.rank, device=weight.device).to(weight.dtype)
        scaling = 1.0 if self.alpha is None else self.alpha / self.rank
        return LoRAXSAdapter(site, u * s, vh, core, scaling, self.dropout)

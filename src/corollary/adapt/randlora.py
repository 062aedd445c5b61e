"""RandLoRA: updates of full rank from random low-rank bases with trained diagonals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from corollary.adapt.base import AdapterConfig, LowRankAdapter, need_finite, need_probability, need_rank
from corollary.adapt.site import Site
from corollary.adapt.vera import kaiming_uniform


class RandLoRAAdapter(LowRankAdapter):
    """ΔM = s Σ B_j diag(λ_j) A diag(γ_j), or its transpose for a wide layer, with λ and γ trained; see `RandLoRA`."""

    randlora_A: Tensor
    randlora_B: Tensor

    def __init__(self, site: Site, a: Tensor, b: Tensor, scaling: float, dropout: float = 0.0) -> None:
        super().__init__(site, dropout)
        self.scaling = scaling
        self.register_buffer("randlora_A", a, persistent=False)
        self.register_buffer("randlora_B", b, persistent=False)
        bases, rank, shorter = b.shape[1], b.shape[2], a.shape[1]
        self.randlora_lambda = nn.Parameter(a.new_zeros(bases, rank))
        self.randlora_gamma = nn.Parameter(a.new_full((bases, shorter), 1 / max(shorter, bases)))

    def factors(self) -> tuple[Tensor, Tensor]:
        # The scaled side is the shorter one, so that little is scaled and trained.
        scaled = (self.scaling * self.randlora_lambda)[:, :, None] * (self.randlora_A * self.randlora_gamma[:, None, :])
        short, long = scaled.flatten(0, 1), self.randlora_B.flatten(1)
        return (long, short) if self.site.in_features <= self.site.out_features else (short.T, long.T)


@dataclass(frozen=True)
class RandLoRA(AdapterConfig):
    r"""RandLoRA: a sum of random low-rank products, scaled by trained diagonals until it has full rank.

    .. math:: \Delta W = \frac{\alpha}{r} \sum_{j=1}^{N} B_j\, \mathrm{diag}(\lambda_j)\, A\, \mathrm{diag}(\gamma_j),
        \qquad N = \lceil \min(m, n) / r \rceil

    with :math:`B_j` (max(m, n) × r) and A (r × min(m, n)) random, frozen and shared by all layers (layers of other sizes take their
    leading parts), and the transpose of it for a layer that is wider than tall. λ = 0 at the start. Give it to `adapt`.

    Args:
        rank: r of each basis. Unlike LoRA's it makes the update *larger* as it falls: N grows.
        alpha: α; None takes 20 r, what the authors find to work.
        dropout: of the layer's input on its way into the factors, in training.
        seed: of the bases, which are drawn anew on loading and not saved.

    Trains N (r + min(m, n)) numbers a layer, about those of a LoRA of rank N / 2. The update has rank min(m, n) as soon as the γ of
    the bases differ, so from the second step of training on; while they are equal, A gives it rank r.

    Raises:
        ValueError, TypeError: where a field is out of range.

    Deviations: peft pairs row k N + j of the scaled A with column j r + k of B, which is a sum over other pairs than the paper's;
    here both are ordered alike. Bases are drawn in float32, in peft in half precision.

    When not to use it: where the time of a step counts: its factors are N r wide, so a forward pass costs what two more layers of the
    same size cost.

    Example:
        >>> import torch
        >>> from corollary.adapt import RandLoRA, adapt
        >>> model = adapt(torch.nn.Linear(16, 8), RandLoRA(rank=4))
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        24
        >>> for parameter in model.adapters["default"].parameters():
        ...     _ = torch.nn.init.normal_(parameter)
        >>> int(torch.linalg.matrix_rank(model.adapters["default"].delta()))
        8

    Reference:
        Albert et al., "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", arXiv 2502.00987, section 4.
    """

    rank: int = 32
    alpha: float | None = None
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        need_rank(self.rank)
        need_probability("dropout", self.dropout)
        if self.alpha is not None:
            need_finite("alpha", self.alpha)

    def prepare(self, sites: Mapping[str, tuple[Site, Tensor]], calibration: Any = None) -> Mapping[str, Any]:
        sides = {name: sorted((site.out_features, site.in_features)) for name, (site, _) in sites.items()}
        shortest = max(short for short, _ in sides.values())
        longest = max(long for _, long in sides.values())
        generator = torch.Generator().manual_seed(self.seed)
        a = kaiming_uniform(self.rank, shortest, generator)
        b = torch.stack([kaiming_uniform(longest, self.rank, generator) for _ in range(math.ceil(shortest / self.rank))], 1)
        a, b = a / a.square().mean().sqrt(), b / b.square().mean().sqrt()
        placed: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        for _, weight in sites.values():
            if (weight.device, weight.dtype) not in placed:
                placed[weight.device, weight.dtype] = (a.to(weight), b.to(weight))
        extras = {}
        for name, (_, weight) in sites.items():
            short, long = sides[name]
            own_a, own_b = placed[weight.device, weight.dtype]
            extras[name] = (own_a[:, :short], own_b[:long, : math.ceil(short / self.rank)])  # views: the bases exist once
        return extras

    def build(self, site: Site, weight: Tensor, extra: Any = None) -> RandLoRAAdapter:
        a, b = extra
        scaling = 20.0 if self.alpha is None else self.alpha / self.rank
        return RandLoRAAdapter(site, a, b, scaling, self.dropout)

"""VeRA: two trained vectors around random factors that all layers share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from corollary.adapt.base import AdapterConfig, LowRankAdapter, cast, need_finite, need_probability, need_rank
from corollary.adapt.site import Site


class VeRAAdapter(LowRankAdapter):
    """ΔM = diag(b) B diag(d) A with the vectors alone trained; see `VeRA`."""

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, site: Site, a: Tensor, b: Tensor, d_initial: float, dropout: float = 0.0) -> None:
        super().__init__(site, dropout)
        self.register_buffer("vera_A", a, persistent=False)
        self.register_buffer("vera_B", b, persistent=False)
        self.vera_lambda_d = nn.Parameter(torch.full_like(a[:, 0], d_initial))
        self.vera_lambda_b = nn.Parameter(torch.zeros_like(b[:, 0]))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.vera_lambda_b[:, None] * self.vera_B, self.vera_lambda_d[:, None] * self.vera_A

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        h = self.site.scale(self.site.reduce(cast(self.inner(x), self.vera_A), self.vera_A), self.vera_lambda_d)
        return out + self.site.scale(self.site.expand(h, self.vera_B), self.vera_lambda_b).to(out.dtype)


@dataclass(frozen=True)
class VeRA(AdapterConfig):
    r"""VeRA: vector-based adaptation between random factors, frozen and shared by all layers.

    .. math:: W x + \Lambda_b\, B\, \Lambda_d\, A\, x

    with A and B uniform as Kaiming has it, d = ``d_initial`` and b = 0 at the start. Layers of other sizes take the leading part of
    the largest layers' factors. Give it to `adapt`.

    Args:
        rank: r, the width of the shared factors; larger than LoRA's, because it costs one number.
        d_initial: d at the start.
        dropout: of the layer's input, in training.
        seed: of A and B, which are drawn anew on loading and not saved; the same as peft's for its ``projection_prng_key``.

    Trains r + m numbers a layer.

    Raises:
        ValueError, TypeError: where a field is out of range.

    When not to use it: where r must be large for the fit: the products with A and B cost as if they were trained.

    Example:
        >>> import torch
        >>> from corollary.adapt import VeRA, adapt
        >>> model = adapt(torch.nn.Linear(16, 8), VeRA(rank=32))
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        40

    Reference:
        Kopiczko, Blankevoort, Asano, "VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454, equation 2.
    """

    rank: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        need_rank(self.rank)
        need_probability("dropout", self.dropout)
        need_finite("d_initial", self.d_initial)

    def prepare(self, sites: Mapping[str, tuple[Site, Tensor]], calibration: Any = None) -> Mapping[str, Any]:
        generator = torch.Generator().manual_seed(self.seed)
        a = _kaiming_uniform(self.rank, max(site.in_features for site, _ in sites.values()), generator)
        b = _kaiming_uniform(max(site.out_features for site, _ in sites.values()), self.rank, generator)
        placed: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        for _, weight in sites.values():
            if (weight.device, weight.dtype) not in placed:
                placed[weight.device, weight.dtype] = (a.to(weight), b.to(weight))
        return {
            # Views: the factors exist once, whatever the number of layers.
            name: (placed[w.device, w.dtype][0][:, : site.in_features], placed[w.device, w.dtype][1][: site.out_features])
            for name, (site, w) in sites.items()
        }

    def build(self, site: Site, weight: Tensor, extra: Any = None) -> VeRAAdapter:
        a, b = extra
        return VeRAAdapter(site, a, b, self.d_initial, self.dropout)


def _kaiming_uniform(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    bound = math.sqrt(6 / columns)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

"""SNNK adapters: a bottleneck's first layer and activation as frozen random features, so that its input side trains nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corollary.adapt.base import Adapter, AdapterConfig, cast, need_rank
from corollary.adapt.site import Site
from corollary.adapt.urf import RandomFeatureMap, need_map


class SNNKAdapterModule(Adapter):
    """y + U Ψ Φ(y) + β on a layer's output y, with U, Ψ and β trained, or U and β alone where U Ψ is one matrix; see `SNNKAdapter`."""

    def __init__(self, site: Site, features: RandomFeatureMap, down: Tensor | None) -> None:
        super().__init__(site)
        self.features = features
        like, width = features.directions, features.num_features
        if down is not None:
            self.snnk_down = nn.Parameter(down)
            width = len(down)
        self.snnk_up = nn.Parameter(like.new_zeros(site.out_features, width))
        self.snnk_bias = nn.Parameter(like.new_zeros(site.out_features))

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        y = cast(out, self.snnk_up)
        if self.features.activation != "relu":
            y = F.normalize(y, dim=-1)  # a wave's features grow as exp(|y|²)
        h = self.features(y)
        if "snnk_down" in self._parameters:
            h = F.linear(h, self.snnk_down)
        return out + F.linear(h, self.snnk_up, self.snnk_bias).to(out.dtype)


@dataclass(frozen=True)
class SNNKAdapter(AdapterConfig):
    r"""An adapter after a layer, in the form of a bottleneck whose first layer and activation are a kernel's random features.

    A bottleneck adapter adds :math:`U f(D y) + \beta` to a layer's output y, and trains D (r × out) besides U (out × r). Here f(D y) is
    :math:`\Psi\, \Phi(y)`: Φ is random and frozen, and Ψ is r × features, however wide the layer. Bundled, U Ψ is one matrix:

    .. math:: y \leftarrow y + U\, \Psi\, \Phi(y) + \beta \qquad \text{or} \qquad y \leftarrow y + \Theta\, \Phi(y) + \beta

    U (or Θ) and β are 0 at the start. Give it to `adapt`.

    Args:
        num_features: dimension m of Φ; even unless the activation is ``"relu"``.
        rank: r of the bottleneck; None bundles it away.
        activation: as of `SNNKLinear`. Waves see y / |y|, because their features grow as exp(|y|²).
        seed: of Φ and of the start of Ψ. Φ is drawn anew on loading and not saved.

    Trains out (m + 1) numbers a layer, or out (r + 1) + r m with a rank.

    Raises:
        ValueError, TypeError: where a field is out of range.

    Deviations: the authors draw Φ for each layer with torch's global state; here one seed draws for all layers.

    When not to use it: where the adapter is to be merged into the weight; its change is no matrix, and it stays as two thin products.

    Example:
        >>> import torch
        >>> from corollary.adapt import SNNKAdapter, adapt
        >>> model = adapt(torch.nn.Linear(64, 32), SNNKAdapter(num_features=8))
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        288

    Reference:
        Sehanobish et al., "Scalable Neural Network Kernels", arXiv 2310.13225, the section on adapters; the authors' ``CustomReluAdapter``.
    """

    supports: ClassVar[frozenset[str]] = frozenset({"linear"})

    num_features: int = 16
    rank: int | None = None
    activation: str = "relu"
    seed: int = 0

    def __post_init__(self) -> None:
        need_map(self.activation, self.num_features, 0.0, 1.0)
        if self.rank is not None:
            need_rank(self.rank)

    def prepare(self, sites: Mapping[str, tuple[Site, Tensor]], calibration: Any = None) -> Mapping[str, Any]:
        generator = torch.Generator().manual_seed(self.seed)
        extras = {}
        for name, (site, weight) in sites.items():
            features = RandomFeatureMap(
                self.activation, site.out_features, self.num_features, generator=generator, persistent=False
            )
            down = None
            if self.rank is not None:
                # What nn.Linear draws for the layer that Ψ stands for.
                bound = site.out_features**-0.5
                rows = torch.empty(self.rank, site.out_features).uniform_(-bound, bound, generator=generator)
                down = features.of_weight(rows).to(weight)
            extras[name] = (features.to(weight), down)
        return extras

    def build(self, site: Site, weight: Tensor, extra: Any = None) -> SNNKAdapterModule:
        return SNNKAdapterModule(site, *extra)

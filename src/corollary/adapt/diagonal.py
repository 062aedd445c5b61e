"""What SVFit, LoLDU and their like share: a trained diagonal between two frozen factors of the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from corollary.adapt.base import LowRankAdapter, cast
from corollary.adapt.site import Site


class DiagonalAdapter(LowRankAdapter):
    """ΔM = B diag(d) A with frozen factors; a subclass registers what it trains and gives d by `change`."""

    left: Tensor
    right: Tensor

    def __init__(self, site: Site, left: Tensor, right: Tensor, dropout: float = 0.0) -> None:
        super().__init__(site, dropout)
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)

    def change(self) -> Tensor:
        """d (rank,): how far the diagonal is from where it began."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.left * self.change(), self.right

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        right = self.right
        h = self.site.scale(self.site.reduce(cast(self.inner(x), right), right), self.change())
        return self.site.expand_add(out, h, self.left)


def need_all(rank: int | None, site: Site) -> int:
    """A rank that fits the layer; None is the layer's shorter side."""
    shorter = min(site.out_features, site.in_features)
    if rank is not None and rank > shorter:
        raise ValueError(f"'rank' is {rank}, but the layer's matrix is {site.out_features} x {site.in_features}")
    return shorter if rank is None else rank


def working(matrix: Tensor) -> Tensor:
    """A matrix in a dtype that decompositions take."""
    return matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))

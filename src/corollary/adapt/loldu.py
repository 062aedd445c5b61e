"""LoLDU: the diagonal of the weight's LDU decomposition is trained, over its frozen triangles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from corollary.adapt.base import AdapterConfig, need_finite, need_probability, need_rank
from corollary.adapt.diagonal import DiagonalAdapter, need_all, working
from corollary.adapt.site import Site


class LoLDUAdapter(DiagonalAdapter):
    """ΔM = P L diag(s z - s₀ z₀) U with z and the scalar s trained; see `LoLDU`."""

    start: Tensor

    def __init__(self, site: Site, left: Tensor, z: Tensor, right: Tensor, scaling: float, dropout: float = 0.0) -> None:
        super().__init__(site, left, right, dropout)
        self.register_buffer("start", scaling * z, persistent=False)
        self.z = nn.Parameter(z.clone())
        self.scaling_factor = nn.Parameter(torch.full_like(z[:1], scaling))

    def change(self) -> Tensor:
        return self.scaling_factor * self.z - self.start


@dataclass(frozen=True)
class LoLDU(AdapterConfig):
    r"""LoLDU: train the leading diagonal of the LDU decomposition of a frozen weight, and one scale.

    .. math:: W = P L D U, \qquad W x + P L_{:,:r}\, \mathrm{diag}(s z - s_0 z_0)\, U_{:r,:}\, x

    with P a permutation, L and U of unit diagonal (partial pivoting), z trained from :math:`z_0 = D_{:r}` and the scalar s from
    :math:`s_0 = \alpha / r`. The rest of the weight stays, so the model starts as it was. Give it to `adapt`.

    Args:
        rank: r, the length of the trained diagonal; None takes each layer's shorter side.
        alpha: α; None takes ``rank``, a scale of 1. The authors' code takes 1 by default, at which z moves the weight r times less.
        dropout: of the layer's input on its way into the factors, in training.

    Trains r + 1 numbers a layer. The triangles are computed from the frozen weight when the adapter is put on, and are not saved.

    Raises:
        ValueError, TypeError: where a field is out of range, or ``rank`` exceeds a layer's shorter side.

    Deviations: a pivot that is zero is taken as 1 and its row of U is left as it is, so that the product is still W; the authors'
    code divides by it. Only the columns of P L and the rows of U that are used are kept, not P and the whole triangles.

    When not to use it: where the fit matters more than the count: the triangles are no basis made for the task, and the order of
    the diagonal is the pivoting's, not one of importance.

    Example:
        >>> import torch
        >>> from corollary.adapt import LoLDU, adapt
        >>> model = adapt(torch.nn.Linear(16, 8), LoLDU(rank=4))
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        5

    Reference:
        Shi et al., "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning", arXiv
        2410.13618, section III; the trained scale as in the authors' code.
    """

    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank is not None:
            need_rank(self.rank)
        if self.alpha is not None:
            need_finite("alpha", self.alpha, positive=True)
        need_probability("dropout", self.dropout)

    def build(self, site: Site, weight: Tensor, extra: Any = None) -> LoLDUAdapter:
        rank = need_all(self.rank, site)
        matrix = site.matrix(weight)
        p, lower, upper = torch.linalg.lu(working(matrix))
        pivots = upper.diagonal()
        pivots = torch.where(pivots == 0, torch.ones_like(pivots), pivots)[:rank]
        # P is a permutation matrix: its product moves the rows of L.
        left = lower[:, :rank][p.argmax(1)]
        right = upper[:rank] / pivots[:, None]
        scaling = 1.0 if self.alpha is None else self.alpha / rank
        like = matrix.dtype
        return LoLDUAdapter(
            site, left.contiguous().to(like), pivots.to(like), right.contiguous().to(like), scaling, self.dropout
        )

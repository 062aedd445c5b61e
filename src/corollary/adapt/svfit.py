"""SVFit: the leading singular values of the weight are trained, over its frozen singular vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from corollary.adapt._svd import leading_triplets
from corollary.adapt.base import AdapterConfig, need_probability, need_rank
from corollary.adapt.diagonal import DiagonalAdapter, need_all
from corollary.adapt.site import Site


class SVFitAdapter(DiagonalAdapter):
    """ΔM = U diag(σ - σ₀) Vᵀ with σ trained; see `SVFit`."""

    start: Tensor

    def __init__(self, site: Site, left: Tensor, sigma: Tensor, right: Tensor, dropout: float = 0.0) -> None:
        super().__init__(site, left, right, dropout)
        self.register_buffer("start", sigma, persistent=False)
        self.sigma = nn.Parameter(sigma.clone())

    def change(self) -> Tensor:
        return self.sigma - self.start


@dataclass(frozen=True)
class SVFit(AdapterConfig):
    r"""SVFit: train the leading singular values of a frozen weight, and nothing else.

    .. math:: W = U_r\, \mathrm{diag}(\sigma)\, V_r^\top + W_e, \qquad \sigma \in \mathbb{R}^r \text{ trained}

    with the rest :math:`W_e` and the singular vectors frozen. Computed as :math:`W x + U_r ((\sigma - \sigma_0) \odot V_r^\top x)`, so
    the model starts as it was. Give it to `adapt`.

    Args:
        rank: r, how many of the largest singular values train; None takes all of each layer's.
        dropout: of the layer's input on its way into the factors, in training.

    Trains r numbers a layer. The vectors, r (m + n) numbers, are computed from the frozen weight when the adapter is put on, and are
    not saved. A singular value may turn negative in training: nothing holds it back, in the paper neither.

    Raises:
        ValueError, TypeError: where a field is out of range, or ``rank`` exceeds a layer's shorter side.

    When not to use it: where the task needs directions that the weight has not: the subspaces stay, only their strengths move. It
    wants a learning rate 10 to 100 times LoRA's.

    Example:
        >>> import torch
        >>> from corollary.adapt import SVFit, adapt
        >>> model = adapt(torch.nn.Linear(16, 8), SVFit(rank=4))
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        4

    Reference:
        Sun et al., "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values", arXiv 2409.05926,
        section III.
    """

    rank: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank is not None:
            need_rank(self.rank)
        need_probability("dropout", self.dropout)

    def build(self, site: Site, weight: Tensor, extra: Any = None) -> SVFitAdapter:
        left, sigma, right = leading_triplets(site.matrix(weight), need_all(self.rank, site))
        return SVFitAdapter(site, left, sigma, right, self.dropout)

"""PEGO: a group of LoRA modules, each kept orthogonal to the frozen weight and to the others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from corollary.adapt.base import AdapterConfig, LowRankAdapter, need_finite, need_probability, need_rank
from corollary.adapt.site import Site


class PEGOAdapter(LowRankAdapter):
    """ΔM = Σ B_i A_i over a group, with an orthogonality penalty; see `PEGO`."""

    def __init__(self, site: Site, weight: Tensor, config: PEGO) -> None:
        super().__init__(site, config.dropout)
        self.regularization = config.regularization
        shape = (config.group_size, config.rank)
        self.lora_A = nn.Parameter(weight.new_empty(*shape, site.in_features))
        self.lora_B = nn.Parameter(weight.new_zeros(config.group_size, site.out_features, config.rank))
        for a in self.lora_A.unbind():
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))

    def factors(self) -> tuple[Tensor, Tensor]:
        # Side by side the group is one LoRA of rank N r: that is what its forward pass costs.
        return self.lora_B.transpose(0, 1).flatten(1), self.lora_A.flatten(0, 1)

    def penalty(self, weight: Tensor) -> Tensor | None:
        """λ times the sum of absolute entries of W ΔW_iᵀ over the group and of ΔW_i ΔW_jᵀ over its pairs."""
        if not self.regularization:
            return None
        a, b = self.lora_A, self.lora_B
        with_weight = (self.site.matrix(weight.detach()).to(a.dtype) @ a.mT) @ b.mT
        total = with_weight.abs().sum()
        if len(a) > 1:
            i, j = torch.triu_indices(len(a), len(a), 1, device=a.device)
            total = total + (b[i] @ (a[i] @ a[j].mT) @ b[j].mT).abs().sum()
        return self.regularization * total


@dataclass(frozen=True)
class PEGO(AdapterConfig):
    r"""PEGO: a group of LoRA modules that preserves what the weight does and whose members differ.

    .. math:: W + \sum_{i=1}^{N} B_i A_i, \qquad
        \mathcal{L} + \lambda \sum_i \Big( \|W (B_i A_i)^\top\|_1 + \sum_{j > i} \|B_i A_i (B_j A_j)^\top\|_1 \Big)

    with the sum of absolute entries as the norm. `adapter_penalty` of the adapted model gives the second term: add it to the loss.
    Give it to `adapt`.

    Args:
        rank: of each module.
        group_size: N, how many modules.
        regularization: λ; 0 leaves a LoRA of rank N r.
        dropout: of the layer's input on its way into the factors, in training.

    Trains N r (m + n) numbers a layer. After merging nothing is left of the group: inference costs what the base model's does.

    Raises:
        ValueError, TypeError: where a field is out of range.

    Deviations: on a layer that holds queries, keys and values together the penalty is of the whole; the authors take queries and
    values apart and leave the keys alone.

    When not to use it: where test data come from the domains of training: the penalty holds the fit back. It costs N products of
    m × m matrices a layer and step.

    Example:
        >>> import torch
        >>> from corollary.adapt import PEGO, adapt, adapter_penalty
        >>> model = adapt(torch.nn.Linear(16, 8), PEGO(rank=2, group_size=3))
        >>> model(torch.randn(4, 16)).shape, adapter_penalty(model).item()
        (torch.Size([4, 8]), 0.0)

    Reference:
        Hu et al., "Learn to Preserve and Diversify: Parameter-Efficient Group with Orthogonal Regularization for Domain
        Generalization", arXiv 2407.15085; the penalty as in the authors' code.
    """

    rank: int = 4
    group_size: int = 4
    regularization: float = 1e-3
    dropout: float = 0.0

    def __post_init__(self) -> None:
        need_rank(self.rank)
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int) or self.group_size < 1:
            raise ValueError(f"'group_size' must be an int of at least 1, not {self.group_size!r}")
        need_finite("regularization", self.regularization)
        need_probability("dropout", self.dropout)

    def build(self, site: Site, weight: Tensor, extra: Any = None) -> PEGOAdapter:
        return PEGOAdapter(site, weight, self)

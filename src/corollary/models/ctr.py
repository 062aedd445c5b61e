"""Click-through models over categorical fields: DeepFM and the Deep & Cross Network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from corollary.models._checks import need_positive
from corollary.models.mlp import MLP


class _FieldModel(nn.Module):
    """What both share: an embedding for each field, the effects of ids alone, and a stack of layers on the embeddings."""

    def __init__(self, field_sizes: Sequence[int], dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        need_positive(dim=dim, **{f"field_sizes[{i}]": size for i, size in enumerate(field_sizes)})
        if not field_sizes or not hidden:
            raise ValueError(f"'field_sizes' has {len(field_sizes)} and 'hidden' {len(hidden)} entries; allowed: at least one")
        self.field_sizes = tuple(field_sizes)
        self.embeddings = nn.ModuleList(nn.Embedding(size, dim) for size in field_sizes)
        for embedding in self.embeddings:
            nn.init.normal_(embedding.weight, std=0.01)  # type: ignore[arg-type]
        mlp = MLP(len(field_sizes) * dim, hidden, 1)
        self.deep = mlp.body
        self.num_features = mlp.num_features

    def _embed(self, ids: Tensor) -> Tensor:
        if ids.ndim != 2 or ids.shape[1] != len(self.field_sizes):
            raise ValueError(f"'ids' has shape {tuple(ids.shape)}; allowed: (batch, {len(self.field_sizes)})")
        if ids.is_floating_point():
            raise TypeError(f"'ids' is {ids.dtype}; allowed: integers")
        return torch.stack([embedding(column) for embedding, column in zip(self.embeddings, ids.unbind(1), strict=True)], 1)


class DeepFM(_FieldModel):
    r"""A factorization machine and a multilayer perceptron on the same embeddings; gives log-odds.

    .. math:: b + \sum_f w_{f,i_f} + \sum_{f<g} \langle e_f, e_g \rangle + \mathrm{MLP}(e_1, \dots, e_F)

    Args:
        field_sizes: ids in each field.
        dim: of each embedding.
        hidden: widths of the perceptron.

    Raises:
        TypeError, ValueError: a size below 1, nothing given, ids that are not (batch, fields) integers.

    Example:
        >>> DeepFM([10, 5], dim=4, hidden=[8])(torch.tensor([[9, 4], [0, 0]])).shape
        torch.Size([2])

    Reference:
        Guo et al., "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction", arXiv 1703.04247.
    """

    def __init__(self, field_sizes: Sequence[int], dim: int = 16, hidden: Sequence[int] = (128, 128, 128)) -> None:
        super().__init__(field_sizes, dim, hidden)
        # One table for the effects of ids alone: they are single numbers, and one look-up is faster than one a field.
        self.first_order = nn.EmbeddingBag(sum(field_sizes), 1, mode="sum")
        nn.init.zeros_(self.first_order.weight)
        self.register_buffer("offsets", torch.tensor([0, *field_sizes[:-1]]).cumsum(0), persistent=False)
        self.head = nn.Linear(self.num_features, 1)

    def features(self, ids: Tensor) -> Tensor:
        """The perceptron's last hidden layer, (batch, num_features)."""
        hidden: Tensor = self.deep(self._embed(ids).flatten(1))
        return hidden

    def forward(self, ids: Tensor) -> Tensor:
        """Log-odds (batch,) of ids (batch, fields)."""
        embedded = self._embed(ids)
        pairs = (embedded.sum(1).square() - embedded.square().sum(1)).sum(1) / 2
        deep: Tensor = self.head(self.deep(embedded.flatten(1)))[:, 0]
        alone: Tensor = self.first_order(ids + self.offsets)[:, 0]
        return pairs + deep + alone


class DCN(_FieldModel):
    r"""Cross layers beside a multilayer perceptron on the same embeddings; gives log-odds.

    .. math:: x_{l+1} = x_0 \langle w_l, x_l \rangle + b_l + x_l

    Args:
        field_sizes: ids in each field.
        dim: of each embedding.
        hidden: widths of the perceptron.
        cross: how many cross layers.

    Raises:
        TypeError, ValueError: a size below 1, nothing given, ids that are not (batch, fields) integers.

    Example:
        >>> DCN([10, 5], dim=4, hidden=[8])(torch.tensor([[9, 4], [0, 0]])).shape
        torch.Size([2])

    Reference:
        Wang et al., "Deep & Cross Network for Ad Click Predictions", arXiv 1708.05123.
    """

    def __init__(
        self, field_sizes: Sequence[int], dim: int = 16, hidden: Sequence[int] = (128, 128, 128), cross: int = 2
    ) -> None:
        super().__init__(field_sizes, dim, hidden)
        need_positive(cross=cross)
        width = len(field_sizes) * dim
        self.cross_weight = nn.Parameter(torch.randn(cross, width) / width**0.5)
        self.cross_bias = nn.Parameter(torch.zeros(cross, width))
        self.num_features += width
        self.head = nn.Linear(self.num_features, 1)

    def features(self, ids: Tensor) -> Tensor:
        """Cross layers' and perceptron's last outputs beside each other, (batch, num_features)."""
        start = self._embed(ids).flatten(1)
        x = start
        for weight, bias in zip(self.cross_weight, self.cross_bias, strict=True):
            x = start * (x @ weight)[:, None] + bias + x
        return torch.cat([x, self.deep(start)], 1)

    def forward(self, ids: Tensor) -> Tensor:
        """Log-odds (batch,) of ids (batch, fields)."""
        out: Tensor = self.head(self.features(ids))[:, 0]
        return out

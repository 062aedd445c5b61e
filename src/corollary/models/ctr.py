"""Click-through models over categorical fields: DeepFM and the Deep & Cross Network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from corollary.models._checks import need_positive
from corollary.models.mlp import MLP


class FieldEmbedding(nn.Embedding):
    """One table for all fields, the rows of a field standing together: one look-up in place of one a field.

    It is an ``nn.Embedding`` that knows where each field's rows begin, and is called with rows of the whole table.

    Args:
        field_sizes: ids in each field.
        dim: of each embedding.
        device, dtype: of the table.

    Attributes:
        field_sizes: as given.
        starts: the first row of each field.

    Raises:
        TypeError, ValueError: no fields, or a size or dimension below 1.

    Example:
        >>> table = FieldEmbedding([10, 5], 4)
        >>> table.starts, table(torch.tensor([[9, 10]])).shape
        ((0, 10), torch.Size([1, 2, 4]))
    """

    def __init__(
        self,
        field_sizes: Sequence[int],
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        need_positive(dim=dim, **{f"field_sizes[{i}]": size for i, size in enumerate(field_sizes)})
        if not field_sizes:
            raise ValueError("'field_sizes' is empty; allowed: at least one field")
        super().__init__(sum(field_sizes), dim, device=device, dtype=dtype)
        self.field_sizes = tuple(field_sizes)
        self.starts = tuple(accumulate(field_sizes[:-1], initial=0))


class _FieldModel(nn.Module):
    """What both share: a table of embeddings, and a stack of layers on the embeddings of a row."""

    starts: Tensor
    ends: Tensor

    def __init__(self, field_sizes: Sequence[int], dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.embedding = FieldEmbedding(field_sizes, dim)
        if not hidden:
            raise ValueError("'hidden' is empty; allowed: at least one width")
        nn.init.normal_(self.embedding.weight, std=0.01)
        self.field_sizes = self.embedding.field_sizes
        starts = torch.tensor(self.embedding.starts)
        self.register_buffer("starts", starts, persistent=False)
        self.register_buffer("ends", starts + torch.tensor(self.field_sizes), persistent=False)
        mlp = MLP(len(field_sizes) * dim, hidden, 1)
        self.deep = mlp.body
        self.num_features = mlp.num_features

    def _rows(self, ids: Tensor) -> Tensor:
        """Rows of the table (batch, fields) that the fields' ids stand for."""
        if ids.ndim != 2 or ids.shape[1] != len(self.field_sizes):
            raise ValueError(f"'ids' has shape {tuple(ids.shape)}; allowed: (batch, {len(self.field_sizes)})")
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise TypeError(f"'ids' is {ids.dtype}; allowed: integers")
        rows = ids + self.starts
        # An id past its field's end would silently be another field's. On a GPU the question would stall the stream.
        if rows.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = (ids < 0) | (rows >= self.ends)
            if bool(wrong.any()):
                row, field = wrong.nonzero()[0].tolist()
                raise ValueError(
                    f"'ids' has {int(ids[row, field])} in field {field}; allowed: 0 to {self.field_sizes[field] - 1}"
                )
        return rows


class DeepFM(_FieldModel):
    r"""A factorization machine and a multilayer perceptron on the same embeddings; gives log-odds.

    .. math:: b + \sum_f w_{f,i_f} + \sum_{f<g} \langle e_f, e_g \rangle + \mathrm{MLP}(e_1, \dots, e_F)

    Args:
        field_sizes: ids in each field.
        dim: of each embedding.
        hidden: widths of the perceptron.

    Attributes:
        embedding: a `FieldEmbedding`, used by the factorization machine and the perceptron.
        first_order: the effects w of ids alone.

    Raises:
        TypeError, ValueError: a size below 1, nothing given, ids that are not (batch, fields) integers within their fields (the
            last is looked at on the CPU, outside of ``torch.compile``).

    Example:
        >>> DeepFM([10, 5], dim=4, hidden=[8])(torch.tensor([[9, 4], [0, 0]])).shape
        torch.Size([2])

    Reference:
        Guo et al., "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction", arXiv 1703.04247.
    """

    def __init__(self, field_sizes: Sequence[int], dim: int = 16, hidden: Sequence[int] = (128, 128, 128)) -> None:
        super().__init__(field_sizes, dim, hidden)
        self.first_order = nn.EmbeddingBag(sum(field_sizes), 1, mode="sum")
        nn.init.zeros_(self.first_order.weight)
        self.head = nn.Linear(self.num_features, 1)

    def features(self, ids: Tensor) -> Tensor:
        """The perceptron's last hidden layer, (batch, num_features)."""
        hidden: Tensor = self.deep(self.embedding(self._rows(ids)).flatten(1))
        return hidden

    def forward(self, ids: Tensor) -> Tensor:
        """Log-odds (batch,) of ids (batch, fields)."""
        rows = self._rows(ids)
        embedded = self.embedding(rows)
        pairs = (embedded.sum(1).square() - embedded.square().sum(1)).sum(1) / 2  # of all pairs, in time linear in the fields
        deep: Tensor = self.head(self.deep(embedded.flatten(1)))[:, 0]
        alone: Tensor = self.first_order(rows)[:, 0]
        out: Tensor = pairs + deep + alone
        return out


class DCN(_FieldModel):
    r"""Cross layers beside a multilayer perceptron on the same embeddings; gives log-odds.

    .. math:: x_{l+1} = x_0 \langle w_l, x_l \rangle + b_l + x_l

    Args:
        field_sizes: ids in each field.
        dim: of each embedding.
        hidden: widths of the perceptron.
        cross: how many cross layers.

    Attributes:
        embedding: a `FieldEmbedding`.

    Raises:
        TypeError, ValueError: as `DeepFM`.

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
        start = self.embedding(self._rows(ids)).flatten(1)
        x = start
        for weight, bias in zip(self.cross_weight, self.cross_bias, strict=True):
            x = start * (x @ weight)[:, None] + bias + x
        deep: Tensor = self.deep(start)
        return torch.cat([x, deep], 1)

    def forward(self, ids: Tensor) -> Tensor:
        """Log-odds (batch,) of ids (batch, fields)."""
        out: Tensor = self.head(self.features(ids))[:, 0]
        return out

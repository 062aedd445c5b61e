"""Click-through models of low rank: embedding tables and perceptrons factored by principal components of what they give out."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from corollary.compress.base import Place, Replacement, Spec
from corollary.compress.calibration import Moments
from corollary.compress.layers import factored
from corollary.compress.lowrank import LowRank, solve
from corollary.linalg import LowRankSolution
from corollary.models import FieldEmbedding

ACTIVATIONS = ("relu",)


class FactoredFields(nn.Module):
    r"""A table of narrow embeddings for all fields, and for each field a projection to the width that the model expects.

    .. math:: e_{f} = P_f\, d_{i_f} + c_f

    Made in the place of a `corollary.models.FieldEmbedding` by `CTRLowRank`; called with the table's rows as that is. All fields are
    projected by one batched product.

    Args:
        field_sizes: ids in each field.
        rank: width of the narrow table.
        dim: width that comes out.
        bias: whether the projections have one.
        device, dtype: of the parameters.

    Attributes:
        down: the narrow ``nn.Embedding``, (sum of sizes, rank).
        up: the projections, (fields, rank, dim).
        bias: (fields, dim), or None.

    Raises:
        ValueError: rows whose last side is not the fields.

    Example:
        >>> FactoredFields([10, 5], 2, 8)(torch.tensor([[9, 10]])).shape
        torch.Size([1, 2, 8])
    """

    def __init__(
        self,
        field_sizes: Sequence[int],
        rank: int,
        dim: int,
        *,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.field_sizes, self.rank = tuple(field_sizes), rank
        with torch.random.fork_rng(devices=[]):  # the start that torch draws is thrown away
            self.down = nn.Embedding(sum(field_sizes), rank, device=device, dtype=dtype)
        self.up = nn.Parameter(torch.zeros(len(field_sizes), rank, dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(len(field_sizes), dim, device=device, dtype=dtype)) if bias else None

    def forward(self, rows: Tensor) -> Tensor:
        """Embeddings (..., fields, dim) of rows (..., fields) of the table."""
        fields = len(self.field_sizes)
        if rows.shape[-1] != fields:
            raise ValueError(f"'rows' has shape {tuple(rows.shape)}; allowed: (..., {fields}), one for each field")
        narrow = self.down(rows).reshape(-1, fields, self.rank).transpose(0, 1)
        wide = narrow @ self.up if self.bias is None else torch.baddbmm(self.bias[:, None], narrow, self.up)
        return wide.transpose(0, 1).reshape(*rows.shape, -1)

    def extra_repr(self) -> str:
        """Fields, rank and width."""
        return f"fields={len(self.field_sizes)}, rank={self.rank}, dim={self.up.shape[2]}, bias={self.bias is not None}"


@dataclass(frozen=True)
class CTRLowRank(LowRank):
    r"""Embedding tables and perceptrons of a click-through model made smaller together, under one budget, by their features.

    What is approximated is not a weight but what a layer gives out over the log, by its leading principal components (atomic feature
    mimicking). For a table of embeddings E that are looked up with frequencies p, and a linear layer y = W x + b,

    .. math:: \mu = \textstyle\sum_i p_i E_i, \quad \sum_i p_i (E_i - \mu)(E_i - \mu)^\top = U \Lambda U^\top, \quad
              E_i \approx U_r\,(U_r^\top E_i) + (I - U_r U_r^\top)\,\mu,

    .. math:: \mathrm{Cov}(y) = U \Lambda U^\top, \qquad y \approx U_r\,(U_r^\top W x) + b + (I - U_r U_r^\top)\, W E[x],

    so an id that is shown often counts for more than one that is hardly ever seen, and the narrow rows :math:`U_r^\top E_i` are the new
    table. A `corollary.models.FieldEmbedding` is decomposed field by field, with one rank for all of its fields; any other table as a
    whole. One budget goes to all tables and layers, where it takes off the most error relative to a layer's own variance.

    With ``activation='relu'`` a rectifier stands between the two halves of every linear layer. It makes the small model stronger than a
    linear one of its size, and wrong until it has been trained for a while.

    Args:
        ratio: the share to keep of what all chosen layers take together, in (0, 1]. Give this or ``rank``.
        rank: instead of ``ratio``: see `LowRank`.
        activation: None or 'relu'.
        allocation: 'global' or 'uniform'; None means global here.
        metric, centered: 'inputs' and True is the method; 'none' and False decompose the weights themselves, field by field too.
        budget, multiple_of, damping: see `LowRank`.

    Raises:
        ValueError: for settings out of range, or both or none of ``ratio`` and ``rank``.

    Deviations: factors are scaled so that both sides of a direction are equally long, where the authors leave U orthonormal. They fold a
    field's projection into the first linear layer where nothing else reads the embeddings; here it stays a layer, since the
    factorization machine or the cross layers read it too. Ranks come from a budget, and the authors' by hand.

    When not to use it: name the tables and layers in ``targets``, since only linear layers are taken without. Tables of width 8 or less
    leave little to cut, and where most of a model is in effects of ids alone (tables of width 1) nothing is gained. A small perceptron
    on a GPU becomes slower, not faster, by being cut in two.

    Example:
        >>> import torch
        >>> from corollary.compress import CTRLowRank, compress, compression_report
        >>> from corollary.models import DeepFM
        >>> model = DeepFM([1000, 200, 50], dim=16, hidden=[64, 64])
        >>> log = [torch.stack([torch.randint(n, (500,)) for n in (1000, 200, 50)], 1)]
        >>> small = compress(model, CTRLowRank(ratio=0.25), [torch.nn.Embedding, torch.nn.Linear], calibration=log)
        >>> small(log[0]).shape, round(compression_report(small).ratio, 1)
        (torch.Size([500]), 0.3)

    Source: Yu, Fu, Ding, Zhou and Wu, "Unified Low-rank Compression Framework for Click-through Rate Prediction", KDD 2024,
    arXiv 2405.18146, by the decomposition of Yu and Wu, AAAI 2023, see `FeaturePCA`.
    """

    metric: str = "inputs"
    centered: bool = True
    allocation: str | None = "global"
    activation: str | None = None

    def __post_init__(self) -> None:
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise ValueError(f"'activation' must be None or one of {', '.join(ACTIVATIONS)}, not {self.activation!r}")
        if self.allocation is None:
            object.__setattr__(self, "allocation", "global")
        super().__post_init__()

    # --------------------------------------------------------------------------------------------------------------- ranks

    def costs(self, place: Place) -> tuple[float, float]:
        each, dense = super().costs(place)
        if not isinstance(place.layer, FieldEmbedding) or self.budget == "macs":
            return each, dense
        size = place.itemsize if self.budget == "bytes" else 1
        return size * (place.site.in_features + len(place.layer.field_sizes) * place.site.out_features), dense

    def errors(self, place: Place) -> Tensor:
        if not isinstance(place.layer, FieldEmbedding):
            return super().errors(place)
        errors = self._field_errors(place)
        return (errors / errors[0].clamp_min(torch.finfo(errors.dtype).tiny)).cpu()

    def _shrinking(self, places: Sequence[Place], ranks: Sequence[int | None]) -> list[int | None]:
        return [
            None if rank is None or rank * cost >= dense else rank
            for rank, (cost, dense) in zip(ranks, map(self.costs, places), strict=True)
        ]

    # -------------------------------------------------------------------------------------------------------------- fields

    def _fields(self, place: Place) -> list[tuple[float, LowRankSolution, Tensor | None]]:
        """Of each field: how often it is looked up at all, its decomposition, and its mean embedding's place among its ids."""
        if place.memo is not None and "fields" in place.memo:
            kept: list[tuple[float, LowRankSolution, Tensor | None]] = place.memo["fields"]
            return kept
        layer, found = cast(FieldEmbedding, place.layer), []
        for start, size in zip(layer.starts, layer.field_sizes, strict=True):
            matrix, rows = place.matrix[:, start : start + size], slice(start, start + size)
            share = 1.0 if place.moments is None else float(place.moments.mean[rows].sum())
            own: Moments | None = None
            if place.moments is not None and share > 0:
                # A field that the data never show is decomposed as it stands: there is nothing to weigh its ids by.
                weights = place.moments.second[rows] / share
                own = dataclasses.replace(place.moments, second=weights, mean=weights)
            solution = solve(matrix, own, self.metric, self.centered and own is not None, self.damping)
            found.append((share, solution, own.mean if own is not None and self.centered else None))
        if place.memo is not None:
            place.memo["fields"] = found
        return found

    def _field_errors(self, place: Place) -> Tensor:
        """Squared error of all fields together at rank 0, 1, ...; a field of few ids has none left past its own rank."""
        most = min(place.site.out_features, place.site.in_features)
        total = torch.zeros(most + 1, dtype=torch.float64)
        for share, solution, _ in self._fields(place):
            errors = solution.errors().cpu()
            total[: len(errors)] += share * errors
        return total

    # ------------------------------------------------------------------------------------------------------------- factors

    def spec(self, place: Place, choice: int) -> Spec:
        if isinstance(place.layer, FieldEmbedding):
            return {"rank": choice, "bias": self.centered}
        return super().spec(place, choice) | {"activation": self.activation if place.site.kind == "linear" else None}

    def replace(self, place: Place, choice: int) -> Replacement:
        if isinstance(place.layer, FieldEmbedding):
            return self._replace_fields(place, place.layer, choice)
        new = super().replace(place, choice)
        spec = self.spec(place, choice)
        if spec["activation"] is not None:
            new = dataclasses.replace(new, module=_activated(new.module, place.bias), error=None)
        return dataclasses.replace(new, spec=spec)

    def _replace_fields(self, place: Place, layer: FieldEmbedding, choice: int) -> Replacement:
        fields, errors = self._fields(place), self._field_errors(place)
        spec = self.spec(place, choice)
        module = cast(FactoredFields, self.build(layer, spec))
        nn.init.zeros_(module.down.weight)
        for f, (start, (_, solution, mean)) in enumerate(zip(layer.starts, fields, strict=True)):
            kept = min(choice, len(solution.energy))
            up, down = solution.factors(kept)
            module.up[f, :kept].copy_(up.T)
            module.down.weight[start : start + down.shape[1], :kept].copy_(down.T)
            if module.bias is not None and mean is not None:
                mean = mean.to(up)
                module.bias[f].copy_(solution.matrix.to(up) @ mean - up @ (down @ mean))
        if place.memo is not None:
            place.memo.clear()
        return Replacement(
            module=module,
            spec=spec,
            rank=choice,
            macs=choice * place.site.out_features,
            error=float(errors[choice] / errors[0]) if float(errors[0]) > 0 else 0.0,
        )

    def build(self, layer: nn.Module, spec: Spec) -> nn.Module:
        if isinstance(layer, FieldEmbedding):
            where = {"device": layer.weight.device, "dtype": layer.weight.dtype}
            rank, dim = int(spec["rank"]), layer.embedding_dim
            return FactoredFields(layer.field_sizes, rank, dim, bias=bool(spec["bias"]), **where).train(layer.training)  # type: ignore[arg-type]
        pair = factored(layer, int(spec["rank"]), bias=bool(spec["bias"]))
        if spec["activation"] is None:
            return pair
        return _activated(pair, cast("Tensor | None", getattr(layer, "bias", None)))


@torch.no_grad()
def _activated(pair: nn.Module, bias: Tensor | None) -> nn.Sequential:
    """A rectifier between the halves. The layer's own bias is projected as its outputs are, and added before the rectifier."""
    down, up = cast(nn.Linear, pair.down), cast(nn.Linear, pair.up)
    with torch.random.fork_rng(devices=[]):  # the start that torch draws is thrown away
        first = nn.Linear(down.in_features, down.out_features, device=down.weight.device, dtype=down.weight.dtype)
    first.weight.copy_(down.weight)
    first.bias.zero_()
    if bias is not None:
        wide = up.weight.double()
        projected = torch.linalg.pinv(wide) @ bias.double()
        first.bias.copy_(projected)
        up.bias.copy_(up.bias.double() - wide @ projected)
    return nn.Sequential(OrderedDict(down=first, activation=nn.ReLU(), up=up))

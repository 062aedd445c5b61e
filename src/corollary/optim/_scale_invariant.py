"""Weights whose scale does not matter: the cosine test that finds them, and the projection of their steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from corollary.optim._batched import is_distributed

T = TypeVar("T")


def on_host(params: Sequence[Tensor]) -> bool:
    """Whether a decision may be looked at for nothing; a compiled step must not depend on one."""
    return params[0].device.type == "cpu" and not is_distributed(params[0]) and not torch.compiler.is_compiling()


class ScaleInvariant:
    """Which weights the cosine test finds to be scale-invariant, by what view, and what the projection needs of them.

    On a CPU only those are kept. An accelerator would have to wait for the decisions, so there every weight is kept, and the
    others' share of the projection is zero.
    """

    def __init__(self, params: Sequence[Tensor], grads: Sequence[Tensor], group: Mapping[str, Any]) -> None:
        self.group = group
        self.places = [i for i, p in enumerate(params) if p.dim() > 1 and p.numel()]
        if self.places and group["delta"]:
            pairs = [(_rows(params[i], params[i]), _rows(grads[i], params[i])) for i in self.places]
            norms = [torch.linalg.vector_norm(w, dim=1) for w, _ in pairs]
            grad_norms = [torch.linalg.vector_norm(g, dim=1) for _, g in pairs]
            across = [torch.linalg.vecdot(w, g) for w, g in pairs]
            weights = [params[i] for i in self.places]
            by_channel, by_layer = _test(weights, _gather(norms), _gather(grad_norms), _gather(across), group)
            if on_host(params):
                kept = [j for j, hit in enumerate((by_channel | by_layer).tolist()) if hit]
                self.places, norms, across = ([items[j] for j in kept] for items in (self.places, norms, across))
                by_channel, by_layer = by_channel[kept], by_layer[kept]
            self.by_channel, self.by_layer, self.norms, self.across = by_channel, by_layer, norms, across
        else:
            self.places = []
        self._members = set(self.places)

    def among(self, items: Sequence[T]) -> list[T]:
        """What belongs to these weights."""
        return [items[i] for i in self.places]

    def others(self, items: Sequence[T]) -> list[T]:
        """What belongs to all other parameters."""
        return [item for i, item in enumerate(items) if i not in self._members]

    def project(
        self,
        params: Sequence[Tensor],
        moments: Sequence[Tensor],
        parts: tuple[float, float],
        step_size: float,
        decay: float,
        *,
        from_moments: bool = False,
    ) -> None:
        """Scale these weights so that adding ``-step_size`` times the update next makes the projected, decayed step.

        The update is ``u = parts[0] * grad + parts[1] * moment``. With a row's share :math:`c = w·u / (‖w‖ + ε)²` the step is
        :math:`w (1 - λ' r + η c) - η u`, so one multiplication of each row does both projection and weight decay.
        ``from_moments`` takes the share out of the moments, which then are the updates, instead.
        """
        weights = self.among(params)
        if not weights:
            return
        along = _gather([torch.linalg.vecdot(_rows(w, w), _rows(m, w)) for w, m in zip(weights, moments, strict=True)])
        along *= parts[1]
        if parts[0]:
            along += parts[0] * _gather(self.across)
        share = _radial_share(weights, _gather(self.norms), along, self.by_channel, self.by_layer, self.group["eps"])
        full = torch.ones_like(share[: len(weights)])
        ratio = torch.where(self.by_channel | self.by_layer, full * self.group["wd_ratio"], full)
        factor = 1 - decay * _repeat(ratio, weights, len(share))
        if from_moments:
            for weight, moment, c in zip(weights, moments, _shape(share, weights), strict=True):
                moment.addcmul_(weight, c, value=-1)
        else:
            factor += step_size * share
        for weight, row_factor in zip(weights, _shape(factor, weights), strict=True):
            weight.mul_(row_factor)


def _test(
    weights: Sequence[Tensor], norm: Tensor, grad_norm: Tensor, across: Tensor, group: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """For each weight, whether the cosine test passes row by row, and if not, whether it does for the whole.

    Args:
        weights: whose rows, end to end, the following are about.
        norm: norm of the weight's row.
        grad_norm: norm of the gradient's row.
        across: inner product of the two rows.
        group: for ``eps`` and ``delta``.
    """
    eps, delta = group["eps"], group["delta"]
    lengths = _lengths(weights, norm.device)
    columns = torch.tensor([w.shape[1:].numel() for w in weights], device=norm.device)
    cosine = across.abs() / (norm.clamp_min(eps) * grad_norm.clamp_min(eps))
    by_channel = torch.segment_reduce(cosine, "max", lengths=lengths, unsafe=True) < delta / columns.sqrt()
    whole, grad_whole = _total(norm.square(), lengths).sqrt(), _total(grad_norm.square(), lengths).sqrt()
    cosine = _total(across, lengths).abs() / (whole.clamp_min(eps) * grad_whole.clamp_min(eps))
    return by_channel, ~by_channel & (cosine < delta / (columns * lengths).sqrt())


def _radial_share(
    weights: Sequence[Tensor], norm: Tensor, along: Tensor, by_channel: Tensor, by_layer: Tensor, eps: float
) -> Tensor:
    """For each row, the share of the weight to take out of the update: of the row, of the whole weight, or none."""
    lengths = _lengths(weights, norm.device)
    whole = _total(norm.square(), lengths).sqrt()
    by_row = along / (norm + eps) / (norm + eps)  # one after the other: a square of eps could vanish
    of_whole = torch.where(by_layer, _total(along, lengths) / (whole + eps) / (whole + eps), 0.0)
    return torch.where(_repeat(by_channel, weights, len(norm)), by_row, _repeat(of_whole, weights, len(norm)))


def _rows(tensor: Tensor, weight: Tensor) -> Tensor:
    """One row for each output channel, the entries in an order that costs no copy where ``weight``'s memory allows."""
    if weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.flatten(1)


def _lengths(weights: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.tensor([len(w) for w in weights], device=device)


def _total(rows: Tensor, lengths: Tensor) -> Tensor:
    return torch.segment_reduce(rows, "sum", lengths=lengths, unsafe=True)


def _repeat(values: Tensor, weights: Sequence[Tensor], rows: int) -> Tensor:
    return torch.repeat_interleave(values, _lengths(weights, values.device), output_size=rows)


def _gather(rows: Sequence[Tensor]) -> Tensor:
    """One vector of all rows' numbers, whole on every process where the weights are sharded."""
    return torch.cat([cast(Any, r).full_tensor() if is_distributed(r) else r for r in rows])


def _shape(values: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Each weight's part of the numbers of all rows, shaped and sharded to multiply it."""
    parts = []
    for part, weight in zip(torch.split(values, [len(w) for w in weights]), weights, strict=True):
        shaped = part.view(-1, *[1] * (weight.dim() - 1))
        if is_distributed(weight):
            from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

            assert isinstance(weight, DTensor)
            # Each process holds the whole of it: rows are sharded as the weight's, anything else is kept on all.
            placements = [place if place.is_shard(0) else Replicate() for place in weight.placements]
            shaped = distribute_tensor(shaped, weight.device_mesh, placements, src_data_rank=None)
        parts.append(shaped)
    return parts

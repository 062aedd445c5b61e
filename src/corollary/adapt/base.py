"""What every adapter is: a configuration that builds, for one frozen layer, a module that changes its output."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from corollary.adapt.site import KINDS, Site

CONFIGS: dict[str, type[AdapterConfig]] = {}
"""every configuration by the name of its class: what a saved adapter names"""


class Adapter(nn.Module):
    r"""The change that one method makes to one frozen layer.

    A subclass registers what it trains as parameters, what it needs besides as buffers, and defines `forward` and `delta`. Buffers
    that `AdapterConfig.build` makes anew from the frozen weight and the seed are ``persistent=False``, and so are not saved.

    Args:
        site: the layer's geometry. The layer's weight is given to ``build`` and not kept.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """The layer's new output, from its input ``x`` and its output ``out``; neither is written into."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        """ΔM, the change of the layer's matrix (out, in) that `forward` stands for, dense and differentiable."""
        raise NotImplementedError

    def penalty(self, weight: Tensor) -> Tensor | None:
        """What the method adds to the training loss for this layer, given the layer's weight; None where it adds nothing."""
        return None

    def extra_repr(self) -> str:
        return f"{self.site.out_features}x{self.site.in_features} {self.site.kind}"


class LowRankAdapter(Adapter):
    """An adapter whose change is a product B A of thin factors; a subclass gives `factors`, and may speed up `forward`.

    Args:
        site: the layer's geometry.
        dropout: probability with which an entry of the layer's input is dropped, in training, on the way into A.
    """

    def __init__(self, site: Site, dropout: float = 0.0) -> None:
        super().__init__(site)
        self.dropout = dropout

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (out, rank) and A (rank, in), every scaling included."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        b, a = self.factors()
        return b @ a

    def inner(self, x: Tensor) -> Tensor:
        """The layer's input as A takes it: dropped out in training, in A's dtype."""
        if self.site.kind == "embedding":
            return x
        if self.dropout and self.training:
            x = nn.functional.dropout(x, self.dropout)
        return x

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        b, a = self.factors()
        return self.site.expand_add(out, self.site.reduce(cast(self.inner(x), a), a), b)


def cast(x: Tensor, like: Tensor) -> Tensor:
    """x in the dtype of a factor; indices stay as they are, and autocast is left to choose."""
    if x.is_floating_point() and x.dtype != like.dtype and not torch.is_autocast_enabled(x.device.type):
        return x.to(like.dtype)
    return x


@dataclass(frozen=True)
class AdapterConfig:
    """What a method needs to know, as plain data: a frozen dataclass that goes into a saved adapter and back.

    A subclass is registered by its name, adds its fields, checks them in ``__post_init__``, and defines `build`.
    """

    supports: ClassVar[frozenset[str]] = frozenset(KINDS)
    needs_calibration: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        CONFIGS[cls.__name__] = cls

    def prepare(self, sites: Mapping[str, tuple[Site, Tensor]], calibration: Any = None) -> Mapping[str, Any]:
        """What layers share, or what data tell of them: called once, before `build`; gives each layer's ``extra`` by its name.

        Args:
            sites: layer's name to its site and weight.
            calibration: what the user gave to `adapt`; None when a saved adapter is loaded, whose tensors come after.
        """
        return {}

    def build(self, site: Site, weight: Tensor, extra: Any = None) -> Adapter:
        """The adapter of one layer, on the weight's device and in its dtype; ``weight`` is only read."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data, for JSON."""
        return dataclasses.asdict(self)


def config_from_dict(method: str, fields: Mapping[str, Any]) -> AdapterConfig:
    """The configuration that ``to_dict`` wrote; raises ``ValueError`` for an unknown method or field."""
    if method not in CONFIGS:
        raise ValueError(f"unknown adapter method '{method}'; known: {', '.join(sorted(CONFIGS))}")
    cls = CONFIGS[method]
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(f"{method} has no field '{unknown[0]}'; it has: {', '.join(sorted(known))}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def need_rank(rank: int) -> None:
    """Raise unless a rank is a whole number above 0."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"'rank' must be an int, not {type(rank).__name__} ({rank!r})")
    if rank < 1:
        raise ValueError(f"'rank' must be at least 1, not {rank}")


def need_fitting_rank(rank: int, site: Site) -> None:
    """Raise unless a rank is at most the layer's shorter side."""
    if rank > min(site.out_features, site.in_features):
        raise ValueError(f"'rank' is {rank}, but the layer's matrix is {site.out_features} x {site.in_features}")


def need_probability(name: str, value: float) -> None:
    """Raise unless a probability lies in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"'{name}' must be at least 0 and below 1, not {value}")


def need_finite(name: str, value: float, *, positive: bool = False) -> None:
    """Raise unless a number is finite (and above 0)."""
    if not abs(value) < float("inf") or (positive and value <= 0):
        raise ValueError(f"'{name}' must be a finite number{' above 0' if positive else ''}, not {value}")

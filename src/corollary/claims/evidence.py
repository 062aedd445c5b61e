"""What one trial of a claim brings back: one of four kinds of evidence, each reduced to one number.

=========  =====================================  ==================================================
kind       a trial measures                       its value
=========  =====================================  ==================================================
`Paired`   ours and a tuned baseline, one metric  ours - baseline
`Exact`    an identity's or a bound's violation   the largest error
`Slope`    cost or error y at sizes x             least-squares slope of log y on log x
`Ratio`    time or bytes of ours and of the peer  ours / baseline
=========  =====================================  ==================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np


class EvidenceError(ValueError):
    """A trial brought back something that is no evidence (a NaN, an empty list, a negative time)."""


def _number(kind: str, name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise EvidenceError(f"{kind}: '{name}' must be one number, not {value!r}") from error
    if not math.isfinite(number):
        raise EvidenceError(f"{kind}: '{name}' is {number}; a trial must bring back finite numbers")
    return number


@dataclass(frozen=True)
class Paired:
    """Ours against a tuned baseline on the same seed, split and start; both are the metric of the record."""

    ours: float
    baseline: float
    kind: ClassVar[str] = "paired"

    def __post_init__(self) -> None:
        object.__setattr__(self, "ours", _number("Paired", "ours", self.ours))
        object.__setattr__(self, "baseline", _number("Paired", "baseline", self.baseline))

    @property
    def value(self) -> float:
        return self.ours - self.baseline

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "ours": self.ours, "baseline": self.baseline}


@dataclass(frozen=True)
class Exact:
    """The largest violation of an identity or a bound over this trial's random instances.

    For an identity give ``|left - right|``; for a bound ``left <= right`` give ``max(0, left - right)``. A tensor, an array
    or a list is reduced to its maximum. A NaN counts as an infinite error: a check that produced NaN has failed.
    """

    error: float
    kind: ClassVar[str] = "exact"

    def __init__(self, error: Any) -> None:
        array = np.asarray(error.detach().cpu() if hasattr(error, "detach") else error, dtype=np.float64)
        if array.size == 0:
            raise EvidenceError("Exact: 'error' is empty; check at least one instance")
        worst = float(array.max())
        if worst < 0:
            raise EvidenceError(f"Exact: 'error' is {worst}; give a violation, which is never negative")
        object.__setattr__(self, "error", math.inf if math.isnan(worst) else worst)

    @property
    def value(self) -> float:
        return self.error

    def to_dict(self) -> dict[str, Any]:
        # JSON has no infinity; as text it comes back through the constructor.
        return {"kind": self.kind, "error": self.error if math.isfinite(self.error) else "inf"}


@dataclass(frozen=True)
class Slope:
    """Growth of ``y`` with ``x``: both positive, at least three different sizes."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    kind: ClassVar[str] = "slope"

    def __init__(self, x: Iterable[Any], y: Iterable[Any]) -> None:
        xs = tuple(_number("Slope", "x", v) for v in x)
        ys = tuple(_number("Slope", "y", v) for v in y)
        if len(xs) != len(ys) or len(set(xs)) < 3:
            raise EvidenceError(f"Slope: needs as many y as x and at least 3 different x, got {len(xs)} x and {len(ys)} y")
        if min(xs) <= 0 or min(ys) <= 0:
            raise EvidenceError("Slope: x and y must be positive, because the slope is taken between logarithms")
        object.__setattr__(self, "x", xs)
        object.__setattr__(self, "y", ys)

    @property
    def value(self) -> float:
        return float(np.polyfit(np.log(self.x), np.log(self.y), 1)[0])

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "x": list(self.x), "y": list(self.y)}


@dataclass(frozen=True)
class Ratio:
    """Time in seconds or size in bytes of ours and of the baseline, measured interleaved; both positive."""

    ours: float
    baseline: float
    kind: ClassVar[str] = "ratio"

    def __post_init__(self) -> None:
        for name in ("ours", "baseline"):
            number = _number("Ratio", name, getattr(self, name))
            if number <= 0:
                raise EvidenceError(f"Ratio: '{name}' must be above 0, not {number}")
            object.__setattr__(self, name, number)

    @property
    def value(self) -> float:
        return self.ours / self.baseline

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "ours": self.ours, "baseline": self.baseline}


Evidence = Paired | Exact | Slope | Ratio
_TYPES: Mapping[str, type[Any]] = {t.kind: t for t in (Paired, Exact, Slope, Ratio)}


def evidence_from_dict(data: Mapping[str, Any]) -> Evidence:
    """The evidence that ``to_dict`` wrote."""
    fields = {k: v for k, v in data.items() if k != "kind"}
    evidence: Evidence = _TYPES[data["kind"]](**fields)
    return evidence


def values(evidence: Sequence[Evidence]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Each trial's number, in order."""
    return np.array([e.value for e in evidence], dtype=np.float64)

"""What a claim's function gets: its seed, scale and device, and a place to write down what it saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, update_wrapper
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

import numpy as np

from corollary.claims.evidence import Evidence

if TYPE_CHECKING:
    import torch

SCALES = ("smoke", "laptop", "full")
P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Trial:
    """One trial of a claim.

    Args:
        seed: the only source of randomness. The runner derives it from the user's ``--seed``, the claim and the trial's
            number, and seeds torch, numpy and random with it before the claim's function is called.
        scale: ``smoke`` (seconds; no verdict), ``laptop`` (the verdict) or ``full`` (a GPU).
        device: where tensors should live, as torch spells it.
        tuned: what the claim's ``tune`` function brought back, once for all trials; empty without one.
    """

    seed: int
    scale: str = "laptop"
    device: str = "cpu"
    tuned: Mapping[str, Any] = field(default_factory=dict)
    logged: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ValueError(f"scale is '{self.scale}'; allowed: {', '.join(SCALES)}")

    @cached_property
    def generator(self) -> torch.Generator:
        """A CPU generator seeded with ``seed``."""
        import torch

        return torch.Generator().manual_seed(self.seed)

    @cached_property
    def rng(self) -> np.random.Generator:
        """A numpy generator seeded with ``seed``."""
        return np.random.default_rng(self.seed)

    def pick(self, *, smoke: T, laptop: T, full: T | None = None) -> T:
        """The value for this trial's scale; ``full`` falls back to ``laptop``."""
        if self.scale == "smoke":
            return smoke
        return full if self.scale == "full" and full is not None else laptop

    def log(self, **values: Any) -> None:
        """Keep numbers or short texts beside this trial's evidence; they are published with it."""
        self.logged.update(values)

    def figure(
        self,
        name: str,
        *,
        x: Sequence[float],
        y: Mapping[str, Sequence[float]],
        xlabel: str = "",
        ylabel: str = "",
        log: str = "",
    ) -> None:
        """Keep one line plot as data: ``y`` maps a series' name to as many values as ``x`` has; ``log`` is '', 'x', 'y', 'xy'.

        The report draws the first trial's figures, so keep them small: at most a few hundred points.
        """
        for series, points in y.items():
            if len(points) != len(x):
                raise ValueError(f"figure '{name}': series '{series}' has {len(points)} values for {len(x)} x")
        self.figures[name] = {
            "x": [float(v) for v in x],
            "y": {series: [float(v) for v in points] for series, points in y.items()},
            "xlabel": xlabel,
            "ylabel": ylabel,
            "log": log,
        }


class ClaimFunction(Generic[P]):
    """A measuring function with its control and, where it has one, its tuning; made by `claim`."""

    def __init__(
        self,
        measure: Callable[P, Evidence],
        control: Mapping[str, Any] | Callable[[Trial], Evidence],
        tune: Callable[..., Mapping[str, Any]] | None,
    ) -> None:
        self.measure = measure
        self.overrides: Mapping[str, Any] = {} if callable(control) else control
        self.control_measure: Callable[..., Evidence] = control if callable(control) else measure
        self.tune = tune
        self.__name__ = getattr(measure, "__name__", "claim")
        update_wrapper(self, measure)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Evidence:
        return self.measure(*args, **kwargs)

    def control(self, trial: Trial) -> Evidence:
        """The same measurement with the method's key idea broken; it must fail."""
        return self.control_measure(trial, **self.overrides)


def claim(
    *,
    control: Mapping[str, Any] | Callable[[Trial], Evidence],
    tune: Callable[..., Mapping[str, Any]] | None = None,
) -> Callable[[Callable[P, Evidence]], ClaimFunction[P]]:
    """Mark a function as the measurement of the claim that carries its name in the record.

    Args:
        control: what breaks the method's key idea: keyword arguments for the same function, or another function of a trial.
        tune: called once before the trials, as ``tune(trial)`` (for the control as ``tune(trial, **control)``), with a seed
            that no trial has; gives the choices of tuning as plain data, kept in the store and handed to each trial as
            ``trial.tuned``. Give the method and its baseline the same budget.

    Example:
        >>> from corollary.claims import Exact, Trial, claim
        >>> @claim(control={"sign": 1.0})
        ... def adds_to_zero(trial: Trial, sign: float = -1.0) -> Exact:
        ...     x = trial.rng.normal(size=8)
        ...     return Exact(abs(x + sign * x))
        >>> adds_to_zero(Trial(seed=0)).error
        0.0
        >>> adds_to_zero.control(Trial(seed=0)).error > 1
        True
    """

    def wrap(measure: Callable[P, Evidence]) -> ClaimFunction[P]:
        return ClaimFunction(measure, control, tune)

    return wrap

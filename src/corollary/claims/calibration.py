"""How often the rule for 'supported' errs and how often it finds an effect, by simulation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from corollary.claims.evidence import Paired
from corollary.claims.record import ClaimRecord
from corollary.claims.stats import SUPPORTED, judge


@dataclass(frozen=True)
class Calibration:
    """Share of simulated claims judged supported.

    Attributes:
        false_positive_rate: with no effect.
        power: with an effect of one standard deviation of the difference.
        pairs: pairs in each simulated claim.
        runs: simulated claims behind each of the two shares.
    """

    false_positive_rate: float
    power: float
    pairs: int
    runs: int


def calibrate(*, pairs: int = 10, runs: int = 1000, seed: int = 0, tails: float | None = None) -> Calibration:
    """Simulate paired claims with no effect and with an effect of one standard deviation, and judge each.

    Args:
        pairs: pairs in each claim, at least 2.
        runs: simulated claims for each share.
        seed: of the simulation.
        tails: degrees of freedom of Student's t for the differences, scaled to unit variance; above 2. Normal by default.

    Example:
        >>> calibrate(runs=20).false_positive_rate <= 0.2
        True
    """
    if tails is not None and not tails > 2:
        raise ValueError(f"tails is {tails}; allowed: above 2, where the variance is finite")
    rng = np.random.default_rng(seed)
    record = ClaimRecord("simulated", "paired", "ours is higher", "simulation", "no effect", better="higher")

    def share(effect: float) -> float:
        supported = 0
        for _ in range(runs):
            noise = rng.normal(size=pairs) if tails is None else rng.standard_t(tails, size=pairs) * np.sqrt(1 - 2 / tails)
            supported += judge(record, [Paired(d, 0.0) for d in effect + noise]).verdict == SUPPORTED
        return supported / runs

    return Calibration(false_positive_rate=share(0.0), power=share(1.0), pairs=pairs, runs=runs)

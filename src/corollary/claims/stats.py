"""From evidence to a verdict: BCa bootstrap, sign-flip permutation test, and the rules that join them.

Every statistical claim is turned into one or two *advantages*, numbers that are positive in a trial where the claim held:

* paired, lower is better:   ``-(ours - baseline) - margin``  (higher: ``(ours - baseline) - margin``)
* ratio, lower is better:    ``log(bound) - log(ours / baseline)``  (higher: the negative)
* slope:                     ``exponent + tolerance - slope`` and ``slope - (exponent - tolerance)``; only the first with
  ``better = "lower"``, only the second with ``better = "higher"``

A claim is *supported* where every advantage's BCa 95% interval lies above zero and its one-sided sign-flip p is below 0.05,
*not supported* where an advantage's interval lies below zero, and *inconclusive* otherwise.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from corollary.claims.evidence import Evidence, EvidenceError, values
from corollary.claims.record import ClaimRecord

SUPPORTED = "supported at this scale"
NOT_SUPPORTED = "not supported at this scale"
INCONCLUSIVE = "inconclusive"
PASSED = "exact check passed"
FAILED = "exact check failed"
COULD_NOT_RUN = "could not run"
VERDICTS = (SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE, PASSED, FAILED, COULD_NOT_RUN)
HOLDS = (SUPPORTED, PASSED)

# Raised when a change here could change a verdict, so that published ones turn stale.
STATISTICS_VERSION = 1
CONFIDENCE = 0.95
ALPHA = 0.05
_RESAMPLES = 9_999
_EXACT_UP_TO = 2**14

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Judgement:
    """A verdict with the numbers it rests on.

    ``effect`` and its interval are in the claim's own unit: the mean difference (paired), the geometric mean ratio (ratio),
    the mean slope (slope), the largest error (exact; no interval, no p).
    """

    verdict: str
    effect: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    p_value: float | None = None


def bca_interval(sample: Array, *, resamples: int = _RESAMPLES) -> tuple[float, float]:
    """BCa bootstrap 95% interval of the mean; the value itself, twice, where all values are equal.

    Args:
        sample: shape (n,), n >= 2.
        resamples: bootstrap resamples; the resampling is seeded, so the same values give the same interval.
    """
    from scipy.stats import bootstrap

    if np.ptp(sample) == 0:
        return float(sample[0]), float(sample[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns where the acceleration degenerates; the fallback below handles it
        result = bootstrap(
            (sample,), np.mean, confidence_level=CONFIDENCE, n_resamples=resamples, method="BCa", vectorized=True,
            rng=np.random.default_rng(0),
        )  # fmt: skip
    low, high = float(result.confidence_interval.low), float(result.confidence_interval.high)
    if not (math.isfinite(low) and math.isfinite(high)):
        return float(sample.min()), float(sample.max())
    return low, high


def sign_flip_p(advantage: Array) -> float:
    """One-sided sign-flip p of the mean being above zero: exact up to 14 values, else from seeded random flips.

    Source: Fisher's randomization test for paired data; valid where the differences are symmetric about zero under no effect.
    """
    from scipy.stats import permutation_test

    result = permutation_test(
        (advantage,), np.mean, permutation_type="samples", alternative="greater", vectorized=True,
        n_resamples=_EXACT_UP_TO, rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(result.pvalue)


def _advantages(claim: ClaimRecord, sample: Array) -> list[Array]:
    sign = -1.0 if claim.better == "lower" else 1.0
    if claim.kind == "paired":
        return [sign * sample - claim.margin]
    if claim.kind == "ratio":
        return [sign * (sample - math.log(claim.bound))]
    below, above = claim.exponent + claim.tolerance - sample, sample - (claim.exponent - claim.tolerance)
    return {"lower": [below], "higher": [above]}.get(claim.better, [below, above])


def judge(claim: ClaimRecord, evidence: Sequence[Evidence]) -> Judgement:
    """The verdict that a claim's trials give.

    Args:
        claim: the pre-registered record.
        evidence: one piece for each trial, all of the claim's kind.

    Raises:
        EvidenceError: no trials, fewer than two for a statistical claim, or evidence of another kind.

    Example:
        >>> from corollary.claims import ClaimRecord, Paired
        >>> claim = ClaimRecord("a", "paired", "ours is lower", "abstract", "none", better="lower")
        >>> trials = [Paired(0.10 + 0.001 * i, 0.15) for i in range(10)]
        >>> judge(claim, trials).verdict
        'supported at this scale'
    """
    for item in evidence:
        if item.kind != claim.kind:
            raise EvidenceError(
                f"claim '{claim.id}' is of kind '{claim.kind}', but its function returned {type(item).__name__}"
            )
    least = 1 if claim.kind == "exact" else 2
    if len(evidence) < least:
        raise EvidenceError(
            f"claim '{claim.id}': {len(evidence)} trials; a claim of kind '{claim.kind}' needs at least {least}"
        )
    sample = values(evidence)
    if claim.kind == "exact":
        worst = float(sample.max())
        return Judgement(PASSED if worst <= claim.tolerance else FAILED, effect=worst)
    sample = np.log(sample) if claim.kind == "ratio" else sample
    intervals = [bca_interval(a) for a in _advantages(claim, sample)]
    p_value = max(sign_flip_p(a) for a in _advantages(claim, sample))
    if all(low > 0 for low, _ in intervals) and p_value < ALPHA:
        verdict = SUPPORTED
    elif any(high < 0 for _, high in intervals):
        verdict = NOT_SUPPORTED
    else:
        verdict = INCONCLUSIVE
    low, high = bca_interval(sample)
    effect = float(sample.mean())
    if claim.kind == "ratio":
        effect, low, high = math.exp(effect), math.exp(low), math.exp(high)
    return Judgement(verdict, effect=effect, ci_low=low, ci_high=high, p_value=p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the order given.

    Source: Holm (1979), A simple sequentially rejective multiple test procedure.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.maximum.accumulate(np.asarray(p_values)[order] * (len(p_values) - np.arange(len(p_values))))
    return [float(p) for p in np.minimum(adjusted, 1.0)]

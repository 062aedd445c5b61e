"""The statistics on simulated data with a known effect, against naive oracles."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import binomtest

from corollary.claims import ClaimRecord, EvidenceError, Exact, Paired, Ratio, Slope, stats
from corollary.claims.calibration import calibrate
from corollary.claims.stats import bca_interval, holm, judge, sign_flip_p


def _record(kind: str, **fields: object) -> ClaimRecord:
    return ClaimRecord(id="c", kind=kind, statement="s", source="x", control="c", **fields)


def _naive_sign_flip(d: np.ndarray) -> float:
    flips = np.array(list(itertools.product([1, -1], repeat=len(d))))
    return float(np.mean((flips * d).mean(1) >= d.mean() - 1e-12))


@pytest.mark.parametrize("n", [2, 6, 10])
def test_sign_flip_equals_full_enumeration(n: int) -> None:
    d = np.random.default_rng(n).normal(0.4, 1, n)
    assert sign_flip_p(d) == pytest.approx(_naive_sign_flip(d), abs=1e-12)


def test_sign_flip_random_part_is_close_and_never_zero() -> None:
    d = np.random.default_rng(0).normal(2, 1, 20)
    assert 0 < sign_flip_p(d) < 1e-3


def test_bca_of_a_symmetric_sample_is_near_the_normal_interval() -> None:
    x = np.random.default_rng(1).normal(3, 2, 400)
    low, high = bca_interval(x)
    half = 1.96 * x.std(ddof=1) / 20
    assert low == pytest.approx(x.mean() - half, abs=0.03)
    assert high == pytest.approx(x.mean() + half, abs=0.03)


def test_bca_corrects_for_skew() -> None:
    x = np.random.default_rng(2).exponential(size=40)
    low, high = bca_interval(x)
    assert high - x.mean() > x.mean() - low


def test_bca_of_equal_values() -> None:
    assert bca_interval(np.full(6, 2.5)) == (2.5, 2.5)


@pytest.mark.parametrize("seed", range(3))
def test_no_sample_gives_more_than_5_percent_false_positives(seed: int) -> None:
    """Whatever the sizes of the differences: over all sign patterns, at most 5% are judged supported."""
    rng = np.random.default_rng(seed)
    sizes = rng.exponential(size=7) * rng.choice([1.0, 5.0], size=7)
    record = _record("paired", better="higher")
    patterns = list(itertools.product([1.0, -1.0], repeat=7))
    found = [judge(record, [Paired(s * d, 0.0) for s, d in zip(signs, sizes, strict=True)]).verdict for signs in patterns]
    assert 0 < found.count(stats.SUPPORTED) <= 0.05 * len(patterns)


@pytest.mark.parametrize("tails", [None, 3.0], ids=["normal", "heavy tails"])
def test_calibration_of_the_verdict(tails: float | None) -> None:
    """No effect: the share of false 'supported' is no more than 5%. One standard deviation: the power that the docs report."""
    found = calibrate(pairs=10, runs=300, seed=11, tails=tails)
    false = round(found.false_positive_rate * found.runs)
    assert binomtest(false, found.runs, 0.05, alternative="greater").pvalue > 0.01
    assert binomtest(round(found.power * found.runs), found.runs, 0.8, alternative="less").pvalue > 0.01


@pytest.mark.parametrize(
    ("better", "margin", "effect", "verdict"),
    [
        ("lower", 0.0, -1.0, stats.SUPPORTED),
        ("lower", 0.0, 1.0, stats.NOT_SUPPORTED),
        ("higher", 0.0, 1.0, stats.SUPPORTED),
        ("higher", 0.0, -1.0, stats.NOT_SUPPORTED),
        ("lower", 0.0, 0.0, stats.INCONCLUSIVE),
        ("lower", 2.0, -1.0, stats.NOT_SUPPORTED),
        ("lower", -0.5, 0.0, stats.SUPPORTED),
        ("higher", -0.5, 0.0, stats.SUPPORTED),
    ],
)
def test_paired_verdicts(better: str, margin: float, effect: float, verdict: str) -> None:
    noise = np.linspace(-0.1, 0.1, 10)
    result = judge(_record("paired", better=better, margin=margin), [Paired(effect + e, 0.0) for e in noise])
    assert result.verdict == verdict
    assert result.effect == pytest.approx(effect, abs=1e-9)
    assert result.ci_low < effect + 1e-9 < result.ci_high + 2e-9


@pytest.mark.parametrize(("factor", "verdict"), [(0.3, stats.SUPPORTED), (0.5, stats.INCONCLUSIVE), (0.9, stats.NOT_SUPPORTED)])
def test_ratio_verdicts(factor: float, verdict: str) -> None:
    trials = [Ratio(factor * np.exp(e), 1.0) for e in np.linspace(-0.05, 0.05, 8)]
    result = judge(_record("ratio", better="lower", bound=0.5), trials)
    assert result.verdict == verdict
    assert result.effect == pytest.approx(factor)
    flipped = [Ratio(t.baseline, t.ours) for t in trials]
    assert judge(_record("ratio", better="higher", bound=2.0), flipped).verdict == verdict


@pytest.mark.parametrize(
    ("slope", "better", "verdict"),
    [
        (1.0, "", stats.SUPPORTED),
        (1.5, "", stats.NOT_SUPPORTED),
        (0.5, "", stats.NOT_SUPPORTED),
        (1.2, "", stats.INCONCLUSIVE),
        (0.5, "lower", stats.SUPPORTED),
        (1.5, "lower", stats.NOT_SUPPORTED),
        (1.5, "higher", stats.SUPPORTED),
    ],
)
def test_slope_verdicts(slope: float, better: str, verdict: str) -> None:
    x = np.array([1.0, 2.0, 4.0])
    trials = [Slope(x, x ** (slope + e)) for e in np.linspace(-0.05, 0.05, 7)]
    assert judge(_record("slope", exponent=1.0, tolerance=0.2, better=better), trials).verdict == verdict


def test_exact_verdicts() -> None:
    record = _record("exact", tolerance=1e-6)
    assert judge(record, [Exact(1e-7), Exact(1e-6)]).verdict == stats.PASSED
    assert judge(record, [Exact(1e-7), Exact(2e-6)]).verdict == stats.FAILED
    assert judge(record, [Exact(float("nan"))]).verdict == stats.FAILED


def test_judge_refuses_other_evidence_and_too_little() -> None:
    with pytest.raises(EvidenceError, match="of kind 'paired', but its function returned Exact"):
        judge(_record("paired", better="lower"), [Exact(0)])
    with pytest.raises(EvidenceError, match=r"1 trials; a claim of kind .paired. needs at least 2"):
        judge(_record("paired", better="lower"), [Paired(0, 1)])


def test_holm_against_exact_fractions() -> None:
    p = [Fraction(1, 100), Fraction(4, 100), Fraction(3, 100), Fraction(1, 200)]
    order = sorted(range(4), key=lambda i: p[i])
    expected, running = [Fraction(0)] * 4, Fraction(0)
    for rank, index in enumerate(order):
        running = max(running, p[index] * (4 - rank))
        expected[index] = min(running, Fraction(1))
    assert holm([float(x) for x in p]) == pytest.approx([float(x) for x in expected])
    assert holm([]) == []

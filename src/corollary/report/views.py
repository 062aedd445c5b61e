"""Records and verdict rows brought together: what a claim's state is, what it measured, and against which threshold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from corollary.claims.evidence import EvidenceError, evidence_from_dict
from corollary.claims.record import ClaimRecord, Paper
from corollary.claims.stats import ALPHA, COULD_NOT_RUN, FAILED, INCONCLUSIVE, NOT_SUPPORTED, PASSED, SUPPORTED, holm
from corollary.report.numbers import interval, plain


@dataclass(frozen=True)
class State:
    """One thing that can be said of a claim; ``tone`` picks the colour and ``icon`` the shape that says it without colour."""

    key: str
    label: str
    tone: str
    icon: str
    mark: str
    meaning: str


STATES = (
    State("supported", SUPPORTED, "good", "check", "✓", "the interval lies beyond the margin, and p < 0.05"),
    State("passed", PASSED, "good", "equals", "=", "the identity or bound held in every trial, to the tolerance"),
    State("inconclusive", INCONCLUSIVE, "open", "half", "~", "the interval holds the margin: these trials cannot decide"),
    State(
        "not-supported", NOT_SUPPORTED, "bad", "cross", "✗",
        "the interval lies on the wrong side; a scaled-down run never says that a paper is wrong",
    ),
    State("failed", FAILED, "bad", "unequal", "≠", "at least one trial broke the identity or bound"),
    State("could-not-run", COULD_NOT_RUN, "bad", "alert", "!", "a trial crashed, or something it needs is missing"),
    State("not-measured", "not yet measured", "none", "ring", "○", "the claim is registered, and no run is on record"),
    State("no-verdict", "no verdict", "none", "ring", "○", "the run was too small to judge"),
)  # fmt: skip
BY_KEY = {state.key: state for state in STATES}
_BY_VERDICT = {state.label: state for state in STATES}
PASSING = frozenset({"supported", "passed"})
FAILING = frozenset({"not-supported", "failed"})


def state_of(verdict: Any) -> State:
    """The state that a verdict's words name."""
    return _BY_VERDICT.get(str(verdict), BY_KEY["no-verdict"])


@dataclass(frozen=True)
class TrialView:
    """One trial's evidence: the number it comes to, and the evidence as it was stored."""

    index: int
    seed: Any
    value: float
    evidence: Mapping[str, Any]
    logged: Mapping[str, Any]
    seconds: float | None


def _trials(kind: str, stored: Iterable[Mapping[str, Any]] | None) -> tuple[TrialView, ...]:
    views = []
    for index, trial in enumerate(stored or (), start=1):
        evidence = trial.get("evidence") or {}
        if evidence.get("kind") != kind:
            continue  # it brought back nothing, or another kind; there is nothing to draw, and the verdict's reason tells of it
        try:
            value = evidence_from_dict(evidence).value
        except (EvidenceError, KeyError, TypeError):
            continue
        seconds = trial.get("seconds")
        views.append(TrialView(index, trial.get("seed"), value, evidence, trial.get("logged") or {}, seconds))
    return tuple(views)


def centre(kind: str, values: Sequence[float]) -> float:
    """The one number of several trials: largest error, geometric mean of ratios, mean of anything else."""
    if kind == "exact":
        return max(values)
    if kind == "ratio":
        return math.exp(math.fsum(math.log(v) for v in values) / len(values))
    return math.fsum(v / len(values) for v in values)


@dataclass(frozen=True)
class ClaimView:
    """One claim with its latest row, if there is one."""

    paper: Paper
    claim: ClaimRecord
    row: Mapping[str, Any] | None
    adjusted: float | None = None

    @property
    def state(self) -> State:
        return BY_KEY["not-measured"] if self.row is None else state_of(self.row.get("verdict"))

    def get(self, name: str) -> Any:
        """A field of the row; None without a row."""
        return None if self.row is None else self.row.get(name)

    def number(self, name: str) -> float | None:
        """A number of the row; None where it has none."""
        value = self.get(name)
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    @property
    def effect(self) -> float | None:
        """The effect; infinite for an exact check that broke without bound, because JSON keeps no infinity."""
        effect = self.number("effect")
        if effect is None and self.claim.kind == "exact" and any(math.isinf(t.value) for t in self.trials):
            return math.inf
        return effect

    @property
    def stale(self) -> bool:
        return bool(self.get("stale"))

    @property
    def control_state(self) -> State | None:
        verdict = self.get("control_verdict")
        return None if verdict is None else state_of(verdict)

    @property
    def defect(self) -> bool:
        """Whether the control passed or could not run: then the claim's own verdict says nothing."""
        control = self.control_state
        broken = control is not None and (control.key in PASSING or control.key == "could-not-run")
        return bool(self.get("defect")) or broken

    @property
    def control_says(self) -> str:
        """What the control did, in a few words."""
        control = self.control_state
        if self.row is None:
            return "not yet run"
        if control is None:
            return "control not run"
        if control.key == "could-not-run":
            return "defect: the control could not run"
        if self.defect:
            return "defect: the control passed"
        if control.key in FAILING:
            return "control failed, as it must"
        return "control did not pass"

    @cached_property
    def trials(self) -> tuple[TrialView, ...]:
        return _trials(self.claim.kind, self.get("values"))

    @cached_property
    def control_trials(self) -> tuple[TrialView, ...]:
        return _trials(self.claim.kind, self.get("control_values"))

    @property
    def span(self) -> tuple[float, float]:
        """The values at which the claim holds, as an interval (ends may be infinite)."""
        c = self.claim
        if c.kind == "paired":
            return (-math.inf, -c.margin) if c.better == "lower" else (c.margin, math.inf)
        if c.kind == "exact":
            return -math.inf, c.tolerance
        if c.kind == "ratio":
            return (-math.inf, c.bound) if c.better == "lower" else (c.bound, math.inf)
        low = -math.inf if c.better == "lower" else c.exponent - c.tolerance
        high = math.inf if c.better == "higher" else c.exponent + c.tolerance
        return low, high

    def holds(self, value: float) -> bool:
        """Whether one trial's value lies where the claim says."""
        low, high = self.span
        return value <= high if self.claim.kind == "exact" else low < value < high

    @property
    def unit(self) -> str:
        return "×" if self.claim.kind == "ratio" else ""

    @property
    def measured(self) -> tuple[str, str]:
        """The effect and its 95% interval in words."""
        return interval(self.effect, self.number("ci_low"), self.number("ci_high"), self.unit)

    @property
    def quantity(self) -> str:
        """What the effect is."""
        c = self.claim
        return {
            "paired": f"ours − baseline, {c.metric}",
            "exact": "largest error",
            "slope": "fitted exponent",
            "ratio": f"ours / baseline{', ' + c.metric if c.metric else ''}",
        }[c.kind]

    @property
    def rule(self) -> str:
        """What it takes for the claim to hold, in one sentence."""
        c, (low, high) = self.claim, self.span
        if c.kind == "exact":
            return f"Passes when the largest error over all trials is at most {plain(c.tolerance)}."
        side = f"below {plain(high)}" if low == -math.inf else f"above {plain(low)}"
        if low != -math.inf and high != math.inf:
            side = f"between {plain(low)} and {plain(high)}"
        if c.kind == "paired":
            return (
                f"Supported when the 95% interval of the mean difference in {c.metric}, ours − baseline, lies {side} "
                f"and the sign-flip test gives p < {ALPHA} ({c.better} is better)."
            )
        if c.kind == "ratio":
            return f"Supported when the 95% interval of the geometric mean of ours / baseline lies {side} and the sign-flip test gives p < {ALPHA}."
        return (
            f"Supported when the 95% interval of the fitted exponent lies {side} (predicted: {plain(c.exponent)}) "
            f"and the sign-flip test gives p < {ALPHA}."
        )


@dataclass(frozen=True)
class PaperView:
    """One paper with its claims."""

    paper: Paper
    claims: tuple[ClaimView, ...]

    @property
    def href(self) -> str:
        """Address of its page, seen from the scoreboard."""
        return f"papers/{self.paper.slug}.html"


@dataclass(frozen=True)
class Board:
    """Everything the report shows."""

    papers: tuple[PaperView, ...]
    orphans: tuple[Mapping[str, Any], ...]

    @cached_property
    def claims(self) -> tuple[ClaimView, ...]:
        return tuple(claim for paper in self.papers for claim in paper.claims)

    @cached_property
    def family(self) -> tuple[ClaimView, ...]:
        """The claims that carry a p value, smallest first: Holm's correction runs over these."""
        tested = [c for c in self.claims if c.adjusted is not None]
        return tuple(sorted(tested, key=lambda c: (c.number("p_value") or 0.0, c.paper.slug, c.claim.id)))

    @cached_property
    def counts(self) -> dict[str, int]:
        """How many claims are in each state, in the states' order."""
        return {s.key: sum(c.state.key == s.key for c in self.claims) for s in STATES}


def build_board(papers: Mapping[str, Paper], rows: Sequence[Mapping[str, Any]]) -> Board:
    """Join records and rows; where several rows stand for one claim, the last one counts."""
    latest = {(row["slug"], row["claim"]): row for row in rows}
    known = {(p.slug, c.id) for p in papers.values() for c in p.claims}
    tested = [(key, row["p_value"]) for key, row in latest.items() if key in known and row.get("p_value") is not None]
    adjusted = dict(zip([key for key, _ in tested], holm([float(p) for _, p in tested]), strict=True))
    views = tuple(
        PaperView(
            paper,
            tuple(
                ClaimView(paper, claim, latest.get((paper.slug, claim.id)), adjusted.get((paper.slug, claim.id)))
                for claim in paper.claims
            ),
        )
        for paper in papers.values()
    )
    return Board(views, tuple(row for key, row in latest.items() if key not in known))

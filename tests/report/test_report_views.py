"""States, thresholds and the correction, against definitions written out anew."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import pytest

from corollary.claims.record import ClaimRecord, Paper
from corollary.report.views import BY_KEY, ClaimView, build_board, centre

PAPER = Paper(slug="made-up", package="optim", title="Made up", authors=("A",), year=2024, summary="s")


def _view(kind: str, row: dict[str, Any] | None = None, **fields: Any) -> ClaimView:
    claim = ClaimRecord(id="c", kind=kind, statement="s", source="t", control="u", **fields)
    return ClaimView(PAPER, claim, row)


def test_adjusted_p_values_are_those_of_the_closed_bonferroni_test(
    papers: Mapping[str, Paper], rows: list[dict[str, Any]]
) -> None:
    family = build_board(papers, rows).family
    p = [float(view.get("p_value")) for view in family]
    every = [s for n in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), n)]
    closed = [max(min(1.0, len(s) * min(p[j] for j in s)) for s in every if i in s) for i in range(len(p))]
    assert [view.adjusted for view in family] == pytest.approx(closed)


@pytest.mark.parametrize(
    ("view", "span"),
    [
        (_view("paired", better="lower", margin=0.1), (-math.inf, -0.1)),
        (_view("paired", better="higher", margin=0.1), (0.1, math.inf)),
        (_view("paired", better="higher", margin=-0.1), (-0.1, math.inf)),
        (_view("ratio", better="lower", bound=3.0), (-math.inf, 3.0)),
        (_view("ratio", better="higher", bound=2.0), (2.0, math.inf)),
        (_view("exact", tolerance=1e-6), (-math.inf, 1e-6)),
        (_view("slope", exponent=-0.5, tolerance=0.125), (-0.625, -0.375)),
        (_view("slope", exponent=1.0, tolerance=0.25, better="lower"), (-math.inf, 1.25)),
        (_view("slope", exponent=1.0, tolerance=0.25, better="higher"), (0.75, math.inf)),
    ],
)
def test_span_and_rule(view: ClaimView, span: tuple[float, float]) -> None:
    assert view.span == span
    for end in span:
        if math.isfinite(end) and view.claim.kind != "exact":
            assert f"{end:g}".replace("-", "−") in view.rule


def test_the_tolerance_itself_passes_and_the_margin_itself_does_not() -> None:
    assert _view("exact", tolerance=0.0).holds(0.0)
    assert not _view("paired", better="lower", margin=0.0).holds(0.0)


def test_centre() -> None:
    assert centre("ratio", [0.5, 2.0]) == pytest.approx(1.0)
    assert centre("exact", [0.0, 3.0, 1.0]) == 3.0
    assert centre("paired", [1.0, 2.0]) == 1.5


@pytest.mark.parametrize(
    ("control", "defect", "words"),
    [
        (None, False, "control not run"),
        ("not supported at this scale", False, "control failed, as it must"),
        ("exact check failed", False, "control failed, as it must"),
        ("inconclusive", False, "control did not pass"),
        ("supported at this scale", True, "defect: the control passed"),
        ("exact check passed", True, "defect: the control passed"),
        ("could not run", True, "defect: the control could not run"),
    ],
)
def test_what_a_control_says(control: str | None, defect: bool, words: str) -> None:
    view = _view("exact", {"verdict": "exact check passed", "control_verdict": control, "defect": defect})
    assert (view.defect, view.control_says) == (defect, words)
    assert _view("exact", {"verdict": "inconclusive", "control_verdict": control}).defect == defect  # found without the flag


def test_states(papers: Mapping[str, Paper], rows: list[dict[str, Any]]) -> None:
    board = build_board(papers, rows)
    assert board.counts == {
        "supported": 6, "passed": 3, "inconclusive": 3, "not-supported": 1, "failed": 1, "could-not-run": 1, "not-measured": 3,
        "no-verdict": 0,
    }  # fmt: skip
    assert [row["claim"] for row in board.orphans] == ["no_longer_there"]
    assert _view("exact", {"verdict": "something new"}).state == BY_KEY["no-verdict"]


def test_the_last_row_of_a_claim_counts(papers: Mapping[str, Paper], rows: list[dict[str, Any]]) -> None:
    again = {**rows[0], "verdict": "inconclusive", "p_value": 0.5}
    board = build_board(papers, [*rows, again])
    assert board.claims[0].state.key == "inconclusive"
    assert board.claims[0].adjusted == 1.0
    assert len(board.family) == 6


def test_a_trial_without_evidence_is_left_out() -> None:
    good = {"seed": 1, "evidence": {"kind": "paired", "ours": 1.0, "baseline": 2.0}}
    bad = [
        {"seed": 2},
        {"seed": 3, "evidence": {"kind": "paired", "ours": math.nan, "baseline": 1.0}},
        {"evidence": {"kind": "?"}},
        {"seed": 4, "evidence": {"kind": "exact", "error": 1.0}},
    ]
    view = _view("paired", {"values": [good, *bad]}, better="lower")
    assert [t.value for t in view.trials] == [-1.0]


def test_an_error_without_bound_is_shown_as_such() -> None:
    trial = {"seed": 1, "evidence": {"kind": "exact", "error": "inf"}}
    view = _view("exact", {"verdict": "exact check failed", "effect": None, "values": [trial]}, tolerance=1e-6)
    assert view.measured == ("∞", "")

"""The verdicts that the pages show, read again when the stores of evidence change."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from corollary.claims.record import Paper, catalogue
from corollary.claims.stats import ALPHA
from corollary.claims.store import Row, Store, latest_verdicts
from corollary.report.views import BY_KEY, FAILING, PASSING, STATES, Board, ClaimView, PaperView, State, build_board

_LOOK_EVERY = 1.0  # seconds between looks at the files


@dataclass(frozen=True)
class Strength:
    """How much a verdict rests on, whichever way it went."""

    key: str
    label: str
    meaning: str


STRENGTHS = (
    Strength(
        "strong", "strong",
        "measured on the code as it is now; the control failed, as it must; and a p value, where the verdict needs one, stays "
        f"below {ALPHA} after Holm's correction over the whole catalogue",
    ),
    Strength("fair", "fair", "a verdict, but the code has changed since, its control did not clearly fail, or its p value does not survive the correction"),
    Strength("weak", "weak", "inconclusive, measured without its control, or with a control that passed: it decides nothing"),
    Strength("none", "not measured", "no run is on record, or none that could be judged"),
)  # fmt: skip
BY_STRENGTH = {strength.key: strength for strength in STRENGTHS}


def strength(view: ClaimView) -> Strength:
    """How much the verdict of a claim rests on."""
    state, control = view.state.key, view.control_state
    if state in ("not-measured", "no-verdict", "could-not-run"):
        return BY_STRENGTH["none"]
    if state == "inconclusive" or view.defect or control is None:
        return BY_STRENGTH["weak"]
    uncorrected = state == "supported" and view.adjusted is not None and view.adjusted >= ALPHA
    if view.stale or uncorrected or control.key not in FAILING:
        return BY_STRENGTH["fair"]
    return BY_STRENGTH["strong"]


@dataclass(frozen=True)
class Standing:
    """How a paper's claims stand, in one line."""

    holds: int
    total: int
    measured: int
    tone: str
    icon: str

    @property
    def words(self) -> str:
        """The line."""
        if not self.measured:
            return "not yet measured"
        return (
            f"{self.holds} of {self.total} {'claim' if self.total == 1 else 'claims'} hold{'s' if self.holds == 1 else ''} here"
        )


def standing(view: PaperView) -> Standing:
    """How a paper's claims stand: those that hold, whose control did not pass, against all."""
    holds = sum(c.state.key in PASSING and not c.defect for c in view.claims)
    measured = sum(c.row is not None for c in view.claims)
    total = len(view.claims)
    if not measured:
        return Standing(holds, total, measured, "none", "ring")
    if holds == total:
        return Standing(holds, total, measured, "good", "check")
    return Standing(holds, total, measured, "open" if holds else "bad", "half" if holds else "cross")


class Verdicts:
    """The board of published verdicts and of runs on this machine.

    Args:
        results: folder of the published evidence.
        runs: folder of this machine's own.
        papers: gives the records; `corollary.claims.record.catalogue` by default.
    """

    def __init__(self, results: Path, runs: Path, papers: Callable[[], Mapping[str, Paper]] = catalogue) -> None:
        self._folders = (results, runs)
        self._papers = papers
        self._lock = threading.Lock()
        self._looked = -_LOOK_EVERY
        self._sign: tuple[tuple[str, int, int], ...] | None = None
        self._number = 0
        self._board: Board | None = None
        self._kept: tuple[Board, list[tuple[str, str]], list[str], dict[str, PaperView]] | None = None
        self._rows: list[Row] = []

    def version(self) -> str:
        """Another text after the evidence has changed; looks at the files at most once a second."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_EVERY:
            with self._lock:
                self._looked = now
                sign = self._signature()
                if sign != self._sign:
                    self._sign, self._board = sign, None
                    self._number += 1
        return str(self._number)

    def changed(self) -> None:
        """Look at the files at the next question: a run has just ended."""
        self._looked = -_LOOK_EVERY

    def _signature(self) -> tuple[tuple[str, int, int], ...]:
        found = []
        for folder in self._folders:
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if entry.name.endswith(".jsonl"):
                            about = entry.stat()
                            found.append((entry.path, about.st_mtime_ns, about.st_size))
            except OSError:
                continue
        return tuple(sorted(found))

    def _read(self) -> tuple[Board, list[Row]]:
        self.version()
        with self._lock:
            if self._board is None:
                papers = self._papers()
                self._rows = latest_verdicts(list(papers.values()), [Store(folder) for folder in self._folders])
                self._board = build_board(papers, self._rows)
            return self._board, self._rows

    @property
    def board(self) -> Board:
        """All records with their verdicts."""
        return self._read()[0]

    @property
    def rows(self) -> list[Row]:
        """The newest row of each claim, as `corollary.claims.store.latest_verdicts` gives them."""
        return self._read()[1]

    def _looked_up(self) -> tuple[Board, list[tuple[str, str]], list[str], dict[str, PaperView]]:
        """What every page asks of a board, made once for each."""
        board, kept = self.board, self._kept
        if kept is None or kept[0] is not board:
            packages = sorted({str(p.paper.package) for p in board.papers})
            kept = self._kept = (board, _choices(board), packages, {p.paper.slug: p for p in board.papers})
        return kept

    @property
    def choices(self) -> list[tuple[str, str]]:
        """The verdicts that a filter can name, those that occur."""
        return self._looked_up()[1]

    @property
    def packages(self) -> list[str]:
        """The packages of the records, by name."""
        return self._looked_up()[2]

    @property
    def by_slug(self) -> dict[str, PaperView]:
        """All of them by slug."""
        return self._looked_up()[3]

    def paper(self, slug: str | None) -> PaperView | None:
        """One record with its verdicts; None where there is none."""
        return self.by_slug.get(slug) if slug else None

    def select(self, package: str = "", verdict: str = "", evidence: str = "") -> list[PaperView]:
        """Papers of a package with at least one claim of this verdict and this strength of evidence; '' leaves a filter out.

        ``verdict`` is a key of `corollary.report.views.STATES`, or ``defect`` or ``stale``.
        """

        def fits(claim: ClaimView) -> bool:
            if verdict == "defect":
                said = claim.defect
            elif verdict == "stale":
                said = claim.stale
            else:
                said = not verdict or claim.state.key == verdict
            return said and (not evidence or strength(claim).key == evidence)

        found = (p for p in self.board.papers if not package or p.paper.package == package)
        return [p for p in found if not (verdict or evidence) or any(map(fits, p.claims))]


def change_words(old: str | None, new: str) -> str:
    """A change of a verdict in words; ``old`` is None for the first.

    Example:
        >>> change_words("inconclusive", "supported at this scale")
        'supported at this scale, was inconclusive'
    """
    return f"{new}, was {old}" if old else f"{new}, measured for the first time"


def _choices(board: Board) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = [(s.key, s.label) for s in STATES if board.counts[s.key]]
    found += [("defect", "defect")] * any(c.defect for c in board.claims)
    found += [("stale", "stale")] * any(c.stale for c in board.claims)
    return found


__all__ = ["BY_KEY", "STRENGTHS", "Standing", "State", "Strength", "Verdicts", "standing", "strength"]

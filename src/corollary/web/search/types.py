"""What a search takes and gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date
from typing import Literal

from corollary.web.store.papers import PaperView

Mode = Literal["fusion", "words", "meaning"]


@dataclass(frozen=True, slots=True)
class Filters:
    """What a search is held to; every field left at its default lets all papers through.

    Args:
        first: no paper of an earlier day.
        last: no paper of a later day.
        category: an arXiv category, as ``cs.LG``.
        slugs: papers of these records alone; what a filter by package, verdict or strength of evidence comes down to.
        has_code: only papers with a link to code.
    """

    first: date | None = None
    last: date | None = None
    category: str | None = None
    slugs: frozenset[str] | None = None
    has_code: bool = False


@dataclass(frozen=True, slots=True)
class Parsed:
    """How a query was understood, to be shown and to highlight by.

    ``words`` are matched; ``phrases`` must stand as they are; ``authors`` must be among the names; ``excluded`` must not stand
    anywhere. ``corrected`` says, for each word that no paper has, which word was taken instead. ``name`` is the arXiv id, DOI or
    address that the query is.
    """

    query: str
    words: tuple[str, ...] = ()
    phrases: tuple[str, ...] = ()
    authors: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    corrected: dict[str, str] = field(default_factory=dict, hash=False)
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Hit:
    """One paper found: its fused score, and its rank (from 1) by words and by meaning; None where that list lacks it."""

    paper: PaperView
    score: float
    words_rank: int | None
    meaning_rank: int | None


@dataclass(frozen=True, slots=True)
class Results:
    """The hits of one page, how the query was read, and the cursor of the next page: None at the end."""

    hits: list[Hit]
    parsed: Parsed
    next: str | None

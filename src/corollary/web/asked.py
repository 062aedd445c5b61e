"""What a search is asked with, by a page's form, a feed's address, or a saved search."""

from __future__ import annotations

from datetime import date
from typing import Any

from corollary.web.search import Filters

LONGEST = 10_000  # letters of a query; an abstract pasted whole has 2,000
FIELDS = ("first", "last", "category", "code", "package", "verdict", "evidence", "mode")


def _day(text: str) -> date | None:
    try:
        return date.fromisoformat(text) if text else None
    except ValueError:
        return None


def filters_of(verdicts: Any, fields: dict[str, str]) -> Filters:
    """The filters that a form's fields stand for; fields that say nothing sensible let everything through."""
    package, verdict, evidence = (fields.get(name, "") for name in ("package", "verdict", "evidence"))
    slugs = None
    if package or verdict or evidence:
        slugs = frozenset(view.paper.slug for view in verdicts.select(package, verdict, evidence))
    return Filters(
        first=_day(fields.get("first", "")),
        last=_day(fields.get("last", "")),
        category=fields.get("category", "")[:40] or None,
        slugs=slugs,
        has_code=fields.get("code", "") == "1",
    )

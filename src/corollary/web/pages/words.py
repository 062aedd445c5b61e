"""What pages say of papers and days, in plain words and addresses."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from urllib.parse import quote

from corollary.web.store import PaperView

_MONTHS = ("", "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def paper_address(paper: PaperView) -> str:
    """Where a paper's page is."""
    return "/papers/" + quote(paper.key, safe=":/")


def long_day(day: date) -> str:
    """A day as people say it.

    Example:
        >>> long_day(date(2024, 10, 2))
        'Wednesday, 2 October 2024'
    """
    return f"{day:%A}, {day.day} {day:%B} {day.year}"


def short_day(day: date) -> str:
    """A day in few letters.

    Example:
        >>> short_day(date(2024, 10, 2))
        '2 Oct 2024'
    """
    return f"{day.day} {_MONTHS[day.month]} {day.year}"


def clip(text: str, most: int = 420) -> str:
    """The beginning of a text, cut between words.

    Example:
        >>> clip("one two three", 9)
        'one two …'
    """
    if len(text) <= most:
        return text
    cut = text[: most - 1]
    return (cut[: cut.rfind(" ")] if " " in cut else cut).rstrip(" ,;:") + " …"


def people(authors: Sequence[str], most: int = 4) -> str:
    """The first names of a list.

    Example:
        >>> people(["A", "B", "C", "D", "E", "F", "G"]), people(["A", "B", "C", "D", "E"])
        ('A, B, C, D and 3 others', 'A, B, C, D, E')
    """
    if len(authors) > most + 1:
        return f"{', '.join(authors[:most])} and {len(authors) - most} others"
    return ", ".join(authors)

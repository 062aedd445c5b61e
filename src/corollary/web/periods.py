"""Days, weeks and months as addresses name them: 2024-10-02, 2024-W40, 2024-10."""

from __future__ import annotations

import re
from datetime import date, timedelta

WEEK, MONTH = r"^\d{4}-W\d{2}$", r"^\d{4}-\d{2}$"


def day_of(text: str) -> date:
    """The day that an address names; ``ValueError`` where it names none.

    Example:
        >>> day_of("2024-10-02")
        datetime.date(2024, 10, 2)
    """
    if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text, re.ASCII) is None:
        raise ValueError(f"'{text[:40]}' is no day; days are written as 2024-10-02")
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"'{text}' is no day; days are written as 2024-10-02") from error


def week_of(text: str) -> tuple[date, date]:
    """First and last day of an ISO week; ``ValueError`` where there is none of the name.

    Example:
        >>> [str(day) for day in week_of("2024-W40")]
        ['2024-09-30', '2024-10-06']
    """
    try:
        if re.fullmatch(WEEK[1:-1], text, re.ASCII) is None:
            raise ValueError
        first = date.fromisocalendar(int(text[:4]), int(text[6:]), 1)
        return first, first + timedelta(days=6)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"'{text[:40]}' is no week; weeks are written as 2024-W40") from error


def month_of(text: str) -> tuple[date, date]:
    """First and last day of a month; ``ValueError`` where there is none of the name.

    Example:
        >>> [str(day) for day in month_of("2024-02")]
        ['2024-02-01', '2024-02-29']
    """
    try:
        if re.fullmatch(MONTH[1:-1], text, re.ASCII) is None:
            raise ValueError
        first = date(int(text[:4]), int(text[5:]), 1)
        return first, date(first.year + first.month // 12, first.month % 12 + 1, 1) - timedelta(days=1)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"'{text[:40]}' is no month; months are written as 2024-10") from error


def week_name(day: date) -> str:
    """The name of the ISO week that a day lies in.

    Example:
        >>> week_name(date(2024, 10, 2))
        '2024-W40'
    """
    year, week, _ = day.isocalendar()
    return f"{year}-W{week:02d}"

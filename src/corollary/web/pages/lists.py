"""Papers by day, week and month, and what is trending."""

from __future__ import annotations

import calendar
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from typing import TypeVar

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from corollary.web.feeds import feed_links
from corollary.web.pages.cards import cards
from corollary.web.pages.render import respond
from corollary.web.pages.words import long_day
from corollary.web.periods import day_of, month_of, week_name, week_of
from corollary.web.quick import quick
from corollary.web.store import (
    TRENDING_FORMULA,
    Page,
    Store,
    count_papers,
    current_day,
    days,
    nearest_day,
    neighbours,
    papers_between,
    papers_of_day,
    trending,
)

T = TypeVar("T")

router = APIRouter(include_in_schema=False)


def _named(named: Callable[[str], T], text: str) -> T:
    """The time that an address names; a page that says so where it names none."""
    try:
        return named(text)
    except ValueError as error:
        raise HTTPException(404, str(error)) from error


def _paged(store: Store, first: date, last: date, after: str | None) -> Page:
    try:
        return papers_between(store, first, last, after=after)
    except ValueError as error:
        raise HTTPException(404, "this page of the list does not exist") from error


def _show_day(request: Request, day: date, asked: date | None, after: str | None, page: Page) -> Response:
    before, later = neighbours(request.app.state.store, day)
    return respond(
        request, "day.html", keep=True, current="day", feeds=feed_links("papers", "Newest papers"), day=day, asked=asked,
        cards=cards(request, page.papers), next=page.next, before=before, later=later, after=after,
    )  # fmt: skip


@router.get("/")
@quick
def today(request: Request) -> Response:
    """The newest day with papers, up to today."""
    store = request.app.state.store
    day, now = current_day(store), datetime.now(UTC).date()
    if day is None:
        return respond(request, "empty.html", current="day")
    return _show_day(request, day, now if day != now else None, None, papers_of_day(store, day))


@router.get("/day")
def pick(request: Request, date: str = "") -> Response:
    """What the date picker sends."""
    return RedirectResponse(f"/day/{_named(day_of, date).isoformat()}", 303)


@router.get("/day/{text}")
@quick
def one_day(request: Request, text: str, asked: str | None = None, after: str | None = None) -> Response:
    """One day; an empty one leads to the nearest that has papers."""
    day, store = _named(day_of, text), request.app.state.store
    page = _paged(store, day, day, after)
    if not page.papers:
        nearest = nearest_day(store, day)
        if nearest is None:
            return respond(request, "empty.html", current="day")
        if nearest != day:
            return RedirectResponse(f"/day/{nearest.isoformat()}?asked={day.isoformat()}", 303)
    return _show_day(request, day, _named(day_of, asked) if asked else None, after, page)


@router.get("/week/{text}")
def one_week(request: Request, text: str, after: str | None = None) -> Response:
    """One ISO week, as 2024-W40."""
    first, last = _named(week_of, text)
    days_of = [[first + timedelta(days=i) for i in range(7)]]
    name = f"Week {int(text[6:])}, {text[:4]}"
    return _period(
        request, "week", text, name, f"{long_day(first)} to {long_day(last)}", (first, last), days_of, week_name, after
    )


@router.get("/month/{text}")
def one_month(request: Request, text: str, after: str | None = None) -> Response:
    """One month, as 2024-10."""
    first, last = _named(month_of, text)
    weeks = calendar.Calendar().monthdatescalendar(first.year, first.month)
    days_of = [[day for day in week if day.month == first.month] for week in weeks]
    return _period(
        request, "month", text, f"{first:%B} {first.year}", "", (first, last), days_of, lambda day: f"{day:%Y-%m}", after
    )


def _period(
    request: Request, kind: str, text: str, name: str, about: str, span: tuple[date, date], weeks: list[list[date]],
    named: Callable[[date], str], after: str | None,
) -> Response:  # fmt: skip
    store = request.app.state.store
    page, counts = _paged(store, *span, after), days(store, *span)
    before, later = nearest_day(store, span[0], "before"), nearest_day(store, span[1], "after")
    return respond(
        request, "period.html", keep=True, current="day", feeds=feed_links(f"{kind}/{text}", name), name=name, about=about, counts=counts,
        weeks=weeks, before=(f"/{kind}/{named(before)}" if before else "", f"the {kind} before"),
        later=(f"/{kind}/{named(later)}" if later else "", f"the {kind} after"), cards=cards(request, page.papers), next=page.next, after=after, address=f"/{kind}/{text}",
        total=sum(counts.values()),
    )  # fmt: skip


@router.get("/trending")
def trends(request: Request) -> Response:
    """What is trending, with the formula."""
    store = request.app.state.store
    found = trending(store)
    return respond(
        request, "trending.html", keep=True, current="trending", feeds=feed_links("trending", "Trending"), formula=TRENDING_FORMULA, total=count_papers(store),
        cards=cards(request, [paper for paper, _ in found], score={paper.id: score for paper, score in found}),
    )  # fmt: skip

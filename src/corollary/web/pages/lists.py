"""Papers by day, week and month, and what is trending."""

from __future__ import annotations

import calendar
import re
from datetime import UTC, date, datetime, timedelta

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from corollary.web.feeds import feed_links
from corollary.web.pages.cards import cards
from corollary.web.pages.render import long_day, respond
from corollary.web.store import (
    TRENDING_FORMULA,
    Page,
    count_papers,
    days,
    nearest_day,
    papers_of_day,
    papers_of_month,
    papers_of_week,
    trending,
)

router = APIRouter(include_in_schema=False)


def _date(text: str) -> date:
    try:
        return date.fromisoformat(text) if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text, re.ASCII) else _no_day(text)
    except ValueError:
        return _no_day(text)


def _no_day(text: str) -> date:
    raise HTTPException(404, f"'{text[:40]}' is no day; days are written as 2024-10-02")


def _show_day(request: Request, day: date, asked: date | None, after: str | None) -> Response:
    store = request.app.state.store
    try:
        page = papers_of_day(store, day, after=after)
    except ValueError as error:
        raise HTTPException(404, "this page of the list does not exist") from error
    return respond(
        request, "day.html", keep=True, current="day", feeds=feed_links("papers", "Newest papers"), day=day, asked=asked, cards=cards(request, page.papers), next=page.next,
        before=nearest_day(store, day, "before"), later=nearest_day(store, day, "after"), after=after,
    )  # fmt: skip


@router.get("/")
def today(request: Request) -> Response:
    """The newest day with papers, up to today."""
    store = request.app.state.store
    now = datetime.now(UTC).date()
    day = nearest_day(store, now + timedelta(days=1), "before") or nearest_day(store, now)
    if day is None:
        return respond(request, "empty.html", current="day")
    return _show_day(request, day, now if day != now else None, None)


@router.get("/day")
def pick(request: Request, date: str = "") -> Response:
    """What the date picker sends."""
    return RedirectResponse(f"/day/{_date(date).isoformat()}", 303)


@router.get("/day/{text}")
def one_day(request: Request, text: str, asked: str | None = None, after: str | None = None) -> Response:
    """One day; an empty one leads to the nearest that has papers."""
    day, store = _date(text), request.app.state.store
    nearest = nearest_day(store, day)
    if nearest is None:
        return respond(request, "empty.html", current="day")
    if nearest != day:
        return RedirectResponse(f"/day/{nearest.isoformat()}?asked={day.isoformat()}", 303)
    return _show_day(request, day, _date(asked) if asked else None, after)


def _shift_month(year: int, month: int, by: int) -> tuple[int, int]:
    at = year * 12 + month - 1 + by
    return at // 12, at % 12 + 1


@router.get("/week/{text}")
def one_week(request: Request, text: str, after: str | None = None) -> Response:
    """One ISO week, as 2024-W40."""
    match = re.fullmatch(r"(\d{4})-W(\d{2})", text, re.ASCII)
    store = request.app.state.store
    try:
        if match is None:
            raise ValueError
        year, week = int(match[1]), int(match[2])
        monday = date.fromisocalendar(year, week, 1)
        page = papers_of_week(store, year, week, after=after)
    except (ValueError, OverflowError) as error:
        raise HTTPException(404, f"'{text[:40]}' is no week; weeks are written as 2024-W40") from error
    sunday = monday + timedelta(days=6)
    before, later = nearest_day(store, monday, "before"), nearest_day(store, sunday, "after")
    counts = days(store, monday, sunday)
    return _period(
        request, page, f"Week {week}, {year}", f"{long_day(monday)} to {long_day(sunday)}", counts, [[monday + timedelta(days=i) for i in range(7)]],
        ("/week/" + "{}-W{:02d}".format(*before.isocalendar()[:2]) if before else "", "the week before"),
        ("/week/" + "{}-W{:02d}".format(*later.isocalendar()[:2]) if later else "", "the week after"), after, f"/week/{text}",
    )  # fmt: skip


@router.get("/month/{text}")
def one_month(request: Request, text: str, after: str | None = None) -> Response:
    """One month, as 2024-10."""
    match = re.fullmatch(r"(\d{4})-(\d{2})", text, re.ASCII)
    store = request.app.state.store
    try:
        if match is None:
            raise ValueError
        year, month = int(match[1]), int(match[2])
        first = date(year, month, 1)
        last = date(year, month, calendar.monthrange(year, month)[1])
        page = papers_of_month(store, year, month, after=after)
        weeks = calendar.Calendar().monthdatescalendar(year, month)
    except (ValueError, OverflowError) as error:
        raise HTTPException(404, f"'{text[:40]}' is no month; months are written as 2024-10") from error
    before, later = nearest_day(store, first, "before"), nearest_day(store, last, "after")
    return _period(
        request, page, f"{first:%B} {year}", "", days(store, first, last), [[d for d in week if d.month == month] for week in weeks],
        (f"/month/{before:%Y-%m}" if before else "", "the month before"),
        (f"/month/{later:%Y-%m}" if later else "", "the month after"), after, f"/month/{text}",
    )  # fmt: skip


def _period(
    request: Request, page: Page, name: str, about: str, counts: dict[date, int], weeks: list[list[date]], before: tuple[str, str],
    later: tuple[str, str], after: str | None, address: str,
) -> Response:  # fmt: skip
    return respond(
        request, "period.html", keep=True, current="day", feeds=feed_links(address[1:], name), name=name, about=about, counts=counts, weeks=weeks, before=before, later=later,
        cards=cards(request, page.papers), next=page.next, after=after, address=address, total=sum(counts.values()),
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

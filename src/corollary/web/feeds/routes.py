"""The feeds' addresses: ``/feeds/<list>.<format>``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, time, timedelta
from enum import StrEnum
from typing import Annotated
from urllib.parse import quote, urlencode

from fastapi import APIRouter, Depends, Query, Request
from sqlalchemy import select
from starlette.exceptions import HTTPException
from starlette.responses import Response

from corollary.web.api.asking import reading
from corollary.web.asked import LONGEST, filters_of
from corollary.web.board import change_words, standing
from corollary.web.feeds.write import KINDS, Entry, Feed, atom, json_feed, rss
from corollary.web.guard import client
from corollary.web.pages.words import paper_address
from corollary.web.periods import month_of, week_of
from corollary.web.search import search
from corollary.web.store import (
    PaperView,
    ReadingItem,
    current_day,
    papers_between,
    papers_by_id,
    papers_of_day,
    papers_of_slugs,
    trending,
    verdict_changes_since,
)

_SIZE = 50
_RECENT = timedelta(days=90)


class Kind(StrEnum):
    """A format."""

    atom = "atom"
    rss = "rss"
    json = "json"


router = APIRouter(prefix="/feeds", tags=["feeds"], dependencies=[Depends(reading)], responses={
    200: {"content": {kind: {} for kind in KINDS.values()}}, 304: {"description": "the same as before"},
    404: {"content": {"text/html": {}}}, 429: {"content": {"text/html": {}}},
})  # fmt: skip


def _entries(request: Request, papers: Sequence[PaperView]) -> list[Entry]:
    app = request.app.state
    found = []
    for paper in papers:
        record = app.verdicts.paper(paper.slug)
        text = paper.text if record is None else f"{standing(record).words}. {paper.text}"
        at = paper.published or datetime.combine(paper.day, time(), UTC)
        address = app.settings.address + paper_address(paper)
        found.append(
            Entry(f"urn:corollary:{quote(paper.key, safe='')}", address, paper.title, text, at, paper.changed_at, paper.authors,
                  (*paper.categories, *paper.keywords))
        )  # fmt: skip
    return found


def _answer(request: Request, kind: Kind, title: str, page: str, entries: Sequence[Entry]) -> Response:
    base = request.app.state.settings.address
    asked = f"?{request.url.query}" if request.url.query else ""
    feed = Feed(title, f"{base}{request.url.path}{asked}", base + page, entries)
    if kind is Kind.json:
        body = json.dumps(json_feed(feed), ensure_ascii=False).encode()
    else:
        body = atom(feed) if kind is Kind.atom else rss(feed)
    # Readers ask every hour or so: who has the same already is told so, and no more.
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    known = {part.strip().removeprefix("W/") for part in request.headers.get("if-none-match", "").split(",")}
    if tag in known or "*" in known:
        return Response(status_code=304, headers={"etag": tag})
    return Response(body, media_type=KINDS[kind.value], headers={"etag": tag})


def _list(request: Request, kind: Kind, title: str, page: str, papers: Sequence[PaperView]) -> Response:
    return _answer(request, kind, title, page, _entries(request, papers))


@router.get("/papers.{kind}")
def newest(request: Request, kind: Kind) -> Response:
    """The newest day that has papers."""
    store = request.app.state.store
    day = current_day(store)
    papers = papers_of_day(store, day, size=_SIZE).papers if day else []
    return _list(request, kind, "Corollary: papers", "/", papers)


@router.get("/day/{day}.{kind}")
def one_day(request: Request, day: date, kind: Kind) -> Response:
    """One day."""
    return _list(
        request, kind, f"Corollary: {day}", f"/day/{day}", papers_of_day(request.app.state.store, day, size=_SIZE).papers
    )


def _period(
    request: Request, kind: Kind, title: str, page: str, named: Callable[[str], tuple[date, date]], text: str
) -> Response:
    try:
        span = named(text)
    except ValueError as error:
        raise HTTPException(404, str(error)) from error
    return _list(request, kind, title, page, papers_between(request.app.state.store, *span, size=_SIZE).papers)


@router.get("/week/{week}.{kind}")
def one_week(request: Request, week: str, kind: Kind) -> Response:
    """One ISO week, as 2024-W40."""
    return _period(request, kind, f"Corollary: week {week}", f"/week/{week}", week_of, week)


@router.get("/month/{month}.{kind}")
def one_month(request: Request, month: str, kind: Kind) -> Response:
    """One month, as 2024-10."""
    return _period(request, kind, f"Corollary: {month}", f"/month/{month}", month_of, month)


@router.get("/trending.{kind}")
def trends(request: Request, kind: Kind) -> Response:
    """What is trending, best first."""
    found = trending(request.app.state.store, size=_SIZE)
    return _list(request, kind, "Corollary: trending", "/trending", [paper for paper, _ in found])


@router.get("/search.{kind}")
def found_papers(
    request: Request, kind: Kind, q: Annotated[str, Query(max_length=LONGEST)] = "", first: str = "", last: str = "",
    category: str = "", code: str = "", package: str = "", verdict: str = "", evidence: str = "",
) -> Response:  # fmt: skip
    """What a search finds, with the fields of the search page."""
    app = request.app.state
    if app.settings.lab:
        app.limits.take("search", client(request))
    fields = {
        "first": first,
        "last": last,
        "category": category,
        "code": code,
        "package": package,
        "verdict": verdict,
        "evidence": evidence,
    }
    asked = {name: value for name, value in fields.items() if value}
    hits = search(app.store, q, filters_of(app.verdicts, asked), size=_SIZE).hits if q.strip() else []
    page = "/search?" + urlencode({"q": q, **asked})
    return _list(request, kind, f"Corollary: search for {q[:100]}", page, [hit.paper for hit in hits])


@router.get("/verdicts.{kind}")
def verdicts(request: Request, kind: Kind) -> Response:
    """Verdicts that came or changed in the last 90 days, newest first."""
    app = request.app.state
    changes = verdict_changes_since(app.store, datetime.now(UTC) - _RECENT)[::-1][:_SIZE]
    known = {paper.slug: paper for paper in papers_of_slugs(app.store, {change.slug for change in changes})}
    entries = []
    for change in changes:
        paper = known.get(change.slug)
        place = paper_address(paper) if paper else f"/papers/{change.slug}"
        title = f"{paper.title if paper else change.slug}: {change_words(change.old, change.new)}"
        text = str(change.row.get("statement") or change.claim)
        entries.append(
            Entry(
                f"urn:corollary:verdict:{change.id}",
                f"{app.settings.address}{place}#{change.claim}",
                title,
                text,
                change.at,
                change.at,
            )
        )
    return _answer(request, kind, "Corollary: verdicts", "/methods", entries)


@router.get("/methods.{kind}")
def methods(request: Request, kind: Kind, package: str = "", verdict: str = "", evidence: str = "") -> Response:
    """The papers that run here, with the catalogue's filters."""
    app = request.app.state
    slugs = [view.paper.slug for view in app.verdicts.select(package, verdict, evidence)]
    asked = urlencode({k: v for k, v in {"package": package, "verdict": verdict, "evidence": evidence}.items() if v})
    return _list(
        request,
        kind,
        "Corollary: methods that run here",
        "/methods" + (f"?{asked}" if asked else ""),
        papers_of_slugs(app.store, slugs),
    )


@router.get("/reading.{kind}")
def reading_list(request: Request, kind: Kind, token: Annotated[str, Query(max_length=200)]) -> Response:
    """A reader's reading list, newest first; the token in the address is the reader's own and shows nothing else."""
    app = request.app.state
    reader = app.sessions.reader_of_feed(token)
    if reader is None:
        app.limits.take("token", client(request))
        raise HTTPException(404, "this address has been withdrawn or never was")
    query = select(ReadingItem.paper_id).where(ReadingItem.reader_id == reader, ReadingItem.state != "read")
    with app.store.reading() as connection:
        ids = list(connection.scalars(query.order_by(ReadingItem.added_at.desc()).limit(_SIZE)))
    return _list(request, kind, "Corollary: reading list", "/desk", papers_by_id(app.store, ids))

"""Search, with its hits marked, and saved searches."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastapi import APIRouter, Request
from sqlalchemy import delete
from sqlalchemy.exc import IntegrityError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import Response

from corollary.web.asked import FIELDS, LONGEST, filters_of
from corollary.web.feeds.links import feed_links
from corollary.web.guard import NotSignedIn, checked_form, client, who
from corollary.web.pages.cards import cards
from corollary.web.pages.render import back, respond, wants_fragment
from corollary.web.search import Results, excerpt, highlight, search
from corollary.web.store import SavedSearch, from_json, rows

router = APIRouter(include_in_schema=False)

_MODES = ("fusion", "words", "meaning")


@router.get("/search")
def find(request: Request, q: str = "", mode: str = "", after: str | None = None) -> Response:
    """The search page, with hits where there is a query; the filters' fields are `FIELDS`."""
    app = request.app.state
    if app.settings.lab:
        app.limits.take("search", client(request))
    asked = {name: request.query_params.get(name, "") for name in FIELDS}
    fields = {name: value for name, value in asked.items() if value}
    q = q.strip()
    results: Results | None = None
    shown: list[Any] = []
    if len(q) > LONGEST:
        raise HTTPException(414, f"a query has at most {LONGEST:,} letters")
    if q:
        picked = mode if mode in _MODES else "fusion"
        try:
            results = search(app.store, q, filters_of(app.verdicts, fields), after=after, mode=picked)  # type: ignore[arg-type]
        except ValueError as error:
            raise HTTPException(404, "this page of the hits does not exist") from error
        parsed = results.parsed
        papers = [hit.paper for hit in results.hits]
        shown = cards(
            request, papers,
            title={p.id: highlight(p.title, parsed) for p in papers},
            text={p.id: excerpt(p.text, parsed, width=320) for p in papers},
            ranks={hit.paper.id: (hit.words_rank, hit.meaning_rank) for hit in results.hits},
        )  # fmt: skip
    return respond(
        request, "_hits.html" if wants_fragment(request) else "search.html", keep=True, current="search", q=q,
        feeds=feed_links("search", "This search", q=q, **{k: v for k, v in fields.items() if k != "mode"}) if q else (),
        fields=fields, results=results, cards=shown, after=after, packages=app.verdicts.packages,
        verdicts=app.verdicts.choices, saved=saved_searches(request),
    )  # fmt: skip


class Saved(NamedTuple):
    """A search that a reader keeps."""

    id: int
    name: str
    query: str
    filters: dict[str, str]


def saved_searches(request: Request) -> list[Saved]:
    """The reader's own, by name."""
    reader = who(request).reader
    if reader is None:
        return []
    query = "SELECT id, name, query, filters FROM saved_searches WHERE reader_id = ? ORDER BY name"
    with request.app.state.store.reading() as connection:
        found = rows(connection, query, (reader,))
    return [Saved(number, name, query, from_json(filters)) for number, name, query, filters in found]


def save_search(request: Request, name: str, query: str, filters: dict[str, str]) -> bool:
    """Keep a search under a name; one of the same name is replaced. False where there is no query or no name."""
    reader, name, query = who(request).reader, " ".join(name.split())[:200], query.strip()[:LONGEST]
    if reader is None:
        raise NotSignedIn
    if not query or not (name := name or query[:80]):
        return False
    with request.app.state.store.writing() as session:
        session.execute(delete(SavedSearch).where(SavedSearch.reader_id == reader, SavedSearch.name == name))
        session.add(SavedSearch(reader_id=reader, name=name, query=query, filters=filters))
        try:
            session.flush()
        except IntegrityError:  # saved twice at once
            session.rollback()
    return True


@router.post("/searches")
async def save(request: Request) -> Response:
    """Save a search."""
    form = await checked_form(request)
    filters = {name: str(form[name])[:200] for name in FIELDS if form.get(name)}
    saved = await run_in_threadpool(save_search, request, str(form.get("name") or ""), str(form.get("q") or ""), filters)
    if not saved:
        raise HTTPException(400, "a saved search needs a query")
    return back(request, form, "/desk#searches")


@router.post("/searches/{number}/delete")
async def forget(request: Request, number: int) -> Response:
    """Delete a saved search."""
    form = await checked_form(request)
    reader = who(request).reader
    if reader is None:
        raise NotSignedIn

    def remove() -> None:
        with request.app.state.store.writing() as session:
            session.execute(delete(SavedSearch).where(SavedSearch.id == number, SavedSearch.reader_id == reader))

    await run_in_threadpool(remove)
    return back(request, form, "/desk#searches")


__all__ = ["filters_of", "router", "save_search", "saved_searches"]

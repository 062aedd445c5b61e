"""What is a reader's own: votes, notes, the reading list, saved searches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.responses import Response

from corollary.web.feeds.links import feed_links
from corollary.web.guard import NotSignedIn, checked_form, who
from corollary.web.pages.cards import cards
from corollary.web.pages.render import back, respond, wants_fragment
from corollary.web.pages.search import saved_searches
from corollary.web.store import Note, PaperView, ReadingItem, Store, Vote, now, papers_by_id, views, vote

router = APIRouter(include_in_schema=False)

READING = ("unread", "reading", "read")
LONGEST_NOTE = 20_000
T = TypeVar("T")


def set_reading(store: Store, reader: int, paper_id: int, state: str) -> None:
    """Put a paper on the reading list, change its state, or take it off (``''``)."""
    with store.writing() as session:
        item = session.get(ReadingItem, (reader, paper_id))
        if not state:
            if item is not None:
                session.delete(item)
        elif item is None:
            session.add(ReadingItem(reader_id=reader, paper_id=paper_id, state=state))
        else:
            item.state = state


def set_note(store: Store, reader: int, paper_id: int, text: str) -> None:
    """Write a reader's note on a paper; an empty one is deleted."""
    text = text.replace("\r\n", "\n").replace("\0", "").strip()
    with store.writing() as session:
        found = session.get(Note, (reader, paper_id))
        if not text:
            if found is not None:
                session.delete(found)
        elif found is None:
            session.add(Note(reader_id=reader, paper_id=paper_id, text=text))
        else:
            found.text, found.changed_at = text, now()


async def _asked(request: Request) -> tuple[FormData, int, PaperView]:
    """The form, the reader, and the paper that it is about."""
    form = await checked_form(request)
    reader = who(request).reader
    if reader is None:
        raise NotSignedIn
    text = str(form.get("paper") or "")
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 0
    found = await run_in_threadpool(papers_by_id, request.app.state.store, [number])
    if not found:
        raise HTTPException(404, "there is no such paper")
    return form, reader, found[0]


async def _do(function: Callable[..., T], *args: Any) -> T:
    return await run_in_threadpool(function, *args)


@router.post("/vote")
async def set_vote(request: Request) -> Response:
    """Vote, or take the vote back."""
    form, reader, paper = await _asked(request)
    on = form.get("on") == "1"
    votes = await _do(vote, request.app.state.store, reader, paper.id, on)
    if wants_fragment(request):
        return respond(request, "_vote.html", paper=paper, own=votes, voted=on, path=form.get("next") or "/")
    return back(request, form)


@router.post("/reading")
async def reading(request: Request) -> Response:
    """Put a paper on the reading list, change its state, or take it off."""
    form, reader, paper = await _asked(request)
    state = str(form.get("state") or "")
    if state not in ("", *READING):
        raise HTTPException(400, f"a paper on the list is {', '.join(READING)}")
    await _do(set_reading, request.app.state.store, reader, paper.id, state)
    if wants_fragment(request):
        return respond(request, "_reading.html", paper=paper, reading=state, path=form.get("next") or "/")
    return back(request, form)


@router.post("/note")
async def write_note(request: Request) -> Response:
    """Write a note on a paper; an empty one deletes it."""
    form, reader, paper = await _asked(request)
    text = str(form.get("text") or "")
    if len(text) > LONGEST_NOTE:
        raise HTTPException(413, f"a note has at most {LONGEST_NOTE:,} letters")
    await _do(set_note, request.app.state.store, reader, paper.id, text)
    return back(request, form)


@router.get("/desk")
def desk(request: Request) -> Response:
    """The reader's own page."""
    store, reader = request.app.state.store, who(request).reader
    if reader is None:
        raise NotSignedIn
    with store.reading() as connection, Session(connection) as session:
        items = list(
            session.scalars(
                select(ReadingItem).where(ReadingItem.reader_id == reader).order_by(ReadingItem.added_at.desc()).limit(500)
            )
        )
        notes = list(session.scalars(select(Note).where(Note.reader_id == reader).order_by(Note.changed_at.desc()).limit(200)))
        votes = list(
            session.scalars(select(Vote.paper_id).where(Vote.reader_id == reader).order_by(Vote.created_at.desc()).limit(200))
        )
        wanted = {*(i.paper_id for i in items), *(n.paper_id for n in notes), *votes}
        papers = {p.id: p for p in views(connection, sorted(wanted))}
        by_id = {card.paper.id: card for card in cards(request, list(papers.values()))}
        return respond(
            request, "desk.html", current="desk", states=READING,
            feeds=feed_links("reading", "Reading list", token=request.app.state.sessions.feed_token(reader)),
            lists={state: [by_id[i.paper_id] for i in items if i.state == state and i.paper_id in by_id] for state in READING},
            notes=[(papers[n.paper_id], n.text, n.changed_at) for n in notes if n.paper_id in papers],
            votes=[by_id[i] for i in votes if i in by_id], saved=saved_searches(request),
        )  # fmt: skip

"""The pages of subscriptions."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl, urlencode

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

from corollary.web.asked import FIELDS
from corollary.web.digest.mailer import check_address
from corollary.web.digest.subscriptions import about, change, confirm, find, named, of_reader, pending, subscribe, unsubscribe
from corollary.web.guard import NotSignedIn, checked_form, client, who
from corollary.web.pages.render import respond
from corollary.web.store import Subscription, papers_by_id

router = APIRouter(include_in_schema=False)


def _mail(request: Request) -> Any:
    mail = request.app.state.mail
    if mail is None:
        raise HTTPException(404, "no mail is set up on this server; every list has a feed instead")
    settings = request.app.state.settings
    if settings.lab and not settings.open_reading and who(request).reader is None:
        raise NotSignedIn  # who may not read here gets no mail either
    return mail


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")[:50] if part.isascii() and part.isdigit() and len(part) < 19]


def _form(request: Request, *, status: int = 200, error: str = "", **given: str) -> Response:
    app, reader = request.app.state, who(request).reader
    papers = papers_by_id(app.store, _numbers(given.get("papers", "")))
    fields = {"frequency": "daily", "kind": "all", "q": "", "address": "", "filters": "", **given}
    own = (
        [(_words(row), row.address, app.sessions.unsubscribe_token(row.id)) for row in of_reader(app.store, reader)]
        if reader
        else []
    )
    token = app.sessions.feed_token(reader) if reader else ""
    return respond(
        request, "subscribe.html", status=status, error=error, given=fields, like=papers, sent=False, own=own, reading=token
    )


@router.get("/subscribe")
def ask(request: Request, kind: str = "all", q: str = "", papers: str = "") -> Response:
    """Where a digest is asked for."""
    _mail(request)
    fields = {name: request.query_params[name][:200] for name in FIELDS if request.query_params.get(name) and name != "mode"}
    kept = urlencode(fields)
    return _form(
        request,
        kind=kind if kind in ("all", "topic", "search", "like") else "all",
        q=q[:2000],
        papers=papers[:1000],
        filters=kept,
    )


@router.post("/subscribe")
async def ask_for(request: Request) -> Response:
    """Send the mail that asks for confirmation."""
    mail = _mail(request)
    form = await checked_form(request)
    app = request.app.state
    given = {name: str(form.get(name) or "") for name in ("address", "frequency", "kind", "q", "papers", "filters")}
    filters = dict(parse_qsl(given["filters"], max_num_fields=20))
    value = {
        "query": given["q"], "papers": _numbers(given["papers"]), "filters": {k: v for k, v in filters.items() if k in FIELDS and k != "mode"}
    }  # fmt: skip
    try:
        check_address(given["address"])
        app.limits.take("subscribe", client(request))
        await run_in_threadpool(
            subscribe, app.store, app.settings, mail.sender, given["address"], frequency=given["frequency"] or "daily",
            kind=given["kind"] or "all", value=value, reader=who(request).reader,
        )  # fmt: skip
    except ValueError as error:
        return await run_in_threadpool(_form, request, status=400, error=str(error), **given)
    if app.outbox is not None:
        app.outbox.wake()
    return respond(request, "subscribe.html", sent=True, error="", given=given, like=[], own=[], reading="")


def _words(row: Subscription) -> str:
    return f"{row.frequency} digest of {about(row.kind, row.value)}"


@router.get("/subscribe/confirm/{token}")
def look(request: Request, token: str) -> Response:
    """A page with one button: a mail scanner that follows the link confirms nothing."""
    row = pending(request.app.state.store, token[:200])
    if row is None:
        request.app.state.limits.take("token", client(request))
        raise HTTPException(404, "this link has been used, has expired, or never was")
    return respond(request, "subscribe_confirm.html", words=_words(row), address=row.address, token=token, done=False)


@router.post("/subscribe/confirm/{token}")
async def confirmed(request: Request, token: str) -> Response:
    """Confirm."""
    await checked_form(request)
    app = request.app.state
    app.limits.take("token", client(request))
    number = await run_in_threadpool(confirm, app.store, app.sessions, token[:200])
    row = await run_in_threadpool(named, app.store, number) if number is not None else None
    if row is None:
        raise HTTPException(404, "this link has been used, has expired, or never was")
    return respond(request, "subscribe_confirm.html", words=_words(row), address=row.address, token="", done=True)


def _subscription(request: Request, token: str) -> Subscription:
    """The subscription of a link in a mail. Wrong ones are counted; a right one always holds, also beside someone who guesses."""
    app = request.app.state
    row = find(app.store, app.sessions, token[:200])
    if row is None:
        app.limits.take("token", client(request))
        raise HTTPException(404, "this link never was, or its subscription is gone")
    return row


def _own_page(request: Request, row: Subscription, token: str, *, changed: bool = False) -> Response:
    return respond(
        request, "unsubscribe.html", words=_words(row), token=token, frequency=row.frequency, done=row.state == "unsubscribed",
        changed=changed,
    )  # fmt: skip


@router.get("/unsubscribe/{token}")
def leaving(request: Request, token: str) -> Response:
    """The page of one digest: a button that ends it, and how often it comes. To look at it changes nothing."""
    return _own_page(request, _subscription(request, token), token)


@router.post("/unsubscribe/{token}")
async def leave(request: Request, token: str) -> Response:
    """End a subscription: from the page's button, or by a mail program's one click (RFC 8058), which sends no cookie and no form of ours.

    The token alone is enough: it ends this one subscription and shows nothing.
    """
    row = await run_in_threadpool(_subscription, request, token)
    await run_in_threadpool(unsubscribe, request.app.state.store, row.id)
    if "text/html" not in request.headers.get("accept", ""):
        return PlainTextResponse("unsubscribed\n")
    row.state = "unsubscribed"
    return _own_page(request, row, token)


@router.post("/unsubscribe/{token}/frequency")
async def how_often(request: Request, token: str) -> Response:
    """Change how often a digest comes."""
    form = await checked_form(request)
    row = await run_in_threadpool(_subscription, request, token)
    try:
        await run_in_threadpool(change, request.app.state.store, row.id, str(form.get("frequency") or ""))
    except ValueError as error:
        raise HTTPException(400, str(error)) from error
    row = await run_in_threadpool(_subscription, request, token)
    return _own_page(request, row, token, changed=True)

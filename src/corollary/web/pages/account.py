"""Signing in and out, in a lab."""

from __future__ import annotations

from urllib.parse import quote

from fastapi import APIRouter, Request
from sqlalchemy import select
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from corollary.web.digest.mailer import check_address, letter
from corollary.web.digest.outbox import put
from corollary.web.guard import checked_form, client, who
from corollary.web.pages.render import local, respond
from corollary.web.store import Reader

router = APIRouter(include_in_schema=False)


def _lab(request: Request) -> None:
    if not request.app.state.settings.lab:
        raise HTTPException(404, "there are no accounts here: you are the only reader")


@router.get("/sign-in")
def sign_in(request: Request, next: str = "/") -> Response:
    """Where a reader asks for a link."""
    _lab(request)
    return respond(request, "sign_in.html", next=local(next), sent=False, error="")


def _find(request: Request, address: str) -> tuple[int, str] | None:
    query = select(Reader.id, Reader.name).where(Reader.settings["address"].as_string() == address)
    with request.app.state.store.reading() as connection:
        row = connection.execute(query).first()
    return (row[0], row[1]) if row else None


def _mail_link(request: Request, address: str) -> None:
    """Put a link for a reader of this address into the outbox. Whoever asks learns nothing of whether there is one."""
    app = request.app.state
    found = _find(request, address)
    if found is None:
        return
    message = letter(app.mail.sender, address, "Your link to sign in to Corollary", "sign-in")
    message.set_content(
        f"Hello {found[1]},\n\nthis link signs you in, once, within a week:\n\n{app.sessions.link(found[0])}\n\n"
        "If you did not ask for it, leave it: nobody is signed in without it.\n"
    )
    with app.store.writing() as session:
        put(
            session,
            message,
            address,
            kind="sign-in",
            dedupe=str(message["Message-ID"]),
            message_id=str(message["Message-ID"]),
            subscription=None,
        )
    app.outbox.wake()


@router.post("/sign-in")
async def ask_for_link(request: Request) -> Response:
    """Mail a link, where the address is a reader's."""
    _lab(request)
    form = await checked_form(request)
    app = request.app.state
    address = str(form.get("address") or "").strip().lower()
    next = local(str(form.get("next") or "/"))
    if app.mail is None:
        raise HTTPException(404, "no mail is set up here; ask whoever keeps this server for a link")
    try:
        check_address(address)
    except ValueError:
        return respond(request, "sign_in.html", status=400, next=next, sent=False, error="That is no mail address.")
    app.limits.take("sign-in", client(request))
    app.limits.take("sign-in", address)
    await run_in_threadpool(_mail_link, request, address)
    return respond(request, "sign_in.html", next=next, sent=True, error="")


@router.get("/sign-in/{token}")
def confirm(request: Request, token: str, next: str = "/") -> Response:
    """A page with one button: a mail scanner that follows the link does not use it up."""
    _lab(request)
    return respond(
        request, "sign_in_confirm.html", token=token[:200], next=local(next), headers={"referrer-policy": "same-origin"}
    )


@router.post("/sign-in/{token}")
async def enter(request: Request, token: str) -> Response:
    """Use a link up."""
    _lab(request)
    form = await checked_form(request)
    app = request.app.state
    app.limits.take("token", client(request))
    found = await run_in_threadpool(app.sessions.enter, token)
    if found is None:
        raise HTTPException(403, "this link has been used, has expired, or never was; ask for a new one")
    answer = RedirectResponse(local(str(form.get("next") or "/")), 303)
    answer.headers["set-cookie"] = app.sessions.cookie(found)
    return answer


@router.post("/sign-out")
async def sign_out(request: Request) -> Response:
    """End all of the reader's sessions."""
    _lab(request)
    await checked_form(request)
    await run_in_threadpool(request.app.state.sessions.leave, who(request))
    return RedirectResponse("/", 303)


def sign_in_address(request: Request) -> str:
    """Where someone who must sign in first is sent."""
    wanted = request.url.path if request.method == "GET" else "/"
    return f"/sign-in?next={quote(wanted, safe='')}"

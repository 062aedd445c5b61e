"""Who asks, when a program does: a bearer token, or the cookie of a browser that is on our own pages."""

from __future__ import annotations

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from corollary.web.guard import Forbidden, NotSignedIn, client, who
from corollary.web.guard.sessions import same_site


async def reading(request: Request) -> None:
    """Let a request read: anyone on a laptop, and in a lab anyone unless it wants its readers to sign in.

    A token that is not ours is passed over where anyone may read: clients of Hugging Face send the one that they have for it.
    """
    # A thread costs as much as some answers; it is for those who have to be looked up in the store.
    if request.app.state.settings.lab or "authorization" in request.headers:
        await run_in_threadpool(_reading, request)


def _reading(request: Request) -> None:
    app = request.app.state
    known = _bearer(request)
    if app.settings.lab:
        app.limits.take("read", client(request))
        if not app.settings.open_reading and who(request).reader is None:
            if known is False:
                app.limits.take("token", client(request))
            raise NotSignedIn


def changing(request: Request) -> None:
    """Let a request change something: it must come from no other site's page, and from a reader."""
    app = request.app.state
    app.limits.take("write", client(request))
    known = _bearer(request)
    if known is False:
        app.limits.take("token", client(request))
        raise NotSignedIn
    if known is None and not same_site(request, app.settings):
        raise Forbidden("this request was sent from another site's page")
    if who(request).reader is None:
        raise NotSignedIn


def keeping(request: Request) -> None:
    """Let through who keeps the server: everything there is, other readers' notes and addresses too."""
    changing(request)
    if not who(request).admin:
        raise Forbidden("all readers' notes and addresses are in it; it is for whoever keeps this server")


def _bearer(request: Request) -> bool | None:
    """Take the token that a request carries: whether it is ours, None where there is none."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if not scheme:
        return None
    found = request.app.state.sessions.bearer(token.strip()) if scheme.lower() == "bearer" and token.strip() else None
    if found is None:
        return False
    request.state.who = found
    return True

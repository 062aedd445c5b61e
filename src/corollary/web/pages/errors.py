"""What is said when something is refused or goes wrong: a page to readers, JSON to programs."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from corollary.web.guard import Forbidden, NotSignedIn, TooMany
from corollary.web.pages.account import sign_in_address
from corollary.web.pages.render import respond, wants_fragment

_LOG = logging.getLogger("corollary.web")
_TITLES = {
    400: "That could not be read", 403: "Not allowed", 404: "Not found", 405: "Not possible", 413: "Too much", 414: "Too long",
    429: "Too many requests", 500: "Something went wrong", 503: "Not now",
}  # fmt: skip


def say(request: Request, status: int, words: str, headers: dict[str, str] | None = None) -> Response:
    """An error as whoever asks can read it."""
    if request.url.path.startswith("/api/"):
        return JSONResponse({"error": words}, status, headers)
    if wants_fragment(request):
        return PlainTextResponse(words, status, headers)
    return respond(request, "error.html", status=status, headers=headers, title=_TITLES.get(status, "Error"), words=words)


def install(app: FastAPI) -> None:
    """Put the handlers of all errors into an app."""

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        words = str(error.detail)
        if error.status_code == 404 and words == "Not Found":
            words = "there is nothing at this address"
        return say(request, error.status_code, words, dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        if request.url.path.startswith("/api/"):
            details = [{"where": [str(p) for p in e["loc"]], "what": e["msg"]} for e in error.errors()]
            return JSONResponse({"error": "the request does not fit the description", "details": details}, 422)
        return say(request, 404, "there is nothing at this address")

    @app.exception_handler(TooMany)
    async def too_many(request: Request, error: TooMany) -> Response:
        return say(request, 429, str(error), {"retry-after": str(error.seconds)})

    @app.exception_handler(Forbidden)
    async def forbidden(request: Request, error: Forbidden) -> Response:
        return say(request, 403, str(error))

    @app.exception_handler(NotSignedIn)
    async def not_signed_in(request: Request, error: NotSignedIn) -> Response:
        if request.url.path.startswith("/api/"):
            return JSONResponse(
                {"error": "sign in, or send 'Authorization: Bearer TOKEN'"}, 401, {"www-authenticate": "Bearer"}
            )
        address = sign_in_address(request)
        return (
            PlainTextResponse("", 200, {"hx-redirect": address}) if wants_fragment(request) else RedirectResponse(address, 303)
        )


class Broken:
    """Turns an exception that nobody foresaw into an answer, within the layer that puts headers on every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        started = False

        async def out(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, out)
        except Exception as error:
            if scope["type"] != "http" or started:
                raise
            # The address may hold a token, so the log names the route and not what was asked.
            route = getattr(scope.get("route"), "path", "?")
            _LOG.error("%s %s failed", scope["method"], route, exc_info=error)
            await say(Request(scope, receive), 500, "the server's log says more")(scope, receive, out)

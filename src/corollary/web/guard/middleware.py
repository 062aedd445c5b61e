"""One ASGI layer around the app: hosts, sizes and headers, the session, and pages kept until something changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from corollary.web.guard.kept import Kept, Pages
from corollary.web.guard.sessions import Sessions, Who
from corollary.web.settings import Settings

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
KEEP = "x-corollary-keep"  # a page that may be kept says so by this header, which goes no further


class Guard:
    """Wraps the app.

    Args:
        app: what answers.
        settings: hosts and sizes.
        sessions: who is asking.
        version: a text that is another after any change that a page could show; called for every request.
    """

    def __init__(self, app: ASGIApp, settings: Settings, sessions: Sessions, version: Callable[[], str]) -> None:
        self.app, self.settings, self.sessions, self.version = app, settings, sessions, version
        self._pages = Pages()
        self._seen = ""
        self._making: dict[tuple[Any, ...], asyncio.Future[Kept | None]] = {}
        fixed = {
            "content-security-policy": POLICY,
            "x-content-type-options": "nosniff",
            "x-frame-options": "DENY",
            # Forms need an Origin header, which browsers blank where no referrer is allowed.
            "referrer-policy": "same-origin",
            "permissions-policy": "camera=(), microphone=(), geolocation=(), interest-cohort=()",
            "cross-origin-opener-policy": "same-origin",
            "cross-origin-resource-policy": "same-origin",
        }
        if settings.https:
            fixed["strict-transport-security"] = "max-age=31536000"
        self._headers = [(name.encode(), value.encode()) for name, value in fixed.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if not self._known_host(headers.get("host", "")):
            await self._refuse(scope, receive, send, 421, "this name is not served here")
            return
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length) > self.settings.max_body:
            await self._refuse(scope, receive, send, 413, f"at most {self.settings.max_body:,} bytes are read")
            return
        static = scope["path"].startswith("/static/")
        who = Who("", None) if static else self.sessions.read(headers.get("cookie", ""))
        scope.setdefault("state", {})["who"] = who
        if scope["method"] == "GET" and not static and "authorization" not in headers:
            await self._page(scope, receive, send, who, headers)
        else:
            await self._pass(scope, receive, send, who)

    def _known_host(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        return name in self.settings.hosts

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, status: int, words: str) -> None:
        async def out(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self._headers, (b"connection", b"close")]
            await send(message)

        await PlainTextResponse(words + "\n", status)(scope, receive, out)

    def _counted(self, receive: Receive) -> Receive:
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self.settings.max_body:
                    raise HTTPException(413, f"at most {self.settings.max_body:,} bytes are read")
            return message

        return counted

    async def _pass(self, scope: Scope, receive: Receive, send: Send, who: Who) -> None:
        """Run the app and send what it says, with headers, cookie and the form's token."""
        html = False

        async def out(message: Message) -> None:
            nonlocal html
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=list(message["headers"]))
                if KEEP in headers:
                    del headers[KEEP]
                html = self._dress(headers, who)
                message = {**message, "headers": headers.raw}
            elif html and message.get("body"):
                message = {**message, "body": self._with_token(message["body"], who)}
            await send(message)

        await self.app(scope, self._counted(receive), out)

    def _dress(self, headers: MutableHeaders, who: Who) -> bool:
        """Put our headers on an answer; whether it is a page."""
        html = headers.get("content-type", "").startswith("text/html")
        headers.raw.extend((n, v) for n, v in self._headers if n.decode() not in headers)
        if "cache-control" not in headers:
            headers["cache-control"] = "private, no-cache"
        if html:
            headers.add_vary_header("Cookie, HX-Request")
            if who.fresh and "set-cookie" not in headers:
                headers.append("set-cookie", self.sessions.cookie(who))
        return html

    def _with_token(self, body: bytes, who: Who) -> bytes:
        # The mark is as long as a token: the length that the answer has told stays right.
        return body.replace(self.sessions.mark.encode(), self.sessions.csrf(who).encode())

    async def _page(self, scope: Scope, receive: Receive, send: Send, who: Who, headers: Headers) -> None:
        """Send a page that was kept, or let the app make it: once, however many ask for it meanwhile."""
        version = self.version()
        if self._seen != version:
            self._seen = version
            self._pages.clear()
            self._making = {}
        making = self._making
        key = (scope["path"], scope["query_string"], who.reader, headers.get("hx-request"), headers.get("host"))
        kept = self._pages.get(key)
        if kept is None and key in making:
            kept = await making[key]
            if kept is None:
                await self._pass(scope, receive, send, who)
                return
        elif kept is None:
            done = making[key] = asyncio.get_running_loop().create_future()
            try:
                kept = await self._make(scope, receive, send, who, done)
                if kept is not None and making is self._making:
                    self._pages.put(key, kept)
            finally:
                making.pop(key, None)
                if not done.done():
                    done.set_result(kept)
        if kept is not None:
            await self._send(kept, send, who)

    async def _make(
        self, scope: Scope, receive: Receive, send: Send, who: Who, done: asyncio.Future[Kept | None]
    ) -> Kept | None:
        """Run the app for one page. A page that may be kept is gathered and given back; any other goes out as it comes."""
        status, raw, parts = 0, list[tuple[bytes, bytes]](), list[bytes]()
        keep = html = False

        async def out(message: Message) -> None:
            nonlocal status, raw, keep, html
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=list(message["headers"]))
                keep = KEEP in headers
                if keep:
                    del headers[KEEP]
                    status, raw = message["status"], headers.raw
                    return
                if not done.done():
                    done.set_result(None)  # those who wait make their own
                html = self._dress(headers, who)
                message = {**message, "headers": headers.raw}
            elif keep:
                parts.append(message.get("body", b""))
                return
            elif html and message.get("body"):
                message = {**message, "body": self._with_token(message["body"], who)}
            await send(message)

        await self.app(scope, self._counted(receive), out)
        return Kept(status, raw, b"".join(parts)) if keep else None

    async def _send(self, kept: Kept, send: Send, who: Who) -> None:
        headers, body = MutableHeaders(raw=list(kept.headers)), kept.body
        if self._dress(headers, who):
            body = self._with_token(body, who)
        await send({"type": "http.response.start", "status": kept.status, "headers": headers.raw})
        await send({"type": "http.response.body", "body": body})

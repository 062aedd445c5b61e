"""Who is asking: a signed cookie, the tokens that prove a form is ours, and the links that sign a reader in.

A cookie holds a random name of the session, the reader's number and epoch, and the time, under a MAC with the store's secret.
Nothing is kept of a session but the reader's epoch: raising it ends all of that reader's sessions. A link for signing in holds
256 random bits, of which the store keeps the hash alone; it works once, and for a week at most.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from http.cookies import CookieError, SimpleCookie
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from starlette.datastructures import FormData
from starlette.requests import Request

from corollary.web.settings import Settings
from corollary.web.store import Meta, Reader, Store, now

OWN_READER = 1  # the laptop's own
_LASTS = 30 * 24 * 3600
LINK_LASTS = timedelta(days=7)
_MARK = secrets.token_hex(16)  # as long as a token


class Forbidden(Exception):
    """The request is refused; the message says why."""


class NotSignedIn(Exception):
    """Someone has to sign in first."""


@dataclass(frozen=True, slots=True)
class Who:
    """Who is asking. ``reader`` is None for someone who has not signed in; ``fresh`` says that a cookie is still to be set."""

    session: str
    reader: int | None
    name: str = ""
    may_run: bool = False
    admin: bool = False
    fresh: bool = False


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


class Sessions:
    """Signs and reads cookies and tokens for one store."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self.store, self.settings = store, settings
        self._key = self._secret()
        self._readers: tuple[str, dict[int, dict[str, Any] | None]] = ("", {})
        self._lock = threading.Lock()
        self._names: list[str] = []
        if not settings.lab:
            self._own()

    def _secret(self) -> bytes:
        with self.store.reading() as connection:
            found = connection.scalar(select(Meta.value).where(Meta.name == "secret"))
        if found is None:
            found = secrets.token_hex(32)
            try:
                with self.store.writing() as session:
                    session.add(Meta(name="secret", value=found))
            except IntegrityError:  # another process was quicker
                return self._secret()
        return bytes.fromhex(str(found))

    def _own(self) -> None:
        with self.store.reading() as connection:
            if connection.scalar(select(Reader.id).where(Reader.id == OWN_READER)) is not None:
                return
        try:
            with self.store.writing() as session:
                session.add(Reader(id=OWN_READER, name="reader"))
        except IntegrityError:
            return

    @property
    def cookie_name(self) -> str:
        """``__Host-`` binds a cookie to this host and to TLS, where there is TLS."""
        return "__Host-corollary" if self.settings.https else "corollary"

    def _sign(self, what: str, text: str) -> str:
        digest = hmac.new(self._key, f"{what}\0{text}".encode(), hashlib.sha256).digest()
        return base64.urlsafe_b64encode(digest[:24]).decode()

    def _facts(self, reader: int) -> dict[str, Any] | None:
        """A reader's name and rights, read anew after every write to the store."""
        version = self.store.version()
        with self._lock:
            if self._readers[0] != version:
                self._readers = (version, {})
            known = self._readers[1]
        if reader not in known:
            with self.store.reading() as connection:
                row = connection.execute(select(Reader.name, Reader.settings).where(Reader.id == reader)).first()
            known[reader] = None if row is None else {**row.settings, "name": row.name}
        return known[reader]

    def read(self, cookies: str) -> Who:
        """Who a Cookie header speaks for; a new session where it speaks for nobody."""
        jar: SimpleCookie = SimpleCookie()
        try:
            jar.load(cookies)
        except CookieError:
            jar.clear()
        value = jar[self.cookie_name].value if self.cookie_name in jar else ""
        text, _, mac = value.rpartition(".")
        parts = text.split(".")
        if len(parts) != 4 or not hmac.compare_digest(mac.encode(), self._sign("session", text).encode()):
            return self._stranger(self._new_name(), fresh=True)
        session, reader, epoch, issued = parts
        if int(issued) + _LASTS < time.time():
            return self._stranger(self._new_name(), fresh=True)
        facts = self._facts(int(reader)) if self.settings.lab and int(reader) else None
        if facts is None or int(facts.get("epoch", 0)) != int(epoch):
            return self._stranger(session)
        return Who(session, int(reader), facts["name"], bool(facts.get("may_run")), bool(facts.get("admin")))

    def _new_name(self) -> str:
        """A new session's name. Clients without cookies get one with every request, so the system is asked for many at once."""
        with self._lock:
            if not self._names:
                random = secrets.token_bytes(18 * 256)
                self._names = [base64.urlsafe_b64encode(random[i : i + 18]).decode() for i in range(0, len(random), 18)]
            return self._names.pop()

    def _stranger(self, session: str, fresh: bool = False) -> Who:
        if self.settings.lab:
            return Who(session, None, fresh=fresh)
        return Who(session, OWN_READER, may_run=True, admin=True, fresh=fresh)

    def bearer(self, token: str) -> Who | None:
        """The reader whose API token this is."""
        with self.store.reading() as connection:
            query = select(Reader.id).where(Reader.settings["api_hash"].as_string() == _hash(token))
            reader = connection.scalar(query)
        facts = self._facts(reader) if reader is not None else None
        if reader is None or facts is None:
            return None
        return Who("", reader, facts["name"], bool(facts.get("may_run")), bool(facts.get("admin")))

    def cookie(self, who: Who) -> str:
        """The Set-Cookie header of a session."""
        reader = who.reader if self.settings.lab and who.reader else 0
        epoch = int((self._facts(reader) or {}).get("epoch", 0)) if reader else 0
        text = f"{who.session}.{reader}.{epoch}.{int(time.time())}"
        secure = "; Secure" if self.settings.https else ""
        value = f"{text}.{self._sign('session', text)}"
        return f"{self.cookie_name}={value}; Path=/; HttpOnly; SameSite=Lax; Max-Age={_LASTS}{secure}"

    def feed_token(self, reader: int) -> str:
        """What lets a feed reader see a reader's list; signing out everywhere withdraws it."""
        text = f"{reader}.{int((self._facts(reader) or {}).get('epoch', 0))}"
        return f"{text}.{self._sign('feed', text)}"

    def reader_of_feed(self, token: str) -> int | None:
        """The reader of such a token; None for one that does not hold."""
        number = token.partition(".")[0]
        if not (number.isascii() and number.isdigit() and len(number) < 19) or self._facts(int(number)) is None:
            return None
        return int(number) if hmac.compare_digest(token.encode(), self.feed_token(int(number)).encode()) else None

    def unsubscribe_token(self, subscription: int) -> str:
        """What ends a subscription. It is derived, so that a digest can be written again to the letter, and kept by nobody."""
        return f"{subscription}.{self._sign('unsubscribe', str(subscription))}"

    def subscription_of(self, token: str) -> int | None:
        """The number of the subscription that a token ends; None for one that does not hold."""
        number = token.partition(".")[0]
        if not (number.isascii() and number.isdigit() and len(number) < 19):
            return None
        return int(number) if hmac.compare_digest(token.encode(), self.unsubscribe_token(int(number)).encode()) else None

    def csrf(self, who: Who) -> str:
        """The token that a form of this session carries."""
        return self._sign("csrf", who.session)

    @property
    def mark(self) -> str:
        """What stands in a page where the token goes: a kept page serves every session."""
        return _MARK

    def csrf_holds(self, who: Who, token: str) -> bool:
        """Whether a token is the session's."""
        return hmac.compare_digest(token.encode(), self.csrf(who).encode())

    def link(self, reader: int) -> str:
        """A new link that signs a reader in, once; the one before it no longer does."""
        token = secrets.token_urlsafe(32)
        with self.store.writing() as session:
            row = session.get_one(Reader, reader)
            row.token_hash = _hash(token)
            row.settings = {**row.settings, "token_expires": (now() + LINK_LASTS).timestamp()}
        return f"{self.settings.address}/sign-in/{token}"

    def enter(self, token: str) -> Who | None:
        """Use a link up: a new session of its reader, or None for a link that does not hold."""
        with self.store.writing() as session:
            row = session.scalar(select(Reader).where(Reader.token_hash == _hash(token)))
            if row is None or row.settings.get("token_expires", 0) < now().timestamp():
                return None
            row.token_hash = None
            reader, name, facts = row.id, row.name, dict(row.settings)
        return Who(secrets.token_urlsafe(18), reader, name, bool(facts.get("may_run")), bool(facts.get("admin")))

    def leave(self, who: Who) -> None:
        """End all sessions of a reader."""
        if who.reader is None or not self.settings.lab:
            return
        with self.store.writing() as session:
            row = session.get_one(Reader, who.reader)
            row.settings = {**row.settings, "epoch": int(row.settings.get("epoch", 0)) + 1}


def who(request: Request) -> Who:
    """Who is asking; `corollary.web.guard.middleware` has found it out."""
    found: Who = request.state.who
    return found


def client(request: Request) -> str:
    """The client's address; behind a proxy the server has already taken the one that the proxy names."""
    return request.client.host if request.client else "unknown"


def same_site(request: Request, settings: Settings) -> bool:
    """Whether the browser says that the request comes from our own pages; clients that are no browser say nothing."""
    origin = request.headers.get("origin")
    site = request.headers.get("sec-fetch-site")
    if site is not None and site not in ("same-origin", "none"):
        return False
    if origin is None:
        return True
    host = request.headers.get("host", "").lower()
    return origin.lower() in (settings.origin, f"http://{host}", f"https://{host}")


async def checked_form(request: Request) -> FormData:
    """The fields of a form that was sent from one of our own pages.

    Every page that changes something reads its form through this.

    Raises:
        Forbidden: where the token is missing or another session's, or the form stood on another site's page.
        TooMany: where the client changes too much too fast.
    """
    app = request.app.state
    app.limits.take("write", client(request))
    if not same_site(request, app.settings):
        raise Forbidden("this form was sent from another site's page")
    form = await request.form(max_files=0, max_fields=50, max_part_size=200_000)
    token = request.headers.get("x-csrf-token") or str(form.get("csrf") or "")
    if not app.sessions.csrf_holds(who(request), token):
        raise Forbidden("this form has gone stale, or cookies are off; load the page again and send it once more")
    return form

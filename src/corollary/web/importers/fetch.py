"""Fetching from the web: where it may go, how much it may bring, how often it may ask."""

from __future__ import annotations

import ipaddress
import random
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

MAX_BYTES = 64 * 2**20  # of one answer, unpacked
MAX_HOPS = 5
TRIES = 5
DEADLINE = 120.0  # seconds that one answer may take
_RETRY = frozenset({429, 500, 502, 503, 504})
_AGENT = "corollary-daily/0.1 (local paper catalogue)"


class FetchError(OSError):
    """Nothing came back; the message names the address and the reason, and never a query's value or a password."""

    def __str__(self) -> str:
        return str(self.args[0])


class Refused(FetchError):
    """An address that is not fetched from: of this machine, of a private network, of a cloud's metadata, or of another scheme."""


@dataclass(frozen=True)
class Fetched:
    """One answer: unpacked body, and what the server said of it. ``body`` is None where nothing has changed."""

    url: str
    body: bytes | None
    kind: str
    etag: str | None
    modified: str | None


def shown(url: httpx.URL | str) -> str:
    """An address as it may be written into a log: without password, query and fragment."""
    url = httpx.URL(url)
    port = f":{url.port}" if url.port else ""
    return f"{url.scheme}://{url.host}{port}{url.path}"[:300]


def _public(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return _public(str(inner))
    return ip.is_global and not ip.is_multicast


def resolve(url: httpx.URL, *, allow_private: bool) -> str:
    """The address to connect to, checked; raises Refused for one that is not public.

    The answer is what the connection is then made to, so that a name cannot resolve to one address here and another there.
    """
    if url.scheme not in ("http", "https") or not url.host:
        raise Refused(f"cannot fetch {shown(url)}: only http and https addresses are fetched")
    if url.userinfo:
        raise Refused(f"cannot fetch {shown(url)}: an address with a user name or password in it is not fetched")
    try:
        found = socket.getaddrinfo(url.host, url.port or (443 if url.scheme == "https" else 80), type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise FetchError(f"cannot fetch {shown(url)}: no such host") from error
    addresses = [str(info[4][0]).partition("%")[0] for info in found]
    if not allow_private and (bad := next((a for a in addresses if not _public(a)), None)):
        raise Refused(
            f"cannot fetch {shown(url)}: it is at {bad}, which is not a public address; --allow-private fetches from there too"
        )
    return addresses[0]


class Pace:
    """At most one request in ``seconds`` to one host, over all processes that share the folder."""

    def __init__(self, folder: Path, host: str, seconds: float) -> None:
        self._path = folder / f"pace-{''.join(c if c.isalnum() else '-' for c in host)}.txt"
        self._seconds = seconds

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the turn, and hold it while the request is under way."""
        with self._path.open("a+") as file:
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)
            except ModuleNotFoundError:  # not a POSIX system: one process at a time is the user's to see to
                pass
            file.seek(0)
            last = file.read().strip()
            wait = self._seconds - (time.time() - float(last)) if last else 0.0
            if wait > 0:
                time.sleep(min(wait, self._seconds))
            try:
                yield
            finally:
                file.seek(0)
                file.truncate()
                file.write(f"{time.time():.3f}")


@dataclass
class Fetcher:
    """Fetches, politely.

    Args:
        folder: where it is noted when a host was asked last.
        allow_private: whether addresses of this machine and of private networks may be fetched from.
        max_bytes: of one unpacked answer.
        intervals: seconds between two requests to a host; hosts without an entry take half a second.
        wait: how to wait before another try; a test may give a clock of its own.
    """

    folder: Path
    allow_private: bool = False
    max_bytes: int = MAX_BYTES
    intervals: dict[str, float] = field(default_factory=dict)
    wait: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        self.intervals = {"export.arxiv.org": 3.0, "arxiv.org": 3.0, "rss.arxiv.org": 3.0, **self.intervals}
        self._client = httpx.Client(timeout=httpx.Timeout(20.0), follow_redirects=False, headers={"User-Agent": _AGENT})

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def get(self, address: str, *, etag: str | None = None, modified: str | None = None) -> Fetched:
        """Fetch one address.

        Follows up to 5 redirects, each checked as the first; tries again after a fault of the server or the way, with growing
        waits, or those that the server asks for.

        Raises:
            Refused: for an address that is not fetched from, and for a redirect to one.
            FetchError: where nothing came, or too much.
        """
        try:
            url = httpx.URL(address)
        except httpx.InvalidURL as error:
            raise FetchError(f"not an address: {address[:100]!r}") from error
        headers = {"Accept-Encoding": "gzip, deflate"}
        if etag:
            headers["If-None-Match"] = etag
        if modified:
            headers["If-Modified-Since"] = modified
        for hop in range(MAX_HOPS + 1):
            answer = self._try(url, headers)
            if isinstance(answer, Fetched):
                return answer
            if hop == MAX_HOPS:
                break
            url = answer
        raise FetchError(f"cannot fetch {shown(address)}: more than {MAX_HOPS} redirects")

    def _try(self, url: httpx.URL, headers: dict[str, str]) -> Fetched | httpx.URL:
        reason = ""
        for number in range(TRIES):
            pause = 0.0
            try:
                with Pace(self.folder, url.host, self.intervals.get(url.host, 0.5 if not self.allow_private else 0.0)).turn():
                    return self._once(url, headers)
            except _Again as error:
                reason, pause = error.reason, error.pause
            except httpx.HTTPError as error:
                reason = str(error) or type(error).__name__
            if number < TRIES - 1:
                self.wait(max(min(pause, 300.0), 2.0**number * (0.5 + random.random())))
        raise FetchError(f"cannot fetch {shown(url)}: {reason} ({TRIES} tries)")

    def _once(self, url: httpx.URL, headers: dict[str, str]) -> Fetched | httpx.URL:
        ip = resolve(url, allow_private=self.allow_private)
        host = url.netloc.decode("ascii")
        target = url.copy_with(host=f"[{ip}]" if ":" in ip else ip)
        request = self._client.build_request(
            "GET", target, headers={**headers, "Host": host}, extensions={"sni_hostname": url.host}
        )
        started = time.monotonic()
        response = self._client.send(request, stream=True)
        try:
            status = response.status_code
            if status in (301, 302, 303, 307, 308) and "location" in response.headers:
                try:
                    return url.join(response.headers["location"])
                except httpx.InvalidURL as error:
                    raise FetchError(f"cannot fetch {shown(url)}: it redirects to no address") from error
            if status == 304:
                return Fetched(str(url), None, "", headers.get("If-None-Match"), headers.get("If-Modified-Since"))
            if status in _RETRY:
                raise _Again(f"the server answers {status}", _seconds(response.headers.get("retry-after", "")))
            if status != 200:
                raise FetchError(f"cannot fetch {shown(url)}: the server answers {status}")
            body = b"".join(self._body(url, response, started))
        finally:
            response.close()
        get = response.headers.get
        return Fetched(
            str(url), body, get("content-type", "").partition(";")[0].strip().lower(), get("etag"), get("last-modified")
        )

    def _body(self, url: httpx.URL, response: httpx.Response, started: float) -> Iterator[bytes]:
        length = response.headers.get("content-length", "")
        if length.isdigit() and int(length) > self.max_bytes:
            raise FetchError(f"cannot fetch {shown(url)}: {length} bytes; at most {self.max_bytes} are taken")
        packing = response.headers.get("content-encoding", "identity").strip().lower()
        if packing not in ("identity", "", "gzip", "x-gzip", "deflate"):
            raise FetchError(f"cannot fetch {shown(url)}: packed as '{packing[:40]}', which was not asked for")
        unpack: Any = None if packing in ("identity", "") else zlib.decompressobj(15 + 32)
        size = 0
        for chunk in response.iter_raw(65_536):
            if time.monotonic() - started > DEADLINE:
                raise FetchError(f"cannot fetch {shown(url)}: not done after {DEADLINE:.0f} s")
            while chunk:
                try:
                    # Never more at once than may still come: a bomb is stopped before it is in memory.
                    out = chunk if unpack is None else unpack.decompress(chunk, self.max_bytes - size + 1)
                except zlib.error as error:
                    raise FetchError(f"cannot fetch {shown(url)}: the packed answer is damaged") from error
                size += len(out)
                if size > self.max_bytes:
                    raise FetchError(f"cannot fetch {shown(url)}: more than {self.max_bytes} bytes")
                yield out
                chunk = b"" if unpack is None else unpack.unconsumed_tail
        if unpack is not None and not unpack.eof:
            raise _Again("the answer broke off", 0.0)


class _Again(Exception):
    def __init__(self, reason: str, pause: float) -> None:
        super().__init__(reason)
        self.reason, self.pause = reason, pause


def _seconds(text: str) -> float:
    """What ``Retry-After`` asks for, in seconds."""
    from email.utils import parsedate_to_datetime

    if text.strip().isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time()) if text else 0.0
    except (ValueError, TypeError):
        return 0.0

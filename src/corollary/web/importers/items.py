"""One paper as a source gives it, checked and made plain."""

from __future__ import annotations

import hashlib
import html
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from corollary.web.store.papers import arxiv_id as arxiv_id

MAX_ITEM = 1_000_000  # letters of one item as it came
_LIMITS = {"title": 2000, "abstract": 50_000, "summary": 20_000, "comment": 5000, "venue": 1000, "organization": 500}
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_TAG = re.compile(r"<[^<>]*>")
_CODE = re.compile(
    r"https?://(?:www\.)?(?:github|gitlab)\.com/[\w.-]+/[\w.-]+|https?://(?:www\.)?bitbucket\.org/[\w.-]+/[\w.-]+"
)


class BadItem(ValueError):
    """No paper can be made of this; the message says which field, what stood there and what may."""


@dataclass(slots=True)
class Item:
    """A paper before it goes into the store; the fields are those of `corollary.web.store.schema.Paper`.

    ``listed`` says that ``day`` is the day of a daily list and not only the day of publication.
    """

    key: str
    title: str
    day: date
    source: str
    slug: str | None = None
    arxiv: str | None = None
    version: int | None = None
    doi: str | None = None
    authors: tuple[str, ...] = ()
    abstract: str = ""
    summary: str = ""
    keywords: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    published: datetime | None = None
    updated: datetime | None = None
    imported_votes: int | None = None
    url: str | None = None
    code: str | None = None
    code_added_by: str | None = None
    organization: str | None = None
    comment: str | None = None
    venue: str | None = None
    links: list[dict[str, Any]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    listed: bool = False


@dataclass(frozen=True, slots=True)
class Raw:
    """An item on its way: where it stood in its source, how it came, and the paper or the reason why it is none."""

    position: str
    text: str
    item: Item | None
    reason: str = ""


def words(value: object, name: str, *, markup: bool = False) -> str:
    """A text in one line, without control characters, NFC; '' for None.

    Args:
        value: what the source gave.
        name: the field, for the message and its greatest length.
        markup: whether tags and entities are to be taken out (feeds).
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadItem(f"{name} must be a text, not {type(value).__name__}")
    if markup:
        value = html.unescape(_TAG.sub(" ", html.unescape(value)))
    text = " ".join(_CONTROL.sub("", unicodedata.normalize("NFC", value)).split())
    limit = _LIMITS.get(name, 2000)
    if len(text) > limit:
        raise BadItem(f"{name} has {len(text)} letters; at most {limit} are taken")
    return text


def names(value: object, name: str) -> tuple[str, ...]:
    """A list of short texts, each once, in their order; objects give their ``name``; a text is split at ';' or ' and '."""
    if value is None:
        return ()
    if isinstance(value, str):
        value = re.split(r"\s*;\s*|\s+and\s+", value) if re.search(r";|\sand\s", value) else [value]
    if not isinstance(value, Iterable):
        raise BadItem(f"{name} must be a list, not {type(value).__name__}")
    found: dict[str, None] = {}
    for part in value:
        said = part.get("name") if isinstance(part, dict) else part
        if said is not None and (text := words(said, name)):
            found[text] = None
    if len(found) > 5000:
        raise BadItem(f"{name} has {len(found)} entries; at most 5000 are taken")
    return tuple(found)


def moment(value: object, name: str) -> datetime | None:
    """A time in any of the usual spellings (ISO 8601, RFC 2822, a date, a year), in UTC; None for None and ''."""
    if value is None or value == "":
        return None
    if isinstance(value, int) and not isinstance(value, bool) and 1000 <= value <= 9999:
        value = str(value)
    if not isinstance(value, str):
        raise BadItem(f"{name} must be a time as text, not {type(value).__name__}")
    text = value.strip()
    try:
        if re.fullmatch(r"\d{4}", text):
            found = datetime(int(text), 1, 1, tzinfo=UTC)
        elif re.fullmatch(r"\d{4}-\d{2}", text):
            found = datetime.fromisoformat(f"{text}-01")
        elif re.match(r"\d{4}-\d{2}-\d{2}", text):
            found = datetime.fromisoformat(text)
        else:
            found = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError) as error:
        raise BadItem(f"{name} is no time: {text[:60]!r}; wanted as 2024-10-02T17:58:46Z") from error
    found = found.replace(tzinfo=UTC) if found.tzinfo is None else found
    try:
        found = found.astimezone(UTC)
    except OverflowError as error:
        raise BadItem(f"{name} is out of range: {text[:60]!r}") from error
    # A time to come is a slip of the source; a day's grace covers zones.
    if found.year < 1900 or found > datetime.now(UTC) + timedelta(days=366):
        raise BadItem(f"{name} is {found.date()}; wanted from 1900 to at most a year from now")
    return found


def count(value: object, name: str) -> int | None:
    """A whole number from 0 to a thousand million; None for None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadItem(f"{name} must be a whole number, not {value!r:.40}")
    if not 0 <= value <= 1_000_000_000:
        raise BadItem(f"{name} must be from 0 to 1000000000, not {value!r:.40}")
    return value


def web_address(value: object, name: str) -> str | None:
    """An http or https address; None for None and ''. Other schemes (``javascript:``, ``data:``) are refused."""
    text = words(value, name)
    if not text:
        return None
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise BadItem(f"{name} is no address: {text[:80]!r}") from error
    if parts.scheme.lower() not in ("http", "https") or not parts.netloc or " " in text:
        raise BadItem(f"{name} must be an http or https address, not {text[:80]!r}")
    return urlunsplit((parts.scheme.lower(), parts.netloc.lower(), parts.path, parts.query, parts.fragment))


def code_in(text: str) -> str | None:
    """The first address of a code repository in a text."""
    match = _CODE.search(text)
    return match[0].rstrip(".") if match else None


def doi_of(value: object) -> str | None:
    """A DOI, lower case and bare; None for None and ''."""
    text = words(value, "doi")
    if not text:
        return None
    match = re.fullmatch(r"(?:https?://(?:dx\.)?doi\.org/|doi:\s*)?(10\.\d{4,9}/\S+)", text, re.IGNORECASE)
    if match is None or len(match[1]) > 280:
        raise BadItem(f"doi must be like 10.1000/182, not {text[:80]!r}")
    return match[1].lower()


def make_key(*, arxiv: str | None, doi: str | None, url: str | None, title: str, authors: tuple[str, ...]) -> str:
    """The public name of a paper, by the best that is known of it."""
    if arxiv:
        return arxiv
    if doi:
        return f"doi:{doi}"
    if url and len(url) <= 480:
        parts = urlsplit(url)
        return f"url:{urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip('/'), parts.query, ''))}"
    said = re.sub(r"\W+", " ", f"{title} {authors[0] if authors else ''}".lower()).strip()
    return f"title:{hashlib.sha256(said.encode()).hexdigest()[:24]}"


def finish(item: Item) -> Item:
    """Check what every paper must have."""
    if not item.title:
        raise BadItem("title is missing")
    return item

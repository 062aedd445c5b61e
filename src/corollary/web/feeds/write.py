"""A feed in each of the three formats, from the same entries."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any
from xml.etree import ElementTree as ET

ATOM = "http://www.w3.org/2005/Atom"
DC = "http://purl.org/dc/elements/1.1/"
_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
KINDS = {"atom": "application/atom+xml", "rss": "application/rss+xml", "json": "application/feed+json"}


@dataclass(frozen=True)
class Entry:
    """One entry: ``id`` stays the same for good, ``text`` is plain."""

    id: str
    url: str
    title: str
    text: str
    published: datetime
    updated: datetime
    authors: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Feed:
    """A feed: its own address, the page that shows the same, and what it holds, newest or best first."""

    title: str
    address: str
    page: str
    entries: Sequence[Entry]


def _clean(text: str) -> str:
    """Without the letters that XML cannot hold."""
    return _NOT_XML.sub("\ufffd", text)


def _add(parent: ET.Element, name: str, text: str | None = None, **attributes: str) -> ET.Element:
    element = ET.SubElement(parent, name, {key: _clean(value) for key, value in attributes.items()})
    if text is not None:
        element.text = _clean(text)
    return element


def _moment(feed: Feed) -> datetime:
    return max((entry.updated for entry in feed.entries), default=datetime(1970, 1, 1, tzinfo=UTC))


def _bytes(root: ET.Element) -> bytes:
    return bytes(ET.tostring(root, encoding="utf-8", xml_declaration=True))


def atom(feed: Feed) -> bytes:
    """As Atom (RFC 4287)."""
    ET.register_namespace("", ATOM)
    root = ET.Element(f"{{{ATOM}}}feed")

    def put(parent: ET.Element, name: str, text: str | None = None, **attributes: str) -> ET.Element:
        return _add(parent, f"{{{ATOM}}}{name}", text, **attributes)

    put(root, "id", feed.address)
    put(root, "title", feed.title)
    put(root, "updated", _moment(feed).isoformat())
    put(root, "link", rel="self", type=KINDS["atom"], href=feed.address)
    put(root, "link", rel="alternate", type="text/html", href=feed.page)
    put(put(root, "author"), "name", "Corollary")
    for entry in feed.entries:
        one = put(root, "entry")
        put(one, "id", entry.id)
        put(one, "title", entry.title)
        put(one, "link", rel="alternate", type="text/html", href=entry.url)
        put(one, "published", entry.published.isoformat())
        put(one, "updated", entry.updated.isoformat())
        for name in entry.authors:
            put(put(one, "author"), "name", name)
        for tag in entry.tags:
            put(one, "category", term=tag)
        put(one, "summary", entry.text, type="text")
    return _bytes(root)


def rss(feed: Feed) -> bytes:
    """As RSS 2.0."""
    ET.register_namespace("atom", ATOM)
    ET.register_namespace("dc", DC)
    root = ET.Element("rss", {"version": "2.0"})
    channel = _add(root, "channel")
    _add(channel, "title", feed.title)
    _add(channel, "link", feed.page)
    _add(channel, "description", feed.title)
    _add(channel, "lastBuildDate", format_datetime(_moment(feed)))
    _add(channel, f"{{{ATOM}}}link", rel="self", type=KINDS["rss"], href=feed.address)
    for entry in feed.entries:
        item = _add(channel, "item")
        _add(item, "title", entry.title)
        _add(item, "link", entry.url)
        _add(item, "guid", entry.id, isPermaLink="false")
        _add(item, "pubDate", format_datetime(entry.published))
        for name in entry.authors:
            _add(item, f"{{{DC}}}creator", name)
        for tag in entry.tags:
            _add(item, "category", tag)
        _add(item, "description", entry.text)
    return _bytes(root)


def json_feed(feed: Feed) -> dict[str, Any]:
    """As JSON Feed 1.1."""
    return {
        "version": "https://jsonfeed.org/version/1.1",
        "title": feed.title,
        "home_page_url": feed.page,
        "feed_url": feed.address,
        "items": [
            {
                "id": entry.id,
                "url": entry.url,
                "title": entry.title,
                "content_text": entry.text,
                "date_published": entry.published.isoformat(),
                "date_modified": entry.updated.isoformat(),
                "authors": [{"name": name} for name in entry.authors],
                "tags": list(entry.tags),
            }
            for entry in feed.entries
        ],
    }

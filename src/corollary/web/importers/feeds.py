"""RSS and Atom feeds, as they are found: broken ones too."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from corollary.web.importers.arxiv import BadAnswer
from corollary.web.importers.items import (
    BadItem,
    Item,
    Raw,
    arxiv_id,
    code_in,
    finish,
    make_key,
    moment,
    names,
    web_address,
    words,
)  # fmt: skip

_ENTITY = re.compile(rb"<!ENTITY", re.IGNORECASE)


def _time(entry: Any, name: str) -> datetime | None:
    value = entry.get(f"{name}_parsed")
    if value is None:
        return moment(entry.get(name), name)
    try:
        return moment(
            f"{value[0]:04d}-{value[1]:02d}-{value[2]:02d}T{value[3]:02d}:{value[4]:02d}:{min(value[5], 59):02d}Z", name
        )
    except ValueError as error:
        raise BadItem(f"{name} is no time: {str(entry.get(name))[:60]!r}") from error


def read_entry(entry: Any) -> Item:
    """One entry of a feed. Markup in title and text is taken out; the arXiv id is looked for in link and id."""
    title = words(entry.get("title"), "title", markup=True)
    title = re.sub(r"\s*\(arXiv:[^()]*\)\s*$", "", title)  # as arXiv's old feeds end their titles
    address = entry.get("link") or None
    found = None
    for said in (address, entry.get("id")):
        if isinstance(said, str) and found is None:
            found = arxiv_id(re.sub(r"^oai:arXiv\.org:", "", said))
    arxiv, version = found or (None, None)
    text = entry.get("summary")
    if not text and entry.get("content"):
        text = entry["content"][0].get("value")
    abstract = words(text, "abstract", markup=True)
    abstract = re.sub(r"^arXiv:\S+\s+Announce Type:\s*\S+\s+(?:Abstract:\s*)?", "", abstract)
    people = [author.get("name", "") for author in entry.get("authors") or () if isinstance(author, dict)]
    authors = names([part for name in people for part in re.split(r"\s*,\s*|\s+and\s+", name)], "authors")
    published, updated = _time(entry, "published"), _time(entry, "updated")
    tags = [tag.get("term") for tag in entry.get("tags") or () if isinstance(tag, dict)]
    url = web_address(address, "link")
    when = published or updated
    categories = names(tags, "categories")
    return finish(
        Item(
            key=make_key(arxiv=arxiv, doi=None, url=url, title=title, authors=authors),
            title=title,
            day=(when or datetime.now(UTC)).date(),
            source="feed",
            arxiv=arxiv,
            version=version,
            authors=authors,
            abstract=abstract,
            categories=categories if arxiv else (),
            keywords=() if arxiv else categories,
            published=published,
            updated=updated,
            url=url,
            code=(code := code_in(abstract)),
            code_added_by="authors" if code else None,
        )
    )


def read(body: bytes) -> Iterator[Raw]:
    """The entries of a feed; raises BadAnswer where it is none."""
    import feedparser

    if _ENTITY.search(body[:65_536]):
        raise BadAnswer("the feed declares entities, which are not read")
    parsed = feedparser.parse(body, sanitize_html=True, resolve_relative_uris=False)
    if not parsed.get("version") and not parsed.entries:
        reason = str(parsed.get("bozo_exception", "no feed in it"))
        raise BadAnswer(f"not readable as RSS or Atom: {reason[:200]}")
    for place, entry in enumerate(parsed.entries):
        text = json.dumps({key: value for key, value in entry.items() if isinstance(value, str)}, ensure_ascii=False)
        try:
            yield Raw(f"entry {place}", text, read_entry(entry))
        except BadItem as error:
            yield Raw(f"entry {place}", text, None, str(error))

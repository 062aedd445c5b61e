"""Atom as the arXiv API gives it (``export.arxiv.org/api/query``), with its errors that come as entries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import Element, ParseError, tostring

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from corollary.web.importers.items import (
    BadItem,
    Item,
    Raw,
    arxiv_id,
    code_in,
    doi_of,
    finish,
    make_key,
    moment,
    web_address,
    words,
)

ATOM = "{http://www.w3.org/2005/Atom}"
ARXIV = "{http://arxiv.org/schemas/atom}"
SEARCH = "{http://a9.com/-/spec/opensearch/1.1/}"


class BadAnswer(ValueError):
    """A whole answer cannot be read; the message says why."""


@dataclass(frozen=True)
class Answer:
    """One page of the API: its items, the number of all that match, and where this page starts."""

    items: list[Raw]
    total: int
    start: int


def parse_xml(body: bytes) -> Element:
    """The root of an XML text, without external entities, entity bombs or DTDs that declare any."""
    try:
        root: Element = fromstring(body, forbid_dtd=False, forbid_entities=True, forbid_external=True)
    except (ParseError, DefusedXmlException, ValueError, LookupError) as error:
        raise BadAnswer(f"not readable as XML: {error}") from error
    return root


def _text(entry: Element, name: str) -> str | None:
    found = entry.find(name)
    return None if found is None else "".join(found.itertext())


def read_entry(entry: Element) -> Item:
    """One ``entry``; raises BadItem for an error that the API sends as an entry, and for one without id or title."""
    address = words(_text(entry, f"{ATOM}id"), "id")
    title = words(_text(entry, f"{ATOM}title"), "title")
    if "/api/errors" in address or (title == "Error" and arxiv_id(address) is None):
        raise BadItem(f"the API answers with an error: {words(_text(entry, f'{ATOM}summary'), 'abstract')[:500]}")
    found = arxiv_id(address)
    if found is None:
        raise BadItem(f"id must be an arXiv address, not {address[:80]!r}")
    arxiv, version = found
    authors, places = [], []
    for author in entry.findall(f"{ATOM}author"):
        if name := words(_text(author, f"{ATOM}name"), "authors"):
            authors.append(name)
            places += [words(place.text, "affiliation") for place in author.findall(f"{ARXIV}affiliation")]
    primary = entry.find(f"{ARXIV}primary_category")
    terms = [] if primary is None else [words(primary.get("term"), "category")]
    terms += [words(category.get("term"), "category") for category in entry.findall(f"{ATOM}category")]
    comment = words(_text(entry, f"{ARXIV}comment"), "comment")
    abstract = words(_text(entry, f"{ATOM}summary"), "abstract")
    published = moment(_text(entry, f"{ATOM}published"), "published")
    updated = moment(_text(entry, f"{ATOM}updated"), "updated")
    when = published or updated
    if when is None:
        raise BadItem("published is missing")
    links: list[dict[str, Any]] = [
        {"url": href, "kind": link.get("title"), "added_by": "arXiv"}
        for link in entry.findall(f"{ATOM}link")
        if (link.get("title") or "") in ("pdf", "doi") and (href := web_address(link.get("href"), "link"))
    ]
    code = code_in(comment) or code_in(abstract)
    extra: dict[str, Any] = {"places": [place for place in places if place]} if any(places) else {}
    return finish(
        Item(
            key=make_key(arxiv=arxiv, doi=None, url=None, title=title, authors=()),
            title=title,
            day=when.date(),
            source="arxiv",
            arxiv=arxiv,
            version=version,
            doi=doi_of(_text(entry, f"{ARXIV}doi")),
            authors=tuple(dict.fromkeys(authors)),
            abstract=abstract,
            categories=tuple(dict.fromkeys(term for term in terms if term)),
            published=published,
            updated=updated,
            url=f"https://arxiv.org/abs/{arxiv}",
            code=code,
            code_added_by="authors" if code else None,
            comment=comment or None,
            venue=words(_text(entry, f"{ARXIV}journal_ref"), "venue") or None,
            links=links,
            extra={"arxiv": extra} if extra else {},
        )
    )


def read(body: bytes) -> Answer:
    """One answer of the API; raises BadAnswer where it is no Atom feed."""
    root = parse_xml(body)
    if root.tag != f"{ATOM}feed":
        raise BadAnswer(f"not an Atom feed: its root is '{root.tag[:80]}'")

    def number(name: str) -> int:
        text = (_text(root, f"{SEARCH}{name}") or "").strip()
        return int(text) if text.isascii() and text.isdigit() else 0

    start = number("startIndex")
    return Answer(list(_raws(root, start)), number("totalResults"), start)


def _raws(root: Element, start: int) -> Iterator[Raw]:
    for place, entry in enumerate(root.findall(f"{ATOM}entry"), start):
        text = tostring(entry, encoding="unicode")
        try:
            yield Raw(f"entry {place}", text, read_entry(entry))
        except BadItem as error:
            yield Raw(f"entry {place}", text, None, str(error))

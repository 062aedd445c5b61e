"""The first issue: the papers that come with the package, facts and our own summaries; no abstract is among them."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib.resources import files
from typing import Any

from sqlalchemy import select

from corollary.claims.record import Paper, catalogue
from corollary.web.importers.items import Item, Raw, make_key, moment
from corollary.web.importers.write import Counts, end_run, start_run, write_batch
from corollary.web.store import Meta, Store

SOURCE = "first-issue"


@cache
def entries() -> tuple[dict[str, Any], ...]:
    """The file as it stands: one object to each paper. ``date`` is a day or a month, as far
    as it is known; ``partial_authors`` says that there are more authors than those named."""
    text = (files("corollary.web") / "data" / "first_issue.jsonl").read_text(encoding="utf-8")
    return tuple(json.loads(line) for line in text.splitlines())


def _with_record(entry: dict[str, Any], record: Paper | None) -> dict[str, Any]:
    """Facts of a paper's record stand above those of the file: they were looked up by who implemented it."""
    if record is None:
        return entry
    facts = {"title": record.title, "authors": list(record.authors), "arxiv": record.arxiv, "date": record.date or str(record.year),
             "venue": record.venue, "code": record.code, "url": record.url,
             "components": [component.object.rpartition(".")[2] for component in record.components]}  # fmt: skip
    known = {name: value for name, value in entry.items() if name != "partial_authors" or not record.authors}
    return {**known, **{name: value for name, value in facts.items() if value}}


def _item(entry: dict[str, Any]) -> Item:
    published = moment(entry.get("date") or str(entry["year"]), "date")
    assert published is not None
    authors, arxiv = tuple(entry["authors"]), entry.get("arxiv") or None
    url = entry.get("url") or (f"https://arxiv.org/abs/{arxiv}" if arxiv else None)
    code = entry.get("code") or None
    exact = len(entry.get("date", "")) == 10
    return Item(
        key=make_key(arxiv=arxiv, doi=None, url=url, title=entry["title"], authors=authors), title=entry["title"],
        day=published.date(), source=SOURCE, slug=entry["slug"], arxiv=arxiv, authors=authors, summary=entry["summary"],
        keywords=(entry["package"], *entry.get("components", ())), published=published if exact else None, url=url, code=code,
        code_added_by="corollary" if code else None, venue=entry.get("venue") or None,
        extra={SOURCE: {**({"partial_authors": True} if entry.get("partial_authors") else {}), "date": entry.get("date") or str(entry["year"])}},
    )  # fmt: skip


def items() -> list[Item]:
    """The papers of the first issue."""
    records = catalogue()
    found = [_item(_with_record(entry, records.get(entry["slug"]))) for entry in entries()]
    own = {entry["slug"] for entry in entries()}
    for slug, record in records.items():
        if slug not in own:  # a record that came later, or is of the reader's own collection
            facts = {"slug": slug, "package": record.package, "summary": " ".join(record.summary.split()), "year": record.year,
                     "title": record.title, "authors": list(record.authors)}  # fmt: skip
            found.append(_item(_with_record(facts, record)))
    return found


def first_issue(store: Store) -> Counts:
    """Put the first issue in, or bring it up to date; nothing is written when it has not changed since."""
    counts = Counts()
    found = items()
    digest = hashlib.sha256("\n".join(repr(item) for item in found).encode()).hexdigest()
    with store.reading() as connection:
        if connection.scalar(select(Meta.value).where(Meta.name == SOURCE)) == digest:
            counts.unchanged = len(found)
            return counts
    run, _ = start_run(store, SOURCE)
    write_batch(store, run, [Raw(item.slug or "", "", item) for item in found], counts, {})
    end_run(store, run)
    with store.writing() as session:
        session.merge(Meta(name=SOURCE, value=digest))
    return counts

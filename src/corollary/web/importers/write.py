"""Putting papers into the store: new ones in, known ones brought up to date, twice the same as once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from corollary.web.importers.items import Item, Raw
from corollary.web.store import ImportRun, Note, Paper, ReadingItem, RejectedItem, Store, Vote, now

BATCH = 2000
_KEPT = 65_536  # letters kept of an item that was set aside
_FACTS = (
    "title", "authors", "abstract", "categories", "comment", "venue", "doi", "published", "updated", "version", "url", "organization",
)  # fmt: skip
_FIELDS = (
    "key", "slug", "arxiv", "version", "doi", "title", "authors", "abstract", "summary", "keywords", "categories", "day",
    "published", "updated", "imported_votes", "url", "code", "code_added_by", "organization", "comment", "venue", "links", "source",
    "extra",
)  # fmt: skip
_COLUMNS = [Paper.id, *(getattr(Paper, name) for name in _FIELDS)]


@dataclass
class Counts:
    """What an import did."""

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    rejected: int = 0


def _newer(old: dict[str, Any], item: Item) -> bool:
    """Whether what the item says outweighs what stands there: a later version, a later update, or neither known."""
    if item.version and old["version"] and item.version != old["version"]:
        return bool(item.version > old["version"])
    if item.updated and old["updated"] and item.updated != old["updated"]:
        return bool(item.updated > old["updated"])
    return bool(item.source == old["source"] or old["source"] == "first-issue")


def merge(old: dict[str, Any], item: Item) -> dict[str, Any]:
    """A known paper with what an item adds to it.

    What is empty is filled. Facts of a newer version take the place of older ones. Votes never fall. The day of a daily list
    outweighs the day of publication, and the earlier of two lists stands. Keywords and links are joined. Code that another source
    names differently becomes a link. The result does not depend on how often the same item comes.
    """
    new = dict(old)
    newer = _newer(old, item)
    for name in _FACTS:
        value = getattr(item, name)
        if value and (newer or not old[name]):
            new[name] = value
    for name in ("slug", "arxiv", "summary"):
        new[name] = old[name] or getattr(item, name)
    if item.source == "first-issue" and item.summary:
        new["summary"] = item.summary
    if item.arxiv and old["key"].partition(":")[0] in ("doi", "url", "title"):
        new["key"] = item.arxiv
    if item.imported_votes is not None:
        new["imported_votes"] = max(item.imported_votes, old["imported_votes"] or 0)
    listed = bool(old["extra"].get("listed"))
    if item.listed:
        new["day"] = min(item.day, old["day"]) if listed else item.day
    elif not listed and item.day < old["day"]:
        new["day"] = item.day  # two dates of publication: the earlier is the paper's
    new["keywords"] = tuple(dict.fromkeys([*old["keywords"], *item.keywords]))
    links = {link["url"]: link for link in [*old["links"], *item.links]}
    if not old["code"]:
        new["code"], new["code_added_by"] = item.code, item.code_added_by
    elif item.code and item.code != old["code"]:
        links.setdefault(item.code, {"url": item.code, "kind": "code", "added_by": item.code_added_by or item.source})
    new["links"] = list(links.values())
    extra = dict(old["extra"])
    for name, value in item.extra.items():
        if name not in extra or newer or name == item.source:
            extra[name] = value
    new["extra"] = extra
    return new


def _known(session: Session, items: list[Item]) -> dict[str, dict[str, Any]]:
    """The rows that items are about, under the key of each item; items about one row share one dictionary."""
    found: dict[str, dict[str, Any]] = {}
    by_id: dict[int, dict[str, Any]] = {}
    by_key = {item.key: [item] for item in items}
    by_doi: dict[str, list[Item]] = {}
    by_slug = {item.slug: [item] for item in items if item.slug}
    for item in items:
        if item.doi:
            by_doi.setdefault(item.doi, []).append(item)
    for column, names in ((Paper.key, by_key), (Paper.doi, by_doi), (Paper.slug, by_slug)):
        wanted = [name for name, about in names.items() if any(item.key not in found for item in about)]
        for start in range(0, len(wanted), 5000):
            for row in session.execute(select(*_COLUMNS).where(column.in_(wanted[start : start + 5000]))).mappings():
                known = by_id.setdefault(row["id"], dict(row))
                for item in names[row[column.key]]:
                    # One DOI may name two papers of arXiv; then it does not say which.
                    if column is Paper.doi and item.arxiv and row["arxiv"] and item.arxiv != row["arxiv"]:
                        continue
                    found.setdefault(item.key, known)
    return found


def _join_slugs(session: Session, items: list[Item], known: dict[str, dict[str, Any]]) -> None:
    """Where a paper of a record has come in by another name too, make one of the two rows: what readers did goes along."""
    for item in items:
        row = known.get(item.key)
        if not item.slug or row is None or row["slug"] == item.slug:
            continue
        other = session.scalar(select(Paper.id).where(Paper.slug == item.slug))
        if other is None or other == row["id"]:
            continue
        for table in (Vote, Note, ReadingItem):
            mine = select(table.reader_id).where(table.paper_id == row["id"])
            moved = update(table).where(table.paper_id == other, table.reader_id.not_in(mine)).values(paper_id=row["id"])
            session.execute(moved.execution_options(synchronize_session=False))
        session.execute(delete(Paper).where(Paper.id == other).execution_options(synchronize_session=False))
        votes = session.scalar(select(func.count()).select_from(Vote).where(Vote.paper_id == row["id"])) or 0
        session.execute(update(Paper).where(Paper.id == row["id"]).values(own_votes=votes))


def write_papers(session: Session, items: list[Item], counts: Counts) -> None:
    """Put a batch of papers into the store, within the session's transaction."""
    known = _known(session, items)
    if any(item.slug for item in items):
        _join_slugs(session, items, known)
    before = {row["id"]: dict(row) for row in known.values()}
    named = {**known, **{row["key"]: row for row in known.values()}}  # a row goes by every name that it has had
    by_doi: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    touched: dict[int, dict[str, Any]] = {}
    met = 0
    for item in items:
        row = named.get(item.key)
        if row is None and item.doi in by_doi and not (item.arxiv and by_doi[item.doi]["arxiv"]):
            row = by_doi[item.doi]
        if row is None:
            row = {name: getattr(item, name) for name in _FIELDS}
            rows.append(row)
        else:
            met += 1
            row.update(merge(row, item))
            if "id" in row:
                touched[row["id"]] = row
        named[item.key] = named[row["key"]] = row
        if item.doi and "id" not in row:
            by_doi.setdefault(item.doi, row)
        if item.listed:
            row["extra"] = {**row["extra"], "listed": True}
    time = now()
    if rows:
        stamp = {"created_at": time, "changed_at": time, "own_votes": 0}
        session.execute(insert(Paper), [{**row, **stamp} for row in rows])
        counts.added += len(rows)
    changed = 0
    for paper, row in touched.items():
        old = before[paper]
        values = {name: value for name, value in row.items() if name not in ("id", "source") and value != old[name]}
        if values:
            session.execute(update(Paper).where(Paper.id == paper).values(**values, changed_at=time))
            changed += 1
    counts.updated += changed
    counts.unchanged += met - changed


def set_aside(store: Store, session: Session, run: ImportRun, raws: list[Raw], counts: Counts) -> None:
    """Keep the items that are no papers, each with its reason and once."""
    rows = []
    for raw in raws:
        digest = hashlib.sha256(f"{run.source}\0{raw.reason}\0{raw.text}".encode("utf-8", "replace")).hexdigest()
        rows.append(
            {
                "run_id": run.id, "source": run.source, "position": raw.position, "reason": raw.reason,
                "item": raw.text[:_KEPT].replace("\0", "").encode("utf-8", "replace").decode(), "digest": digest, "at": now(),
            }
        )  # fmt: skip
    upsert = postgresql.insert if store.dialect == "postgresql" else sqlite.insert
    session.execute(upsert(RejectedItem).on_conflict_do_nothing(index_elements=["digest"]), rows)
    counts.rejected += len(rows)


def batches(raws: Iterable[Raw], size: int = BATCH) -> Iterator[list[Raw]]:
    """Items in lists of so many."""
    source = iter(raws)
    while batch := list(islice(source, size)):
        yield batch


def write_batch(store: Store, run_id: int, raws: list[Raw], counts: Counts, cursor: dict[str, Any]) -> None:
    """One transaction: the papers, the items set aside, the counts and how far the run has come."""
    with store.writing() as session:
        run = session.get_one(ImportRun, run_id)
        step = Counts()
        write_papers(session, [raw.item for raw in raws if raw.item is not None], step)
        bad = [raw for raw in raws if raw.item is None]
        if bad:
            set_aside(store, session, run, bad, step)
        run.cursor = cursor
        run.added += step.added
        run.updated += step.updated
        run.unchanged += step.unchanged
        run.rejected += step.rejected
    for name in ("added", "updated", "unchanged", "rejected"):
        setattr(counts, name, getattr(counts, name) + getattr(step, name))


def start_run(store: Store, source: str) -> tuple[int, dict[str, Any]]:
    """A run for a source: the one that was cut off, with its cursor, or a new one."""
    with store.writing() as session:
        last = session.scalar(select(ImportRun).where(ImportRun.source == source).order_by(ImportRun.id.desc()).limit(1))
        if last is not None and last.state != "done":
            last.state, last.error = "running", ""
            return last.id, dict(last.cursor)
        run = ImportRun(source=source, cursor={})
        session.add(run)
        session.flush()
        return run.id, {}


def end_run(store: Store, run_id: int, *, error: str = "", at: datetime | None = None) -> None:
    """Close a run: done, or failed with its reason."""
    with store.writing() as session:
        run = session.get_one(ImportRun, run_id)
        run.state, run.error, run.finished_at = ("failed" if error else "done"), error[:2000], at or now()

"""Everything as JSONL, and back.

The first line names the format; each further line is one row: its table and its columns. Into an empty store an export goes back
as it was, ids included. Into a store that has papers, rows that are there already (by what makes each kind of row one: the key
of a paper, the reader and paper of a vote) stay, papers are merged as by any import, and the rest comes in under new ids.
"""

from __future__ import annotations

import base64
import json
import os
import tempfile
from collections.abc import Iterator
from datetime import date, datetime
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from sqlalchemy import Table, func, insert, select, text, tuple_
from sqlalchemy.orm import Session

from corollary.web.importers.arxiv import BadAnswer
from corollary.web.importers.items import Item
from corollary.web.importers.sources import ARCHIVE
from corollary.web.importers.write import Counts, merge
from corollary.web.store import Paper, Store, now
from corollary.web.store.schema import EXPORTED, Base, Lines, Utc

VERSION = 1
_BATCH = 1000
# What makes a row of each table one; references in it are translated first.
_NATURAL: dict[str, tuple[str, ...]] = {
    "papers": ("key",), "readers": ("name", "created_at"), "votes": ("reader_id", "paper_id"), "notes": ("reader_id", "paper_id"),
    "reading_items": ("reader_id", "paper_id"), "saved_searches": ("reader_id", "name"),
    "subscriptions": ("address", "kind", "created_at"), "deliveries": ("dedupe",), "jobs": ("kind", "created_at"),
    "verdict_states": ("slug", "claim"), "verdict_changes": ("slug", "claim", "at"), "import_runs": ("source", "started_at"),
    "rejected_items": ("digest",),
}  # fmt: skip


def _table(model: type[Base]) -> Table:
    table = model.__table__
    assert isinstance(table, Table)
    return table


def _out(value: Any) -> Any:
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    return list(value) if isinstance(value, tuple) else value


def rows(store: Store) -> Iterator[dict[str, Any]]:
    """Every row that an export has, as plain data, all of one moment."""
    with store.reading() as connection:
        for model in EXPORTED:
            table = _table(model)
            columns = [column for column in table.columns if column.computed is None]
            query = select(*columns).order_by(*table.primary_key.columns)
            result = connection.execution_options(stream_results=True).execute(query)
            for row in result.mappings().yield_per(_BATCH):
                yield {"table": table.name, **{name: _out(value) for name, value in row.items()}}


def export(store: Store, path: Path) -> int:
    """Write everything to a file, whole or not at all; ``-`` is standard output. Returns the number of rows.

    Raises:
        OSError: where the file cannot be written.
    """
    head = json.dumps({"format": ARCHIVE, "version": VERSION, "at": now().isoformat()})
    if str(path) == "-":
        return _write(store, os.fdopen(os.dup(1), "w", encoding="utf-8"), head)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        count = _write(store, os.fdopen(handle, "w", encoding="utf-8"), head)
        os.chmod(temporary, 0o600)  # addresses and notes are in it
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return count


def _write(store: Store, file: Any, head: str) -> int:
    count = 0
    with file:
        file.write(head + "\n")
        for row in rows(store):
            file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
            count += 1
        file.flush()
    return count


def _in(column: Any, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(column.type, Lines):
        return tuple(value)
    if isinstance(column.type, Utc):
        return datetime.fromisoformat(value)
    if isinstance(value, dict) and set(value) == {"base64"}:
        return base64.b64decode(value["base64"], validate=True)
    return date.fromisoformat(value) if column.type.python_type is date else value


def restore(store: Store, file: BinaryIO, counts: Counts) -> None:
    """Read an export back; ``counts`` tells of the papers. Killed in between, the same call goes on.

    Raises:
        BadAnswer: where it is no export, is of a later version, or breaks off.
    """
    try:
        head = json.loads(file.readline(10_000))
        version = int(head["version"])
        known = head["format"] == ARCHIVE
    except (ValueError, KeyError, TypeError) as error:
        raise BadAnswer("not an export of a daily page: its first line does not say so") from error
    if not known or version > VERSION:
        raise BadAnswer(f"the export is of version {version}; up to {VERSION} is read here")
    tables = {_table(model).name: _table(model) for model in EXPORTED}
    ids: dict[str, dict[int, int]] = {name: {} for name in tables}
    name, batch = "", list[dict[str, Any]]()

    def flush() -> None:
        for start in range(0, len(batch), _BATCH):
            with store.writing() as session:
                _restore_rows(session, tables[name], batch[start : start + _BATCH], ids, counts)
        batch.clear()

    for number, line in enumerate(iter(lambda: list(islice(file, 1)), []), 2):
        if not line[0].strip():
            continue
        try:
            data = json.loads(line[0])
            table = tables[data.pop("table")]
            row = {c.name: _in(c, data[c.name]) for c in table.columns if c.computed is None and c.name in data}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadAnswer(f"line {number} of the export is damaged: {error}"[:300]) from error
        if table.name != name or len(batch) >= _BATCH:
            flush()
            name = table.name
        batch.append(row)
    flush()
    with store.writing() as session:
        _numbering(session, tables)


def _restore_rows(
    session: Session, table: Table, batch: list[dict[str, Any]], ids: dict[str, dict[int, int]], counts: Counts
) -> None:
    natural = _NATURAL[table.name]
    for row in batch:
        for column in table.columns:
            for key in column.foreign_keys:
                if row.get(column.name) is not None:
                    row[column.name] = ids[key.column.table.name].get(row[column.name])
    columns = [table.c[name] for name in natural]
    has_id = "id" in table.c
    wanted = [tuple(row[name] for name in natural) for row in batch]
    selected = [*columns, *([table.c.id] if has_id else [])]
    present: dict[tuple[Any, ...], Any] = {}
    for start in range(0, len(wanted), 200):
        query = select(*selected).where(tuple_(*columns).in_(wanted[start : start + 200]))
        present.update({tuple(found[: len(natural)]): found[-1] for found in session.execute(query)})
    taken: set[int] = set()
    if has_id:
        asked = [row["id"] for row in batch]
        taken = set(session.scalars(select(table.c.id).where(table.c.id.in_(asked))))
        free = (session.scalar(select(func.max(table.c.id))) or 0) + 1
        free = max(free, max(asked, default=0) + 1)
    new = []
    for row, name in zip(batch, wanted, strict=True):
        if any(row.get(c.name) is None and not c.nullable for c in table.columns if c.foreign_keys):
            continue  # what it belonged to is not there
        if name in present:
            if has_id:
                ids[table.name][row["id"]] = present[name]
            if table.name == "papers":
                _merge_paper(session, present[name], row, counts)
            continue
        if has_id:
            old = row["id"]
            if old in taken:
                row["id"], free = free, free + 1
            ids[table.name][old] = row["id"]
            taken.add(row["id"])
        present[name] = row.get("id")
        new.append(row)
    if new:
        session.execute(insert(table), new)
        if table.name == "papers":
            counts.added += len(new)


def _merge_paper(session: Session, paper_id: int, row: dict[str, Any], counts: Counts) -> None:
    paper = session.get_one(Paper, paper_id)
    names = [c.name for c in _table(Paper).columns if c.computed is None]
    old = {name: getattr(paper, name) for name in names}
    skip = {"id", "own_votes", "created_at", "changed_at"}
    item = Item(**{name: value for name, value in row.items() if name not in skip})
    item.listed = bool(row["extra"].get("listed"))
    changed = {name: value for name, value in merge(old, item).items() if name not in ("id", "source") and value != old[name]}
    for name, value in changed.items():
        setattr(paper, name, value)
    if changed:
        paper.changed_at = now()
        counts.updated += 1
    else:
        counts.unchanged += 1


def _numbering(session: Session, tables: dict[str, Table]) -> None:
    """On PostgreSQL the next id is a sequence's, which rows with an id of their own do not move."""
    if session.get_bind().dialect.name != "postgresql":
        return
    for name, table in tables.items():
        if "id" in table.c:
            session.execute(
                text(f"SELECT setval(pg_get_serial_sequence('{name}', 'id'), (SELECT coalesce(max(id), 1) FROM {name}))")
            )

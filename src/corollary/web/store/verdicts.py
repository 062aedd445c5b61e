"""What changed among the verdicts: the log that the digest reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from corollary.web.store.engine import Store
from corollary.web.store.schema import VerdictChange, VerdictState, now


def record_verdicts(store: Store, rows: Iterable[Mapping[str, Any]]) -> list[VerdictChange]:
    """Compare verdicts with those last seen, and log what came or changed.

    Args:
        store: the store.
        rows: rows as `corollary.claims.store.latest_verdicts` gives them: ``slug``, ``claim``, ``verdict`` and the rest. Rows
            without a verdict (smoke scale) are passed over.

    Returns:
        The changes of this call, each with the ``old`` verdict, None for a claim seen for the first time.
    """
    with store.writing() as session:
        session.expire_on_commit = False
        seen = {(state.slug, state.claim): state for state in session.scalars(select(VerdictState))}
        changes = []
        for row in rows:
            if row.get("verdict") is None:
                continue
            name = (str(row["slug"]), str(row["claim"]))
            state = seen.get(name)
            if state is not None and state.verdict == row["verdict"]:
                if state.row != dict(row):
                    state.row = dict(row)
                continue
            old = state.verdict if state else None
            changes.append(VerdictChange(slug=name[0], claim=name[1], old=old, new=row["verdict"], row=dict(row), at=now()))
            if state is None:
                seen[name] = state = VerdictState(slug=name[0], claim=name[1])
                session.add(state)
            state.verdict, state.row, state.seen_at = row["verdict"], dict(row), now()
        session.add_all(changes)
    return changes


def verdict_changes_since(store: Store, moment: datetime) -> list[VerdictChange]:
    """The changes logged after a moment, oldest first."""
    with store.reading() as connection, Session(connection, expire_on_commit=False) as session:
        return list(session.scalars(select(VerdictChange).where(VerdictChange.at > moment).order_by(VerdictChange.id)))

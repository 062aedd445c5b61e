"""What the cards of a list show beside the papers themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import Request
from sqlalchemy import Connection

from corollary.report.views import PaperView as RecordView
from corollary.web.guard import who
from corollary.web.search.encoders import unit
from corollary.web.search.engine import searcher
from corollary.web.store import PaperView, Store, places, rows

_LIKENESS = 0.35  # a method whose likeness is below this is not worth naming on a card


@dataclass(frozen=True)
class Card:
    """One paper on a list."""

    paper: PaperView
    record: RecordView | None
    nearest: tuple[PaperView, float] | None
    voted: bool
    reading: str
    title: Sequence[tuple[str, bool]] | None = None
    text: Sequence[tuple[str, bool]] | None = None
    score: float | None = None
    ranks: tuple[int | None, int | None] | None = None


def nearest_methods(
    store: Store, papers: Sequence[PaperView], connection: Connection | None = None
) -> dict[int, tuple[PaperView, float]]:
    """For each of many papers the method that runs here and is most like it, with its likeness."""
    tool = searcher(store)
    methods, vectors = tool.implemented()
    own = tool.vectors.of_papers([p.id for p in papers], connection) if methods else {}
    if not own:
        return {}
    cosines = unit(np.array(list(own.values()), np.float32)) @ vectors.T
    best = cosines.argmax(axis=1).tolist()
    found = {}
    for paper_id, place, likeness in zip(own, best, cosines.max(axis=1).tolist(), strict=True):
        if methods[place].id != paper_id and likeness >= _LIKENESS:
            found[paper_id] = (methods[place], likeness)
    return found


def reader_marks(connection: Connection, reader: int | None, ids: Sequence[int]) -> tuple[set[int], dict[int, str]]:
    """Which of these papers a reader has voted for, and the state of those on the reading list."""
    if reader is None or not ids:
        return set(), {}
    these = f"reader_id = ? AND paper_id IN ({places(ids)})"
    own = rows(connection, f"SELECT paper_id FROM votes WHERE {these}", (reader, *ids))
    kept = rows(connection, f"SELECT paper_id, state FROM reading_items WHERE {these}", (reader, *ids))
    return {paper for (paper,) in own}, dict(kept)


def cards(request: Request, papers: Sequence[PaperView], **more: dict[int, Any]) -> list[Card]:
    """Cards of these papers, in their order; ``more`` gives further fields of `Card` by the paper's id."""
    app = request.app.state
    records = app.verdicts.by_slug
    with app.store.reading() as connection:
        votes, reading = reader_marks(connection, who(request).reader, [p.id for p in papers])
        near = nearest_methods(app.store, [p for p in papers if p.slug not in records], connection)
    return [
        Card(
            paper,
            records.get(paper.slug) if paper.slug else None,
            near.get(paper.id),
            paper.id in votes,
            reading.get(paper.id, ""),
            **{name: values.get(paper.id) for name, values in more.items()},
        )
        for paper in papers
    ]

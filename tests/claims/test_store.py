"""The store: whole rows or none, survival of a crash, two writers at once."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from corollary.claims.record import get_paper
from corollary.claims.source import source_hash
from corollary.claims.store import Store, StoreError, latest_verdicts


def test_append_and_read(store: Store) -> None:
    store.append("a", {"x": 1})
    store.append("a", {"x": [1.5, None, "é"]})
    assert store.rows("a") == [{"x": 1}, {"x": [1.5, None, "é"]}]
    assert store.rows("never") == []


def test_truncated_last_line_is_set_aside_and_nothing_else_is_lost(store: Store) -> None:
    store.append("a", {"x": 1})
    store.append("a", {"x": 2})
    path = store.path("a")
    path.write_bytes(path.read_bytes()[:-4])
    assert store.rows("a") == [{"x": 1}]
    store.append("a", {"x": 3})
    assert store.rows("a") == [{"x": 1}, {"x": 3}]
    assert b'{"x"' in path.read_bytes().split(b"\n")[1], "the cut line stays in the file"


def test_foreign_lines_are_passed_over(store: Store) -> None:
    store.append("a", {"x": 1})
    with store.path("a").open("ab") as file:
        file.write(b"\xff\xfe\n[1]\n\n7\n")
    store.append("a", {"x": 2})
    assert store.rows("a") == [{"x": 1}, {"x": 2}]


def test_non_finite_numbers_are_refused_before_anything_is_written(store: Store) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.append("a", {"x": float("nan")})
    assert store.rows("a") == []


def _write(root: Path, writer: int) -> None:
    store = Store(root)
    for number in range(50):
        store.append("a", {"writer": writer, "number": number, "padding": "x" * 20_000})


def test_two_writers_at_once(store: Store) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(store.root, writer)) for writer in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    rows = store.rows("a")
    assert len(store.path("a").read_bytes().splitlines()) == len(rows) == 100
    for writer in range(2):
        assert [row["number"] for row in rows if row["writer"] == writer] == list(range(50))


def test_unwritable_store_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "store")
    with pytest.raises(StoreError, match=r"cannot write to store .*choose another with --store"):
        store.check_writable()
    with pytest.raises(StoreError, match="cannot write to"):
        store.append("a", {})


def test_unreadable_store(store: Store) -> None:
    store.path("a").mkdir(parents=True)
    with pytest.raises(StoreError, match="cannot read"):
        store.rows("a")


def test_latest_verdict_wins_and_staleness_is_seen(toys: Path, store: Store, tmp_path: Path) -> None:
    paper = get_paper("steady")
    fresh = source_hash(paper, "better")
    other = Store(tmp_path / "published")
    row = {"type": "verdict", "slug": "steady", "claim": "better", "verdict": "inconclusive"}
    other.append("steady", {**row, "time": "2020-01-01", "source_hash": "old", "n": 1})
    store.append("steady", {**row, "time": "2021-01-01", "source_hash": fresh, "n": 2})
    store.append("steady", {**row, "time": "2019-01-01", "source_hash": fresh, "n": 3})
    store.append("steady", {**row, "claim": "renamed", "time": "2022-01-01", "source_hash": fresh, "n": 4})
    store.append("steady", {**row, "type": "trial", "time": "2023-01-01", "source_hash": fresh, "n": 5})
    assert [(r["n"], r["stale"]) for r in latest_verdicts([paper], [other, store])] == [(2, False)]
    assert [(r["n"], r["stale"]) for r in latest_verdicts([paper], [other])] == [(1, True)]


def test_rows_are_one_json_object_a_line(store: Store) -> None:
    store.append("a", {"text": "two\nlines"})
    lines = store.path("a").read_text().splitlines()
    assert len(lines) == 1
    assert json.loads(lines[0]) == {"text": "two\nlines"}
    assert os.stat(store.path("a")).st_mode & 0o777 == 0o644

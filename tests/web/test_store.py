"""The store: its migrations, its lists and its counts, against plain Python over the same papers."""

from __future__ import annotations

import random
import sqlite3
import threading
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import func, inspect, select, text
from tests.web.crash import killed

from corollary.web import store as s
from corollary.web.store import schema
from corollary.web.store.schema import Base

FIRST = date(2024, 1, 1)


def fill(store: s.Store, count: int = 400, seed: int = 0) -> list[tuple[date, int, int]]:
    """Papers over 20 days, some without any; (day, points, id) of each."""
    rng = random.Random(seed)
    with store.writing() as session:
        session.add(s.Reader(name="laptop"))
        for i in range(count):
            day = FIRST + timedelta(days=rng.choice([d for d in range(20) if d % 7 != 3]))
            session.add(
                s.Paper(key=f"k{i}", title=f"Paper {i}", authors=("A B", "C D"), day=day, source="t", imported_votes=rng.choice([None, 0, 1, 5, 5]))
            )  # fmt: skip
    with store.reading() as connection:
        rows = connection.execute(select(s.Paper.day, s.Paper.imported_votes, s.Paper.id))
        return [(day, votes or 0, i) for day, votes, i in rows]


def walk(page, *args) -> list[int]:
    """Ids of all pages of a list."""
    found, after = [], None
    while True:
        one = page(*args, after=after, size=7)
        found += [paper.id for paper in one.papers]
        after = one.next
        if after is None:
            return found


def test_migrated_schema_is_the_declared_one(store):
    inspector = inspect(store.engine)
    for table in Base.metadata.sorted_tables:
        columns = {column["name"]: column for column in inspector.get_columns(table.name)}
        assert set(columns) == {column.name for column in table.columns}, table.name
        for column in table.columns:
            assert columns[column.name]["nullable"] == column.nullable, (table.name, column.name)
        assert {index["name"] for index in inspector.get_indexes(table.name)} >= {index.name for index in table.indexes}


def test_opening_twice_changes_nothing_and_a_later_schema_is_refused(store):
    url = str(store.engine.url)
    before = store.version()
    s.open_store(url).close()
    assert store.version() == before
    with store.writing() as session:
        session.execute(text("UPDATE alembic_version SET version_num = 'from the future'"))
    with pytest.raises(s.StoreUnavailable, match="newer version"):
        s.open_store(url)


def test_migration_killed_anywhere_leaves_nothing_half_done(tmp_path):
    path = tmp_path / "a" / "daily.sqlite"
    url = f"sqlite:///{path}"
    for n in (*range(1, 60, 7), 60, 70, 80):
        if not killed(n, lambda: s.open_store(url)):
            break
        if path.exists():
            with sqlite3.connect(path) as raw:
                names = {row[0] for row in raw.execute("SELECT name FROM sqlite_master")}
            assert names in (set(), {"alembic_version"}) or "papers_changed" in names, (n, names)
    else:
        pytest.fail("the migration has more statements than are tried here")
    opened = s.open_store(url)
    assert fill(opened, 3)
    opened.close()


def test_many_processes_may_open_a_new_store_at_once(tmp_path):
    errors: list[Exception] = []

    def open_it() -> None:
        try:
            s.open_store(f"sqlite:///{tmp_path / 'b' / 'daily.sqlite'}").close()
        except Exception as error:  # noqa: BLE001 - told of in the main thread
            errors.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mysql://host/x", "sqlite or postgresql"),
        ("sqlite://", "must name a file"),
        ("nonsense", "must be like"),
        ("sqlite:////proc/x/d", "cannot"),
    ],
)
def test_a_store_that_cannot_be_says_why(url, words):
    with pytest.raises((ValueError, s.StoreUnavailable), match=words):
        s.open_store(url)


def test_days_are_paged_whole_and_in_order(store):
    rows = fill(store)
    for day in sorted({row[0] for row in rows}):
        wanted = [i for d, _, i in sorted(rows, key=lambda row: (-row[1], -row[2])) if d == day]
        assert walk(s.papers_of_day, store, day) == wanted
    first, last = FIRST + timedelta(days=2), FIRST + timedelta(days=11)
    wanted = [i for d, _, i in sorted(rows, key=lambda row: (-row[1], -row[2])) if first <= d <= last]
    assert walk(s.papers_between, store, first, last) == wanted


def test_counts_and_nearest_days(store):
    rows = fill(store, 60, seed=1)
    have = sorted({row[0] for row in rows})
    counts = s.days(store, FIRST, FIRST + timedelta(days=40))
    assert counts == {day: sum(row[0] == day for row in rows) for day in have}
    assert s.newest_day(store) == have[-1]
    for offset in range(-3, 24):
        day = FIRST + timedelta(days=offset)
        assert s.nearest_day(store, day) == min(have, key=lambda d: (abs(d - day), d))
        assert s.nearest_day(store, day, "before") == max((d for d in have if d < day), default=None)
        assert s.nearest_day(store, day, "after") == min((d for d in have if d > day), default=None)


def test_an_empty_store_has_no_days(store):
    assert s.newest_day(store) is None
    assert s.nearest_day(store, FIRST) is None
    assert s.trending(store) == []
    assert s.papers_of_day(store, FIRST) == s.Page([], None)


def test_trending_is_the_formula(store):
    rows = fill(store, seed=2)
    days = sorted({row[0] for row in rows}, reverse=True)[: s.TRENDING_DAYS]
    scores = {i: (points + 1) / ((days[0] - day).days + 2) ** 1.5 for day, points, i in rows if day in days}
    found = s.trending(store, size=25)
    assert [score for _, score in found] == pytest.approx(sorted(scores.values(), reverse=True)[:25])
    for paper, score in found:
        assert score == pytest.approx(scores[paper.id])
    assert s.trending(store, FIRST - timedelta(days=1)) == []
    assert {paper.day for paper, _ in s.trending(store, FIRST)} == {FIRST}


def test_own_votes_stay_apart_from_imported_ones(store):
    fill(store, 5)
    with store.writing() as session:
        session.add(s.Reader(name="other"))
    before = s.get_paper(store, "k3")
    assert s.vote(store, 1, before.id) == 1
    assert s.vote(store, 1, before.id) == 1
    assert s.vote(store, 2, before.id) == 2
    after = s.get_paper(store, "k3")
    assert after.imported_votes == before.imported_votes
    assert (after.own_votes, after.points) == (2, before.points + 2)
    assert s.voted(store, 1, [1, 2, 3, 4, 5]) == {before.id}
    assert s.vote(store, 1, before.id, on=False) == 1
    assert s.vote(store, 1, before.id, on=False) == 1
    with pytest.raises(KeyError):
        s.vote(store, 1, 999)


def test_papers_go_by_key_by_any_spelling_of_their_id_and_by_slug(store):
    with store.writing() as session:
        for key, slug in (("2410.01623", "fira"), ("hep-ex/0307015", None), ("doi:10.1/x", None)):
            session.add(s.Paper(key=key, slug=slug, title="t", day=FIRST, source="t"))
    for name in ("2410.01623", "2410.01623v3", "arXiv:2410.01623", "https://arxiv.org/abs/2410.01623v1", "fira", "http://arxiv.org/pdf/2410.01623.pdf"):  # fmt: skip
        assert s.get_paper(store, name).slug == "fira", name
    assert s.get_paper(store, "hep-ex/0307015v2").key == "hep-ex/0307015"
    assert s.get_paper(store, "doi:10.1/x") is not None
    assert s.get_paper(store, "no such paper") is None
    assert [paper.slug for paper in s.papers_of_slugs(store, ["fira", "x"])] == ["fira"]


@pytest.mark.parametrize("after", ["", "x", "1", "-1.2", "1.2.3", "1e9.3", "９.1"])
def test_a_cursor_that_is_none_is_refused(store, after):
    with pytest.raises(ValueError, match="after"):
        s.papers_of_day(store, FIRST, after=after)


@pytest.mark.parametrize("size", [0, -1, 201])
def test_a_size_out_of_range_is_refused(store, size):
    with pytest.raises(ValueError, match="size"):
        s.papers_of_day(store, FIRST, size=size)


@given(st.lists(st.text(st.characters(blacklist_categories=["Cs"]), max_size=20), max_size=6))
def test_lines_come_back(items):
    kind = schema.Lines()
    stored = kind.process_bind_param(items, None)
    assert kind.process_result_value(stored, None) == tuple(" ".join(item.split()) for item in items if item.strip())


def test_times_are_in_utc_and_naive_ones_are_refused(store):
    moment = datetime(2024, 5, 1, 23, 30, tzinfo=UTC) + timedelta(microseconds=7)
    with store.writing() as session:
        session.add(s.Paper(key="k", title="t", day=FIRST, source="t", published=moment))
    assert s.get_paper(store, "k").published == moment
    with pytest.raises(Exception, match="without a zone"), store.writing() as session:
        session.add(s.Paper(key="l", title="t", day=FIRST, source="t", published=datetime(2024, 5, 1)))


def test_version_changes_with_every_write_and_only_then(store):
    first = store.version()
    s.papers_of_day(store, FIRST)
    assert store.version() == first
    fill(store, 1)
    second = store.version()
    assert second != first
    other = s.open_store(str(store.engine.url))
    s.vote(other, 1, 1)
    other.close()
    assert store.version() != second


def test_a_failed_write_leaves_nothing(store):
    def fail() -> None:
        with store.writing() as session:
            session.add(s.Paper(key="k", title="t", day=FIRST, source="t"))
            session.flush()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert s.count_papers(store) == 0


def test_writers_take_turns(store):
    fill(store, 1)

    def add() -> None:
        for _ in range(20):
            with store.writing() as session:
                row = session.get_one(s.Paper, 1)
                row.own_votes += 1

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert s.get_paper(store, "k0").own_votes == 80


def test_changed_verdicts_are_logged_once(store):
    row = {"slug": "fira", "claim": "beats_galore", "verdict": "inconclusive", "effect": 0.1}
    start = datetime.now(UTC) - timedelta(seconds=1)
    assert [(c.old, c.new) for c in s.record_verdicts(store, [row, {**row, "claim": "smoke", "verdict": None}])] == [(None, "inconclusive")]  # fmt: skip
    assert s.record_verdicts(store, [{**row, "effect": 0.2}]) == []
    changed = s.record_verdicts(store, [{**row, "verdict": "supported at this scale"}])
    assert [(c.old, c.new) for c in changed] == [("inconclusive", "supported at this scale")]
    assert [c.new for c in s.verdict_changes_since(store, start)] == ["inconclusive", "supported at this scale"]
    assert s.verdict_changes_since(store, datetime.now(UTC)) == []


def test_the_index_of_words_follows_every_write(store):
    fill(store, 50)
    with store.writing() as session:
        session.execute(text("UPDATE papers SET title = 'Zebra crossing' WHERE id = 7"))
        session.execute(text("UPDATE papers SET own_votes = 3 WHERE id = 8"))
        session.execute(text("DELETE FROM papers WHERE id = 9"))
        session.execute(text("DELETE FROM pending"))
        session.execute(text("UPDATE papers SET abstract = 'Zebra' WHERE id = 10"))
    with store.reading() as connection:
        found = connection.execute(text("SELECT rowid FROM words WHERE words MATCH 'zebras' ORDER BY rowid")).scalars().all()
        assert found == [7, 10]
        assert connection.execute(text("SELECT count(*) FROM words WHERE words MATCH 'paper'")).scalar() == 48
        assert connection.execute(text("SELECT paper_id FROM pending")).scalars().all() == [10]
    with store.writing() as session:  # the engine's own check against the table
        session.execute(text("INSERT INTO words(words, rank) VALUES('integrity-check', 1)"))
    with store.reading() as connection:
        assert connection.scalar(select(func.count()).select_from(s.Vector)) == 0


def test_the_data_folder_is_the_users(monkeypatch):
    monkeypatch.delenv("COROLLARY_DATA")
    monkeypatch.setenv("XDG_DATA_HOME", "/somewhere")
    assert s.data_dir() in (Path("/somewhere/corollary"), Path.home() / "Library" / "Application Support" / "corollary")
    monkeypatch.setenv("COROLLARY_DATA", "/own")
    assert s.default_url() == "sqlite:////own/daily.sqlite"
    monkeypatch.setenv("COROLLARY_DATABASE", "postgresql://lab/x")
    assert s.default_url() == "postgresql://lab/x"

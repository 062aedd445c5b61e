"""The same store on PostgreSQL: a throwaway server with Debian's binaries, where there are any."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import date, timedelta

import pytest
from sqlalchemy import text
from tests.web import samples
from tests.web.crash import killed

from corollary.web import store as s
from corollary.web.importers import Importer, export, first_issue
from corollary.web.importers.archive import rows
from corollary.web.search import Filters, catch_up, nearest_implemented, search, similar


def test_lists_votes_and_versions(lab):
    with lab.writing() as session:
        session.add(s.Reader(name="one"))
        for i in range(40):
            session.add(
                s.Paper(
                    key=f"k{i}",
                    title=f"Paper {i}",
                    authors=("A B",),
                    day=date(2024, 1, 1) + timedelta(days=i // 10),
                    source="t",
                    imported_votes=i % 4,
                )
            )
    version = lab.version()
    assert lab.version() == version
    assert s.vote(lab, 1, 5) == s.vote(lab, 1, 5) == 1
    assert lab.version() != version
    found, after = [], None
    while True:
        page = s.papers_of_day(lab, date(2024, 1, 2), after=after, size=3)
        found += [(paper.points, paper.id) for paper in page.papers]
        after = page.next
        if after is None:
            break
    assert found == sorted(found, reverse=True)
    assert len(found) == 10
    assert s.days(lab, date(2024, 1, 1), date(2024, 2, 1)) == {date(2024, 1, 1) + timedelta(days=d): 10 for d in range(4)}
    assert s.nearest_day(lab, date(2025, 1, 1)) == date(2024, 1, 4)
    assert len(s.trending(lab, size=7)) == 7


def test_first_issue_search_and_likeness(lab):
    first_issue(lab)
    assert first_issue(lab).unchanged >= 135
    assert catch_up(lab) >= 135
    assert search(lab, "arxiv:2410.01623").hits[0].paper.slug == "fira"
    assert "fira" in [h.paper.slug for h in search(lab, "low-rank optimizer that saves memory", size=5).hits]
    words = search(lab, "stragglers in distributed gradient computation", mode="words")
    assert words.hits[0].paper.slug == "gradient-coding"
    assert search(lab, "gradeint codng stragler").parsed.corrected["codng"] == "coding"
    assert all("low" in (h.paper.title + h.paper.summary).lower() for h in search(lab, '"low rank"').hits)
    assert search(lab, "author:vechev").hits[0].paper.slug == "ibp-tightness"
    assert all(h.paper.day >= date(2024, 1, 1) for h in search(lab, "gradient", Filters(first=date(2024, 1, 1))).hits)
    assert {h.paper.slug for h in search(lab, "gradient", Filters(slugs=frozenset({"fira", "adamp"}))).hits} <= {
        "fira",
        "adamp",
    }
    fira = s.get_paper(lab, "fira")
    assert similar(lab, fira.id, size=5)
    assert nearest_implemented(lab, fira.id, size=2)


@pytest.mark.parametrize(
    "query", ["", "'", '"', "a & b | !c", "x'; DROP TABLE papers; --", "\0", "\ud800", ":*", "a <-> b", "%s %(x)s", "author:"]
)
def test_syntax_in_a_query_is_only_text(lab, query):
    with lab.writing() as session:
        session.add(s.Paper(key="k", title="a b c", day=date(2024, 1, 1), source="t"))
    search(lab, query)
    search(lab, query, Filters(category=query, slugs=frozenset([query])))
    assert s.count_papers(lab) == 1


def test_imports_twice_and_everything_back_into_sqlite(lab, tmp_path):
    for name, body in (("a.rss", samples.RSS), ("a.bib", samples.BIBTEX.encode()), ("a.jsonl", samples.JSONL.encode())):
        (tmp_path / name).write_bytes(body)
        first = Importer(lab).run(str(tmp_path / name))
        again = Importer(lab).run(str(tmp_path / name))
        assert (again.counts.added, again.counts.updated, again.counts.unchanged) == (0, 0, first.counts.added)
    with lab.writing() as session:
        session.add(s.Reader(name="one"))
        session.flush()
        session.add(s.Vote(reader_id=1, paper_id=1))
    export(lab, tmp_path / "all.jsonl")
    other = s.open_store(f"sqlite:///{tmp_path / 'o' / 'daily.sqlite'}")
    Importer(other).run(str(tmp_path / "all.jsonl"))
    assert list(rows(other)) == list(rows(lab))
    other.close()


def test_everything_from_sqlite_and_new_rows_after_it(lab, store, tmp_path):
    first_issue(store)
    export(store, tmp_path / "all.jsonl")
    Importer(lab).run(str(tmp_path / "all.jsonl"))
    assert [r for r in rows(lab) if r["table"] == "papers"] == [r for r in rows(store) if r["table"] == "papers"]
    with lab.writing() as session:  # the sequence has moved past the ids that came in
        session.add(s.Paper(key="new", title="New", day=date(2024, 1, 1), source="t"))
    assert s.get_paper(lab, "new").id > 135


def test_migration_and_import_killed_anywhere(url, tmp_path):
    (tmp_path / "a.jsonl").write_text(samples.JSONL)
    for n in (5, 30, 45):
        killed(n, lambda: s.open_store(url, tmp_path / "k"))
    opened = s.open_store(url, tmp_path / "k")
    with opened.reading() as connection:
        assert connection.execute(text("SELECT count(*) FROM papers")).scalar() == 0
    opened.close()
    for n in (4, 7, 9):
        killed(n, lambda: Importer(s.open_store(url, tmp_path / "k")).run(str(tmp_path / "a.jsonl")))
    opened = s.open_store(url, tmp_path / "k")
    Importer(opened).run(str(tmp_path / "a.jsonl"))
    assert s.count_papers(opened) == 3
    opened.close()


def test_a_server_that_is_not_there_says_so_without_the_password():
    with pytest.raises(s.StoreUnavailable, match="cannot open") as caught:
        s.open_store("postgresql://lab:secret@127.0.0.1:1/x")
    assert "secret" not in str(caught.value)


def test_a_search_that_runs_out_of_time_ends_with_what_it_has(lab, monkeypatch):
    first_issue(lab)
    catch_up(lab)
    assert search(lab, "low-rank optimizer", mode="words").hits

    @contextmanager
    def endless(connection, seconds=0.25):
        connection.exec_driver_sql("SET LOCAL statement_timeout = 20")
        connection.exec_driver_sql("SELECT pg_sleep(5)")
        yield

    monkeypatch.setattr("corollary.web.search.words.limited", endless)
    assert search(lab, "low-rank optimizer", mode="words").hits == []
    assert "fira" in [hit.paper.slug for hit in search(lab, "low-rank optimizer that saves memory").hits]  # by meaning

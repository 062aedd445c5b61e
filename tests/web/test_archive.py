"""Export to JSONL and back: nothing is lost, nothing comes twice."""

from __future__ import annotations

import io
import json
import os
import random
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import inspect, select
from tests.web import samples
from tests.web.crash import killed

from corollary.web import store as s
from corollary.web.importers import Importer, ImportFailed, export, first_issue
from corollary.web.importers.archive import rows
from corollary.web.store.schema import EXPORTED

NOW = datetime(2026, 5, 8, 12, 0, 0, 123456, tzinfo=UTC)


def fill(store: s.Store) -> None:
    """Rows in every table that is exported, with texts that are hard on JSON lines."""
    rng = random.Random(0)
    with store.writing() as session:
        for name in ("laptop", "Zoë \u2028 <b>"):
            session.add(s.Reader(name=name, token_hash=name[:1] * 64, settings={"dark": True, "n": [1, None]}, created_at=NOW))
        session.flush()
        for i in range(70):
            session.add(
                s.Paper(
                    key=f"k{i}", slug=f"s{i}" if i % 5 == 0 else None, title='"quoted" \\ \u2028 \U0001f33b ' * 3, authors=("A B", "Ç D"), day=date(2024, 1, 1) + timedelta(days=i),
                    source="t", abstract="line\nline", published=NOW - timedelta(days=i), imported_votes=rng.choice([None, 0, 3]), own_votes=i % 2, links=[{"url": "https://x", "kind": "code", "added_by": "me"}],
                    extra={"deep": {"list": [1.5, None, True, "x"]}}, doi="10.1/x" if i == 3 else None,
                )
            )  # fmt: skip
        session.flush()
        for i in (1, 3, 5):
            session.add(s.Vote(reader_id=1, paper_id=i + 1, created_at=NOW))
            session.add(s.Note(reader_id=2, paper_id=i, text="a\nb\u0000"[:3], changed_at=NOW))
            session.add(s.ReadingItem(reader_id=1, paper_id=i, state="reading", added_at=NOW))
        session.add(s.SavedSearch(reader_id=1, name="mine", query='"low rank"', filters={"first": "2024-01-01"}))
        session.add(s.Subscription(reader_id=1, address="a@example.org", frequency="daily", kind="search", value={"id": 1}, state="confirmed", unsubscribe_hash="h" * 64))  # fmt: skip
        session.flush()
        session.add(s.Delivery(subscription_id=1, dedupe="digest:1:2026-05-08", kind="digest", address="a@example.org", message_id="<1@x>", message=bytes(range(256)), state="sent", sent_at=NOW))  # fmt: skip
        session.add(
            s.Job(kind="verify", args={"slug": "fira"}, state="done", progress=1.0, log="…", result={"ok": True}, reader_id=1)
        )
        session.add(s.ImportRun(source="x", state="done", cursor={"item": 3}, added=3))
        session.flush()
        session.add(s.RejectedItem(run_id=1, source="x", position="line 1", reason="r", item="{", digest="d" * 64))
    s.record_verdicts(store, [{"slug": "fira", "claim": "c", "verdict": "inconclusive", "effect": 1.0}])


def test_every_table_is_exported_or_derived():
    derived = {"fetch_states", "vectors", "pending", "terms", "meta"}
    assert {model.__table__.name for model in EXPORTED} | derived == set(s.Base.metadata.tables)


def test_nothing_is_lost_into_an_empty_store(store, tmp_path):
    fill(store)
    path = tmp_path / "all.jsonl"
    count = export(store, path)
    assert path.stat().st_mode & 0o777 == 0o600, "addresses are in it"
    assert count == path.read_text().count("\n") - 1
    other = s.open_store(f"sqlite:///{tmp_path / 'other' / 'daily.sqlite'}")
    Importer(other).run(str(path))
    before = list(rows(store))
    after = [row for row in rows(other) if not (row["table"] == "import_runs" and row["source"] == str(path))]
    assert after == before
    for model in EXPORTED:
        columns = [column for column in model.__table__.columns if column.name != "points"]
        with store.reading() as one, other.reading() as two:
            query = select(*columns).order_by(*model.__table__.primary_key.columns)
            mine = one.execute(query).all()
            assert mine, model
            theirs = [row for row in two.execute(query).all() if str(path) not in map(str, row)]
            assert theirs == mine
    other.close()


def test_into_a_store_that_has_papers_nothing_comes_twice(store, tmp_path):
    fill(store)
    path = tmp_path / "all.jsonl"
    export(store, path)
    other = s.open_store(f"sqlite:///{tmp_path / 'other' / 'daily.sqlite'}")
    (tmp_path / "hf.json").write_text(json.dumps(samples.HF_DAY))
    Importer(other).run(str(tmp_path / "hf.json"))
    with other.writing() as session:
        session.add(s.Reader(name="someone"))
        session.add(s.Paper(key="k3", title="Known", day=date(2024, 1, 1), source="t", imported_votes=9))
    first = Importer(other).run(str(path))
    assert (first.counts.added, first.counts.updated) == (69, 1)
    whole = [row for row in rows(other) if row["table"] != "import_runs"]
    again = Importer(other).run(str(path))
    assert (again.counts.added, again.counts.updated) == (0, 0)
    assert [row for row in rows(other) if row["table"] != "import_runs"] == whole
    with other.reading() as connection:
        votes = connection.execute(select(s.Reader.name, s.Paper.key).select_from(s.Vote).join(s.Reader).join(s.Paper).order_by(s.Paper.key)).all()  # fmt: skip
    assert [tuple(vote) for vote in votes] == [("laptop", "k1"), ("laptop", "k3"), ("laptop", "k5")]
    assert s.get_paper(other, "k3").imported_votes == 9
    assert inspect(other.engine).has_table("papers")
    other.close()


def test_a_restore_killed_anywhere_goes_on(store, tmp_path):
    fill(store)
    path = tmp_path / "all.jsonl"
    export(store, path)
    wanted = [row for row in rows(store) if row["table"] != "import_runs"]
    for n in (3, 9, 15, 21, 40, 60):
        url = f"sqlite:///{tmp_path / f'k{n}' / 'daily.sqlite'}"
        s.open_store(url).close()

        def work(url: str = url) -> None:
            Importer(s.open_store(url)).run(str(path))

        killed(n, work)
        other = s.open_store(url)
        Importer(other).run(str(path))
        found = [row for row in rows(other) if row["table"] != "import_runs"]
        assert found == wanted, n
        other.close()


def test_an_export_that_cannot_be_written_leaves_nothing(store, tmp_path):
    fill(store)
    with pytest.raises(OSError, match="No such file"):
        export(store, tmp_path / "no" / "x.jsonl")
    blocked = tmp_path / "d"
    blocked.mkdir()
    with pytest.raises(OSError):  # noqa: PT011 - the system's own words
        export(store, blocked)
    assert os.listdir(tmp_path / "d") == []
    assert not list(tmp_path.glob(".d.*"))


@pytest.mark.parametrize(
    "body",
    [
        b'{"format": "corollary-daily", "version": 99}\n',
        b'{"format": "corollary-daily", "version": 1}\n{"table": "no such"}\n',
        b'{"format": "corollary-daily", "version": 1}\n{"table": "papers", "id": 1\n',
        b'{"format": "corollary-daily", "version": 1}\n{"table": "papers", "created_at": "yesterday"}\n',
    ],
)
def test_a_damaged_export_is_refused(store, body):
    with pytest.raises(ImportFailed, match="export"):
        Importer(store).run("-", stdin=io.BytesIO(body))


def test_export_to_standard_output(store, capfd):
    fill(store)
    export(store, Path("-"))
    lines = capfd.readouterr().out.splitlines()
    assert json.loads(lines[0])["format"] == "corollary-daily"
    assert len(lines) > 80


def test_the_first_issue(store):
    from corollary.claims.record import catalogue
    from corollary.web.importers.first import entries

    counts = first_issue(store)
    assert len(entries()) == 135
    assert counts.added == 135 + len(set(catalogue()) - {entry["slug"] for entry in entries()})
    version = store.version()
    assert first_issue(store).unchanged == counts.added
    assert store.version() == version, "nothing is written when nothing has changed"
    for entry in entries():
        paper = s.get_paper(store, entry["slug"])
        assert paper.title
        assert paper.abstract == "", "abstracts come with the reader's own import"
        assert paper.summary == entry["summary"]
        assert entry["summary"].count(". ") == 1, "two sentences"
        record = catalogue().get(entry["slug"])
        if record is not None and record.arxiv:
            assert (paper.arxiv, paper.authors) == (record.arxiv, record.authors)
        if entry.get("code"):
            assert paper.code
            assert paper.code_added_by == "corollary"


def test_an_import_adds_the_abstract_to_the_first_issue(store, tmp_path):
    first_issue(store)
    path = tmp_path / "a.xml"
    path.write_bytes(samples.atom([samples.entry("2410.01623v3", "Fira", "The reader's own abstract.", "2024-10-02T14:58:11Z", "2025-01-01T00:00:00Z")]))  # fmt: skip
    report = Importer(store).run(str(path))
    assert (report.counts.added, report.counts.updated) == (0, 1)
    fira = s.get_paper(store, "fira")
    assert (fira.abstract, fira.version) == ("The reader's own abstract.", 3)
    assert fira.summary
    assert first_issue(store).updated == 0

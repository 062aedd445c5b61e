"""Importers: documented shapes read right, the same twice changes nothing, bad items set aside, and nothing lost when killed."""

from __future__ import annotations

import gzip
import io
import json
from datetime import UTC, date, datetime
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select
from tests.web import samples
from tests.web.crash import killed
from tests.web.server import serving

from corollary.web.importers import Fetcher, FetchError, Importer, ImportFailed, Refused, arxiv, fetch, huggingface
from corollary.web.importers.items import BadItem, Item
from corollary.web.importers.sources import KINDS, arxiv_address, named, read_body, sniff
from corollary.web.importers.write import _FIELDS, merge
from corollary.web.store import ImportRun, Paper, RejectedItem, Store, count_papers, get_paper, open_store


def local(store: Store, **options) -> Fetcher:
    """A fetcher that may ask this machine and waits for nothing."""
    return Fetcher(store.folder, allow_private=True, wait=lambda _: None, **options)


def rows(store: Store) -> list[tuple]:
    """All papers as they stand, with the time of their last change."""
    columns = list(Paper.__table__.columns)
    with store.reading() as connection:
        return [tuple(row) for row in connection.execute(select(*columns).order_by(Paper.id))]


def reasons(store: Store) -> list[str]:
    with store.reading() as connection:
        return list(connection.scalars(select(RejectedItem.reason).order_by(RejectedItem.id)))


# --- the shapes


def test_hugging_face_items(store, tmp_path):
    path = tmp_path / "day.json"
    path.write_text(json.dumps(samples.HF_DAY))
    report = Importer(store).run(str(path))
    assert (report.counts.added, report.counts.rejected) == (2, samples.HF_BAD)
    paper = get_paper(store, "2605.00001")
    assert paper.title == "Sparse Gardens: Pruning That Grows Back"
    assert paper.abstract == "We prune weights and let them regrow."
    assert paper.authors == ("Ada Example", "Bo Sample")
    assert (paper.day, paper.published) == (date(2026, 5, 8), datetime(2026, 5, 6, 17, 59, 59, tzinfo=UTC))
    assert (paper.imported_votes, paper.own_votes) == (41, 0)
    assert (paper.code, paper.code_added_by) == ("https://github.com/example/gardens", "auto")
    assert (paper.keywords, paper.organization) == (("pruning", "regrowth"), "Example Lab")
    kept = paper.extra["huggingface"]
    assert kept["paper"]["authors"] == samples.HF_DAY[0]["paper"]["authors"]
    assert kept["paper"]["ai_summary"] == "Pruning with regrowth."
    assert kept["item"]["numComments"] == 3
    least = get_paper(store, "2605.00002")
    assert (least.imported_votes, least.authors, least.abstract) == (None, (), "")
    assert sorted(reasons(store)) == [
        "githubRepo must be an http or https address, not 'javascript:alert(1)'",
        "paper must be an object, not str",
        "title is missing",
        "upvotes must be a whole number, not 'many'",
    ]


def test_arxiv_entries_with_old_ids_without_versions_and_errors(store, tmp_path):
    path = tmp_path / "answer.xml"
    path.write_bytes(
        samples.atom(
            [
                samples.entry("hep-ex/0307015v1"),
                samples.entry("2410.01623"),
                samples.entry("math.GT/0309136v2", "Knots"),
                samples.ERROR_ENTRY,
            ]
        )
    )
    report = Importer(store).run(str(path))
    assert (report.counts.added, report.counts.rejected) == (3, 1)
    paper = get_paper(store, "hep-ex/0307015")
    assert (paper.version, paper.doi) == (1, "10.1000/example.7")
    assert paper.authors == ("Ada Example", "Émile Étude")
    assert paper.categories == ("cs.LG", "stat.ML")
    assert (paper.published, paper.day) == (datetime(2003, 7, 7, 17, 46, 39, tzinfo=UTC), date(2003, 7, 7))
    assert (paper.code, paper.code_added_by) == ("https://github.com/example/flow", "authors")
    assert paper.comment.startswith("12 pages")
    assert paper.venue == "Eur.Phys.J. C31 (2003) 17-29"
    assert {link["kind"] for link in paper.links} == {"pdf", "doi"}
    assert get_paper(store, "2410.01623").version is None
    assert get_paper(store, "math.GT/0309136").version == 2
    assert reasons(store) == ["the API answers with an error: incorrect id format for 1234.12345"]


def test_feeds(store, tmp_path):
    (tmp_path / "a.rss").write_bytes(samples.RSS)
    (tmp_path / "b.atom").write_bytes(samples.ATOM_FEED)
    assert Importer(store).run(str(tmp_path / "a.rss")).counts.added == 2
    assert Importer(store).run(str(tmp_path / "b.atom")).counts.added == 1
    paper = get_paper(store, "2605.01234")
    assert (paper.title, paper.abstract) == ("Rivers of Tokens", "Tokens flow & merge.")
    assert (paper.authors, paper.categories, paper.version) == (("Ada Example", "Bo Sample"), ("cs.LG", "cs.CL"), None)
    note = get_paper(store, "url:https://blog.example.org/notes/1")
    assert "<" not in note.abstract
    assert "alert" not in note.abstract
    letter = get_paper(store, "url:https://lab.example.org/letters")
    assert (letter.abstract, letter.authors) == ("A long letter.", ("Cy Person",))
    assert reasons(store) == ["title is missing"]


def test_bibtex(store, tmp_path):
    (tmp_path / "refs.bib").write_text(samples.BIBTEX)
    report = Importer(store).run(str(tmp_path / "refs.bib"))
    assert (report.counts.added, report.counts.rejected) == (3, 2)
    paper = get_paper(store, "hep-th/9405001")
    assert paper.title == "On the Equation of Étude and $x^n$"
    assert paper.authors == ("Pierre de Fermat", "Ada Example")
    assert paper.day == date(1994, 5, 1)
    gardens = get_paper(store, "doi:10.1000/xyz")
    assert (gardens.venue, gardens.keywords) == ("International Conference on Machine Learning", ("pruning", "growth"))
    assert get_paper(store, "2401.00001").version == 2


def test_jsonl(store, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(samples.JSONL)
    report = Importer(store).run(str(path))
    assert (report.counts.added, report.counts.rejected) == (3, samples.JSONL_BAD)
    assert get_paper(store, "2604.00001").extra == {"jsonl": {"mine": {"k": [1]}}}
    own = get_paper(store, "id:local-7")
    assert (own.authors, own.day, own.imported_votes) == (("A B", "C D"), date(2025, 1, 1), 3)
    with store.reading() as connection:
        positions = connection.scalars(select(RejectedItem.position)).all()
    assert positions == ["line 4", "line 5", "line 6", "line 7"]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b'{"title": "x"}\n{"title": "y"}', "jsonl"),
        (b'\xef\xbb\xbf{"title": "x"}', "jsonl"),
        (b'{\n "papers": []\n}', "json"),
        (b"[{}]", "json"),
        (samples.atom([]), "arxiv"),
        (samples.RSS, "feed"),
        (samples.ATOM_FEED, "feed"),
        (samples.BIBTEX.encode(), "bibtex"),
        (b"% a comment\n@article{x,}", "bibtex"),
    ],
)
def test_the_kind_is_found_out(body, kind):
    assert sniff(body) == kind


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([kind for kind in KINDS if kind != "archive"]))
def test_no_bytes_break_a_reader(body, kind):
    try:
        items = list(read_body(body, kind))
    except ValueError:  # a whole answer that cannot be read
        return
    assert all(raw.item is not None or raw.reason for raw in items)


_JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["id", "title", "summary", "authors", "name", "paper", "publishedAt", "upvotes", "githubRepo", "organization", "ai_keywords", "doi", "url", "date", "year"]), x, max_size=6), max_leaves=12)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(_JSON)
def test_no_json_breaks_the_reader(data):
    try:
        item = huggingface.read_plain(data)
    except BadItem:
        return
    assert item.title
    assert len(item.key) <= 500


# --- twice is once; sources are merged


@pytest.mark.parametrize(
    ("name", "body"),
    [("a.json", json.dumps(samples.HF_DAY).encode()), ("a.xml", samples.atom([samples.entry("2410.01623v1")])), ("a.rss", samples.RSS), ("a.bib", samples.BIBTEX.encode()), ("a.jsonl", samples.JSONL.encode()), ("a.jsonl.gz", gzip.compress(samples.JSONL.encode()))],
)  # fmt: skip
def test_importing_twice_changes_nothing(store, tmp_path, name, body):
    path = tmp_path / name
    path.write_bytes(body)
    first = Importer(store).run(str(path))
    papers, bad = rows(store), reasons(store)
    assert papers
    again = Importer(store).run(str(path))
    assert (again.counts.added, again.counts.updated) == (0, 0)
    assert again.counts.unchanged == first.counts.added
    assert rows(store) == papers
    assert reasons(store) == bad


def test_the_same_paper_from_several_sources_is_one(store, tmp_path):
    (tmp_path / "hf.json").write_text(json.dumps([{"paper": {"id": "2410.01623", "title": "Flows on graphs", "upvotes": 9, "submittedOnDailyAt": "2024-10-05T00:00:00Z"}}]))  # fmt: skip
    (tmp_path / "ax.xml").write_bytes(samples.atom([samples.entry("2410.01623v2", published="2024-10-02T00:00:00Z")]))
    (tmp_path / "b.bib").write_text(
        "@article{x, title={Flows}, author={A}, year={2024}, doi={10.1000/EXAMPLE.7}, keywords={flows}}"
    )
    for name in ("hf.json", "ax.xml", "b.bib"):
        Importer(store).run(str(tmp_path / name))
    assert count_papers(store) == 1
    paper = get_paper(store, "2410.01623")
    assert (paper.imported_votes, paper.version, paper.keywords) == (9, 2, ("flows",))
    assert paper.abstract == "We study flows."
    assert paper.day == date(2024, 10, 5), "the day of a daily list stands above the day of publication"
    everything = rows(store)
    for name in ("b.bib", "ax.xml", "hf.json"):
        Importer(store).run(str(tmp_path / name))
    assert rows(store) == everything


def test_a_paper_known_by_its_doi_gets_its_arxiv_name(store, tmp_path):
    (tmp_path / "b.bib").write_text("@article{x, title={Flows}, author={A}, year={2003}, doi={10.1000/Example.7}}")
    (tmp_path / "ax.xml").write_bytes(samples.atom([samples.entry("2410.01623v2")]))
    Importer(store).run(str(tmp_path / "b.bib"))
    Importer(store).run(str(tmp_path / "ax.xml"))
    assert [row[1] for row in rows(store)] == ["2410.01623"]


def test_names_that_turn_out_to_be_one_paper_within_a_file(store, tmp_path):
    lines = [
        {"title": "Flows", "doi": "10.1000/x", "year": 2003, "keywords": ["a"]},
        {"title": "Flows", "arxiv": "2410.01623", "doi": "10.1000/X", "year": 2003, "keywords": ["b"]},
        {"title": "Flows", "arxiv": "2410.01623", "year": 2003, "keywords": ["c"]},
        {"title": "Other", "arxiv": "2410.09999", "doi": "10.1000/x", "year": 2003},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    for _ in range(3):
        Importer(store).run(str(path))
        assert sorted(row[1] for row in rows(store)) == ["2410.01623", "2410.09999"]
        assert set(get_paper(store, "2410.01623").keywords) == {"a", "b", "c"}
    final = rows(store)
    Importer(store).run(str(path))
    assert rows(store) == final


def test_a_record_that_learns_its_arxiv_id_joins_the_reader_s_import(store):
    from corollary.web.importers.write import Counts, write_papers
    from corollary.web.store import Note, Reader, Vote

    def item(**more) -> Item:
        return Item(**{"title": "T", "day": date(2024, 1, 1), "source": "first-issue", "slug": "some", **more})

    with store.writing() as session:
        write_papers(session, [item(key="title:x", summary="Ours.")], Counts())
        write_papers(
            session, [item(key="2410.01623", arxiv="2410.01623", slug=None, source="arxiv", abstract="Theirs.")], Counts()
        )
        session.add_all([Reader(name="a"), Reader(name="b")])
        session.flush()
        session.add_all([Vote(reader_id=1, paper_id=1), Vote(reader_id=2, paper_id=1), Vote(reader_id=2, paper_id=2), Note(reader_id=1, paper_id=1, text="n")])  # fmt: skip
    with store.writing() as session:
        write_papers(session, [item(key="2410.01623", arxiv="2410.01623", summary="Ours.")], Counts())
    assert count_papers(store) == 1
    paper = get_paper(store, "some")
    assert (paper.key, paper.summary, paper.abstract, paper.own_votes) == ("2410.01623", "Ours.", "Theirs.", 2)
    with store.reading() as connection:
        assert connection.execute(select(Note.paper_id)).all() == [(paper.id,)]


_VALUES = st.fixed_dictionaries(
    {
        "source": st.sampled_from(["arxiv", "huggingface", "feed"]), "version": st.none() | st.integers(1, 3), "title": st.sampled_from(["A", "B"]),
        "abstract": st.sampled_from(["", "x", "y"]), "imported_votes": st.none() | st.integers(0, 9), "code": st.sampled_from([None, "https://github.com/a/b", "https://github.com/c/d"]),
        "keywords": st.lists(st.sampled_from("abc"), max_size=2, unique=True).map(tuple), "listed": st.booleans(), "day": st.dates(date(2024, 1, 1), date(2024, 1, 9)),
    }
)  # fmt: skip


@given(_VALUES, st.lists(_VALUES, min_size=1, max_size=4))
def test_merging_the_same_item_again_changes_nothing_and_votes_never_fall(first, others):
    row = {
        **{name: getattr(Item(key="k", **first), name) for name in _FIELDS},
        "extra": {"listed": True} if first["listed"] else {},
    }
    for values in others:
        item = Item(key="k", **values)
        once = merge(row, item)
        if item.listed:
            once["extra"] = {**once["extra"], "listed": True}
        assert merge(once, item) == once
        assert (once["imported_votes"] or 0) >= (row["imported_votes"] or 0)
        assert set(once["keywords"]) >= set(row["keywords"])
        row = once


# --- the network


def test_arxiv_is_paged_and_its_empty_pages_are_asked_for_again(store):
    entries = [samples.entry(f"2401.{i:05d}v1", f"Paper {i}") for i in range(2300)]
    empty = {"2000": 2}

    def answer(path, _):
        query = dict(httpx.QueryParams(path.partition("?")[2]))
        start, count = int(query["start"]), int(query["max_results"])
        assert count <= 2000
        assert query["search_query"] == "cat:cs.LG"
        if empty.get(query["start"], 0):
            empty[query["start"]] -= 1
            return 200, {}, samples.atom([], total=2300, start=start)
        return 200, {}, samples.atom(entries[start : start + count], total=2300, start=start)

    with serving(answer) as server:
        importer = Importer(store, local(store), arxiv=server.url)
        report = importer.run("arxiv:cs.LG")
        assert (report.counts.added, report.counts.rejected) == (2300, 0)
        assert len(server.asked) == 5
        again = importer.run("arxiv:cs.LG")
        assert again.counts.unchanged == 1000, "newest first: a page of known papers ends it"
        assert importer.run("arxiv:cs.LG", limit=40).counts.unchanged == 40


def test_arxiv_is_asked_once_in_three_seconds_by_all_processes(tmp_path):
    fetcher = Fetcher(tmp_path)
    assert fetcher.intervals["export.arxiv.org"] == 3.0
    import threading
    import time

    times = []

    def ask() -> None:
        with fetch.Pace(tmp_path, "export.arxiv.org", 0.2).turn():
            times.append(time.monotonic())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times.sort()
    assert min(b - a for a, b in pairwise(times)) >= 0.19


def test_an_error_entry_alone_fails_the_import_and_is_kept(store):
    with (
        serving(lambda *_: (200, {}, samples.atom([samples.ERROR_ENTRY]))) as server,
        pytest.raises(ImportFailed, match="error"),
    ):
        Importer(store, local(store), arxiv=server.url).run("arxiv:1234.12345")
    assert reasons(store) == ["the API answers with an error: incorrect id format for 1234.12345"]


def test_hugging_face_days_with_etag(store):
    def answer(path, headers):
        day = path.partition("date=")[2]
        if headers.get("if-none-match") == f'"{day}"':
            return 304, {}, b""
        body = json.dumps(
            [{"paper": {"id": f"26{day[5:7]}.{day[8:10]:0>5}", "title": f"Of {day}"}, "publishedAt": f"{day}T00:00:00Z"}]
        )
        return 200, {"ETag": f'"{day}"', "Content-Type": "application/json"}, body.encode()

    with serving(answer) as server:
        importer = Importer(store, local(store), huggingface=f"{server.url}/api/daily_papers")
        report = importer.run("hf:2026-05-01..2026-05-04")
        assert (report.counts.added, report.unmodified) == (4, False)
        again = importer.run("hf:2026-05-01..2026-05-04")
        assert again.unmodified
        assert again.counts.added == again.counts.unchanged == 0
        assert [path for path, _ in server.asked] == 2 * [f"/api/daily_papers?date=2026-05-0{i}" for i in (1, 2, 3, 4)]
        assert importer.run("hf").counts.added > 0


def test_faults_are_tried_again_as_the_server_asks(store):
    waits: list[float] = []
    answers = iter([(503, {"Retry-After": "7"}, b""), (429, {}, b""), (500, {}, b""), (200, {}, samples.RSS)])
    fetcher = Fetcher(store.folder, allow_private=True, wait=waits.append)
    with serving(lambda *_: next(answers)) as server:
        assert Importer(store, fetcher).run(f"{server.url}/feed").counts.added == 2
    assert waits[0] >= 7
    assert len(waits) == 3
    with serving(lambda *_: (503, {}, b"")) as server, pytest.raises(ImportFailed, match="5 tries"):
        Importer(store, fetcher).run(f"{server.url}/feed")
    with serving(lambda *_: (404, {}, b"")) as server, pytest.raises(ImportFailed, match="404"):
        Importer(store, fetcher).run(f"{server.url}/feed")


def test_an_answer_that_breaks_off_is_not_taken_for_whole(store):
    packed = gzip.compress(samples.RSS)
    answers = iter([(200, {"Content-Encoding": "gzip"}, packed[:-20]), (200, {"Content-Encoding": "gzip"}, packed)])
    with serving(lambda *_: next(answers)) as server:
        assert Importer(store, local(store)).run(f"{server.url}/feed").counts.added == 2


# --- where it may not go, and what it may not bring


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1/x", "http://localhost:8000/", "http://169.254.169.254/latest/meta-data/", "http://[::1]/", "http://10.0.0.1/", "http://192.168.1.1/", "http://172.16.3.4/", "http://0.0.0.0/", "http://[::ffff:127.0.0.1]/", "http://[64:ff9b::7f00:1]/", "http://[fe80::1]/", "http://[fd00::1]/", "http://2130706433/", "http://0x7f.1/", "http://100.64.0.1/", "http://[2002:7f00:1::]/"],
)  # fmt: skip
def test_addresses_inside_are_refused(tmp_path, url):
    with pytest.raises(Refused, match="not a public address"):
        Fetcher(tmp_path, wait=lambda _: None).get(url)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "gopher://example.org/", "http://user:secret@example.org/", "http:///x"])
def test_other_schemes_and_passwords_are_refused(tmp_path, url):
    with pytest.raises(FetchError) as caught:
        Fetcher(tmp_path, wait=lambda _: None).get(url)
    assert "secret" not in str(caught.value)


def test_a_redirect_inside_is_refused(tmp_path, monkeypatch):
    with serving(lambda path, _: (302, {"Location": "http://169.254.169.254/latest"}, b"")) as server:
        real = fetch._public
        monkeypatch.setattr(
            fetch, "_public", lambda ip: ip == "127.0.0.1" or real(ip)
        )  # the first hop stands for a public host
        with pytest.raises(Refused, match=r"169\.254\.169\.254"):
            Fetcher(tmp_path, wait=lambda _: None).get(server.url)


def test_a_name_is_resolved_once_and_connected_to_as_checked(tmp_path, monkeypatch):
    answers = iter([[(2, 1, 6, "", ("127.0.0.1", 80))], [(2, 1, 6, "", ("10.0.0.1", 80))]])
    resolver = SimpleNamespace(getaddrinfo=lambda *_, **__: next(answers), gaierror=OSError, SOCK_STREAM=1)
    monkeypatch.setattr(fetch, "socket", resolver)
    with serving(lambda path, headers: (200, {}, headers["host"].encode())) as server:
        port = server.url.rpartition(":")[2]
        got = Fetcher(tmp_path, allow_private=True).get(f"http://papers.example.org:{port}/a")
    assert got.body == f"papers.example.org:{port}".encode()


def test_redirects_end(tmp_path):
    with (
        serving(lambda path, _: (302, {"Location": path + "x"}, b"")) as server,
        pytest.raises(FetchError, match="5 redirects"),
    ):
        Fetcher(tmp_path, allow_private=True).get(server.url)


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({}, b"x" * 300_000),
        ({"Content-Encoding": "gzip"}, gzip.compress(b"0" * 50_000_000)),
        ({"Content-Encoding": "deflate"}, __import__("zlib").compress(b"0" * 50_000_000)),
    ],
)
def test_oversized_and_bomb_packed_answers_are_stopped(tmp_path, headers, body):
    with serving(lambda *_: (200, headers, body)) as server, pytest.raises(FetchError, match="bytes"):
        Fetcher(tmp_path, allow_private=True, max_bytes=200_000, wait=lambda _: None).get(server.url)


def test_packings_not_asked_for_and_damaged_ones_are_refused(tmp_path):
    with (
        serving(lambda *_: (200, {"Content-Encoding": "br"}, b"x")) as server,
        pytest.raises(FetchError, match="not asked for"),
    ):
        Fetcher(tmp_path, allow_private=True).get(server.url)
    with (
        serving(lambda *_: (200, {"Content-Encoding": "gzip"}, b"no gzip")) as server,
        pytest.raises(FetchError, match="damaged"),
    ):
        Fetcher(tmp_path, allow_private=True, wait=lambda _: None).get(server.url)


_BOMB = b"""<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]><feed xmlns="http://www.w3.org/2005/Atom"><entry><title>&b;</title></entry></feed>"""
_FILE = b"""<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><feed xmlns="http://www.w3.org/2005/Atom"><entry><title>&e;</title></entry></feed>"""


@pytest.mark.parametrize("body", [_BOMB, _FILE])
@pytest.mark.parametrize("kind", ["arxiv", "feed"])
def test_entities_are_not_read(body, kind):
    with pytest.raises(arxiv.BadAnswer):
        list(read_body(body, kind))


def test_a_secret_in_an_address_is_not_written_down(store):
    with serving(lambda *_: (200, {}, samples.RSS)) as server:
        Importer(store, local(store)).run(f"{server.url}/feed?token=hunter2")
    with serving(lambda *_: (404, {}, b"")) as server, pytest.raises(ImportFailed) as caught:
        Importer(store, local(store)).run(f"{server.url}/feed?token=hunter2")
    assert "hunter2" not in str(caught.value)
    with store.reading() as connection:
        runs = connection.execute(select(ImportRun.source, ImportRun.error)).all()
    assert "hunter2" not in str(runs)


def test_lines_without_end_do_not_fill_the_memory(store):
    body = io.BytesIO(b'{"title": "' + b"x" * 5_000_000 + b'"}\n{"title": "Next", "year": 2020}\n')
    report = Importer(store).run("-", stdin=body)
    assert (report.counts.added, report.counts.rejected) == (1, 1)
    assert "over 1000000" in reasons(store)[0]


# --- names of sources


@pytest.mark.parametrize(
    "text",
    ["hf:2026-99-01", "hf:2026-05-09..2026-05-01", "hf:1900-01-01..2026-01-01", "arxiv:", "ftp://x/y", "no/such/file", ""],
)
def test_a_source_that_is_none_says_what_would_be(text):
    with pytest.raises(ValueError, match=r"source|file"):
        named(text)


def test_questions_to_arxiv():
    assert (
        arxiv_address("b", "cs.LG", 0, 9)
        == "b?search_query=cat%3Acs.LG&sortBy=submittedDate&sortOrder=descending&start=0&max_results=9"
    )
    assert (
        arxiv_address("b", "2410.01623,hep-ex/0307015v2", 0, 9) == "b?id_list=2410.01623,hep-ex/0307015v2&start=0&max_results=9"
    )
    assert 'search_query=all%3A%22low%20rank%22' in arxiv_address("b", 'all:"low rank"', 0, 9)  # fmt: skip


# --- killed


def test_an_import_killed_anywhere_loses_and_repeats_nothing(tmp_path):
    items = [{"title": f"Paper {i}", "id": f"x{i}", "year": 2000, "votes": i} for i in range(45)]
    items.insert(20, {"title": ""})
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, items)))

    def run(folder: Path):
        opened = open_store(f"sqlite:///{folder / 'daily.sqlite'}")
        from corollary.web.importers import run as module

        module.Importer._write.__defaults__ = (10,)  # small batches, so that there are many places to be killed at
        report = Importer(opened).run(str(path))
        opened.close()
        return report

    whole = tmp_path / "whole"
    assert not killed(10_000, lambda: run(whole))
    reference = open_store(f"sqlite:///{whole / 'daily.sqlite'}")
    wanted = [row[1:-2] for row in rows(reference)]
    reference.close()
    for n in range(1, 60, 6):
        folder = tmp_path / f"k{n}"
        open_store(f"sqlite:///{folder / 'daily.sqlite'}").close()
        was_killed = killed(n, lambda folder=folder: run(folder))
        assert not killed(10_000, lambda folder=folder: run(folder))
        opened = open_store(f"sqlite:///{folder / 'daily.sqlite'}")
        assert [row[1:-2] for row in rows(opened)] == wanted, n
        assert len(reasons(opened)) == 1
        with opened.reading() as connection:
            runs = connection.execute(select(ImportRun.state, ImportRun.added, ImportRun.rejected)).all()
        assert {state for state, _, _ in runs} == {"done"}
        assert sum(added for _, added, _ in runs) == 45, "counted once, before or after"
        opened.close()
        if not was_killed:
            break
    else:
        pytest.fail("more statements than are tried here")

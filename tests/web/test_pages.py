"""The pages as they come over the wire, without scripts: what they show, what they refuse, and what they never let through."""

from __future__ import annotations

import json
import logging
import re
from datetime import date

import pytest
from sqlalchemy import select
from tests.web.filled import page

from corollary.claims.record import catalogue
from corollary.claims.store import published_results
from corollary.web.guard import Sessions
from corollary.web.guard.kept import Kept, Pages
from corollary.web.importers import Importer
from corollary.web.search import catch_up
from corollary.web.settings import Settings
from corollary.web.store import TRENDING_FORMULA, Note, Reader, SavedSearch, get_paper, papers_of_day

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>'


@pytest.fixture
def store(issue_store):
    return issue_store


@pytest.fixture
def client(store):
    with page(store) as made:
        yield made


def csrf(client, path="/trending"):
    return re.search(r'name="csrf" value="([^"]+)"', client.get(path).text)[1]


def send(client, path, **fields):
    return client.post(path, data={"csrf": csrf(client), **fields}, follow_redirects=False)


def load(store, tmp_path, *papers):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(p) + "\n" for p in papers))
    Importer(store).run(str(tmp_path / "p.jsonl"))
    catch_up(store)


# ------------------------------------------------------------------------------------------------------------------ lists


def test_a_day_shows_its_papers_and_leads_on(client, store):
    shown = client.get("/day/2024-10-02").text
    assert "Fira: Can We Achieve" in shown
    assert "Wednesday, 2 October 2024" in shown
    before, later = re.search(r'rel="prev"[^>]*href="(/day/[^"]+)"', shown)[1], re.search(r'rel="next"[^>]*href="(/day/[^"]+)"', shown)[1]  # fmt: skip
    assert before < "/day/2024-10-02" < later
    assert client.get(before).status_code == client.get(later).status_code == 200
    assert re.search(r"\d+ of \d+ claims hold here", shown)
    assert "corollary verify fira" in shown
    assert client.get("/day?date=2024-10-02", follow_redirects=False).headers["location"] == "/day/2024-10-02"


def test_an_empty_day_leads_to_the_nearest(client):
    answer = client.get("/day/2024-10-03", follow_redirects=True)
    assert answer.url.path == "/day/2024-10-02"
    assert "No papers on Thursday, 3 October 2024" in answer.text


@pytest.mark.parametrize("path", ["/day/2024-13-01", "/day/x", "/week/2024-W60", "/week/2024", "/month/2024-00", "/month/12", "/day/2024-10-02?after=x", "/nothing", "/papers/none", "/runs/99", "/runs/x"])  # fmt: skip
def test_an_address_of_nothing_says_so(client, path):
    answer = client.get(path)
    assert answer.status_code == 404
    assert "<h1>Not found</h1>" in answer.text


def test_week_month_and_trending(client):
    week = client.get("/week/2024-W40").text
    assert "Fira" in week
    assert 'href="/day/2024-10-02"' in week
    assert "Fira" in client.get("/month/2024-10").text
    assert "/month/2024-09" in client.get("/month/2024-10").text
    assert TRENDING_FORMULA in client.get("/trending").text


def test_imported_votes_stand_apart_from_ours(client, store, tmp_path):
    load(store, tmp_path, {"id": "2501.00001", "title": "Counted elsewhere", "date": "2025-01-05", "votes": 1234})
    number = get_paper(store, "2501.00001").id
    assert re.search(r"<b>1,234</b> imported", client.get("/day/2025-01-05").text)
    send(client, "/vote", paper=number, on=1)
    shown = client.get("/day/2025-01-05").text
    assert 'aria-pressed="true"' in shown
    assert re.search(r"<b>1</b><span class=\"unseen\"> vote here", shown)
    assert re.search(r"<b>1,234</b> imported", shown)


def test_an_empty_store_says_how_papers_come_in(tmp_path):
    from corollary.web.store import open_store

    store = open_store(f"sqlite:///{tmp_path / 'empty.sqlite'}")
    with page(store) as client:
        assert "corollary daily import first-issue" in client.get("/").text
        assert client.get("/trending").status_code == client.get("/search?q=x").status_code == client.get("/methods").status_code == 200  # fmt: skip
    store.close()


# ------------------------------------------------------------------------------------------------------------- one paper


def test_every_method_has_its_page(client):
    """Each record's page shows each claim, every deviation's first words and the lines to import."""
    for slug, paper in catalogue().items():
        answer = client.get(f"/papers/{slug}", follow_redirects=True)
        assert answer.status_code == 200, slug
        for claim in paper.claims:
            assert f'id="{claim.id}"' in answer.text, (slug, claim.id)
        assert f"corollary verify {slug} --controls" in answer.text
        assert f"from {paper.components[0].object.rpartition('.')[0]} import" in answer.text
        assert ("Where we deviate" in answer.text) == bool(paper.deviations)


def test_a_verdict_is_shown_with_effect_and_interval(client):
    last = [json.loads(line) for line in (published_results() / "fira.jsonl").read_text().splitlines()][-1]
    shown = client.get("/papers/2410.01623").text
    assert "95% interval" in shown
    assert "<svg" in shown
    assert last["commit"][:12] in shown


def test_a_paper_is_found_under_every_name(client):
    for name in ("fira", "arXiv:2410.01623v2", "https://arxiv.org/abs/2410.01623"):
        answer = client.get(f"/papers/{name}", follow_redirects=False)
        assert answer.headers["location"] == "/papers/2410.01623", name


def test_a_paper_without_a_record_names_the_nearest_that_runs(client, store, tmp_path):
    load(store, tmp_path, {"id": "2501.00002", "title": "Gradient low-rank projection for memory-efficient training",
                           "abstract": "A low-rank projection of gradients saves optimizer memory in language model pre-training.", "date": "2025-01-06"})  # fmt: skip
    shown = client.get("/papers/2501.00002").text
    assert "Nearest methods that run here" in shown
    assert "Similar papers" in shown
    assert re.search(r"corollary verify [\w-]+", shown)


# --------------------------------------------------------------------------------------------------- catalogue and search


def test_the_catalogue_filters(client):
    whole = client.get("/methods").text
    assert whole.count('class="card method"') == len(catalogue())
    for package in {paper.package for paper in catalogue().values()}:
        found = client.get(f"/methods?package={package}").text
        assert found.count('class="card method"') == sum(p.package == package for p in catalogue().values())
    assert client.get("/methods?verdict=supported&evidence=strong").text.count('class="card method"') >= 1
    assert "No method fits" in client.get("/methods?q=thereisnosuchword").text


def test_search_marks_its_hits_and_is_saved(client, store):
    shown = client.get("/search?q=low-rank+optimizer+that+saves+memory").text
    assert "<mark>" in shown
    assert "Fira" in shown
    assert send(client, "/searches", q="low-rank optimizer", name="mine", category="cs.LG").status_code == 303
    with store.reading() as connection:
        saved = connection.execute(select(SavedSearch.name, SavedSearch.query, SavedSearch.filters)).one()
    assert tuple(saved) == ("mine", "low-rank optimizer", {"category": "cs.LG"})
    assert "/search?q=low-rank+optimizer&amp;category=cs.LG" in client.get("/desk").text


@pytest.mark.parametrize("query", ["'; DROP TABLE papers; --", '" OR 1=1', "NEAR(a b)", "title:*", "a AND OR NOT", "^*", "{}[]()", "%00", "\\", "𝕏" * 50, '"', "-", "author:", "arxiv:"])  # fmt: skip
def test_syntax_in_a_query_is_words(client, store, query):
    assert client.get("/search", params={"q": query}).status_code == 200
    assert get_paper(store, "fira") is not None


def test_a_query_is_not_endless(client):
    assert client.get("/search", params={"q": "a " * 6000}).status_code == 414


def test_htmx_gets_the_hits_alone(client):
    answer = client.get("/search?q=optimizer", headers={"hx-request": "true"})
    assert "<html" not in answer.text
    assert "<mark>" in answer.text


# ----------------------------------------------------------------------------------------------------------------- desk


def test_reading_list_and_note(client, store):
    number = get_paper(store, "fira").id
    assert send(client, "/reading", paper=number, state="unread").headers["location"] == "/"
    assert "Fira" in client.get("/desk").text
    send(client, "/reading", paper=number, state="read")
    send(client, "/note", paper=number, text=EVIL)
    shown = client.get("/papers/2410.01623").text
    assert "&lt;script&gt;" in shown
    assert EVIL not in shown
    send(client, "/note", paper=number, text="")
    with store.reading() as connection:
        assert connection.scalar(select(Note.text)) is None
    send(client, "/reading", paper=number, state="")
    assert "“Read later” on any card" in client.get("/desk").text


# ------------------------------------------------------------------------------------------------------------- security


def test_scripts_in_papers_are_text(client, store, tmp_path):
    load(store, tmp_path, {"id": "2501.00003", "title": f"Evil {EVIL}", "abstract": f"low-rank {EVIL}", "authors": [EVIL], "date": "2025-01-07",
                           "url": "javascript:alert(1)", "code": "javascript:alert(2)", "keywords": [EVIL], "comment": EVIL, "venue": EVIL})  # fmt: skip
    for path in ("/day/2025-01-07", "/papers/2501.00003", "/search?q=evil", f"/search?q={EVIL}", "/trending", "/month/2025-01"):
        shown = client.get(path).text
        assert "<script>alert" not in shown, path
        assert "<img src=x" not in shown, path
        assert 'href="javascript:' not in shown, path


def test_every_answer_forbids_what_pages_do_not_need(client):
    for path in ("/", "/papers/2410.01623", "/nothing", "/api/papers/2410.01623", "/static/web.css", "/feeds/papers.rss"):
        headers = client.get(path).headers
        assert "script-src 'self'" in headers["content-security-policy"], path
        assert "unsafe" not in headers["content-security-policy"]
        assert (headers["x-content-type-options"], headers["x-frame-options"]) == ("nosniff", "DENY")


def test_no_page_has_inline_scripts_or_styles_or_loads_from_elsewhere(client):
    for path in ("/", "/papers/2410.01623", "/methods", "/search?q=optimizer", "/desk", "/runs", "/month/2024-10", "/api"):
        shown = client.get(path).text
        assert not re.search(r"<script(?![^>]*\ssrc=)", shown), path
        assert not re.search(r"\son\w+=|\sstyle=|<style", shown), path
        assert not re.search(r"<(?:script|img|link|iframe)[^>]+(?:src|href)=\"(?:https?:)?//", shown), path


@pytest.mark.parametrize("path", ["/vote", "/reading", "/note", "/searches", "/runs", "/runs/1/cancel", "/searches/1/delete"])
def test_a_form_of_another_site_is_refused(client, path):
    fields = {"paper": 1, "on": 1, "state": "unread", "text": "x", "q": "x", "slug": "fira"}
    assert client.post(path, data=fields).status_code == 403
    token = csrf(client)
    elsewhere = client.post(path, data={**fields, "csrf": token}, headers={"origin": "https://evil.example"})
    assert elsewhere.status_code == 403
    assert "another site" in elsewhere.text
    assert client.post(path, data={**fields, "csrf": token}, headers={"sec-fetch-site": "cross-site"}).status_code == 403
    client.cookies.clear()  # the token of another session
    assert client.post(path, data={**fields, "csrf": token}).status_code == 403


def test_a_form_leads_back_to_this_site_alone(client, store):
    number = get_paper(store, "fira").id
    for evil in ("https://evil.example", "//evil.example", "/\\evil.example", "javascript:alert(1)"):
        assert send(client, "/vote", paper=number, on=1, next=evil).headers["location"] == "/"


def test_another_host_is_not_served(client):
    assert client.get("/", headers={"host": "evil.example"}).status_code == 421  # a name that was rebound to this machine


def test_large_bodies_are_not_read(client):
    assert client.post("/note", content=b"x" * 1_100_000, headers={"content-type": "application/x-www-form-urlencoded"}).status_code == 413  # fmt: skip
    chunked = client.post("/note", content=(b"x" * 100_000 for _ in range(20)), headers={"content-type": "application/x-www-form-urlencoded"})  # fmt: skip
    assert chunked.status_code == 413


def test_an_unforeseen_failure_is_a_page_and_its_log_has_no_address(client, monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("boom")

    monkeypatch.setattr("corollary.web.pages.search.search", broken)
    with caplog.at_level(logging.ERROR):
        answer = client.get("/search?q=my-secret-words")
    assert answer.status_code == 500
    assert "Something went wrong" in answer.text
    assert "boom" not in answer.text
    assert "my-secret-words" not in caplog.text
    assert "content-security-policy" in answer.headers


# ------------------------------------------------------------------------------------------------------------------ labs


@pytest.fixture
def lab(store):
    settings = Settings(address="https://papers.example.org", lab=True, jobs=False)
    with page(store, settings=settings) as made:
        yield made


def reader_of(store, name, **rights):
    with store.writing() as session:
        row = Reader(name=name, settings=rights)
        session.add(row)
        session.flush()
        return row.id


def enter(lab, store, number):
    sessions = lab.app.state.sessions
    path = "/" + sessions.link(number).split("/", 3)[3]
    token = re.search(r'name="csrf" value="([^"]+)"', lab.get(path).text)[1]
    return lab.post(path, data={"csrf": token}, headers={"origin": "https://papers.example.org"}, follow_redirects=False)


def test_a_lab_needs_signing_in_to_change_anything(lab, store):
    assert lab.get("/day/2024-10-02").status_code == 200
    assert lab.get("/desk", follow_redirects=False).headers["location"] == "/sign-in?next=%2Fdesk"
    assert send(lab, "/vote", paper=1, on=1).headers["location"].startswith("/sign-in")
    ada = reader_of(store, "Ada")
    assert enter(lab, store, ada).status_code == 303
    assert lab.get("/desk").status_code == 200
    assert send(lab, "/vote", paper=1, on=1).headers["location"] == "/"
    assert send(lab, "/runs", slug="fira").status_code == 403  # not allowed to this reader
    send(lab, "/sign-out")
    assert lab.get("/desk", follow_redirects=False).status_code == 303


def test_a_link_works_once_and_guesses_are_counted(lab, store):
    sessions: Sessions = lab.app.state.sessions
    path = "/" + sessions.link(reader_of(store, "Ada")).split("/", 3)[3]
    token = csrf(lab)
    assert lab.post(path, data={"csrf": token}, follow_redirects=False).status_code == 303
    lab.cookies.clear()
    token = csrf(lab)
    assert lab.post(path, data={"csrf": token}).status_code == 403
    tried = [lab.post(f"/sign-in/guess-{i}", data={"csrf": token}).status_code for i in range(30)]
    assert tried[-1] == 429
    assert set(tried) == {403, 429}


def test_a_forged_cookie_is_nobody(lab, store):
    ada = reader_of(store, "Ada")
    enter(lab, store, ada)
    name = lab.app.state.sessions.cookie_name
    own = lab.cookies[name]
    lab.cookies.clear()
    for forged in (own.replace(f".{ada}.", f".{ada + 1}."), own[:-2] + "AA", "x", "a.b.c.d.e", "." * 5):
        assert lab.get("/desk", headers={"cookie": f"{name}={forged}"}, follow_redirects=False).status_code == 303


def test_notes_are_their_readers_own(lab, store):
    enter(lab, store, reader_of(store, "Ada"))
    send(lab, "/note", paper=get_paper(store, "fira").id, text="seen by Ada alone")
    assert "seen by Ada alone" in lab.get("/papers/2410.01623").text
    lab.cookies.clear()
    assert "seen by Ada alone" not in lab.get("/papers/2410.01623").text
    enter(lab, store, reader_of(store, "Bob"))
    assert "seen by Ada alone" not in lab.get("/papers/2410.01623").text


def test_a_closed_lab_shows_nothing_to_strangers(store):
    settings = Settings(address="https://papers.example.org", lab=True, open_reading=False, jobs=False)
    with page(store, settings=settings) as lab:
        for path in ("/", "/day/2024-10-02", "/papers/2410.01623", "/methods", "/search?q=x", "/trending", "/runs"):
            assert lab.get(path, follow_redirects=False).headers["location"].startswith("/sign-in"), path
        assert lab.get("/sign-in").status_code == lab.get("/static/web.css").status_code == 200
        enter(lab, store, reader_of(store, "Ada"))
        assert "Fira" in lab.get("/day/2024-10-02").text
        lab.cookies.clear()
        assert lab.get("/day/2024-10-02", follow_redirects=False).status_code == 303  # though the page was kept


def test_a_kept_page_gives_way_to_what_is_new(client, store, tmp_path):
    assert len(papers_of_day(store, date(2024, 10, 2)).papers) == client.get("/day/2024-10-02").text.count(
        '<article class="card"'
    )
    load(store, tmp_path, {"id": "2410.99999", "title": "Came in later", "date": "2024-10-02"})
    assert "Came in later" in client.get("/day/2024-10-02").text


def test_pages_are_kept_within_a_budget():
    """The newest as they are; of the others those that were asked for again."""
    pages = Pages(fresh=10_000, pressed=400)
    for i in range(30):
        pages.put(i, Kept(200, [(b"n", str(i).encode())], bytes([65 + i]) * 1000))
        assert pages.get(3) is not None or i < 3
    assert [i for i in range(30) if pages.get(i) is not None] == [3, *range(21, 30)]
    assert pages.get(3).body == b"D" * 1000  # asked for each time, it has never been the oldest
    for i in range(30, 60):
        pages.put(i, Kept(200, [], bytes([65 + i]) * 1000))
    kept = [i for i in range(60) if pages.get(i) is not None]
    assert kept[-10:] == [*range(50, 60)]
    assert len(kept) > 10, "of the older, those asked for again are pressed"
    assert all(pages.get(i).body == bytes([65 + i]) * 1000 and pages.get(i).headers is not None for i in kept)
    for i in range(100, 500):
        pages.put(i, Kept(200, [], b"x" * 1000))
        pages.get(i)
    assert len([i for i in range(500) if pages.get(i) is not None]) < 10 + 400 / 15, (
        "a thousand equal letters take some 15 bytes"
    )
    pages.put("large", Kept(200, [], b"x" * (2**20 + 1)))
    assert pages.get("large") is None
    pages.clear()
    assert pages.get(59) is None


@pytest.mark.parametrize(
    "path", ["/", "/day/2024-10-02", "/papers/2410.01623", "/api/corollary/similar/fira", "/api/papers/fira"]
)
def test_answers_without_a_thread_are_the_same(store, path):
    with page(store) as client:
        before = client.get(path)
    with page(store) as client:
        client.app.state.ready.set()
        after = client.get(path)
    hide = re.compile(rb'name="csrf" value="[^"]+"')
    assert after.status_code == before.status_code == 200
    assert hide.sub(b"", after.content) == hide.sub(b"", before.content)

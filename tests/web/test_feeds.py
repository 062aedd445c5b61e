"""Feeds: every list in three formats, valid, escaped, and read back the same by a feed reader."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from xml.etree import ElementTree as ET

import feedparser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.web.filled import HERE, page

from corollary.web.feeds.write import Entry, Feed, atom, json_feed, rss
from corollary.web.guard.sessions import OWN_READER
from corollary.web.settings import Settings
from corollary.web.store import Paper, Reader, ReadingItem, papers_of_day, record_verdicts

AT = datetime(2024, 10, 2, 17, 58, 46, tzinfo=UTC)
LISTS = (
    "papers", "day/2024-10-02", "week/2024-W40", "month/2024-10", "trending", "search", "methods", "verdicts",
)  # fmt: skip


@pytest.fixture
def full(issue_store):
    store = issue_store
    record_verdicts(store, [{"slug": "fira", "claim": "c", "verdict": "inconclusive", "statement": "A < B & C"}])
    record_verdicts(store, [{"slug": "fira", "claim": "c", "verdict": "supported at this scale", "statement": "A < B & C"}])
    return store


@pytest.mark.parametrize("path", LISTS)
def test_every_list_has_three(full, path):
    query = "?q=optimizer&code=1" if path == "search" else ""
    with page(full) as client:
        read = {}
        for kind in ("atom", "rss"):
            answer = client.get(f"/feeds/{path}.{kind}{query}")
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith(f"application/{kind}+xml")
            parsed = feedparser.parse(answer.content)
            assert not parsed.bozo, parsed.bozo_exception
            assert parsed.version == {"atom": "atom10", "rss": "rss20"}[kind]
            assert f"{HERE}/feeds/{path}.{kind}{query}" in [link.href for link in parsed.feed.links if link.rel == "self"]
            read[kind] = [(e.title, e.link, e.id) for e in parsed.entries]
        data = client.get(f"/feeds/{path}.json{query}").json()
        read["json"] = [(e["title"], e["url"], e["id"]) for e in data["items"]]
    assert data["version"] == "https://jsonfeed.org/version/1.1"
    assert data["feed_url"] == f"{HERE}/feeds/{path}.json{query}"
    assert read["atom"] == read["rss"] == read["json"] != []
    assert len({e[2] for e in read["json"]}) == len(read["json"])


def test_what_they_hold_is_what_the_page_holds(full):
    with page(full) as client:
        day = client.get("/feeds/day/2024-10-02.json").json()["items"]
        assert [e["title"] for e in day] == [p.title for p in papers_of_day(full, date(2024, 10, 2)).papers]
        assert client.get("/feeds/day/1999-01-01.json").json()["items"] == []
        verdicts = client.get("/feeds/verdicts.json").json()["items"]
        assert verdicts[0]["title"].endswith("supported at this scale, was inconclusive")
        assert verdicts[1]["title"].endswith("inconclusive, measured for the first time")
        assert "A < B & C" in verdicts[0]["content_text"]
        methods = client.get("/feeds/methods.json?package=optim").json()["items"]
        assert methods
        assert all(m["content_text"] for m in methods)
        for path in ("week/2024-W60", "week/x", "month/2024-13", "day/2024-02-30", "nothing"):
            assert client.get(f"/feeds/{path}.atom").status_code == 404
        assert client.get("/feeds/papers.pdf").status_code == 404


def test_who_has_it_already_is_told_so(full):
    with page(full) as client:
        first = client.get("/feeds/month/2024-10.atom")
        again = client.get("/feeds/month/2024-10.atom", headers={"if-none-match": f'"x", W/{first.headers["etag"]}'})
        assert (again.status_code, again.content) == (304, b"")
        with full.writing() as session:
            session.add(Paper(key="k", title="New", day=date(2024, 10, 3), source="t"))
        assert client.get("/feeds/month/2024-10.atom", headers={"if-none-match": first.headers["etag"]}).status_code == 200


def test_a_reading_list_is_its_readers_own(full):
    lab = Settings(address="https://papers.example.org", lab=True, jobs=False)
    with full.writing() as session:
        session.add_all([Reader(id=i, name=f"r{i}") for i in (2, 3)])
        session.flush()
        session.add_all([ReadingItem(reader_id=2, paper_id=5), ReadingItem(reader_id=2, paper_id=6, state="read")])
    with page(full, settings=lab) as client:
        sessions = client.app.state.sessions
        token = sessions.feed_token(2)
        mine = client.get(f"/feeds/reading.json?token={token}").json()
        assert len(mine["items"]) == 1
        assert client.get(f"/feeds/reading.json?token={sessions.feed_token(3)}").json()["items"] == []
        # Another's number under this one's signature, a cut one, one letter off.
        wrong = [token.replace("2.", "3.", 1), token[:-1], token[:-1] + ("A" if token[-1] != "A" else "B"), "", "2", "é", "1" * 30]  # fmt: skip
        for guess in wrong:
            assert client.get("/feeds/reading.json", params={"token": guess}).status_code == 404
        sessions.leave(sessions.bearer("none") or _reader(2))
        assert client.get(f"/feeds/reading.json?token={token}").status_code == 404  # withdrawn with the sessions
        told = [client.get("/feeds/reading.atom?token=2.guess").status_code for _ in range(20)]
        assert told[-1] == 429
    assert OWN_READER == 1


def _reader(number):
    from corollary.web.guard import Who

    return Who("s", number)


@given(st.text(max_size=60), st.text(max_size=60), st.lists(st.text(min_size=1, max_size=9), max_size=2))
@settings(max_examples=60, deadline=None)
def test_any_text_stays_what_it_is(title, text, authors):
    entry = Entry("urn:x:1", f"{HERE}/x?a=1&b=2", title, text, AT, AT, tuple(authors), ("cs.LG",))
    feed = Feed(f"All <of> & {title}", f"{HERE}/f.atom", f"{HERE}/", [entry])
    kept = "".join(c if c in "\t\n" or (c >= " " and c not in "\ufffe\uffff" and not "\ud800" <= c <= "\udfff") else "\r" if c == "\r" else "\ufffd" for c in title)  # fmt: skip
    root = ET.fromstring(atom(feed))
    spaces = {"a": "http://www.w3.org/2005/Atom"}
    assert _lines(root.findtext("a:entry/a:title", namespaces=spaces)) == _lines(kept)
    assert len(root.findall("a:entry/a:author", spaces)) == len(authors)
    channel = ET.fromstring(rss(feed)).find("channel")
    assert _lines(channel.findtext("item/title")) == _lines(kept)
    assert channel.findtext("item/pubDate") == "Wed, 02 Oct 2024 17:58:46 +0000"
    assert json.loads(json.dumps(json_feed(feed)))["items"][0]["content_text"] == text


def _lines(text):
    return (text or "").replace("\r\n", "\n").replace("\r", "\n")

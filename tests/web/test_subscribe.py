"""Subscribing through the pages: confirmed from the mail, ended by one click, and what strangers may not do."""

from __future__ import annotations

import logging
import re
import time

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient
from tests.web.filled import page
from tests.web.mailbox import SENDER, link, mailbox
from tests.web.test_digest_killed import confirmed

from corollary.web.app import create_app
from corollary.web.digest import flush, queue_digests
from corollary.web.importers import Importer, export
from corollary.web.settings import Settings
from corollary.web.store import Reader, Subscription, open_store

ONE_CLICK = {"data": {"List-Unsubscribe": "One-Click"}}
HTML = {"accept": "text/html"}


@pytest.fixture
def store(issue_store):
    return issue_store


@pytest.fixture
def box():
    with mailbox() as opened:
        yield opened


@pytest.fixture
def client(store, box):
    with page(store, mail=box.mailer) as made:
        yield made


def _csrf(client, path="/subscribe"):
    return re.search(r'name="csrf" value="([^"]+)"', client.get(path, headers=HTML).text)[1]


def _ask(client, **fields):
    return client.post("/subscribe", data={"csrf": _csrf(client), "address": "ada@example.org", "frequency": "daily", "kind": "all", **fields})  # fmt: skip


def _subscriptions(store):
    with store.reading() as connection:
        return [tuple(row) for row in connection.execute(select(Subscription.address, Subscription.state, Subscription.kind).order_by(Subscription.id))]  # fmt: skip


def _path(address):
    return "/" + address.split("/", 3)[3]


def test_from_the_page_to_the_end(store, box, client):
    assert "on its way" in _ask(client).text
    flush(store, box.mailer)
    asked = _path(link(box.mails[0], "/subscribe/confirm/"))
    before = client.get(asked)
    assert "Confirm" in before.text
    assert _subscriptions(store) == [("ada@example.org", "pending", "all")]  # to look at it confirms nothing
    assert client.head(asked).status_code == 405
    assert "Confirmed" in client.post(asked, data={"csrf": _csrf(client, asked)}).text
    assert _subscriptions(store) == [("ada@example.org", "confirmed", "all")]
    assert client.get(asked).status_code == 404
    confirmed(store, people=())
    state = client.app.state
    queue_digests(store, state.sessions, state.settings, box.mailer.sender, state.verdicts)
    flush(store, box.mailer)
    mail = box.mails[1]
    leave = _path(str(mail["list-unsubscribe"]).strip("<>"))
    own = client.get(leave)
    assert "Unsubscribe" in own.text
    assert _subscriptions(store)[0][1] == "confirmed"
    changed = client.post(f"{leave}/frequency", data={"csrf": _csrf(client, leave), "frequency": "weekly"})
    assert "comes weekly" in changed.text
    assert "change it or end it" in client.get("/subscribe").text  # the reader's own
    # As a mail program does it: no cookie, no form of ours, from anywhere.
    bare = TestClient(client.app, base_url="http://127.0.0.1:8000")
    done = bare.post(leave, **ONE_CLICK, headers={"origin": "https://mail.example", "sec-fetch-site": "cross-site"})
    assert (done.status_code, done.text) == (200, "unsubscribed\n")
    assert bare.post(leave, **ONE_CLICK).status_code == 200
    assert _subscriptions(store)[0][1] == "unsubscribed"
    assert "has ended" in client.get(leave).text
    assert client.post(f"{leave}/frequency", data={"csrf": _csrf(client), "frequency": "x"}).status_code == 400


def test_each_kind_is_kept(store, box, client):
    form = client.get("/subscribe?kind=search&q=low+rank&code=1&package=optim").text
    filters = re.search(r'name="filters" value="([^"]+)"', form)[1].replace("&amp;", "&")
    _ask(client, kind="search", q="low rank", filters=filters)
    _ask(client, kind="topic", q="bees", address="b@example.org")
    like = client.get("/subscribe?kind=like&papers=5,6,junk").text
    papers = re.search(r'name="papers" value="([^"]+)"', like)[1]
    _ask(client, kind="like", papers=papers, address="c@example.org")
    with store.reading() as connection:
        values = list(connection.scalars(select(Subscription.value).order_by(Subscription.id)))
    assert values[0] == {"query": "low rank", "filters": {"code": "1", "package": "optim"}}
    assert values[1] == {"query": "bees"}
    assert len(values[2]["papers"]) == 2
    assert isinstance(values[2]["papers"][0], str)


@pytest.mark.parametrize("address", ["", "nobody", "a@b.c\r\nBcc: x@y.z", "a@b.c, x@y.z", "<a@b.c>", "a@b.c\0", "é@b.c"])
def test_no_header_is_injected(store, box, client, address):
    answer = _ask(client, address=address)
    assert answer.status_code == 400
    assert "no mail address" in answer.text
    assert _subscriptions(store) == []


def test_a_form_of_another_site_subscribes_nobody(store, client):
    fields = {"address": "v@example.org", "frequency": "daily", "kind": "all"}
    assert client.post("/subscribe", data=fields).status_code == 403
    assert client.post("/subscribe", data={**fields, "csrf": "x"}).status_code == 403
    token = _csrf(client)
    assert client.post("/subscribe", data={**fields, "csrf": token}, headers={"origin": "https://evil.example"}).status_code == 403  # fmt: skip
    assert TestClient(client.app, base_url="http://127.0.0.1:8000").post("/subscribe", data={**fields, "csrf": token}).status_code == 403  # fmt: skip
    assert _subscriptions(store) == []


def test_a_flood_is_stopped(store, box, client):
    told = [_ask(client, address=f"p{i}@example.org").status_code for i in range(8)]
    assert told == [200] * 5 + [429] * 3
    assert len(_subscriptions(store)) == 5


def test_a_stranger_learns_nothing_of_an_address(store, box, client):
    first = _ask(client)
    flush(store, box.mailer)
    asked = _path(link(box.mails[0], "/subscribe/confirm/"))
    client.post(asked, data={"csrf": _csrf(client, asked)})
    token = re.compile(r'value="[\w=-]{32}"')
    assert token.sub("", _ask(client).text) == token.sub("", first.text)
    flush(store, box.mailer)
    assert len(box.raw) == 1  # who has it already gets no mail


def test_links_cannot_be_guessed(store, client):
    confirmed(store, ("a@example.org", "b@example.org"))
    sessions = client.app.state.sessions
    one, two = sessions.unsubscribe_token(1), sessions.unsubscribe_token(2)
    last = "A" if one[-1] != "A" else "B"
    for guess in (
        "1.",
        "1",
        f"1.{two.partition('.')[2]}",
        one[:-1] + last,
        one[:-1],
        one + "A",
        "9." + one[2:],
        "1.%00",
        "%F0%9F",
    ):
        assert client.post(f"/unsubscribe/{guess}", **ONE_CLICK).status_code == 404, guess
    assert {state for _, state, _ in _subscriptions(store)} == {"confirmed"}
    told = [client.get(f"/unsubscribe/1.{i}").status_code for i in range(15)]
    assert told[-1] == 429
    assert client.post(f"/unsubscribe/{one}", **ONE_CLICK).status_code == 200  # a right one holds beside someone who guesses
    assert client.get("/subscribe/confirm/guess").status_code == 429


def test_mails_of_before_a_move_still_end_what_they_should(store, box, client, tmp_path):
    _ask(client)
    flush(store, box.mailer)
    asked = _path(link(box.mails[0], "/subscribe/confirm/"))
    client.post(asked, data={"csrf": _csrf(client, asked)})
    token = client.app.state.sessions.unsubscribe_token(1)
    export(store, tmp_path / "all.jsonl")
    other = open_store(f"sqlite:///{tmp_path / 'other' / 'daily.sqlite'}")
    confirmed(other, ("first@example.org",))  # it has a subscription of that number already
    Importer(other).run(str(tmp_path / "all.jsonl"))
    with page(other, mail=box.mailer) as moved:
        assert moved.app.state.sessions.unsubscribe_token(1) != token
        assert moved.post(f"/unsubscribe/{token}", **ONE_CLICK).status_code == 200
        assert [row[:2] for row in _subscriptions(other)] == [("first@example.org", "confirmed"), ("ada@example.org", "unsubscribed")]  # fmt: skip
    other.close()


def test_without_mail_there_are_only_feeds(store):
    with page(store) as client:
        assert client.get("/subscribe", headers=HTML).status_code == 404
        assert client.post("/subscribe").status_code in (403, 404)


def test_a_lab_reader_sees_the_own_ones_alone(store, box):
    lab = Settings(address="https://papers.example.org", lab=True, jobs=False)
    with store.writing() as session:
        session.add_all([Reader(id=i, name=str(i)) for i in (31, 32)])
    confirmed(store, ("mine@example.org", "other@example.org"))
    with store.writing() as session:
        for number, reader in ((1, 31), (2, 32)):
            session.get_one(Subscription, number).reader_id = reader
    with page(store, settings=lab, mail=box.mailer) as client:
        link_in = client.app.state.sessions.link(31)
        client.post(_path(link_in), data={"csrf": _csrf(client, _path(link_in))})
        text = client.get("/subscribe").text
    assert "mine@example.org" in text
    assert "other@example.org" not in text


def test_who_may_not_read_gets_no_mail(store, box):
    closed = Settings(address="https://papers.example.org", lab=True, open_reading=False, jobs=False)
    with page(store, settings=closed, mail=box.mailer) as client:
        answer = client.get("/subscribe", follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (303, "/sign-in?next=%2Fsubscribe")
        assert client.post("/subscribe", follow_redirects=False).status_code == 303


def test_the_reading_list_has_a_feed_of_its_own(client):
    address = re.search(r'href="(/feeds/reading.atom[^"]+)"', client.get("/subscribe").text)[1]
    assert client.get(address).status_code == 200


def test_no_secret_in_a_log(store, box, caplog):
    with caplog.at_level(logging.DEBUG), page(store, mail=box.mailer) as client:
        _ask(client)
        flush(store, box.mailer)
        asked = link(box.mails[0], "/subscribe/confirm/")
        client.post(_path(asked), data={"csrf": _csrf(client, _path(asked))})
        box.on = lambda event, _: "451 " + asked if event == "DATA" else None  # a server that repeats what it was sent
        confirmed(store, people=())
        state = client.app.state
        queue_digests(store, state.sessions, state.settings, box.mailer.sender, state.verdicts)
        flush(store, box.mailer)
    ours = [r.getMessage() for r in caplog.records if not r.name.startswith(("httpx", "mail", "asyncio"))]
    for secret in (asked.rpartition("/")[2], state.sessions.unsubscribe_token(1)):
        assert not [line for line in ours if secret in line]


def test_the_server_sends_by_itself(store, box):
    app = create_app(store, Settings(jobs=False), mail=box.mailer)
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        _ask(client)
        until = time.monotonic() + 10
        while not box.raw and time.monotonic() < until:
            time.sleep(0.02)
    assert box.to == ["ada@example.org"]
    assert box.mails[0]["from"].addresses[0].addr_spec == SENDER

"""Digests: what stands in them, for whom, how often, and how they go to a real mail server."""

from __future__ import annotations

import logging
import smtplib
from datetime import date, timedelta
from html.parser import HTMLParser

import pytest
from sqlalchemy import select, update
from tests.web.filled import filled
from tests.web.mailbox import SENDER, link, mailbox

from corollary.web.board import Verdicts, standing
from corollary.web.digest import compose, flush, outbox, queue_digests, unsubscribe
from corollary.web.digest.mailer import Mailer, MailSettings, check_address, person
from corollary.web.digest.subscriptions import change, confirm, pending, subscribe
from corollary.web.guard import Sessions
from corollary.web.search import catch_up
from corollary.web.settings import Settings
from corollary.web.store import Delivery, Paper, Reader, Subscription, get_paper, now, record_verdicts, vote

TODAY = now().date()
EVIL = 'A <script>alert(1)</script> "quoted" & method\r\nBcc: x@evil.example'


class Place:
    """A store with its page's parts and a mail server."""

    def __init__(self, store, box):
        self.store, self.box, self.settings = store, box, Settings(jobs=False)
        self.sessions = Sessions(store, self.settings)
        self.verdicts = Verdicts(self.settings.results, self.settings.runs)

    def subscribed(self, address="ada@example.org", frequency="daily", kind="all", value=None, reader=None):
        before = len(self.box.raw)
        assert subscribe(self.store, self.settings, self.box.mailer.sender, address, frequency=frequency, kind=kind, value=value, reader=reader)  # fmt: skip
        assert flush(self.store, self.box.mailer).sent == 1
        mail = self.box.mails[before]
        number = confirm(self.store, self.sessions, link(mail, "/subscribe/confirm/").rpartition("/")[2])
        del self.box.raw[before:], self.box.to[before:]
        return number

    def papers(self, *titles, day=TODAY, **more):
        with self.store.writing() as session:
            for title in titles:
                session.add(Paper(key=f"k:{title}:{day}"[:400], title=title, day=day, source="t", **{"authors": ("A B", "C D"), "abstract": title, **more}))  # fmt: skip
        catch_up(self.store)

    def queue(self, today=TODAY, **kw):
        return queue_digests(self.store, self.sessions, self.settings, self.box.mailer.sender, self.verdicts, today=today, **kw)

    def digest(self, today=TODAY, **kw):
        """The mails that a call sends."""
        before = len(self.box.raw)
        self.queue(today, **kw)
        flush(self.store, self.box.mailer)
        return self.box.mails[before:]


@pytest.fixture
def place(tmp_path):
    store = filled(tmp_path / "full")
    with mailbox() as box:
        yield Place(store, box)
    store.close()


def _text(mail):
    return mail.get_body(("plain",)).get_content()


def _html(mail):
    return mail.get_body(("html",)).get_content()


def test_only_what_is_new_and_only_once(place):
    place.subscribed()
    assert place.digest() == []  # 135 papers were there before
    place.papers("First Light", "Second Wind")
    (mail,) = place.digest()
    assert mail["subject"].endswith("2 new papers")
    for body in (_text(mail), _html(mail)):
        assert "First Light" in body
        assert "Second Wind" in body
    place.papers("Third Rail")
    assert place.digest() == []  # one mail a day
    (mail,) = place.digest(TODAY + timedelta(days=1))
    assert "Third Rail" in _text(mail)
    assert "First Light" not in _text(mail)
    place.papers("An Old One", day=date(2019, 1, 1))
    assert place.digest(TODAY + timedelta(days=2)) == []  # an import of old papers is no news
    assert place.box.to == ["ada@example.org"] * 2


def test_an_outage_loses_nothing(place):
    place.subscribed()
    place.papers("First Light")
    assert len(place.digest()) == 1
    place.papers("While It Was Down", day=TODAY + timedelta(days=1))
    (mail,) = place.digest(TODAY + timedelta(days=40))
    assert "While It Was Down" in _text(mail)


def test_the_headers_that_end_it_by_one_click(place):
    number = place.subscribed()
    place.papers("First Light")
    (mail,) = place.digest()
    token = place.sessions.unsubscribe_token(number)
    assert mail["list-unsubscribe"] == f"<{place.settings.address}/unsubscribe/{token}>"
    assert mail["list-unsubscribe-post"] == "List-Unsubscribe=One-Click"
    assert mail["from"] == f"Corollary <{SENDER}>"
    assert (mail["to"], mail["auto-submitted"]) == ("ada@example.org", "auto-generated")
    assert link(mail, "/unsubscribe/").endswith(token)
    assert mail["message-id"].startswith(f"<digest.{TODAY}.")
    assert mail["message-id"].endswith("@papers.example.org>")
    assert [part.get_content_type() for part in mail.walk()] == ["multipart/alternative", "text/plain", "text/html"]
    unsubscribe(place.store, number)
    place.papers("Second Wind")
    assert place.digest(TODAY + timedelta(days=1)) == []


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]


def test_text_is_well_set_and_html_is_inert(place):
    place.subscribed(kind="all")
    place.papers(EVIL, abstract="word " * 200, authors=tuple(f"Person {i}" for i in range(9)))
    record_verdicts(place.store, [{"slug": "fira", "claim": "c", "verdict": "inconclusive", "statement": EVIL}])
    (mail,) = place.digest()
    assert "bcc" not in mail
    text = _text(mail)
    assert max(len(line) for line in text.splitlines() if "://" not in line) <= 72
    assert "Person 3 and 5 others" in text
    assert "\r\nBcc" not in text.replace(">", "")
    read = _Page()
    read.feed(_html(mail))
    assert set(read.tags) <= {"html", "head", "meta", "title", "body", "div", "h1", "h2", "p", "a", "b", "code"}
    assert all(value.startswith(place.settings.address) for tag, name, value in read.attributes if name in ("href", "src"))
    assert not [a for a in read.attributes if a[1] not in ("href", "style", "lang", "charset", "name", "content")]
    raw = place.box.raw[-1]
    assert raw.isascii()
    assert max(map(len, raw.split(b"\r\n"))) <= 998


def test_a_paper_that_runs_here_carries_its_verdict(place):
    place.subscribed(kind="all")
    with place.store.writing() as session:  # Fira comes in today
        session.execute(update(Paper).where(Paper.slug == "fira").values(created_at=now(), day=TODAY))
    (mail,) = place.digest()
    words = standing(place.verdicts.paper("fira")).words
    assert "of 7 claims hold here" in words
    for body in (_text(mail), _html(mail)):
        assert words[0].upper() + words[1:] in " ".join(body.split())
        assert "corollary verify fira" in body


def test_verdicts_that_changed(place):
    def row(claim, verdict):
        return {"slug": "fira", "claim": claim, "verdict": verdict, "statement": f"statement of {claim}"}

    record_verdicts(place.store, [row("old", "inconclusive"), row("back", "inconclusive")])
    place.subscribed()
    assert place.digest() == []  # what stood before is no change
    record_verdicts(place.store, [row("old", "supported at this scale"), row("back", "exact check failed"), row("new", "could not run")])  # fmt: skip
    record_verdicts(place.store, [row("old", "not supported at this scale"), row("back", "inconclusive")])
    (mail,) = place.digest()
    text = " ".join(_text(mail).split())
    assert "not supported at this scale, was inconclusive" in text
    assert "could not run, measured for the first time" in text
    assert text.index("statement of old") < text.index("statement of new")
    assert "statement of back" not in text  # there and back again
    assert mail["subject"].endswith(": 2 verdicts")
    assert place.digest(TODAY + timedelta(days=1)) == []


def test_topics_searches_and_papers_like_these(place):
    fira = get_paper(place.store, "fira")
    place.subscribed("topic@example.org", kind="topic", value={"query": "beekeeping drones"})
    place.subscribed("search@example.org", kind="search", value={"query": "optimizer", "filters": {"code": "1"}})
    place.subscribed("like@example.org", kind="like", value={"papers": [fira.id]})
    place.papers("Beekeeping with Drones", "The History of Soup")
    place.papers("An Optimizer with Code", code="https://github.com/x/y")
    place.papers("An Optimizer Without")
    place.papers("Again: " + fira.title, abstract=fira.text)
    mails = {mail["to"]: " ".join(_text(mail).split()) for mail in place.digest()}
    assert "Beekeeping" in mails["topic@example.org"]
    assert "Soup" not in "".join(mails.values())
    assert "An Optimizer with Code" in mails["search@example.org"]
    assert "Without" not in mails["search@example.org"]
    assert "Again: Fira" in mails["like@example.org"]
    assert "Beekeeping" not in mails["like@example.org"] + mails["search@example.org"]


def test_ranked_for_its_reader(place):
    with place.store.writing() as session:
        session.add_all([Reader(id=i, name=str(i)) for i in (21, 22)])
    liked = {21: get_paper(place.store, "fira"), 22: get_paper(place.store, "maestro")}
    for reader, paper in liked.items():
        vote(place.store, reader, paper.id)
        place.subscribed(f"r{reader}@example.org", reader=reader)
    place.papers(*[f"Other matter {i}" for i in range(6)], abstract="the of and", imported_votes=3)
    for paper in liked.values():
        place.papers(f"More of {paper.title}", abstract=paper.text, imported_votes=3)
    first = {mail["to"]: " ".join(_text(mail).split()).partition(" 1. ")[2][:40] for mail in place.digest()}
    assert first == {f"r{reader}@example.org": f"More of {paper.title}"[:40] for reader, paper in liked.items()}


def test_weeks(place):
    number = place.subscribed(frequency="weekly")
    monday = TODAY - timedelta(days=TODAY.weekday()) + timedelta(days=7)
    place.papers("First Light")
    assert len(place.digest(monday)) == 1
    place.papers("Second Wind", day=monday + timedelta(days=1))
    assert place.digest(monday + timedelta(days=6)) == []
    assert len(place.digest(monday + timedelta(days=7))) == 1
    assert change(place.store, number, "daily")
    place.papers("Third Rail", day=monday + timedelta(days=7))
    assert len(place.digest(monday + timedelta(days=8))) == 1
    assert place.queue(monday + timedelta(days=9), frequencies=("weekly",)).nothing == 0


def test_a_frequency_changed_to_and_fro_loses_nothing(place):
    number = place.subscribed()
    place.papers("First Light")
    assert len(place.digest()) == 1
    change(place.store, number, "weekly")
    change(place.store, number, "daily")
    place.papers("Second Wind")
    assert place.digest() == []  # today's has gone out
    (mail,) = place.digest(TODAY + timedelta(days=1))
    assert "Second Wind" in _text(mail)


def test_one_that_fails_stops_no_other(place, caplog, monkeypatch):
    place.subscribed("a@example.org", kind="topic", value={"query": "light secret-word"})
    place.subscribed("b@example.org")
    place.papers("First Light")
    monkeypatch.setattr(compose, "_matching", lambda *_: 1 / 0)
    with caplog.at_level(logging.ERROR):
        mails = place.digest()
    assert [mail["to"] for mail in mails] == ["b@example.org"]
    assert "ZeroDivisionError" in caplog.text
    assert "secret-word" not in caplog.text
    monkeypatch.undo()
    assert [mail["to"] for mail in place.digest()] == ["a@example.org"]


def test_show_changes_nothing(place):
    place.subscribed()
    place.papers("First Light")
    shown = []
    assert place.queue(show=shown.append).written == place.queue(show=shown.append).written == 1
    assert shown[0]["message-id"] == shown[1]["message-id"]
    assert len(place.digest()) == 1


# The server


def test_what_the_server_does_not_take_now_is_tried_again(place, monkeypatch):
    place.subscribed("a@example.org")
    place.subscribed("b@example.org")
    place.papers("First Light")
    place.queue()
    place.box.on = lambda event, address: "451 later" if (event, address) == ("DATA", "a@example.org") else None
    done = flush(place.store, place.box.mailer)
    assert (done.sent, done.waiting, done.failed, place.box.to) == (1, 1, 0, ["b@example.org"])
    place.box.on = lambda event, address: None
    assert flush(place.store, place.box.mailer).sent == 0  # not at once
    monkeypatch.setattr(outbox, "now", lambda: now() + timedelta(minutes=3))
    assert flush(place.store, place.box.mailer).sent == 1
    assert place.box.to == ["b@example.org", "a@example.org"]


def test_what_the_server_refuses_is_not(place):
    place.subscribed("a@example.org")
    place.subscribed("b@example.org")
    place.papers("First Light")
    place.queue()
    place.box.on = lambda event, address: "550 no such person a@example.org" if (event, address) == ("RCPT", "a@example.org") else None  # fmt: skip
    done = flush(place.store, place.box.mailer)
    assert (done.sent, done.failed, done.waiting) == (1, 1, 0)
    with place.store.reading() as connection:
        state = connection.execute(select(Delivery.state, Delivery.error).where(Delivery.address == "a@example.org", Delivery.kind == "digest")).one()  # fmt: skip
    assert state == ("failed", "the server refuses the address (550)")


def test_a_server_that_takes_nothing_from_us_loses_nothing(place):
    place.subscribed()
    place.papers("First Light")
    place.queue()
    place.box.on = lambda event, _: "550 who are you" if event == "MAIL" else None
    done = flush(place.store, place.box.mailer)
    assert (done.sent, done.failed, done.waiting) == (0, 0, 1)
    assert "takes no mail from" in done.error


def test_a_server_that_is_away_counts_no_attempt(place):
    place.subscribed()
    place.papers("First Light")
    place.queue()
    away = Mailer(MailSettings("127.0.0.1", 1, SENDER))
    for _ in range(20):
        done = flush(place.store, away)
    assert (done.sent, done.failed, done.waiting) == (0, 0, 1)
    assert "cannot be reached" in done.error
    assert flush(place.store, place.box.mailer).sent == 1


def test_a_connection_that_breaks_off_costs_one_attempt(place, monkeypatch):
    for name in "abc":
        place.subscribed(f"{name}@example.org")
    place.papers("First Light")
    place.queue()
    broken = []

    def sendmail(self, sender, to, message, real=smtplib.SMTP.sendmail):
        if to == ["b@example.org"] and not broken:
            broken.append(1)
            self.sock.close()
            raise smtplib.SMTPServerDisconnected("Connection unexpectedly closed")
        return real(self, sender, to, message)

    monkeypatch.setattr(smtplib.SMTP, "sendmail", sendmail)
    done = flush(place.store, place.box.mailer)
    assert (done.sent, done.waiting, place.box.to) == (2, 1, ["a@example.org", "c@example.org"])
    monkeypatch.setattr(outbox, "now", lambda: now() + timedelta(minutes=3))
    assert flush(place.store, place.box.mailer).sent == 1


def test_a_server_that_takes_so_many_at_a_time(place):
    for name in "abc":
        place.subscribed(f"{name}@example.org")
    place.papers("First Light")
    place.queue()
    place.box.on = lambda event, address: "421 enough" if (event, address) == ("RCPT", "b@example.org") else None
    done = flush(place.store, place.box.mailer)
    assert (done.sent, done.waiting, done.failed, place.box.to) == (2, 1, 0, ["a@example.org", "c@example.org"])
    assert "421" in done.error


def test_what_was_sent_leaves_no_link_behind(place):
    place.subscribed()
    with place.store.reading() as connection:
        assert set(connection.scalars(select(Delivery.message))) == {b""}


def test_two_senders_at_once_send_once(place):
    place.subscribed()
    place.papers("First Light")
    place.queue()
    seen = []

    def on(event, address):
        if event == "DATA":
            seen.append(flush(place.store, place.box.mailer).sent)  # the second, while the first is at it

    place.box.on = on
    assert flush(place.store, place.box.mailer).sent == 1
    assert (seen, place.box.to) == ([0], ["ada@example.org"])


# Addresses and settings


@pytest.mark.parametrize(
    "text",
    ["", "a", "a@", "@b", "a b@c.d", "a@b@c.d", "a@b.c\r\nBcc: x@y.z", "a@b.c\nX: y", "a@b.c,x@y.z", "a@b.c;x@y.z", "<a@b.c>", "A <a@b.c>",
     '"a\r\n"@b.c', "a@[127.0.0.1]", "a@-b.c", "a@b..c", ".a@b.c", "a..b@c.d", "a@" + "b" * 64 + ".c", "a" * 65 + "@b.c", "é@b.c", "a@b.c\0", "a@b.c\u2028x"],
)  # fmt: skip
def test_no_address_that_a_header_could_break_on(text):
    with pytest.raises(ValueError, match="mail address"):
        check_address(text)


def test_addresses_that_are_some():
    assert check_address("  Ada.Lovelace+x@Mail.Example.ORG\n") == "Ada.Lovelace+x@mail.example.org"
    assert check_address("a!#$%&'*/=?^_`{|}~-b@b.c")
    assert person("Ada+1@Example.org") == person("ada+2@example.ORG")


@pytest.mark.parametrize(
    "url", ["smtp://", "http://x", "smtp://x:99999", "smtp://x/y", "x", "smtp://u:secret-word@x:port", "smtp://u:secret-word@/"]
)
def test_settings_that_are_none(url):
    with pytest.raises(ValueError, match=r"mail server|smtp") as caught:
        MailSettings.of(url, SENDER)
    assert "secret-word" not in str(caught.value)


def test_a_password_is_shown_to_nobody(monkeypatch):
    monkeypatch.setenv("COROLLARY_SMTP", "smtps://user:p%40ss@mail.example.org")
    with pytest.raises(ValueError, match="COROLLARY_MAIL_FROM"):
        MailSettings.from_environment()
    monkeypatch.setenv("COROLLARY_MAIL_FROM", SENDER)
    own = MailSettings.from_environment()
    assert (own.password, own.port, own.tls) == ("p@ss", 465, "tls")
    assert "p@ss" not in repr(own) + str(Mailer(own).__dict__)


def test_a_password_goes_over_tls_alone(place, monkeypatch):
    # This server offers none; by a name that is not this machine's own the password must stay with us.
    import corollary.web.digest.mailer as module

    monkeypatch.setattr(module, "LOOPBACK", frozenset())
    mailer = Mailer(MailSettings("127.0.0.1", place.box.port, SENDER, user="u", password="p"))
    with pytest.raises(OSError, match="offers no TLS"), mailer.session():
        pass


# Subscribing


def test_nothing_of_a_token_is_kept(place):
    subscribe(place.store, place.settings, place.box.mailer.sender, "a@example.org", frequency="daily")
    flush(place.store, place.box.mailer)
    token = link(place.box.mails[-1], "/subscribe/confirm/").rpartition("/")[2]
    assert len(token) >= 43
    with place.store.reading() as connection:
        rows = str(connection.execute(select(Subscription.__table__)).all()) + str(connection.execute(select(Delivery.__table__)).all())  # fmt: skip
    assert token not in rows
    assert pending(place.store, token) is not None
    assert confirm(place.store, place.sessions, token)
    assert pending(place.store, token) is None
    assert confirm(place.store, place.sessions, token) is None


def test_the_mail_that_asks_says_nothing_that_a_stranger_wrote(place):
    subscribe(place.store, place.settings, place.box.mailer.sender, "a@example.org", frequency="daily", kind="topic", value={"query": "BUY http://evil.example"})  # fmt: skip
    flush(place.store, place.box.mailer)
    assert "evil" not in place.box.mails[-1].as_string()


def test_links_expire_and_are_forgotten(place, monkeypatch):
    import corollary.web.digest.subscriptions as module

    args = (place.store, place.settings, place.box.mailer.sender)
    subscribe(*args, "a@example.org", frequency="daily")
    flush(place.store, place.box.mailer)
    token = link(place.box.mails[-1], "/subscribe/confirm/").rpartition("/")[2]
    subscribe(*args, "late@example.org", frequency="daily")  # never sent
    monkeypatch.setattr(module, "now", lambda: now() + timedelta(days=3, minutes=1))
    assert pending(place.store, token) is None
    assert confirm(place.store, place.sessions, token) is None
    subscribe(*args, "b@example.org", frequency="daily")
    with place.store.reading() as connection:
        assert list(connection.scalars(select(Subscription.address))) == ["b@example.org"]
        assert list(connection.scalars(select(Delivery.address).where(Delivery.state == "queued"))) == ["b@example.org"]


def test_nobody_is_bombed(place):
    args = (place.store, place.settings, place.box.mailer.sender)
    for i in range(30):
        subscribe(*args, f"Victim+{i}@example.org", frequency=("daily", "weekly")[i % 2], kind="topic", value={"query": f"word {i}"})  # fmt: skip
    flush(place.store, place.box.mailer)
    assert len(place.box.to) == 3
    assert subscribe(*args, "other@example.org", frequency="daily")


def test_a_flood_from_everywhere_ends(place, monkeypatch):
    import corollary.web.digest.subscriptions as module

    monkeypatch.setattr(module, "ALL_A_DAY", 10)
    told = [subscribe(place.store, place.settings, place.box.mailer.sender, f"p{i}@example.org", frequency="daily") for i in range(15)]  # fmt: skip
    assert told == [True] * 10 + [False] * 5


@pytest.mark.parametrize(
    ("more", "word"),
    [({"frequency": "hourly"}, "daily or weekly"), ({"kind": "x"}, "digest is of"), ({"kind": "topic", "value": {"query": " \n"}}, "which words"), ({"kind": "like", "value": {"papers": [10**6]}}, "at least one")],
)  # fmt: skip
def test_what_is_asked_for_must_be_something(place, more, word):
    with pytest.raises(ValueError, match=word):
        subscribe(place.store, place.settings, place.box.mailer.sender, "a@example.org", **{"frequency": "daily", **more})

"""Kill -9 while digests are written and sent: nothing is lost, and nothing comes twice but in the one instant that SMTP leaves open."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from datetime import timedelta
from itertools import count

import pytest
from sqlalchemy import func, select
from tests.web.crash import killed
from tests.web.filled import filled
from tests.web.mailbox import SENDER, mailbox

from corollary.web.board import Verdicts
from corollary.web.digest import flush, queue_digests
from corollary.web.guard import Sessions
from corollary.web.settings import Settings
from corollary.web.store import Delivery, Paper, Subscription, now, open_store

PEOPLE = ("a@example.org", "b@example.org")


def confirmed(store, people=PEOPLE, papers=("First Light",)):
    """Subscriptions with papers that are new to them."""
    with store.writing() as session:
        then = (now() - timedelta(seconds=1)).isoformat()
        for address in people:
            session.add(Subscription(address=address, frequency="daily", kind="all", value={"after": then, "changes_after": then}, state="confirmed"))  # fmt: skip
        for title in papers:
            session.add(Paper(key=title, title=title, abstract=title, day=now().date(), source="t"))


def _url(folder):
    return f"sqlite:///{folder / 'daily.sqlite'}"


def _queue(folder):
    store, settings = open_store(_url(folder)), Settings(jobs=False, results=folder, runs=folder)
    sender = mailer_of(1).sender
    queue_digests(store, Sessions(store, settings), settings, sender, Verdicts(folder, folder))
    store.close()


def mailer_of(port):
    from corollary.web.digest import Mailer, MailSettings

    return Mailer(MailSettings("127.0.0.1", port, SENDER))


def _flush(folder, port):
    store = open_store(_url(folder))
    flush(store, mailer_of(port))
    store.close()


def _states(folder):
    store = open_store(_url(folder))
    with store.reading() as connection:
        found = Counter(connection.scalars(select(Delivery.state)))
        told = connection.scalar(select(func.count()).where(Subscription.last_period.is_not(None)))
    store.close()
    return found, told


def test_killed_while_they_are_written(tmp_path):
    """Before every statement in turn: the next call writes what is missing, and each mail once."""
    n, done, base = 0, False, tmp_path / "base"
    base.mkdir()
    store = open_store(_url(base))
    confirmed(store)
    store.close()
    while not done:
        n += 1
        folder = shutil.copytree(base, tmp_path / str(n))
        done = not killed(n, lambda folder=folder: _queue(folder))
        states, told = _states(folder)
        assert states["queued"] == told <= 2  # a mail and its mark come together
        _queue(folder)
        _queue(folder)
        assert _states(folder) == (Counter(queued=2), 2)
    assert n > 25


@pytest.fixture
def queued(tmp_path):
    """Makes folders with two mails in the outbox."""
    numbers, base = count(), tmp_path / "base"
    base.mkdir()
    store = open_store(_url(base))
    confirmed(store)
    store.close()
    _queue(base)
    return lambda: shutil.copytree(base, tmp_path / str(next(numbers)))


def test_killed_while_they_are_sent(queued):
    """Before every statement and commit in turn. Only between the server's acceptance and the commit of our mark is a mail sent
    again, once, to the letter the same."""
    n, done, again = 0, False, []
    while not done:
        n += 1
        folder = queued()
        with mailbox() as box:
            done = not killed(n, lambda folder=folder, port=box.port: _flush(folder, port))
            taken = len(box.raw)
            _flush(folder, box.port)
            _flush(folder, box.port)
            states, _ = _states(folder)
            assert states == Counter(sent=2)
            to = Counter(box.to)
            assert set(to) == set(PEOPLE)
            assert len(box.raw) <= 3
            if len(box.raw) == 3:
                again.append((n, taken))
                twice = next(a for a in PEOPLE if to[a] == 2)
                raw = [r for r, whom in zip(box.raw, box.to, strict=True) if whom == twice]
                assert raw[0] == raw[1]
                assert box.mails[0]["message-id"]
    # The whole of that instant, for each mail: before BEGIN, before UPDATE and before COMMIT of the mark.
    assert len(again) == 6, again
    assert n > 15


def _forked(work):
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


@pytest.mark.parametrize(
    ("event", "mails"),
    [("MAIL", 2), ("RCPT", 2), ("DATA", 2), ("TAKEN", 3)],
)
def test_killed_within_the_talk_with_the_server(queued, event, mails):
    """Before the server has the whole mail none comes twice; after it has taken it and before we know, one does."""
    folder = queued()
    with mailbox() as box:
        child = []

        def on(what, address):
            if what == event and child:
                os.kill(child.pop(), signal.SIGKILL)
                return "451 gone" if event != "TAKEN" else None
            return None

        ready = threading.Event()
        box.on = lambda *args: (ready.wait(10), on(*args))[1]
        child.append(_forked(lambda: _flush(folder, box.port)))
        victim = child[0]
        ready.set()
        _, status = os.waitpid(victim, 0)
        assert os.WIFSIGNALED(status)
        box.on = lambda *_: None
        _flush(folder, box.port)
        _flush(folder, box.port)
        assert set(box.to) == set(PEOPLE)
        assert len(box.raw) == mails
        assert len({mail["message-id"] for mail in box.mails}) == 2
        assert _states(folder)[0] == Counter(sent=2)


def test_the_command_killed_at_any_moment(tmp_path):
    """``corollary daily digest`` as cron runs it, killed at random moments, until one run comes through."""
    folder = tmp_path / "c"
    store = filled(folder)
    people = [f"p{i}@example.org" for i in range(12)]
    confirmed(store, people, ("First Light", "Second Wind"))
    store.close()
    with mailbox() as box:
        slow = time.sleep
        box.on = lambda event, _: slow(0.03) if event == "RCPT" else None
        env = {**os.environ, "COROLLARY_SMTP": f"smtp://127.0.0.1:{box.port}", "COROLLARY_MAIL_FROM": SENDER}
        command = [
            sys.executable,
            "-c",
            "from corollary.cli import main; main()",
            "daily",
            "digest",
            "--database",
            _url(folder),
        ]
        kills = 0
        for wanted in (2, 7, 10**6):
            process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            until = time.monotonic() + 60
            while process.poll() is None and len(box.raw) < wanted and time.monotonic() < until:
                time.sleep(0.002)
            if process.poll() is None:
                process.kill()
                kills += 1
            said = process.communicate()[0]
        assert process.returncode == 0, said
        assert kills == 2
        assert set(box.to) == set(people)
        assert len(box.raw) <= len(people) + kills
        assert len({mail["message-id"] for mail in box.mails}) == len(people)
        assert "0 waiting" in said

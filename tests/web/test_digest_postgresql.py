"""Digests from a store on PostgreSQL."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

from tests.web.mailbox import mailbox
from tests.web.test_digest_killed import PEOPLE, confirmed

from corollary.web.board import Verdicts
from corollary.web.digest import confirm, flush, outbox, queue_digests, subscribe
from corollary.web.digest.subscriptions import find, unsubscribe
from corollary.web.guard import Sessions
from corollary.web.settings import Settings
from corollary.web.store import Paper, now


def test_from_subscribing_to_the_end(lab, tmp_path):
    settings = Settings(jobs=False, results=tmp_path, runs=tmp_path)
    sessions, verdicts = Sessions(lab, settings), Verdicts(tmp_path, tmp_path)

    def queue(day):
        return queue_digests(lab, sessions, settings, box.mailer.sender, verdicts, today=day).written

    with mailbox() as box:
        assert subscribe(lab, settings, box.mailer.sender, "Victim+1@example.org", frequency="daily")
        token = outbox_token(lab)
        assert confirm(lab, sessions, token) == 1
        assert flush(lab, box.mailer).sent == 1
        confirmed(lab)
        today = now().date()
        assert queue(today) == 3
        assert queue(today) == 0
        busy = []
        box.on = lambda event, _: busy.append(flush(lab, box.mailer).sent) if event == "RCPT" else None
        assert flush(lab, box.mailer).sent == 3
        assert busy == [0, 0, 0]  # one sends at a time
        assert sorted(box.to[1:]) == sorted([*PEOPLE, "Victim+1@example.org"])
        row = find(lab, sessions, sessions.unsubscribe_token(1))
        assert row.id == 1
        assert unsubscribe(lab, 1)

        # An import that began before the digest and ends after it loses no paper: the digest waits for it.
        def late():
            with lab.writing() as session:
                session.add(Paper(key="late", title="The Late One", day=today, source="t"))
                session.flush()
                begun.set()
                time.sleep(0.5)

        begun = threading.Event()
        importing = threading.Thread(target=late)
        importing.start()
        begun.wait(10)
        assert queue(today + timedelta(days=1)) == 2
        importing.join()
        box.on = lambda *_: None
        flush(lab, box.mailer)
        assert "The Late One" in box.mails[-1].get_body(("plain",)).get_content()


def outbox_token(store):
    """The token of the mail that waits."""
    import re

    from sqlalchemy import select

    from corollary.web.store import Delivery

    with store.reading() as connection:
        raw = connection.scalar(select(Delivery.message).where(Delivery.state == "queued"))
    return re.search(rb"/subscribe/confirm/([\w-]+)", raw)[1].decode()


def test_a_sender_that_died_lets_go(lab):
    with outbox._alone(lab) as first:
        assert first
        with outbox._alone(lab) as second:
            assert not second
    with outbox._alone(lab) as again:
        assert again

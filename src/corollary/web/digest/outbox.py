"""The outbox: mails are put into the store first, and sent from there.

A row goes ``queued`` -> ``sending`` -> ``sent``, each step committed before the next begins. What holds when the process is killed:

- before the row is marked ``sending``, or between that and the server's acceptance: the server has taken nothing, and the next
  `flush` sends the mail;
- after the row is marked ``sent``: it is never sent again;
- between the server's acceptance and our mark, which is the way of its answer back to us and one commit: nobody on our side can know
  whether the mail was taken. SMTP has no way to ask. It is then sent once more, to the letter the same, under the same
  ``Message-ID``, by which mail servers and programs see that it is the same one; a mail lost would be seen by nobody.

So no mail is lost, and none is sent twice but in that one instant. One process at a time sends (`_alone`): what it finds as
``sending`` was left by one that was killed. After a loss of power, other than of a process, SQLite may have forgotten the last marks;
their mails are sent again in the same way.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from email.message import EmailMessage
from email.policy import SMTP
from typing import Any, cast

from sqlalchemy import CursorResult, func, select, text, update
from sqlalchemy.orm import Session

from corollary.web.background import Background
from corollary.web.digest.mailer import Gone, Mailer, Refused
from corollary.web.store import Delivery, Store, now

_LOG = logging.getLogger("corollary.web")
ATTEMPTS = 8
WIRE = SMTP.clone(max_line_length=900)
"""how mails are written: an address in a header stays on one line, where every mail program finds it"""
_LOCK = 0x6D61696C
_LOOK_EVERY = 20.0


def put(
    session: Session, message: EmailMessage, address: str, *, kind: str, dedupe: str, message_id: str, subscription: int | None
) -> bool:
    """Put a mail into the outbox, in a transaction at hand; False where it is there already."""
    if session.scalar(select(Delivery.id).where(Delivery.dedupe == dedupe)) is not None:
        return False
    raw = message.as_bytes(policy=WIRE)
    row = Delivery(subscription_id=subscription, dedupe=dedupe, kind=kind, address=address, message_id=message_id, message=raw)
    session.add(row)
    session.flush()
    return True


@dataclass
class Sent:
    """What a call of `flush` did."""

    sent: int = 0
    failed: int = 0
    waiting: int = 0
    error: str = ""


@contextmanager
def _alone(store: Store) -> Iterator[bool]:
    """Whether this process is the one that sends, for as long as the block lasts."""
    if store.dialect == "postgresql":
        with store.engine.connect() as connection:
            got = bool(connection.execute(text("SELECT pg_try_advisory_lock(:n)"), {"n": _LOCK}).scalar())
            try:
                yield got
            finally:
                if got:
                    connection.execute(text("SELECT pg_advisory_unlock(:n)"), {"n": _LOCK})
        return
    with (store.folder / "outbox.lock").open("a") as file:
        try:
            import fcntl
        except ModuleNotFoundError:  # not a POSIX system
            yield True
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def _mark(store: Store, number: int, was: str, **values: Any) -> bool:
    with store.writing() as session:
        mine = update(Delivery).where(Delivery.id == number, Delivery.state == was)
        return cast("CursorResult[Any]", session.execute(mine.values(**values))).rowcount == 1


def flush(store: Store, mailer: Mailer) -> Sent:
    """Send what is due, oldest first; one that is taken off its list meanwhile is left out.

    A mail that the server does not take now is tried again, later each time, `ATTEMPTS` times; one that it refuses is not. Where the
    server cannot be reached at all, everything waits, and no attempt counts.

    Returns:
        What was done, with the last trouble in words, free of addresses and of what the server said; nothing was done where another
        process is at it.
    """
    done = Sent()
    with _alone(store) as alone:
        if not alone:
            return done
        with store.reading() as connection:
            left = connection.scalar(select(Delivery.id).where(Delivery.state == "sending").limit(1))
            due = select(Delivery.id).where(Delivery.state.in_(("queued", "sending")), Delivery.next_try <= now())
            numbers = deque(connection.scalars(due.order_by(Delivery.id)))
        if left is not None:  # by a process that was killed
            with store.writing() as session:
                session.execute(update(Delivery).where(Delivery.state == "sending").values(state="queued"))
        try:
            while numbers:
                with mailer.session() as server:
                    while numbers and _send(store, mailer, server, numbers.popleft(), done):
                        pass
        except OSError as error:  # the server itself: whatever is left waits
            done.error = str(error)
        with store.reading() as connection:
            done.waiting = connection.scalar(select(func.count()).where(Delivery.state == "queued")) or 0
    return done


def _send(store: Store, mailer: Mailer, server: Any, number: int, done: Sent) -> bool:
    """Send one; False where the connection is gone."""
    with store.reading() as connection:
        columns = select(Delivery.address, Delivery.message, Delivery.attempts)
        row = connection.execute(columns.where(Delivery.id == number, Delivery.state == "queued")).first()
    if row is None or not _mark(store, number, "queued", state="sending", attempts=row.attempts + 1):
        return True
    try:
        mailer.send(server, row.message, row.address)
    except Refused as error:
        _mark(store, number, "sending", state="failed", error=str(error), message=b"")
        done.failed += 1
    except OSError as error:
        last = row.attempts + 1 >= ATTEMPTS
        later = now() + timedelta(minutes=2 ** min(10, row.attempts + 1))
        _mark(store, number, "sending", state="failed" if last else "queued", error=str(error)[:500], next_try=later)
        done.failed += last
        done.error = str(error)
        return not isinstance(error, Gone)
    else:
        # What was sent is of no more use, and may hold a link that confirms.
        _mark(store, number, "sending", state="sent", sent_at=now(), error="", message=b"")
        done.sent += 1
    return True


class OutboxRunner(Background):
    """A thread that sends what is put into the outbox."""

    def __init__(self, store: Store, mailer: Mailer) -> None:
        super().__init__("corollary-mail", _LOOK_EVERY, 10)
        self.store, self.mailer, self._told = store, mailer, ""

    def work(self) -> bool:
        """Send what is due."""
        trouble = ""
        try:
            trouble = flush(self.store, self.mailer).error
        except Exception as error:  # noqa: BLE001 - the store may be away for a moment; the outbox waits
            trouble = type(error).__name__
        if trouble and trouble != self._told:
            _LOG.warning("mail waits: %s", trouble)
        self._told = trouble
        return False

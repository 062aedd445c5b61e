"""Subscriptions: asked for, confirmed by mail, changed and ended by the link in every mail.

Tokens. A link that confirms holds 256 random bits, of which the store keeps the hash alone; it works once, and for three days. A link
that changes or ends a subscription must be in every mail and for good, so it is a MAC of the subscription's number with the store's
secret (`corollary.web.guard.Sessions.unsubscribe_token`), compared in constant time; its hash is kept too, so that mails sent before a
move to another store, which has another secret, still end what they should. A row is found by a token's hash, never by a part of the
token, so that how long the search takes says nothing of it.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from datetime import timedelta
from email.headerregistry import Address
from email.message import EmailMessage
from typing import Any

from sqlalchemy import delete, func, or_, select
from sqlalchemy.orm import Session

from corollary.web.digest.mailer import check_address, letter, person
from corollary.web.digest.outbox import put
from corollary.web.guard import Sessions
from corollary.web.search import search
from corollary.web.settings import Settings
from corollary.web.store import Delivery, Paper, Store, Subscription, now

FREQUENCIES = ("daily", "weekly")
KINDS = ("all", "topic", "search", "like")
LINK_LASTS = timedelta(days=3)
A_DAY = 3
"""mails asking for confirmation that one person gets in a day, whoever asks for them and under however many of their addresses"""
ALL_A_DAY = 300
"""mails asking for confirmation that leave in a day at all: a flood from everywhere ends here"""
MOST_TO_ONE = 20
LONGEST = 2000


def hash_of(token: str) -> str:
    """What the store keeps of a token."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def _value(store: Store, kind: str, value: dict[str, Any]) -> dict[str, Any]:
    if kind not in KINDS:
        raise ValueError(f"a digest is of {', '.join(KINDS)}")
    if kind == "all":
        return {}
    if kind == "like":
        with store.reading() as connection:
            ids = [int(i) for i in value.get("papers", [])][:50]
            keys = list(connection.scalars(select(Paper.key).where(Paper.id.in_(ids)).order_by(Paper.id)))
        if not keys:
            raise ValueError("name at least one paper that the new ones should be like")
        return {"papers": keys}  # by key: numbers change when an export goes into another store
    query = " ".join(str(value.get("query", "")).replace("\0", " ").split())[:LONGEST]
    if not query:
        raise ValueError("say which words the digest is about" if kind == "topic" else "the search needs a query")
    search(store, query, size=1)  # what cannot be searched for is refused here, not at night
    filters = {str(k): str(v)[:200] for k, v in value.get("filters", {}).items()} if kind == "search" else {}
    return {"query": query, **({"filters": filters} if filters else {})}


def about(kind: str, value: dict[str, Any]) -> str:
    """What a subscription is of, in words."""
    if kind == "all":
        return "all new papers"
    if kind == "like":
        count = len(value.get("papers", []))
        return f"papers like {count} of yours" if count != 1 else "papers like one of yours"
    return f"papers about {value['query'][:80]}" if kind == "topic" else f"the search {value['query'][:80]}"


def forget_unconfirmed(session: Session) -> None:
    """Forget what was not confirmed in time, with mails to it that still wait."""
    late = select(Subscription.id).where(Subscription.state == "pending", Subscription.confirm_expires < now())
    numbers = list(session.scalars(late))
    if numbers:
        session.execute(delete(Delivery).where(Delivery.subscription_id.in_(numbers), Delivery.state == "queued"))
        session.execute(delete(Subscription).where(Subscription.id.in_(numbers)))


def subscribe(
    store: Store, settings: Settings, sender: Address, address: str, *, frequency: str, kind: str = "all",
    value: dict[str, Any] | None = None, reader: int | None = None,
) -> bool:  # fmt: skip
    """Ask for a digest: a mail with a link that confirms goes into the outbox, and nothing else is sent before that is followed.

    Args:
        store, settings: of the page.
        sender: whom the mail is from.
        address: whose digest it is.
        frequency: ``daily`` or ``weekly``.
        kind: ``all``, ``topic``, ``search`` or ``like``.
        value: ``{"query"}`` of a topic, ``{"query", "filters"}`` of a search, ``{"papers"}`` (ids) of papers to be like.
        reader: whose votes rank it, where that is known.

    Returns:
        Whether a mail was written. It is not where the person has got `A_DAY` in a day, all have got `ALL_A_DAY`, or the address has
        the same digest already; whoever asks is told the same in any case, and learns nothing of an address that is not theirs.

    Raises:
        ValueError: where something is not as it must be; the message says what.
    """
    address = check_address(address)
    if frequency not in FREQUENCIES:
        raise ValueError("a digest comes daily or weekly")
    kept = _value(store, kind, value or {})
    token, at = secrets.token_urlsafe(32), now()
    with store.writing() as session:
        forget_unconfirmed(session)
        own = select(Subscription).where(func.lower(Subscription.address) == address.lower(), Subscription.state == "confirmed")
        theirs = list(session.scalars(own))
        same = any((s.frequency, s.kind, plain_value(s.value)) == (frequency, kind, kept) for s in theirs)
        mailed = select(Delivery.address).where(Delivery.kind == "confirm", Delivery.created_at > at - timedelta(days=1))
        people = [person(other) for other in session.scalars(mailed.limit(ALL_A_DAY))]
        if same or len(theirs) >= MOST_TO_ONE or len(people) >= ALL_A_DAY or people.count(person(address)) >= A_DAY:
            return False
        row = Subscription(
            address=address, frequency=frequency, kind=kind, value=kept, reader_id=reader, confirm_hash=hash_of(token),
            confirm_expires=at + LINK_LASTS,
        )  # fmt: skip
        session.add(row)
        session.flush()
        message = _confirmation(settings, sender, row, token)
        return put(
            session,
            message,
            address,
            kind="confirm",
            dedupe=str(message["Message-ID"]),
            message_id=str(message["Message-ID"]),
            subscription=row.id,
        )


def plain_value(value: dict[str, Any]) -> dict[str, Any]:
    """What a subscription asks for, without how far it has been told."""
    return {name: v for name, v in value.items() if name not in ("after", "changes_after")}


def _confirmation(settings: Settings, sender: Address, row: Subscription, token: str) -> EmailMessage:
    """The mail that asks. Nothing stands in it that whoever asked has written: it may be sent to a stranger."""
    message = letter(sender, row.address, f"Confirm your {row.frequency} digest", "confirm")
    message.set_content(
        f"Someone, probably you, asked for a {row.frequency} digest of new papers to this\naddress.\n\n"
        f"To get it, open this page and press its button, within three days:\n\n{settings.address}/subscribe/confirm/{token}\n\n"
        "If it was not you, do nothing: no digest comes, and the request is forgotten.\n",
        cte="7bit",
    )
    return message


def _out(session: Session, row: Subscription | None) -> Subscription | None:
    if row is not None:
        session.expunge(row)
    return row


def pending(store: Store, token: str) -> Subscription | None:
    """The subscription that a link would confirm; None for a link that does not hold."""
    with store.reading() as connection, Session(connection, expire_on_commit=False) as session:
        return _out(session, _pending(session, token))


def _pending(session: Session, token: str) -> Subscription | None:
    row = session.scalar(select(Subscription).where(Subscription.confirm_hash == hash_of(token)))
    holds = row is not None and row.state == "pending" and row.confirm_expires is not None and row.confirm_expires >= now()
    return row if holds else None


def confirm(store: Store, sessions: Sessions, token: str) -> int | None:
    """Use a link up; the subscription's number, or None for a link that does not hold.

    The digest begins with what comes after this moment.
    """
    with store.writing() as session:
        row = _pending(session, token)
        if row is None:
            return None
        at = now()
        row.state, row.confirmed_at, row.confirm_hash, row.confirm_expires = "confirmed", at, None, None
        row.unsubscribe_hash = hash_of(sessions.unsubscribe_token(row.id))
        row.value = {**row.value, "after": at.isoformat(), "changes_after": at.isoformat()}
        return row.id


def find(store: Store, sessions: Sessions, token: str) -> Subscription | None:
    """The subscription of the link in a mail; None for a link that does not hold."""
    number = sessions.subscription_of(token)
    with store.reading() as connection, Session(connection, expire_on_commit=False) as session:
        # The hash is one of a mail that was sent from a store which this one was restored from.
        own = select(Subscription).where(or_(Subscription.id == number, Subscription.unsubscribe_hash == hash_of(token)))
        rows = list(
            session.scalars(own.where(Subscription.state != "pending").order_by(Subscription.id != (number or 0)).limit(1))
        )
        return _out(session, rows[0] if rows else None)


def of_reader(store: Store, reader: int) -> list[Subscription]:
    """The digests that a reader has asked for and confirmed."""
    with store.reading() as connection, Session(connection, expire_on_commit=False) as session:
        own = select(Subscription).where(Subscription.reader_id == reader, Subscription.state == "confirmed")
        found: Iterable[Subscription] = session.scalars(own.order_by(Subscription.id).limit(100))
        rows = list(found)
        session.expunge_all()
        return rows


def change(store: Store, number: int, frequency: str) -> bool:
    """How often a digest comes, from now on; False where it has ended.

    Raises:
        ValueError: for anything but ``daily`` and ``weekly``.
    """
    if frequency not in FREQUENCIES:
        raise ValueError("a digest comes daily or weekly")
    with store.writing() as session:
        row = session.get(Subscription, number)
        if row is None or row.state != "confirmed":
            return False
        if row.frequency != frequency:
            row.frequency, row.last_period = frequency, None  # days and weeks are named differently
        return True


def unsubscribe(store: Store, number: int) -> bool:
    """End a subscription; mails to it that wait are not sent. False where there is none of this number. Twice is the same as once."""
    with store.writing() as session:
        row = session.get(Subscription, number)
        if row is None:
            return False
        if row.state != "unsubscribed":
            row.state, row.ended_at = "unsubscribed", now()
        waiting = delete(Delivery).where(
            Delivery.subscription_id == number, Delivery.kind == "digest", Delivery.state == "queued"
        )
        session.execute(waiting)
        return True


def named(store: Store, number: int) -> Subscription | None:
    """One subscription."""
    with store.reading() as connection, Session(connection, expire_on_commit=False) as session:
        return _out(session, session.get(Subscription, number))

"""What a digest says: new papers, ranked for its reader, and the verdicts that changed."""

from __future__ import annotations

import hashlib
import logging
import textwrap
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from email.headerregistry import Address
from email.message import EmailMessage
from email.utils import format_datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from corollary.web.asked import filters_of
from corollary.web.board import Verdicts, change_words, standing
from corollary.web.digest.outbox import put
from corollary.web.digest.subscriptions import about, forget_unconfirmed
from corollary.web.guard import Sessions
from corollary.web.pages.cards import nearest_methods
from corollary.web.pages.render import environment
from corollary.web.pages.words import long_day, paper_address, people, short_day
from corollary.web.periods import week_name
from corollary.web.search import rank_for, search
from corollary.web.search.types import Filters
from corollary.web.settings import Settings
from corollary.web.store import (
    Paper,
    PaperView,
    ReadingItem,
    Store,
    Subscription,
    Vote,
    now,
    papers_by_id,
    papers_of_slugs,
    verdict_changes_since,
)

_LOG = logging.getLogger("corollary.web")
MOST = 15
CHANGES = 15
_FAR = 1000
_FUSION = 10
"""of reciprocal rank fusion; less than the search's, for lists of tens and not of hundreds"""
_LIKE = 0.3
"""the least likeness to what was named of a paper in a digest of papers like those"""
_BACK = {"daily": timedelta(days=7), "weekly": timedelta(days=14)}
"""how old a paper may be that came in since the last digest: an import of old papers is no news"""


_WIDTH = 72


@dataclass(frozen=True)
class Change:
    """A verdict that came or changed."""

    title: str
    address: str
    statement: str
    old: str | None
    new: str

    @property
    def words(self) -> str:
        """What happened."""
        return change_words(self.old, self.new)


@dataclass(frozen=True)
class Found:
    """A paper of a digest, and the method that runs here and is nearest to it."""

    paper: PaperView
    address: str
    record: Any
    nearest: tuple[str, str] | None


@dataclass
class Desk:
    """What the digests of one call share."""

    store: Store
    sessions: Sessions
    settings: Settings
    verdicts: Verdicts
    fresh: dict[tuple[date, str], tuple[list[int], str]] = field(default_factory=dict)


def period_of(frequency: str, day: date) -> str:
    """The name of the period in which a digest goes out.

    Example:
        >>> period_of("weekly", date(2024, 10, 2))
        '2024-W40'
    """
    return day.isoformat() if frequency == "daily" else week_name(day)


def _since(row: Subscription, today: date) -> date:
    """The oldest day whose papers are news: older than usual where the last look is longer ago, as after an outage."""
    return min(today - _BACK[row.frequency], datetime.fromisoformat(row.value["after"]).date())


def _fresh(desk: Desk, since: date, after: str) -> tuple[list[int], str]:
    """Ids of the papers that came into the store after a moment, most points first, and the moment up to which that holds.

    Papers of one moment come in one transaction, and a later one has a later moment: writers of SQLite take turns; those of PostgreSQL
    are waited for, since one that began earlier may end later.
    """
    key = (since, after)
    if key not in desk.fresh:
        moment = datetime.fromisoformat(after)
        query = select(Paper.id, Paper.created_at).where(Paper.day >= since, Paper.created_at > moment)
        with desk.store.reading() as connection:
            if desk.store.dialect == "postgresql":
                connection.exec_driver_sql("LOCK TABLE papers IN SHARE MODE")
            rows = connection.execute(query.order_by(Paper.points.desc(), Paper.id.desc())).all()
        last = max((row.created_at for row in rows), default=moment)
        desk.fresh[key] = [row.id for row in rows[:5000]], last.isoformat()
    return desk.fresh[key]


def _matching(desk: Desk, query: str, fields: dict[str, str], ids: Sequence[int], since: date) -> list[int]:
    """Those of some papers that a search finds, best first: by their words, or among the first by meaning."""
    wanted = set(ids)
    filters = filters_of(desk.verdicts, fields)
    filters = Filters(max(filters.first or since, since), filters.last, filters.category, filters.slugs, filters.has_code)
    found: list[int] = []
    after = None
    while True:
        page = search(desk.store, query, filters, after=after, size=100)
        near = (hit for hit in page.hits if hit.words_rank is not None or (hit.meaning_rank or _FAR) <= 10)
        found += [hit.paper.id for hit in near if hit.paper.id in wanted]
        after = page.next
        if after is None:
            return found


def _liked(store: Store, reader: int | None) -> list[int]:
    """What a reader voted for and reads."""
    if reader is None:
        return []
    with store.reading() as connection:
        votes = list(connection.scalars(select(Vote.paper_id).where(Vote.reader_id == reader).limit(200)))
        items = list(connection.scalars(select(ReadingItem.paper_id).where(ReadingItem.reader_id == reader).limit(200)))
    return sorted({*votes, *items})


def _ids(store: Store, keys: Sequence[str]) -> list[int]:
    with store.reading() as connection:
        return list(connection.scalars(select(Paper.id).where(Paper.key.in_(list(keys)))))


def choose(desk: Desk, row: Subscription, today: date) -> tuple[list[int], str]:
    """Ids of the new papers of a subscription, best first for its reader, and the moment up to which there are no others.

    The order is that of votes, of the search, or of likeness; where the reader is known to like other papers, it is fused half and half
    with the likeness to those, by reciprocal rank.
    """
    since = _since(row, today)
    ids, last = _fresh(desk, since, row.value["after"])
    if ids and row.kind in ("topic", "search"):
        ids = _matching(desk, row.value["query"], dict(row.value.get("filters", {})), ids, since)
    elif ids and row.kind == "like":
        ranked = rank_for(desk.store, _ids(desk.store, row.value["papers"]), ids)
        ids = [i for i, likeness in ranked if likeness >= _LIKE]
    liked = _liked(desk.store, row.reader_id) if len(ids) > 1 else []
    if liked:
        place = {i: rank for rank, i in enumerate(ids, 1)}
        taste = {i: rank for rank, (i, _) in enumerate(rank_for(desk.store, liked, ids), 1)}
        ids = sorted(ids, key=lambda i: (-1 / (_FUSION + place[i]) - 1 / (_FUSION + taste[i]), taste[i]))
    return ids[:MOST], last


def changed(desk: Desk, row: Subscription) -> tuple[list[Change], str]:
    """The verdicts that changed since the last digest, each claim once, and the moment up to which there are no others."""
    after = str(row.value["changes_after"])
    rows = verdict_changes_since(desk.store, datetime.fromisoformat(after))
    if not rows:
        return [], after
    first: dict[tuple[str, str], str | None] = {}
    for c in rows:
        first.setdefault((c.slug, c.claim), c.old)
    newest = {(c.slug, c.claim): c for c in rows}
    known = {paper.slug: paper for paper in papers_of_slugs(desk.store, {c.slug for c in rows})}
    wanted: set[str | None] = {c.slug for c in rows}
    if row.kind in ("topic", "search"):
        hits = search(desk.store, row.value["query"], Filters(slugs=frozenset(filter(None, known))), size=50).hits
        wanted = {hit.paper.slug for hit in hits if hit.words_rank is not None or (hit.meaning_rank or _FAR) <= 5}
    elif row.kind == "like":
        named, by_id = set(row.value["papers"]), {paper.id: paper for paper in known.values()}
        like = rank_for(desk.store, _ids(desk.store, row.value["papers"]), list(by_id))
        wanted = {by_id[i].slug for i, likeness in like if likeness >= _LIKE or by_id[i].key in named}
    found = []
    for name, c in newest.items():
        if c.slug not in wanted or first[name] == c.new:  # there and back again is no change
            continue
        paper = known.get(c.slug)
        place = paper_address(paper) if paper else f"/papers/{c.slug}"
        title, said = paper.title if paper else c.slug, str(c.row.get("statement") or c.claim)
        found.append(Change(title, f"{desk.settings.address}{place}#{c.claim}", said, first[name], c.new))
    found.sort(key=lambda c: c.old is None)  # what changed stands above what is new
    return found, max(c.at for c in rows).isoformat()


def _set(text: str, indent: str = "", first: str | None = None) -> str:
    """A paragraph in lines of a width that every mail program shows whole."""
    one = " ".join(text.split())
    return textwrap.fill(
        one,
        _WIDTH,
        initial_indent=indent if first is None else first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def plain(papers: Sequence[Found], changes: Sequence[Change], more: int, head: str, address: str, leave: str) -> str:
    """The mail as text."""
    parts = [_set(head)]
    if changes:
        words = _heading(changes).upper()
        parts.append(words + "\n" + "-" * len(words))
        parts += ["\n".join([_set(c.title), _set(c.statement, "  "), _set(c.words, "  "), f"  {c.address}"]) for c in changes]
        if more:
            parts.append(f"and {more} more: {address}/methods")
    if papers:
        parts.append("NEW PAPERS\n" + "-" * 10)
        for number, found in enumerate(papers, 1):
            lines = [_set(found.paper.title, "    ", f"{number:>2}. ")]
            if found.paper.authors:
                lines.append(_set(people(found.paper.authors), "    "))
            lines.append(_set(_short(found.paper.text), "    "))
            if found.record is not None:
                lines.append(_set(f"{standing(found.record).words[0].upper()}{standing(found.record).words[1:]}:", "    "))
                lines.append(f"    corollary verify {found.record.paper.slug}")
            elif found.nearest:
                lines.append(_set(f"Nearest method that runs here: {found.nearest[0]}", "    "))
            lines.append(f"    {found.address}")
            parts.append("\n".join(line for line in lines if line))
    parts.append(f"-- \nYou asked for this digest. Change it or end it:\n{leave}")
    return "\n\n".join(parts) + "\n"


def _heading(changes: Sequence[Change]) -> str:
    return "Verdicts that changed" if all(c.old for c in changes) else "Verdicts, changed and new"


def _short(text: str) -> str:
    clip: Callable[[str, int], str] = environment().filters["clip"]
    return clip(" ".join(text.split()), 280)


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def write(
    desk: Desk,
    sender: Address,
    row: Subscription,
    papers: Sequence[PaperView],
    changes: Sequence[Change],
    day: date,
    at: datetime,
) -> EmailMessage:
    """The mail: plain text and HTML, with the headers that let a mail program end the subscription by one click (RFC 8058)."""
    base = desk.settings.address
    token = desk.sessions.unsubscribe_token(row.id)
    leave = f"{base}/unsubscribe/{token}"
    near = nearest_methods(desk.store, [p for p in papers if desk.verdicts.paper(p.slug) is None])
    found = [
        Found(
            paper, base + paper_address(paper), desk.verdicts.paper(paper.slug),
            (near[paper.id][0].title, base + paper_address(near[paper.id][0])) if paper.id in near else None,
        )
        for paper in papers
    ]  # fmt: skip
    period = period_of(row.frequency, day)
    counted = [_count(len(papers), "new paper")] if papers else []
    counted += [_count(len(changes), "verdict")] if changes else []
    told, more = changes[:CHANGES], max(0, len(changes) - CHANGES)
    message = EmailMessage()
    message["From"] = sender
    message["To"] = Address(addr_spec=row.address)
    message["Subject"] = f"Corollary, {short_day(day)}: {', '.join(counted)}"
    message["Date"] = format_datetime(at)
    message["Message-ID"] = f"<digest.{period}.{hashlib.sha256(token.encode()).hexdigest()[:24]}@{sender.domain}>"
    message["List-Id"] = f"Digest of Corollary <digest.{sender.domain}>"
    message["List-Unsubscribe"] = f"<{leave}>"
    message["List-Unsubscribe-Post"] = "List-Unsubscribe=One-Click"
    message["Auto-Submitted"] = "auto-generated"
    head = f"Corollary, {long_day(day)}. Your {row.frequency} digest: {about(row.kind, row.value)}."
    # Quoted-printable: short lines, and seven bits, whatever the server between can take.
    message.set_content(plain(found, told, more, head, base, leave), cte="quoted-printable")
    context = {
        "papers": found, "changes": told, "more_changes": more, "day": day, "frequency": row.frequency, "standing": standing, "heading": _heading(told), "short": _short,
        "about": about(row.kind, row.value), "leave": leave, "address": base,
    }  # fmt: skip
    page = environment().get_template("digest.html").render(context)
    message.add_alternative(page, subtype="html", cte="quoted-printable")
    return message


@dataclass
class Queued:
    """What a call of `queue_digests` did: mails written, subscriptions with nothing new, and those that failed and are tried anew."""

    written: int = 0
    nothing: int = 0
    failed: int = 0


def queue_digests(
    store: Store, sessions: Sessions, settings: Settings, sender: Address, verdicts: Verdicts, *, today: date | None = None,
    frequencies: Sequence[str] = ("daily", "weekly"), show: Callable[[EmailMessage], None] | None = None,
) -> Queued:  # fmt: skip
    """Write the digests that are due into the outbox; killed anywhere and called again, it writes what is missing and nothing twice.

    Each subscription is one transaction: its mail, and the mark how far it has been told. One whose search fails stops no other.

    Args:
        store, sessions, settings, sender, verdicts: of the page.
        today: the day of the digest. A subscription gets one mail a day or week at most, and none where nothing is new; a daily one
            then takes what comes later that day, a weekly one what comes in the next week.
        frequencies: which subscriptions are looked at.
        show: given each mail instead of the outbox; nothing is changed then.
    """
    at = now()
    day = today or at.date()
    stamp = at if today is None else datetime.combine(today, time(12), UTC)
    desk, done = Desk(store, sessions, settings, verdicts), Queued()
    wanted = select(Subscription).where(Subscription.state == "confirmed", Subscription.frequency.in_(list(frequencies)))
    with store.reading() as connection, Session(connection, expire_on_commit=False) as session:
        rows = list(session.scalars(wanted.order_by(Subscription.id)))
        session.expunge_all()
    if show is None:
        with store.writing() as session:
            forget_unconfirmed(session)
    for row in rows:
        if row.last_period is not None and row.last_period >= period_of(row.frequency, day):
            continue
        try:
            _one(desk, sender, row, day, stamp, show, done)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one digest, the others go out
            done.failed += 1
            # Where it failed, without the values that an error's own words may repeat.
            where = "".join(traceback.format_tb(error.__traceback__))
            _LOG.error("the digest of subscription %s could not be written: %s\n%s", row.id, type(error).__name__, where)
    return done


def _one(
    desk: Desk,
    sender: Address,
    row: Subscription,
    day: date,
    at: datetime,
    show: Callable[[EmailMessage], None] | None,
    done: Queued,
) -> None:
    ids, after = choose(desk, row, day)
    changes, changes_after = changed(desk, row)
    message = write(desk, sender, row, papers_by_id(desk.store, ids), changes, day, at) if ids or changes else None
    done.nothing += message is None
    if show is not None:
        if message is not None:
            show(message)
            done.written += 1
        return
    period = period_of(row.frequency, day)
    with desk.store.writing() as session:
        # What is told and that it is told are one transaction: no mail without its mark, no mark without its mail.
        own = session.get(Subscription, row.id)
        if own is None or own.state != "confirmed" or (own.last_period, own.value) != (row.last_period, row.value):
            return  # ended, changed, or told by another process meanwhile
        if message is not None:
            name = f"digest:{row.id}:{period}"
            written = put(
                session,
                message,
                row.address,
                kind="digest",
                dedupe=name,
                message_id=str(message["Message-ID"]),
                subscription=row.id,
            )
            own.last_period = period
            if not written:
                return  # this day's mail has gone out before; what has come since goes into the next one
            done.written += 1
        elif row.frequency == "weekly":
            own.last_period = period
        own.value = {**own.value, "after": after, "changes_after": changes_after}

"""The tables. One schema for SQLite and PostgreSQL; what only one of them has (the full-text index) stands in the migrations.

Times are UTC. Lists of short strings (authors, keywords, categories) are stored one a line, so that the full-text index can read
them where they stand; `Lines` turns them into tuples.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, date, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Computed,
    Date,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
)  # fmt: skip
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Id = BigInteger().with_variant(Integer(), "sqlite")  # SQLite numbers rows only in an INTEGER PRIMARY KEY


class Lines(TypeDecorator[tuple[str, ...]]):
    """A tuple of strings, stored one a line; a line break inside an item becomes a space."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Iterable[str] | None, dialect: Dialect) -> str:
        return "\n".join(" ".join(item.split()) for item in value or () if item.strip())

    def process_result_value(self, value: str | None, dialect: Dialect) -> tuple[str, ...]:
        return tuple(value.split("\n")) if value else ()


class Utc(TypeDecorator[datetime]):
    """A moment in UTC, aware in Python; SQLite keeps no zone, so it is put back on the way out."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"a time without a zone: {value!r}; give an aware datetime")
        value = value.astimezone(UTC)
        return value if dialect.name != "sqlite" else value.replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def now() -> datetime:
    """This moment, in UTC."""
    return datetime.now(UTC)


class Base(DeclarativeBase):
    """Root of the tables."""


class Paper(Base):
    """One paper, from whatever source; the same paper from two sources is one row.

    ``key`` is its public name: the arXiv id without version (``2410.01623``, ``hep-ex/0307015``), else ``doi:...``, else
    ``url:...``, else ``title:<hash>``. ``slug`` links to a record of `corollary.papers`. ``imported_votes`` come from a source
    and are not known (None) for most; ``own_votes`` counts the rows of `Vote`; ``points`` is their sum. ``summary`` is ours, and
    ``abstract`` comes with the reader's own import. ``links`` is a list of ``{"url", "kind", "added_by"}``; ``extra`` keeps what
    a source gave beyond these columns, under the source's name, so that nothing is lost on the way out.
    """

    __tablename__ = "papers"

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    key: Mapped[str] = mapped_column(String(500), unique=True)
    slug: Mapped[str | None] = mapped_column(String(100), unique=True)
    arxiv: Mapped[str | None] = mapped_column(String(40))
    version: Mapped[int | None] = mapped_column(Integer)
    doi: Mapped[str | None] = mapped_column(String(300))
    title: Mapped[str] = mapped_column(Text)
    authors: Mapped[tuple[str, ...]] = mapped_column(Lines, default=())
    abstract: Mapped[str] = mapped_column(Text, default="")
    summary: Mapped[str] = mapped_column(Text, default="")
    keywords: Mapped[tuple[str, ...]] = mapped_column(Lines, default=())
    categories: Mapped[tuple[str, ...]] = mapped_column(Lines, default=())
    day: Mapped[date] = mapped_column(Date)
    published: Mapped[datetime | None] = mapped_column(Utc)
    updated: Mapped[datetime | None] = mapped_column(Utc)
    imported_votes: Mapped[int | None] = mapped_column(Integer)
    own_votes: Mapped[int] = mapped_column(Integer, default=0)
    points: Mapped[int] = mapped_column(Integer, Computed("coalesce(imported_votes, 0) + own_votes", persisted=True))
    url: Mapped[str | None] = mapped_column(Text)
    code: Mapped[str | None] = mapped_column(Text)
    code_added_by: Mapped[str | None] = mapped_column(String(100))
    organization: Mapped[str | None] = mapped_column(Text)
    comment: Mapped[str | None] = mapped_column(Text)
    venue: Mapped[str | None] = mapped_column(Text)
    links: Mapped[list[dict[str, Any]]] = mapped_column(JSON, default=list)
    source: Mapped[str] = mapped_column(String(40))
    extra: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    created_at: Mapped[datetime] = mapped_column(Utc, default=now)
    changed_at: Mapped[datetime] = mapped_column(Utc, default=now)

    __table_args__ = (Index("papers_by_day", "day", "points", "id"), Index("papers_by_doi", "doi"))


class Reader(Base):
    """Someone who votes, takes notes and keeps lists. Row 1 is the laptop's own reader, who needs no account."""

    __tablename__ = "readers"

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    name: Mapped[str] = mapped_column(String(200), default="")
    token_hash: Mapped[str | None] = mapped_column(String(128), unique=True)
    settings: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    created_at: Mapped[datetime] = mapped_column(Utc, default=now)


class Vote(Base):
    """A reader's own vote; never mixed with the votes that a source counted."""

    __tablename__ = "votes"

    reader_id: Mapped[int] = mapped_column(ForeignKey("readers.id", ondelete="CASCADE"), primary_key=True)
    paper_id: Mapped[int] = mapped_column(ForeignKey("papers.id", ondelete="CASCADE"), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(Utc, default=now)

    __table_args__ = (Index("votes_by_paper", "paper_id"),)


class Note(Base):
    """A reader's note on a paper: one to each, in plain text."""

    __tablename__ = "notes"

    reader_id: Mapped[int] = mapped_column(ForeignKey("readers.id", ondelete="CASCADE"), primary_key=True)
    paper_id: Mapped[int] = mapped_column(ForeignKey("papers.id", ondelete="CASCADE"), primary_key=True)
    text: Mapped[str] = mapped_column(Text)
    changed_at: Mapped[datetime] = mapped_column(Utc, default=now)

    __table_args__ = (Index("notes_by_paper", "paper_id"),)


class ReadingItem(Base):
    """A paper on a reader's reading list; ``state`` is ``unread``, ``reading`` or ``read``."""

    __tablename__ = "reading_items"

    reader_id: Mapped[int] = mapped_column(ForeignKey("readers.id", ondelete="CASCADE"), primary_key=True)
    paper_id: Mapped[int] = mapped_column(ForeignKey("papers.id", ondelete="CASCADE"), primary_key=True)
    state: Mapped[str] = mapped_column(String(20), default="unread")
    added_at: Mapped[datetime] = mapped_column(Utc, default=now)

    __table_args__ = (
        CheckConstraint("state IN ('unread', 'reading', 'read')", name="reading_state"),
        Index("reading_by_paper", "paper_id"),
    )


class SavedSearch(Base):
    """A query with its filters, under a name of the reader's own."""

    __tablename__ = "saved_searches"

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    reader_id: Mapped[int] = mapped_column(ForeignKey("readers.id", ondelete="CASCADE"))
    name: Mapped[str] = mapped_column(String(200))
    query: Mapped[str] = mapped_column(Text)
    filters: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    created_at: Mapped[datetime] = mapped_column(Utc, default=now)

    __table_args__ = (UniqueConstraint("reader_id", "name"),)


class Subscription(Base):
    """A digest to one address. ``kind`` is ``all``, ``topic``, ``search`` or ``like``; ``value`` says which.

    ``state`` goes ``pending`` -> ``confirmed`` -> ``unsubscribed``. Tokens are kept as hashes alone. ``last_period`` is the last
    day or week (``2026-05-08``, ``2026-W19``) for which a mail was put into `Delivery`.
    """

    __tablename__ = "subscriptions"

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    reader_id: Mapped[int | None] = mapped_column(ForeignKey("readers.id", ondelete="SET NULL"))
    address: Mapped[str] = mapped_column(String(320))
    frequency: Mapped[str] = mapped_column(String(10))
    kind: Mapped[str] = mapped_column(String(10))
    value: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    state: Mapped[str] = mapped_column(String(20), default="pending")
    confirm_hash: Mapped[str | None] = mapped_column(String(128), unique=True)
    confirm_expires: Mapped[datetime | None] = mapped_column(Utc)
    unsubscribe_hash: Mapped[str | None] = mapped_column(String(128), unique=True)
    last_period: Mapped[str | None] = mapped_column(String(20))
    created_at: Mapped[datetime] = mapped_column(Utc, default=now)
    confirmed_at: Mapped[datetime | None] = mapped_column(Utc)
    ended_at: Mapped[datetime | None] = mapped_column(Utc)

    __table_args__ = (
        CheckConstraint("frequency IN ('daily', 'weekly')", name="subscription_frequency"),
        CheckConstraint("kind IN ('all', 'topic', 'search', 'like')", name="subscription_kind"),
        CheckConstraint("state IN ('pending', 'confirmed', 'unsubscribed')", name="subscription_state"),
        Index("subscriptions_by_address", "address"),
        Index("subscriptions_by_state", "state", "frequency"),
    )


class Delivery(Base):
    """The outbox: one row to each mail, put down before anything is sent. ``dedupe`` (``digest:<subscription>:<period>``,
    ``confirm:<subscription>:<n>``) is unique, so that no mail is written twice. ``state`` goes ``queued`` -> ``sending`` ->
    ``sent``, or ``failed`` after the last attempt; ``message_id`` stays the same over all attempts.
    """

    __tablename__ = "deliveries"

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    subscription_id: Mapped[int | None] = mapped_column(ForeignKey("subscriptions.id", ondelete="SET NULL"))
    dedupe: Mapped[str] = mapped_column(String(200), unique=True)
    kind: Mapped[str] = mapped_column(String(20))
    address: Mapped[str] = mapped_column(String(320))
    message_id: Mapped[str] = mapped_column(String(300), unique=True)
    message: Mapped[bytes] = mapped_column(LargeBinary)
    state: Mapped[str] = mapped_column(String(20), default="queued")
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    next_try: Mapped[datetime] = mapped_column(Utc, default=now)
    error: Mapped[str] = mapped_column(Text, default="")
    created_at: Mapped[datetime] = mapped_column(Utc, default=now)
    sent_at: Mapped[datetime | None] = mapped_column(Utc)

    __table_args__ = (
        CheckConstraint("state IN ('queued', 'sending', 'sent', 'failed')", name="delivery_state"),
        Index("deliveries_by_state", "state", "next_try"),
        Index("deliveries_by_subscription", "subscription_id"),
    )


class Job(Base):
    """Background work: ``verify`` runs, imports, index upkeep. ``heartbeat`` tells a live worker from a dead one."""

    __tablename__ = "jobs"

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    kind: Mapped[str] = mapped_column(String(40))
    args: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    state: Mapped[str] = mapped_column(String(20), default="queued")
    progress: Mapped[float] = mapped_column(Float, default=0.0)
    log: Mapped[str] = mapped_column(Text, default="")
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    error: Mapped[str] = mapped_column(Text, default="")
    worker: Mapped[str | None] = mapped_column(String(200))
    reader_id: Mapped[int | None] = mapped_column(ForeignKey("readers.id", ondelete="SET NULL"))
    created_at: Mapped[datetime] = mapped_column(Utc, default=now)
    started_at: Mapped[datetime | None] = mapped_column(Utc)
    heartbeat: Mapped[datetime | None] = mapped_column(Utc)
    finished_at: Mapped[datetime | None] = mapped_column(Utc)

    __table_args__ = (
        CheckConstraint("state IN ('queued', 'running', 'done', 'failed', 'cancelled')", name="job_state"),
        Index("jobs_by_state", "state", "id"),
    )


class VerdictState(Base):
    """The verdict of one claim as last seen; what `VerdictChange` is measured against."""

    __tablename__ = "verdict_states"

    slug: Mapped[str] = mapped_column(String(100), primary_key=True)
    claim: Mapped[str] = mapped_column(String(100), primary_key=True)
    verdict: Mapped[str] = mapped_column(String(60))
    row: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    seen_at: Mapped[datetime] = mapped_column(Utc, default=now)


class VerdictChange(Base):
    """A verdict that came or changed: ``old`` is None for the first. Append-only; the digest reads it."""

    __tablename__ = "verdict_changes"

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    slug: Mapped[str] = mapped_column(String(100))
    claim: Mapped[str] = mapped_column(String(100))
    old: Mapped[str | None] = mapped_column(String(60))
    new: Mapped[str] = mapped_column(String(60))
    row: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    at: Mapped[datetime] = mapped_column(Utc, default=now)

    __table_args__ = (Index("verdict_changes_by_time", "at"),)


class ImportRun(Base):
    """One import. ``cursor`` says how far it has come and is committed together with the papers, so that it resumes there."""

    __tablename__ = "import_runs"

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    source: Mapped[str] = mapped_column(Text)
    state: Mapped[str] = mapped_column(String(20), default="running")
    cursor: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    added: Mapped[int] = mapped_column(Integer, default=0)
    updated: Mapped[int] = mapped_column(Integer, default=0)
    unchanged: Mapped[int] = mapped_column(Integer, default=0)
    rejected: Mapped[int] = mapped_column(Integer, default=0)
    error: Mapped[str] = mapped_column(Text, default="")
    started_at: Mapped[datetime] = mapped_column(Utc, default=now)
    finished_at: Mapped[datetime | None] = mapped_column(Utc)

    __table_args__ = (
        CheckConstraint("state IN ('running', 'done', 'failed')", name="import_state"),
        Index("import_runs_by_source", "source", "id"),
    )


class RejectedItem(Base):
    """An item that no paper could be made of, with the reason; the same item is set aside once."""

    __tablename__ = "rejected_items"

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    run_id: Mapped[int | None] = mapped_column(ForeignKey("import_runs.id", ondelete="SET NULL"))
    source: Mapped[str] = mapped_column(Text)
    position: Mapped[str] = mapped_column(String(100))
    reason: Mapped[str] = mapped_column(Text)
    item: Mapped[str] = mapped_column(Text)
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    at: Mapped[datetime] = mapped_column(Utc, default=now)

    __table_args__ = (Index("rejected_by_run", "run_id"),)


class FetchState(Base):
    """What a source's server said last: its ETag, and when it may be asked again."""

    __tablename__ = "fetch_states"

    url: Mapped[str] = mapped_column(String(2000), primary_key=True)
    etag: Mapped[str | None] = mapped_column(Text)
    modified: Mapped[str | None] = mapped_column(Text)
    fetched_at: Mapped[datetime] = mapped_column(Utc, default=now)


class Vector(Base):
    """The meaning of one paper as signed bytes of a unit vector. ``seq`` grows with every write: an index file that holds all
    up to some ``seq`` catches up by reading those above it."""

    __tablename__ = "vectors"

    seq: Mapped[int] = mapped_column(Id, primary_key=True)
    paper_id: Mapped[int] = mapped_column(ForeignKey("papers.id", ondelete="CASCADE"), unique=True)
    model: Mapped[str] = mapped_column(String(100))
    vector: Mapped[bytes] = mapped_column(LargeBinary)

    __table_args__ = ({"sqlite_autoincrement": True},)


class Pending(Base):
    """Papers whose text is newer than their vector. Triggers of the migrations put them here."""

    __tablename__ = "pending"

    paper_id: Mapped[int] = mapped_column(ForeignKey("papers.id", ondelete="CASCADE"), primary_key=True, autoincrement=False)


class Term(Base):
    """How many papers a word stands in; what spelling is corrected by. Counted when a paper's vector is made."""

    __tablename__ = "terms"

    term: Mapped[str] = mapped_column(String(60), primary_key=True)
    papers: Mapped[int] = mapped_column(Integer)


class Meta(Base):
    """Small facts of the store itself under a name: its secret, the embedding model, when the first issue was put in."""

    __tablename__ = "meta"

    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    value: Mapped[Any] = mapped_column(JSON)


# What export writes and import reads back, parents before children. The rest is derived (vectors, terms) or of this machine.
EXPORTED: tuple[type[Base], ...] = (
    Paper, Reader, Vote, Note, ReadingItem, SavedSearch, Subscription, Delivery, Job, VerdictState, VerdictChange, ImportRun,
    RejectedItem,
)  # fmt: skip

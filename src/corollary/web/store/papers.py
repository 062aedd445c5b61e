"""Reading papers: by name, by day, week and month, and by what is trending.

Lists are ordered by points, newest row first among equals, and paged by a cursor that names the last row seen, so that a page
costs the same however far down it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal, NamedTuple

from sqlalchemy import Connection, func, select, update
from sqlalchemy.dialects import postgresql, sqlite

from corollary.web.store.engine import Store, from_json, places, rows
from corollary.web.store.schema import Paper, Vote, now

PAGE = 30
TRENDING_DAYS = 30
TRENDING_FORMULA = "(points + 1) / (age in days + 2)^1.5, over the last 30 days that have papers before the newest"


class PaperView(NamedTuple):
    """One paper as the pages show it; the fields are those of `corollary.web.store.schema.Paper`."""

    id: int
    key: str
    slug: str | None
    arxiv: str | None
    version: int | None
    doi: str | None
    title: str
    authors: tuple[str, ...]
    abstract: str
    summary: str
    keywords: tuple[str, ...]
    categories: tuple[str, ...]
    day: date
    published: datetime | None
    updated: datetime | None
    imported_votes: int | None
    own_votes: int
    points: int
    url: str | None
    code: str | None
    code_added_by: str | None
    organization: str | None
    comment: str | None
    venue: str | None
    links: list[dict[str, Any]]
    source: str
    extra: dict[str, Any]
    created_at: datetime
    changed_at: datetime

    @property
    def text(self) -> str:
        """What there is to read: the abstract, or our summary where none was imported."""
        return self.abstract or self.summary


@dataclass(frozen=True, slots=True)
class Page:
    """Some papers of a list, and the cursor of the rest: None at the end."""

    papers: list[PaperView]
    next: str | None


_NAMES = ", ".join(PaperView._fields)
_ARXIV = re.compile(
    r"(?:https?://(?:www\.|export\.)?arxiv\.org/(?:abs|pdf|html)/|arxiv:\s*)?"
    r"(\d{4}\.\d{4,5}|[a-z][a-z-]+(?:\.[A-Za-z]{2})?/\d{7})(?:v(\d+))?(?:\.pdf)?/?",
    re.IGNORECASE,
)


def arxiv_id(text: str) -> tuple[str, int | None] | None:
    """The arXiv id and version that a text names, as id, ``arxiv:`` name or address; None where it names none.

    Example:
        >>> arxiv_id("arXiv:2410.01623v2"), arxiv_id("http://arxiv.org/abs/hep-ex/0307015"), arxiv_id("Fira")
        (('2410.01623', 2), ('hep-ex/0307015', None), None)
    """
    match = _ARXIV.fullmatch(text.strip())
    return None if match is None else (match[1], int(match[2]) if match[2] else None)


def _lines(text: str) -> tuple[str, ...]:
    return tuple(text.split("\n")) if text else ()


def _time(value: Any) -> datetime | None:
    """A moment as SQLite stores it, in UTC without a zone, or as PostgreSQL's driver gives it."""
    if value is None:
        return None
    return datetime.fromisoformat(value + "+00:00") if isinstance(value, str) else value.astimezone(UTC)


def _date(value: Any) -> date:
    return date.fromisoformat(value) if isinstance(value, str) else value


def _view(row: Sequence[Any]) -> PaperView:
    """A row of a driver, as the column types of the schema would read it; every page with cards reads thirty."""
    (
        number, key, slug, arxiv, version, doi, title, authors, abstract, summary, keywords, categories, day, published, updated,
        imported_votes, own_votes, points, url, code, code_added_by, organization, comment, venue, links, source, extra, created_at,
        changed_at,
    ) = row  # fmt: skip
    return PaperView(
        number, key, slug, arxiv, version, doi, title, _lines(authors), abstract, summary, _lines(keywords), _lines(categories),
        _date(day), _time(published), _time(updated), imported_votes, own_votes, points, url, code, code_added_by, organization,
        comment, venue, from_json(links), source, from_json(extra), _time(created_at), _time(changed_at),  # type: ignore[arg-type]
    )  # fmt: skip


def _papers(connection: Connection, condition: str, values: Sequence[Any] = ()) -> list[PaperView]:
    return [_view(row) for row in rows(connection, f"SELECT {_NAMES} FROM papers WHERE {condition}", values)]


def _cursor(after: str | None) -> tuple[int, int] | None:
    if after is None:
        return None
    match = re.fullmatch(r"(\d{1,9})\.(\d{1,18})", after, re.ASCII)
    if match is None:
        raise ValueError(f"after must be the 'next' of an earlier page, not {after!r}")
    return int(match[1]), int(match[2])


def _size(size: int) -> int:
    if not 1 <= size <= 200:
        raise ValueError(f"size must be from 1 to 200, not {size}")
    return size


def get_paper(store: Store, name: str) -> PaperView | None:
    """The paper of a key, arXiv id (any version or spelling), or slug; None where there is none."""
    with store.reading() as connection:
        return paper_of(connection, name)


def paper_of(connection: Connection, name: str) -> PaperView | None:
    """As `get_paper`, on a connection at hand."""
    named, name = arxiv_id(name), name.replace("\0", "")
    found = _papers(connection, "key = ?", (named[0] if named else name,)) or _papers(connection, "slug = ?", (name,))
    return found[0] if found else None


def papers_by_id(store: Store, ids: Sequence[int]) -> list[PaperView]:
    """The papers of these ids in the order asked for; ids that are gone are passed over."""
    with store.reading() as connection:
        return views(connection, ids)


def views(connection: Connection, ids: Sequence[int]) -> list[PaperView]:
    """As `papers_by_id`, on a connection at hand."""
    if not ids:
        return []
    found = _papers(connection, f"id IN ({places(ids)})", ids)
    by_id = {paper.id: paper for paper in found}
    return [by_id[i] for i in ids if i in by_id]


def papers_of_slugs(store: Store, slugs: Iterable[str]) -> list[PaperView]:
    """The papers of these records, by day, newest first."""
    with store.reading() as connection:
        ids = list(connection.scalars(select(Paper.id).where(Paper.slug.in_(list(slugs))).order_by(Paper.day.desc(), Paper.id)))
        return views(connection, ids)


def papers_between(store: Store, first: date, last: date, *, after: str | None = None, size: int = PAGE) -> Page:
    """The papers of the days from ``first`` to ``last``, both included, most points first.

    Args:
        store: the store.
        first: the first day.
        last: the last day.
        after: the ``next`` of the page before.
        size: papers on the page, 1 to 200.

    Raises:
        ValueError: for a cursor or size that is none.
    """
    cursor, size = _cursor(after), _size(size)
    condition = "day BETWEEN ? AND ?"
    values: list[Any] = [first.isoformat(), last.isoformat()]
    if first == last:
        condition, values = "day = ?", [first.isoformat()]
    if cursor is not None:
        condition += " AND (points, id) < (?, ?)"
        values += cursor
    # The ids come from the index alone; only the page's own rows are read.
    query = f"SELECT id FROM papers WHERE {condition} ORDER BY points DESC, id DESC LIMIT {size + 1}"
    with store.reading() as connection:
        found = [row[0] for row in rows(connection, query, values)]
        papers = views(connection, found[:size])
    more = len(found) > size and papers
    return Page(papers, f"{papers[-1].points}.{papers[-1].id}" if more else None)


def papers_of_day(store: Store, day: date, *, after: str | None = None, size: int = PAGE) -> Page:
    """The papers of one day, most points first."""
    return papers_between(store, day, day, after=after, size=size)


def nearest_day(store: Store, day: date, direction: Literal["either", "before", "after"] = "either") -> date | None:
    """The day with papers that is nearest: ``day`` itself for ``either`` if it has any, strictly before or after it otherwise.

    Of two equally near, the earlier. None where there is no such day.
    """
    before, after = neighbours(store, day, strictly=direction != "either")
    if direction != "either":
        return before if direction == "before" else after
    if before is None or after is None:
        return before or after
    return before if day - before <= after - day else after


def neighbours(store: Store, day: date, *, strictly: bool = True) -> tuple[date | None, date | None]:
    """The last day with papers before ``day`` and the first after it, or ``day`` itself for both where it may be: not ``strictly``."""
    equal = "" if strictly else "="
    query = f"SELECT (SELECT max(day) FROM papers WHERE day <{equal} ?), (SELECT min(day) FROM papers WHERE day >{equal} ?)"
    with store.reading() as connection:
        before, after = rows(connection, query, (day.isoformat(), day.isoformat()))[0]
    return (None if before is None else _date(before)), (None if after is None else _date(after))


def current_day(store: Store) -> date | None:
    """The newest day with papers up to today, or the first one after it; None for an empty store."""
    today = datetime.now(UTC).date()
    return nearest_day(store, today + timedelta(days=1), "before") or nearest_day(store, today)


def newest_day(store: Store) -> date | None:
    """The last day that has papers; None for an empty store."""
    with store.reading() as connection:
        return connection.scalar(select(func.max(Paper.day)))


def days(store: Store, first: date, last: date) -> dict[date, int]:
    """How many papers each day from ``first`` to ``last`` has; days without any are left out."""
    query = select(Paper.day, func.count()).where(Paper.day.between(first, last)).group_by(Paper.day).order_by(Paper.day)
    with store.reading() as connection:
        return dict(connection.execute(query).tuples().all())


def trending(store: Store, today: date | None = None, *, size: int = PAGE) -> list[tuple[PaperView, float]]:
    """What is trending, best first, with its score.

    .. math:: \\text{score} = \\frac{\\text{points} + 1}{(\\text{age in days} + 2)^{1.5}}

    over the newest `TRENDING_DAYS` days that have papers, up to ``today``. ``points`` are imported and own votes together; both
    stand on the paper, each under its own name. Ages count from the newest such day, so that an old store has trends too.
    """
    _size(size)
    until = today or datetime.now(UTC).date()
    with store.reading() as connection:
        best: list[tuple[float, int]] = []
        day = newest = connection.scalar(select(func.max(Paper.day)).where(Paper.day <= until))
        for _ in range(TRENDING_DAYS):
            if day is None or newest is None:
                break
            weight = ((newest - day).days + 2) ** -1.5
            # On one day the score grows with the points alone: the day's first rows are all that can be among the first.
            rows = select(Paper.points, Paper.id).where(Paper.day == day).order_by(Paper.points.desc(), Paper.id.desc())
            best += [((points + 1) * weight, i) for points, i in connection.execute(rows.limit(size))]
            day = connection.scalar(select(func.max(Paper.day)).where(Paper.day < day))
        best.sort(reverse=True)
        scores = {i: score for score, i in best[:size]}
        return [(paper, scores[paper.id]) for paper in views(connection, list(scores))]


def papers_added_since(store: Store, moment: datetime, *, limit: int = 1000) -> list[PaperView]:
    """Papers that came into the store after a moment, in the order they came, at most ``limit``."""
    query = select(Paper.id).where(Paper.created_at > moment).order_by(Paper.id).limit(limit)
    with store.reading() as connection:
        return views(connection, list(connection.scalars(query)))


def count_papers(store: Store) -> int:
    """How many papers there are."""
    with store.reading() as connection:
        return connection.scalar(select(func.count()).select_from(Paper)) or 0


def vote(store: Store, reader_id: int, paper_id: int, on: bool = True) -> int:
    """Set or take back a reader's own vote, and return the paper's own votes; twice is the same as once.

    Raises:
        KeyError: for a paper that is not there.
    """
    with store.writing() as session:
        if session.scalar(select(Paper.id).where(Paper.id == paper_id)) is None:
            raise KeyError(f"no paper of id {paper_id}")
        if on:
            insert = postgresql.insert if store.dialect == "postgresql" else sqlite.insert
            values = {"reader_id": reader_id, "paper_id": paper_id, "created_at": now()}
            session.execute(insert(Vote).values(values).on_conflict_do_nothing())
        else:
            row = session.get(Vote, (reader_id, paper_id))
            if row is not None:
                session.delete(row)
        session.flush()
        count = session.scalar(select(func.count()).select_from(Vote).where(Vote.paper_id == paper_id)) or 0
        session.execute(update(Paper).where(Paper.id == paper_id).values(own_votes=count))
        return count


def voted(store: Store, reader_id: int, paper_ids: Sequence[int]) -> set[int]:
    """Which of these papers the reader has voted for."""
    with store.reading() as connection:
        return set(connection.scalars(select(Vote.paper_id).where(Vote.reader_id == reader_id, Vote.paper_id.in_(paper_ids))))


__all__ = [
    "PAGE", "TRENDING_DAYS", "TRENDING_FORMULA", "Page", "PaperView", "arxiv_id", "count_papers", "days", "get_paper",
    "current_day", "nearest_day", "neighbours", "newest_day", "paper_of", "papers_added_since", "papers_between", "papers_by_id",
    "papers_of_day", "papers_of_slugs", "trending", "views", "vote", "voted",
]  # fmt: skip

"""Search by words: SQLite's FTS5, or PostgreSQL's tsvector.

A ranking by BM25 reads the whole list of every word of the query, and a common word stands in half of a million papers. So the
engine ranks by the rare words, whose lists are short and which decide the ranking anyway; common words are asked for only
together with the others, where the engine skips through their lists; and the few hundred papers found so are ranked again by
all words of the query. In a small store all words are rare, and the ranking is the engine's own.
"""

from __future__ import annotations

import math
import re
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.exc import OperationalError

from corollary.web.search.text import fold, spaced, stem
from corollary.web.search.types import Filters, Parsed
from corollary.web.search.vocabulary import Vocabulary
from corollary.web.store import Store, driver, places, rows

WHOLE = 600  # postings that a ranking by the engine may read where it is the only one
BUDGET = 150  # and where it only proposes: with more, what is ranked again holds more of what merely has a rare word
TOGETHER = 40  # papers taken that have all words
RANKED = 20  # papers taken by the engine's ranking, where it proposes
LISTED = 80  # and where it is the only one
SECONDS = 0.25  # of one statement: a query made to be slow ends with what it has
_OUT_OF_TIME = "57014"  # PostgreSQL's name for a statement that its timeout ended
_WEIGHTS = "4.0, 3.0, 1.0, 1.5, 2.0"  # title, authors, abstract, summary, keywords


@contextmanager
def limited(connection: Connection, seconds: float = SECONDS) -> Iterator[None]:
    """Statements inside end after so many seconds with an error of the driver."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SET LOCAL statement_timeout = {int(1000 * seconds)}")
        yield
        return
    raw, until = driver(connection), time.monotonic() + seconds
    raw.set_progress_handler(lambda: int(time.monotonic() > until), 20_000)
    try:
        yield
    finally:
        raw.set_progress_handler(None, 0)


def _clean(text: str) -> str:
    """A text that a driver takes: without NUL and half characters."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def _conditions(filters: Filters, *, lines: str) -> tuple[str, dict[str, Any]]:
    parts: list[str] = []
    values: dict[str, Any] = {}
    for name, sign in (("first", ">="), ("last", "<=")):
        if (day := getattr(filters, name)) is not None:
            parts.append(f"p.day {sign} :{name}")
            values[name] = day.isoformat() if lines == "sqlite" else day
    if filters.category:
        parts.append("(char(10) || p.categories || char(10)) LIKE :category" if lines == "sqlite" else "(chr(10) || p.categories || chr(10)) LIKE :category")  # fmt: skip
        safe = re.sub(r"[%_\\]", "", _clean(filters.category))
        values["category"] = f"%\n{safe}\n%"
    if filters.has_code:
        parts.append("p.code IS NOT NULL")
    if filters.slugs is not None:
        names = {f"slug{i}": _clean(slug) for i, slug in enumerate(sorted(filters.slugs)[:1000])}
        parts.append(f"p.slug IN ({', '.join(':' + name for name in names)})" if names else "1 = 0")
        values.update(names)
    return " AND ".join(parts), values


def allowed(connection: Connection, filters: Filters, ids: Sequence[int]) -> list[int]:
    """Those of the papers that the filters let through, in their order."""
    condition, values = _conditions(filters, lines=connection.dialect.name)
    if not condition or not ids:
        return list(ids)
    names = {f"id{i}": paper for i, paper in enumerate(ids)}
    query = f"SELECT p.id FROM papers p WHERE p.id IN ({', '.join(':' + name for name in names)}) AND {condition}"
    found = set(connection.scalars(text(query), {**values, **names}))
    return [paper for paper in ids if paper in found]


def few_allowed(connection: Connection, filters: Filters, most: int = 2000) -> list[int] | None:
    """The papers that the filters let through where they are few enough to be named one by one; None where there are more."""
    condition, values = _conditions(filters, lines=connection.dialect.name)
    if not condition:
        return None
    # Only days and records have an index; other filters alone would read the whole table.
    if filters.slugs is None and (filters.first is None or filters.last is None):
        return None
    ids = list(connection.scalars(text(f"SELECT p.id FROM papers p WHERE {condition} LIMIT {most + 1}"), values))
    return ids if len(ids) <= most else None


def missing(connection: Connection, words: Sequence[str], vocabulary: Vocabulary) -> set[str]:
    """Those of the words that stand in no paper."""
    unknown = [word for word in words[:60] if vocabulary.papers(word) == 0]
    if connection.dialect.name == "postgresql":
        query = text(
            "SELECT EXISTS (SELECT 1 FROM papers WHERE words @@ (plainto_tsquery('english', :w) || plainto_tsquery('simple', :w)))"
        )
        return {word for word in unknown if not connection.scalar(query, {"w": word})}
    return {
        word
        for word in unknown
        if not _first(connection, "SELECT rowid FROM words WHERE words MATCH :word LIMIT 1", {"word": _quoted(word)})
    }


def _quoted(part: str) -> str:
    return '"' + part.replace('"', " ") + '"'


def _first(connection: Connection, query: str, values: dict[str, Any]) -> list[int]:
    """First column of a statement of SQLite's; what was found by then where it runs out of time, nothing where it is refused."""
    found: list[int] = []
    with limited(connection), suppress(sqlite3.OperationalError):
        found.extend(row[0] for row in driver(connection).execute(query, values))
    return found


class _Plan:
    """Which words are asked for in which way."""

    def __init__(self, parsed: Parsed, vocabulary: Vocabulary) -> None:
        self.counts = {word: max(1, vocabulary.papers(word)) for word in parsed.words}
        self.words = sorted(self.counts, key=lambda word: self.counts[word])
        self.rare: list[str] = []
        spent = 0
        for word in self.words[:40]:
            spent += self.counts[word]
            if spent > (BUDGET if self.rare else WHOLE):
                break
            self.rare.append(word)
        self.whole = len(self.words) <= 40 and sum(self.counts.values()) <= WHOLE
        # Words that stand in a tenth of the papers and more tell little, and an engine that skips through their lists is slow.
        telling = [word for word in self.words if 10 * self.counts[word] < vocabulary.most]
        self.together = (telling if len(telling) > 1 else self.words[:2])[:4]


def find(store: Store, connection: Connection, parsed: Parsed, vocabulary: Vocabulary, filters: Filters) -> list[int]:
    """Ids of the papers that match by words, best first."""
    if not (parsed.words or parsed.phrases or parsed.authors):
        return []
    plan = _Plan(parsed, vocabulary)
    if store.dialect == "postgresql":
        found, ranked = _find_postgresql(connection, parsed, plan, filters)
    else:
        found, ranked = _find_sqlite(connection, parsed, plan, filters)
    if ranked:
        return found
    return rerank(connection, found, parsed, plan.counts)


def _find_sqlite(connection: Connection, parsed: Parsed, plan: _Plan, filters: Filters) -> tuple[list[int], bool]:
    must = [*map(_quoted, parsed.phrases), *(f"authors : {_quoted(name)}" for name in parsed.authors)]
    never = " ".join(f"NOT {_quoted(part)}" for part in parsed.excluded)
    condition, values = _conditions(filters, lines="sqlite")
    few = few_allowed(connection, filters)
    if few is not None:
        condition, values = f"w.rowid IN ({', '.join(map(str, few))})" if few else "1 = 0", {}
    join = "JOIN papers p ON p.id = w.rowid" if condition and few is None else ""
    where = f"AND {condition}" if condition else ""

    def ask(match: str, order: str, limit: int) -> list[int]:
        query = f"SELECT w.rowid FROM words w {join} WHERE words MATCH :match {where} ORDER BY {order} LIMIT {limit}"
        return _first(connection, query, {**values, "match": f"({match}) {never}" if never else match})

    def all_of(words: Sequence[str]) -> str:
        return " AND ".join([*(f"({part})" for part in must), *map(_quoted, words)])

    ranked = f"bm25(words, {_WEIGHTS})"
    if plan.whole:
        some = " OR ".join(map(_quoted, plan.words))
        return ask(" AND ".join([*(f"({part})" for part in must), *([f"({some})"] if some else [])]), ranked, LISTED), True
    found: dict[int, None] = {}
    together = ask(all_of(plan.together), "w.rowid DESC", TOGETHER)
    found.update(dict.fromkeys(together))
    if len(together) >= TOGETHER:  # so many have all words that those with all of them in the title come first
        found.update(
            dict.fromkeys(ask(f"{{title}} : ({' AND '.join(map(_quoted, plan.together[:3]))})", "w.rowid DESC", TOGETHER))
        )
    if plan.rare:
        some = " OR ".join(map(_quoted, plan.rare))
        found.update(dict.fromkeys(ask(" AND ".join([*(f"({part})" for part in must), f"({some})"]), ranked, RANKED)))
    elif len(found) < TOGETHER and len(plan.words) > 2:  # all words are common, and few papers have them all
        for width in (3, 2):
            if len(found) < TOGETHER:
                found.update(dict.fromkeys(ask(all_of(plan.words[:width]), "w.rowid DESC", TOGETHER)))
    return list(found), False


def _find_postgresql(connection: Connection, parsed: Parsed, plan: _Plan, filters: Filters) -> tuple[list[int], bool]:
    values: dict[str, Any] = {}

    def one(part: str, kind: str = "plainto") -> str:
        name = f"w{len(values)}"
        values[name] = part
        return f"({kind}_tsquery('english', :{name}) || {kind}_tsquery('simple', :{name}))"

    must = [one(part, "phraseto") for part in (*parsed.phrases, *parsed.authors)]
    never = [f"!!{one(part, 'phraseto')}" for part in parsed.excluded]
    each = {word: one(word) for word in plan.words[:40]}
    condition, more = _conditions(filters, lines="postgresql")
    where = f"AND {condition}" if condition else ""
    found: dict[int, None] = {}

    def ask(query: str, order: str, limit: int) -> None:
        if query:
            sql = f"SELECT p.id FROM papers p, (SELECT {query} AS q) AS asked WHERE p.words @@ q {where} ORDER BY {order} LIMIT {limit}"
            try:
                with connection.begin_nested(), limited(connection):
                    found.update(dict.fromkeys(connection.scalars(text(sql), {**values, **more})))
            except OperationalError as error:
                if getattr(error.orig, "sqlstate", None) != _OUT_OF_TIME:
                    raise

    ask(" && ".join([*must, *(each[word] for word in plan.together), *never]), "p.id DESC", TOGETHER)
    rare = " || ".join(each[word] for word in plan.rare)
    ask(" && ".join([*must, *([f"({rare})"] if rare else []), *never]) if rare or must else "", "ts_rank_cd(p.words, q, 1) DESC, p.id DESC", LISTED)  # fmt: skip
    return list(found), False


def rerank(connection: Connection, ids: Sequence[int], parsed: Parsed, counts: dict[str, int]) -> list[int]:
    """Order a few hundred papers by all words of the query.

    .. math:: \\frac{m}{w} \\sum_{i=1}^{w} \\log\\Bigl(1 + \\frac{N}{d_i}\\Bigr) \\frac{n_i}{n_i + 3/2}

    with :math:`n_i` the number of words that begin with the stem of word :math:`i`, one in the title counted four times,
    :math:`d_i` the papers that have it, and :math:`m` of the :math:`w` words found; half as much again where the title holds
    the query as it stands.
    """
    if len(ids) < 2 or not counts:
        return list(ids)
    total = 2 * max(counts.values(), default=1) + len(ids)
    stems = [(" " + stem(word), math.log(1 + total / count)) for word, count in list(counts.items())[:60]]
    plain = all(start.isascii() for start, _ in stems)
    phrase = " ".join(parsed.words)
    query = f"SELECT id, title, authors, abstract, summary, keywords FROM papers WHERE id IN ({places(ids)})"
    scores: dict[int, float] = {}
    for paper, title, authors, abstract, summary, keywords in rows(connection, query, ids):
        head, body = fold(title), fold(f"{authors}\n{keywords}\n{summary}\n{abstract}")
        if plain:  # other letters are no part of what is looked for, and texts without them are quick to go through
            head, body = head.encode("ascii", "replace").decode(), body.encode("ascii", "replace").decode()
        head, body = spaced(head), spaced(body)
        score, had = 0.0, 0
        for start, weight in stems:
            if n := 4 * head.count(start) + body.count(start):
                score += weight * n / (n + 1.5)
                had += 1
        score *= had / len(stems)  # one with all words comes before one that has the rarest of them in its title
        if phrase and phrase in head:
            score *= 1.5
        scores[paper] = score
    return sorted(scores, key=lambda paper: (-scores[paper], -paper))

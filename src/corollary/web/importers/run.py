"""Imports from beginning to end: resumed where they were cut off, and told of in numbers."""

from __future__ import annotations

import hashlib
import io
import sys
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any, BinaryIO

from sqlalchemy import select

from corollary.web.importers import arxiv
from corollary.web.importers.archive import restore
from corollary.web.importers.arxiv import BadAnswer
from corollary.web.importers.fetch import Fetcher, FetchError
from corollary.web.importers.items import Raw
from corollary.web.importers.sources import (
    KINDS,
    Source,
    arxiv_address,
    fingerprint,
    named,
    open_file,
    read_body,
    read_lines,
    read_whole,
    sniff,
)  # fmt: skip
from corollary.web.importers.write import BATCH, Counts, batches, end_run, start_run, write_batch
from corollary.web.store import FetchState, Meta, Store, now

ARXIV = "https://export.arxiv.org/api/query"
HUGGINGFACE = "https://huggingface.co/api/daily_papers"
ARXIV_PAGE = 1000  # the API takes 2,000 at most
_UNREADABLE = (OSError, EOFError, zlib.error)  # what a file, a packing or the network raises
_AGAIN = 3  # days whose votes are asked for again


class ImportFailed(OSError):
    """An import could not be finished; what came in stays, and the same command goes on from there."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass
class Report:
    """What an import did. ``resumed`` says that it went on from an earlier one; ``unmodified``, that the server had nothing new."""

    source: str
    counts: Counts = field(default_factory=Counts)
    resumed: bool = False
    unmodified: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"source": self.source, **asdict(self.counts), "resumed": self.resumed, "unmodified": self.unmodified}


@dataclass
class Importer:
    """Imports into one store.

    Args:
        store: the store.
        fetcher: fetches; its folder is the store's by default.
        progress: called with the counts so far after each batch.
        arxiv: address of arXiv's API.
        huggingface: address of the daily papers.
    """

    store: Store
    fetcher: Fetcher | None = None
    progress: Callable[[Counts], None] | None = None
    arxiv: str = ARXIV
    huggingface: str = HUGGINGFACE

    def __post_init__(self) -> None:
        self._fetcher = self.fetcher or Fetcher(self.store.folder)

    def run(self, source: str, *, kind: str | None = None, limit: int | None = None, stdin: BinaryIO | None = None) -> Report:
        """Import from one source.

        Args:
            source: as `corollary.web.importers.sources.named` reads it.
            kind: of a file, stream or address, where it is not to be found out: jsonl, json, arxiv, feed or bibtex.
            limit: items at most; for a question to arXiv 10,000 by default.
            stdin: what ``-`` reads from.

        Raises:
            ValueError: for a source, kind or limit that is none.
            ImportFailed: where it could not be finished.
        """
        if kind is not None and kind not in KINDS:
            raise ValueError(f"format must be one of {', '.join(KINDS)}, not '{kind}'")
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit}")
        what = named(source)
        if what.kind == "hf":
            return self._days(what)
        report = Report(what.name)
        if what.path is not None and self._restored(what, report, kind):
            return report
        run, cursor = start_run(self.store, what.name)
        report.resumed = bool(cursor)
        try:
            if what.kind == "arxiv":
                self._arxiv(what, run, cursor, report, limit or 10_000)
            elif what.kind == "url":
                self._url(what.name, what.url, run, cursor, report, kind)
            elif what.path is not None:
                self._file(what, run, cursor, report, kind, limit)
            else:
                report.resumed = False
                self._stream(stdin or sys.stdin.buffer, run, report, kind, limit)
        except (BadAnswer, *_UNREADABLE) as error:
            end_run(self.store, run, error=str(error))
            raise ImportFailed(f"{source if what.kind != 'url' else what.name}: {error}") from error
        end_run(self.store, run)
        return report

    def sync(self, sources: Iterable[str]) -> list[Report]:
        """Bring each source up to date; one that fails does not stop the others, and the failure is raised at the end."""
        reports, failures = [], []
        for source in sources:
            try:
                reports.append(self.run(source))
            except ImportFailed as error:
                failures.append(str(error))
        if failures:
            raise ImportFailed("; ".join(failures))
        return reports

    def _write(
        self, run: int, raws: Iterable[Raw], report: Report, cursor: Callable[[int], dict[str, Any]], size: int = BATCH
    ) -> int:
        done = 0
        for batch in batches(raws, size):
            done += len(batch)
            write_batch(self.store, run, batch, report.counts, cursor(done))
            if self.progress is not None:
                self.progress(report.counts)
        return done

    def _rest(
        self, run: int, raws: Iterable[Raw], mark: str, cursor: dict[str, Any], report: Report, limit: int | None
    ) -> None:
        """Write items, past those that an earlier run of the same text has written."""
        skip = int(cursor.get("item", 0)) if cursor.get("mark") == mark else 0
        report.resumed = skip > 0
        left = (raw for place, raw in enumerate(raws) if place >= skip and (limit is None or place < limit))
        self._write(run, left, report, lambda done: {"mark": mark, "item": skip + done})

    def _restored(self, what: Source, report: Report, kind: str | None) -> bool:
        """Whether the file is an export, which goes in without a run of its own: it brings its runs, under their ids."""
        assert what.path is not None
        try:
            with open_file(what.path) as file:
                if kind is None and sniff(file.read(65_536)) == "archive":
                    kind = "archive"
        except (BadAnswer, *_UNREADABLE):
            return False  # the run that follows says what is wrong, and keeps it
        if kind != "archive":
            return False
        try:
            with open_file(what.path) as file:
                restore(self.store, file, report.counts)
        except (BadAnswer, *_UNREADABLE) as error:
            raise ImportFailed(f"{what.name}: {error}") from error
        return True

    def _file(
        self, what: Source, run: int, cursor: dict[str, Any], report: Report, kind: str | None, limit: int | None
    ) -> None:
        assert what.path is not None
        mark = fingerprint(what.path)
        with open_file(what.path) as file:
            head = read_whole(io.BytesIO(file.read(65_536)))
        kind = kind or sniff(head)
        with open_file(what.path) as file:
            if kind == "jsonl":
                self._rest(run, read_lines(file), mark, cursor, report, limit)
            else:
                self._rest(run, read_body(read_whole(file), kind), mark, cursor, report, limit)

    def _stream(self, file: BinaryIO, run: int, report: Report, kind: str | None, limit: int | None) -> None:
        buffered = io.BufferedReader(file, 131_072) if isinstance(file, io.RawIOBase) else file
        head = buffered.peek(65_536)[:65_536] if hasattr(buffered, "peek") else b""
        if not head:
            body = read_whole(buffered)
            head, buffered = body[:65_536], io.BytesIO(body)
        if not head.strip():
            raise BadAnswer("standard input is empty")
        kind = kind or sniff(head)
        if kind == "archive":
            restore(self.store, buffered, report.counts)
        elif kind == "jsonl":
            self._rest(run, read_lines(buffered), "", {}, report, limit)
        else:
            self._rest(run, read_body(read_whole(buffered), kind), "", {}, report, limit)

    def _url(self, name: str, url: str, run: int, cursor: dict[str, Any], report: Report, kind: str | None) -> None:
        with self.store.reading() as connection:
            state = connection.execute(select(FetchState.etag, FetchState.modified).where(FetchState.url == name)).first()
        etag, modified = (state[0], state[1]) if state and not cursor else (None, None)
        got = self._fetcher.get(url, etag=etag, modified=modified)
        if got.body is None:
            report.unmodified = True
            return
        if kind is None and got.kind in ("application/x-ndjson", "application/jsonl", "application/x-jsonlines"):
            kind = "jsonl"
        mark = hashlib.sha256(got.body).hexdigest()[:32]
        kind = kind or sniff(got.body[:65_536])
        if kind == "archive":
            restore(self.store, io.BytesIO(got.body), report.counts)
        else:
            self._rest(run, read_body(got.body, kind), mark, cursor, report, None)
        # Only now: an answer that was not taken in whole is to come again.
        with self.store.writing() as session:
            session.merge(FetchState(url=name, etag=got.etag, modified=got.modified, fetched_at=now()))

    def _arxiv(self, what: Source, run: int, cursor: dict[str, Any], report: Report, limit: int) -> None:
        start, empty, resumed = int(cursor.get("start", 0)), 0, bool(cursor)
        while start < limit:
            count = min(ARXIV_PAGE, limit - start)
            got = self._fetcher.get(arxiv_address(self.arxiv, what.query, start, count))
            answer = arxiv.read(got.body or b"")
            if not answer.items:
                # The API now and then sends a page without entries where there are some.
                empty += 1
                if start < answer.total and empty < 4:
                    self._fetcher.wait(3.0)
                    continue
                break
            empty = 0
            before = report.counts.added + report.counts.updated
            at = start
            self._write(run, answer.items, report, lambda done, at=at: {"start": at + done})  # type: ignore[misc]
            start += len(answer.items)
            if start >= answer.total:
                break
            if not resumed and report.counts.added + report.counts.updated == before and report.counts.rejected == 0:
                break  # newest first: a whole page of known papers, and the rest is older
        if start and not report.counts.added + report.counts.updated + report.counts.unchanged and report.counts.rejected:
            raise BadAnswer("the API answers with an error, which is among the items set aside")

    def _days(self, what: Source) -> Report:
        """Daily papers: the days named, else those since the last one imported, and the days before it whose votes still move."""
        report = Report(what.name)
        today = datetime.now(UTC).date()
        with self.store.reading() as connection:
            last = connection.scalar(select(Meta.value).where(Meta.name == "huggingface_day"))
        first = what.first or (date.fromisoformat(str(last)) - timedelta(days=_AGAIN) if last else today - timedelta(days=7))
        until = what.last or today
        day, changed = first, False
        while day <= until:
            name = f"hf:{day}"
            run, cursor = start_run(self.store, name)
            one = Report(name)
            try:
                self._url(name, f"{self.huggingface}?date={day}", run, cursor, one, "json")
            except (BadAnswer, FetchError) as error:
                end_run(self.store, run, error=str(error))
                raise ImportFailed(f"{name}: {error}") from error
            end_run(self.store, run)
            changed |= not one.unmodified
            report.resumed |= one.resumed
            for field_ in ("added", "updated", "unchanged", "rejected"):
                setattr(report.counts, field_, getattr(report.counts, field_) + getattr(one.counts, field_))
            if what.first is None:
                with self.store.writing() as session:
                    session.merge(Meta(name="huggingface_day", value=day.isoformat()))
            day += timedelta(days=1)
        report.unmodified = not changed
        return report

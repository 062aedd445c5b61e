"""The append-only store of evidence: one JSON-lines file for each paper.

A line goes out in one write under a lock and is flushed to the disk, so a crash can at worst leave the last line cut short;
the reader sets such a line aside and the next append starts on a fresh line. Nothing is ever rewritten.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from corollary.claims.record import Paper
from corollary.claims.source import source_hash

Row = dict[str, Any]


class StoreError(OSError):
    """The store cannot be read or written; the message names the path and the reason."""

    def __str__(self) -> str:
        return str(self.args[0])


@contextmanager
def _locked(descriptor: int) -> Iterator[None]:
    try:
        import fcntl
    except ModuleNotFoundError:  # not a POSIX system: a single O_APPEND write is all the protection there is
        yield
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


class Store:
    """A folder of ``<slug>.jsonl`` files.

    Args:
        root: the folder; made on the first append.

    Raises:
        StoreError: on an append or a read that the system refuses.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def path(self, slug: str) -> Path:
        """The file of one paper."""
        return self.root / f"{slug}.jsonl"

    def check_writable(self) -> None:
        """Make the folder and prove that a file can be written in it; raises `StoreError` before any work is spent."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe = self.root / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise StoreError(f"cannot write to store '{self.root}': {error.strerror}; choose another with --store") from error

    def append(self, slug: str, row: Mapping[str, Any]) -> None:
        """Append one row; it is on the disk when this returns. Infinite and NaN numbers are refused."""
        line = json.dumps(row, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        path = self.path(slug)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                with _locked(descriptor):
                    size = os.fstat(descriptor).st_size
                    if size and os.pread(descriptor, 1, size - 1) != b"\n":
                        line = b"\n" + line  # a crash cut the last line short: start on a fresh one
                    view = memoryview(line)
                    while view:
                        view = view[os.write(descriptor, view) :]
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StoreError(f"cannot write to '{path}': {error.strerror}") from error

    def rows(self, slug: str) -> list[Row]:
        """Every whole row of a paper, oldest first; lines that are no JSON object are passed over."""
        path = self.path(slug)
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreError(f"cannot read '{path}': {error.strerror}") from error
        rows = []
        for line in text.split(b"\n"):
            try:
                row = json.loads(line) if line else None
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append(row)
        return rows


def default_store() -> Path:
    """Where a user's own runs are kept: ``$COROLLARY_STORE`` or ``.corollary`` in the working folder."""
    return Path(os.environ.get("COROLLARY_STORE", ".corollary"))


def published_results() -> Path:
    """The published evidence: ``results`` of the source tree, or the copy that the package carries."""
    package = Path(__file__).resolve().parents[1]
    tree = package.parents[1] / "results"
    if "COROLLARY_RESULTS" in os.environ:
        return Path(os.environ["COROLLARY_RESULTS"])
    return tree if (package.parents[1] / "pyproject.toml").is_file() and tree.is_dir() else package / "_results"


def latest_verdicts(papers: Sequence[Paper], stores: Sequence[Store]) -> list[Row]:
    """The newest verdict of each claim of these papers, with ``stale`` added: whether its source has changed since.

    Rows of claims that the record no longer has are left out.
    """
    found: dict[tuple[str, str], Row] = {}
    for paper in papers:
        ids = {claim.id for claim in paper.claims}
        for store in stores:
            for row in store.rows(paper.slug):
                if row.get("type") == "verdict" and row.get("claim") in ids:
                    key = (paper.slug, row["claim"])
                    if key not in found or row["time"] >= found[key]["time"]:
                        found[key] = row
    ordered = []
    for paper in papers:
        for claim in paper.claims:
            row_or_none = found.get((paper.slug, claim.id))
            if row_or_none is not None:
                stale = row_or_none["source_hash"] != source_hash(paper, claim.id)
                ordered.append({**row_or_none, "stale": stale})
    return ordered

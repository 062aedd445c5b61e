"""The index of vectors: one memory-mapped HNSW file of usearch, and the rows of the store that came after it.

The vectors themselves stand in the store. The file is derived from them, named after the model and the last ``seq`` that it
holds, and replaced by renaming; a reader takes the newest file and reads the rows above its ``seq``. So the index is never behind
the store, and a file that is lost or damaged is built anew.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, func, select

from corollary.web.search.encoders import Floats, to_bytes, unit
from corollary.web.store import Meta, Store, Vector, places, rows

TAIL = 50_000  # rows compared one by one before a new file is written
SMALLEST = 4096  # a store of fewer papers needs no file
_FILE = re.compile(r"vectors-([\w.-]+)-(\d+)\.usearch")


def current_model(store: Store) -> str | None:
    """The model that the store's vectors are of."""
    with store.reading() as connection:
        value = connection.scalar(select(Meta.value).where(Meta.name == "model"))
    return None if value is None else str(value)


@contextmanager
def index_lock(store: Store) -> Iterator[None]:
    """One process at a time writes vectors and files of a folder."""
    with (store.folder / "vectors.lock").open("a") as file:
        try:
            import fcntl
        except ModuleNotFoundError:  # not a POSIX system
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def newest_file(folder: Path, model: str) -> tuple[Path, int] | None:
    """The newest index file of a model, and the last ``seq`` that it holds."""
    found = [(int(match[2]), path) for path in folder.glob("vectors-*.usearch") if (match := _FILE.fullmatch(path.name))]
    found = [(seq, path) for seq, path in found if path.name == f"vectors-{model}-{seq}.usearch"]
    return (max(found)[1], max(found)[0]) if found else None


def rows_after(store: Store, model: str, seq: int, limit: int) -> tuple[NDArray[np.int64], NDArray[np.int8], int]:
    """Paper ids, vectors and last ``seq`` of the rows above a ``seq``, at most ``limit`` of them."""
    query = select(Vector.seq, Vector.paper_id, Vector.vector).where(Vector.seq > seq, Vector.model == model)
    with store.reading() as connection:
        found = connection.execute(query.order_by(Vector.seq).limit(limit)).all()
    if not found:
        return np.empty(0, np.int64), np.empty((0, 0), np.int8), seq
    ids = np.array([row[1] for row in found], dtype=np.int64)
    return ids, np.frombuffer(b"".join(row[2] for row in found), np.int8).reshape(len(found), -1), found[-1][0]


def _new(dims: int) -> Any:
    from usearch.index import Index

    return Index(ndim=dims, metric="cos", dtype="i8", connectivity=16, expansion_add=64, expansion_search=64)


def _open(path: Path, *, view: bool) -> Any | None:
    from usearch.index import Index

    try:
        return Index.restore(str(path), view=view)
    except (RuntimeError, ValueError, OSError):  # damaged: the rows are still in the store
        return None


class Builder:
    """Adds rows to the index file; used under `index_lock`."""

    def __init__(self, store: Store, model: str, dims: int) -> None:
        self._store, self._model, self._dims = store, model, dims
        newest = newest_file(store.folder, model)
        self._index = _open(newest[0], view=False) if newest else None
        self._seq = newest[1] if newest and self._index is not None else 0
        self._saved = self._seq

    def take(self, *, finish: bool) -> None:
        """Take in the rows that came since, and write a file when there are many; at the end when there are some."""
        with self._store.reading() as connection:
            waiting = connection.scalar(select(func.count()).where(Vector.seq > self._seq, Vector.model == self._model)) or 0
        if waiting < (SMALLEST if finish else TAIL):
            return
        if self._index is None:
            self._index = _new(self._dims)
        while True:
            ids, vectors, seq = rows_after(self._store, self._model, self._seq, 20_000)
            if not len(ids):
                break
            known = ids[self._index.contains(ids)]
            if len(known):
                self._index.remove(known)
            self._index.add(ids, vectors, threads=os.cpu_count() or 1)
            self._seq = seq
        self._save()

    def _save(self) -> None:
        path = self._store.folder / f"vectors-{self._model}-{self._seq}.usearch"
        temporary = path.with_suffix(".tmp")
        self._index.save(str(temporary))  # type: ignore[union-attr]
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        for other in self._store.folder.glob("vectors-*.usearch"):
            if other != path:
                other.unlink(missing_ok=True)  # who has it mapped keeps it until it looks again
        self._saved = self._seq


class VectorIndex:
    """The reader's side. One to each process and store; safe for threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._version = ""
        self.model: str | None = None
        self._file: Path | None = None
        self._index: Any = None
        self._seq = 0
        self._ids: NDArray[np.int64] = np.empty(0, np.int64)
        self._newer: frozenset[int] = frozenset()
        self._tail: Floats = np.empty((0, 0), np.float32)

    def refresh(self) -> None:
        """Look whether the store has more than this index; next to nothing when nothing was written."""
        version = self._store.version()
        if version == self._version:
            return
        with self._lock:
            model = current_model(self._store)
            newest = newest_file(self._store.folder, model) if model else None
            if model != self.model or (newest and newest[0] != self._file):
                self.model, self._file, self._index, self._seq = model, None, None, 0
                self._ids, self._tail = np.empty(0, np.int64), np.empty((0, 0), np.float32)
                if newest and (index := _open(newest[0], view=True)) is not None:
                    self._file, self._index, self._seq = newest[0], index, newest[1]
            while model:
                ids, vectors, seq = rows_after(self._store, model, self._seq, 10_000)
                if not len(ids):
                    break
                kept = ~np.isin(self._ids, ids)
                old = self._tail[kept] if len(self._tail) else np.empty((0, vectors.shape[1]), np.float32)
                self._ids, self._tail, self._seq = (
                    np.concatenate([self._ids[kept], ids]),
                    np.concatenate([old, unit(vectors)]),
                    seq,
                )
            self._newer = frozenset(self._ids.tolist())
            self._version = version

    def nearest(self, vector: Floats | NDArray[np.int8], count: int) -> list[tuple[int, float]]:
        """The papers nearest to a vector of shape (dims,), with their cosines, most alike first."""
        self.refresh()
        near: list[tuple[int, float]] = []
        with self._lock:  # a search of usearch is a tenth of a millisecond, and its threads would share one context
            ids, newer, tail = self._ids, self._newer, self._tail
            if self._index is not None:
                query = vector if vector.dtype == np.int8 else to_bytes(np.asarray(vector[None], dtype=np.float32))[0]
                matches = self._index.search(query, min(count + 8, len(self._index)), threads=1)
                pairs = zip(matches.keys.tolist(), matches.distances.tolist(), strict=True)
                near = [(key, 1 - away) for key, away in pairs if key not in newer]
        if len(ids):
            cosines = tail @ unit(vector[None])[0]
            best = np.argpartition(-cosines, count)[:count] if len(ids) > count else np.arange(len(ids))
            near += zip(ids[best].tolist(), cosines[best].tolist(), strict=True)
        return sorted(near, key=lambda item: (-item[1], item[0]))[:count]

    def of_papers(self, ids: Sequence[int], connection: Connection | None = None) -> dict[int, NDArray[np.int8]]:
        """The stored vectors of these papers, of those that have one of the present model."""
        self.refresh()
        found: dict[int, NDArray[np.int8]] = {}
        with self._store.reading() if connection is None else nullcontext(connection) as open_:
            for start in range(0, len(ids), 1000):
                some = ids[start : start + 1000]
                query = f"SELECT paper_id, vector FROM vectors WHERE paper_id IN ({places(some)}) AND model = ?"
                got = rows(open_, query, (*some, self.model))
                found.update({paper: np.frombuffer(vector, np.int8) for paper, vector in got})
        return found

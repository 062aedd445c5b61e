"""A store of a million generated papers: how fast it fills, and how fast it answers 50 requests at once.

The server is `corollary serve` with a worker to each core; the load comes from this process: 50 connections, each of which asks
again as soon as it has its whole answer. A day's page is kept once it was made, until the store changes: "a page made anew" is
what it takes to make one.

Usage: python -m benchmarks.web_scale [--papers 1000000] [--folder DIR] [--workers N] [--known-items]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

_SYLLABLES = [
    c + v
    for c in [
        "b",
        "c",
        "d",
        "f",
        "g",
        "h",
        "j",
        "k",
        "l",
        "m",
        "n",
        "p",
        "r",
        "s",
        "t",
        "v",
        "w",
        "z",
        "br",
        "cl",
        "dr",
        "fl",
        "gr",
        "pl",
        "pr",
        "st",
        "tr",
        "th",
        "sh",
    ]
    for v in "aeiou"
]


def vocabulary(size: int = 200_000, seed: int = 0) -> list[str]:
    """Made-up words that differ from one another, short ones first, as in a language."""
    rng = np.random.default_rng(seed)
    words: dict[str, None] = {}
    while len(words) < size:
        length = 1 + min(4, int(np.log10(len(words) + 10)) - 1) + int(rng.integers(0, 2))
        words[
            "".join(_SYLLABLES[i] for i in rng.integers(len(_SYLLABLES), size=length)) + str(rng.choice(["", "n", "r", "l"]))
        ] = None
    return list(words)


def papers(count: int, *, seed: int = 1, batch: int = 5000, last: date = date(2026, 5, 8)) -> Iterator[dict[str, Any]]:
    """Papers whose words follow Zipf's law, a third of them from the paper's own topic; 350 a day, as JSONL items.

    Title 6 to 12 words, abstract 120 to 180, 1 to 6 authors out of 40,000 surnames: about 1.2 kB of text to a paper.
    """
    rng = np.random.default_rng(seed)
    words = np.array(vocabulary())
    mass = 1 / np.arange(1, len(words) + 1) ** 1.05
    cumulative = np.cumsum(mass / mass.sum())
    topics = rng.integers(200, len(words), size=(500, 250))  # the words that a topic has for itself
    given, names = words[2000:3000], words[3000:43000]
    for start in range(0, count, batch):
        n = min(batch, count - start)
        ids = np.searchsorted(cumulative, rng.random((n, 192)))
        topic = rng.integers(len(topics), size=n)
        own = rng.random((n, 192)) < 1 / 3
        # Within a topic, too, few words are frequent.
        pick = (rng.random((n, 192)) ** 3 * topics.shape[1]).astype(np.int64)
        ids = np.where(own, topics[topic[:, None], pick], ids)
        text = words[np.minimum(ids, len(words) - 1)]
        lengths = rng.integers(120, 181, size=n)
        heads = rng.integers(6, 13, size=n)
        teams = rng.integers(1, 7, size=n)
        people = np.char.add(
            np.char.add(np.char.capitalize(given[rng.integers(1000, size=(n, 6))]), " "),
            np.char.capitalize(names[rng.integers(40000, size=(n, 6))]),
        )
        votes = rng.integers(0, 200, size=n)
        for i in range(n):
            number = start + i
            day = last - timedelta(days=number // 350)
            row = text[i]
            title = " ".join(row[: heads[i]])
            yield {
                "id": f"gen-{number}",
                "title": title[0].upper() + title[1:],
                "authors": people[i, : teams[i]].tolist(),
                "abstract": " ".join(row[12 : 12 + lengths[i]]) + ".",
                "date": day.isoformat(),
                "votes": int(votes[i]),
                "categories": ["cs.LG" if topic[i] % 3 else "stat.ML"],
            }


HERE = Path(__file__).parent
RESULTS = HERE / "web_scale.json"
LIMITS = {
    "search": 150.0,
    "search page": 150.0,
    "similar": 50.0,
    "day page": 50.0,
    "any day's page": 50.0,
    "a page made anew": 50.0,
}  # milliseconds, 95 of 100 requests
AT_ONCE = 50
SECONDS = 20.0


def write_papers(path: Path, count: int) -> None:
    """The papers as a JSONL file; takes minutes, and is not timed."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for paper in papers(count):
            file.write(json.dumps(paper) + "\n")
    os.replace(temporary, path)


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def build(folder: Path, count: int) -> dict[str, Any]:
    """Import the papers and index them, as a reader's import would; the rates, and what it took."""
    from corollary.web.importers import Importer
    from corollary.web.search import catch_up
    from corollary.web.store import open_store

    folder.mkdir(parents=True, exist_ok=True)
    told = folder / "built.json"
    if told.exists() and json.loads(told.read_text())["papers"] == count:
        return dict(json.loads(told.read_text()))
    source = folder / "papers.jsonl"
    if not source.exists():
        print(f"making {count} papers", flush=True)
        write_papers(source, count)
    store = open_store(f"sqlite:///{folder / 'daily.sqlite'}")
    print("importing", flush=True)
    began, cpu = time.perf_counter(), time.process_time()
    report = Importer(store).run(str(source))
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    if report.counts.added != count:
        raise SystemExit(f"the folder {folder} held papers already, or an import was cut off; begin with an empty one")
    after_import = _peak_mb()
    print(f"imported {count / seconds:.0f} a second; indexing", flush=True)
    began, cpu = time.perf_counter(), time.process_time()
    catch_up(store)
    index_seconds, index_cpu = time.perf_counter() - began, time.process_time() - cpu
    store.close()
    source.unlink()
    row = {
        "papers": count, "import_per_second": count / seconds, "import_per_cpu_second": count / cpu_seconds,
        "index_per_second": count / index_seconds, "index_per_cpu_second": count / index_cpu,
        "import_peak_mb": after_import, "index_peak_mb": _peak_mb(), "load_average": os.getloadavg()[0],
        "database_mb": sum(f.stat().st_size for f in folder.glob("daily.sqlite*")) / 2**20,
        "vectors_mb": sum(f.stat().st_size for f in folder.glob("vectors-*.usearch")) / 2**20,
    }  # fmt: skip
    told.write_text(json.dumps(row))
    return row


@contextmanager
def served(folder: Path, workers: int) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """`corollary serve` over the folder's store, its port and its process, once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "corollary", "serve", "--no-open", "--no-jobs", "--port", str(port)]
    command += ["--workers", str(workers), "--database", f"sqlite:///{folder / 'daily.sqlite'}"]
    environment = {**os.environ, "COROLLARY_EMBEDDING": "lsa", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5):
                    break
            except OSError as error:
                if server.poll() is not None or time.monotonic() > until:
                    raise SystemExit("the server does not answer") from error
            time.sleep(0.5)
        time.sleep(10)  # what a server reads once
        yield port, server
    finally:
        server.terminate()
        server.wait()


class _Client(asyncio.Protocol):
    """One connection that asks, waits for the whole answer, and asks again."""

    def __init__(self, paths: Iterator[str], until: float, taken: list[float]) -> None:
        self._paths, self._until, self._taken = paths, until, taken
        self._head, self._left = b"", 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        self._head = b""
        self._began = time.perf_counter()
        if self._began >= self._until:
            self._transport.close()
        else:
            self._transport.write(f"GET {next(self._paths)} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())

    def data_received(self, data: bytes) -> None:
        if self._left:
            self._left -= len(data)
        else:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self._head[:end].lower()
            if b" 200 " not in head.split(b"\r\n", 1)[0]:
                self._transport.close()
                self.done.set_exception(SystemExit(f"the server answers {head[:200]!r}"))
                return
            self._left = int(head.split(b"content-length:")[1].split(b"\r\n")[0]) - (len(self._head) - end - 4)
        if not self._left:
            self._taken.append(1000 * (time.perf_counter() - self._began))
            self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error) if error else self.done.set_result(None)


async def _load(port: int, paths: Iterator[str], at_once: int, seconds: float) -> list[float]:
    taken: list[float] = []
    until = time.perf_counter() + seconds
    loop = asyncio.get_running_loop()
    clients = [await loop.create_connection(lambda: _Client(paths, until, taken), "127.0.0.1", port) for _ in range(at_once)]
    await asyncio.gather(*(client.done for _, client in clients))
    return taken


def questions(folder: Path, seed: int = 5) -> dict[str, Iterator[str]]:
    """Endless requests of each kind, no two alike in a row: words of titles, of abstracts, names, misspellings."""
    from sqlalchemy import func, select

    from corollary.web.importers import first_issue
    from corollary.web.search import catch_up
    from corollary.web.store import Paper, open_store

    store = open_store(f"sqlite:///{folder / 'daily.sqlite'}")
    first_issue(store)  # cards name the nearest methods that run: there must be some
    catch_up(store)
    rng = random.Random(seed)
    with store.reading() as connection:
        last = connection.scalar(select(func.max(Paper.id))) or 1
        ids = sorted(rng.sample(range(1, last + 1), min(4000, last)))
        known = connection.execute(
            select(Paper.id, Paper.title, Paper.abstract, Paper.authors, Paper.day, Paper.key, Paper.points).where(
                Paper.id.in_(ids), Paper.source == "jsonl"
            )
        ).all()
    store.close()

    def search(place: str) -> Iterator[str]:
        while True:
            _, title, abstract, authors, *_ = rng.choice(known)
            words = title.lower().split()
            kind = rng.random()
            if kind < 0.4:
                query = " ".join(rng.sample(words, min(len(words), rng.randint(2, 5))))
            elif kind < 0.7:
                query = " ".join(rng.sample((abstract or title).split(), 4))
            elif kind < 0.8:
                query = f"{authors[0]} {rng.choice(words)}"
            elif kind < 0.9:
                word = max(words, key=len)
                query = f"{word[:3]}{word[4:]} {rng.choice(words)}"
            else:
                query = title
            yield f"{place}?q={quote(query)}"

    def similar() -> Iterator[str]:
        while True:
            yield f"/api/corollary/similar/{quote(rng.choice(known)[5], safe='')}"

    by_day = sorted({row[4] for row in known}, reverse=True)
    newness = [1 / (1 + place) for place in range(len(by_day))]

    def day() -> Iterator[str]:
        """As readers do: the newer a day, the more ask for it."""
        while True:
            yield f"/day/{rng.choices(by_day, newness)[0]}"

    def any_day() -> Iterator[str]:
        while True:
            yield f"/day/{rng.choice(by_day)}"

    def anew() -> Iterator[str]:
        """Further pages of a day's list from a place that nobody has asked for: none of them is kept."""
        while True:
            number, _, _, _, at, _, points = rng.choice(known)
            yield f"/day/{at}?after={points + rng.randint(1, 10**8)}.{number}"

    return {
        "search": search("/api/papers/search"),
        "search page": search("/search"),
        "similar": similar(),
        "day page": day(),
        "any day's page": any_day(),
        "a page made anew": anew(),
    }


def _private_mb(pid: int) -> float:
    """Memory that is a process's own: what it shares with the file cache is not counted."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_Dirty")) / 1024


def _workers(pid: int) -> list[int]:
    """The processes that answer: the children of one that deals, else itself."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children] or [pid]


def measure(folder: Path, workers: int, seconds: float = SECONDS) -> dict[str, Any]:
    """Latencies of each kind under a load of 50 requests at once, sent from this process to servers in others."""
    import uvloop

    asked = questions(folder)
    with served(folder, workers) as (port, server):
        found: dict[str, Any] = {}
        for kind, paths in asked.items():
            uvloop.run(_load(port, paths, AT_ONCE, 3.0))  # what a server reads once
            row: dict[str, Any] = {}
            for at_once in (1, AT_ONCE):
                taken = sorted(uvloop.run(_load(port, paths, at_once, seconds)))
                row[f"at_{at_once}"] = {
                    "p50_ms": taken[len(taken) // 2], "p95_ms": taken[int(len(taken) * 0.95)], "p99_ms": taken[int(len(taken) * 0.99)],
                    "per_second": len(taken) / seconds,
                }  # fmt: skip
            row["limit_ms"] = LIMITS[kind]
            row["holds"] = row[f"at_{AT_ONCE}"]["p95_ms"] <= LIMITS[kind]
            row["load_average"] = os.getloadavg()[0]
            found[kind] = row
        found["server_private_mb"] = [_private_mb(worker) for worker in _workers(server.pid)]
        return found


def known_items(folder: Path, count: int = 800, seed: int = 23) -> dict[str, dict[str, float]]:
    """Of papers drawn at random and asked for by some of their words, the part that is among the first five hits.

    The words are made up and a topic's are drawn without order, so that meaning has little to go by; what is measured is whether the
    words of a query find the one paper that they come from among all.
    """
    from sqlalchemy import func, select

    from corollary.web.search import search
    from corollary.web.store import Paper, open_store

    store = open_store(f"sqlite:///{folder / 'daily.sqlite'}")
    rng = random.Random(seed)
    with store.reading() as connection:
        last = connection.scalar(select(func.max(Paper.id))) or 1
        ids = rng.sample(range(1, last + 1), min(count, last))
        columns = select(Paper.id, Paper.title, Paper.abstract, Paper.authors)
        known = connection.execute(columns.where(Paper.id.in_(ids), Paper.source == "jsonl").order_by(Paper.id)).all()
    asked: dict[str, list[tuple[int, str]]] = {
        "words of a title": [],
        "words of an abstract": [],
        "a title": [],
        "an author and a word": [],
    }
    for number, title, abstract, authors in known:
        words = title.lower().split()
        asked["words of a title"].append((number, " ".join(rng.sample(words, min(len(words), rng.randint(3, 5))))))
        asked["words of an abstract"].append((number, " ".join(rng.sample(abstract.split(), 6))))
        asked["a title"].append((number, title))
        asked["an author and a word"].append((number, f"{authors[0]} {rng.choice(words)}"))
    found: dict[str, dict[str, float]] = {}
    for kind, queries in asked.items():
        found[kind] = {}
        for mode in ("words", "meaning", "fusion"):
            hits = [n in [hit.paper.id for hit in search(store, q, size=5, mode=mode).hits] for n, q in queries]  # type: ignore[arg-type]
            found[kind][mode] = sum(hits) / len(hits)
    store.close()
    return found


def _keep(result: dict[str, Any]) -> None:
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, RESULTS)


def main() -> int:
    """Build, measure, show and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--papers", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "corollary_web_scale")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--known-items", action="store_true", help="only ask for known items again; the times on record stay")
    options = parser.parse_args()
    os.environ["COROLLARY_EMBEDDING"] = "lsa"  # a million papers through a Transformer take hours
    from corollary.claims.environment import commit, machine, packages

    if options.known_items:
        recall = known_items(options.folder)
        print(json.dumps(recall, indent=1))
        _keep(json.loads(RESULTS.read_text(encoding="utf-8")) | {"known_items": recall})
        return 0
    result = {
        "built": build(options.folder, options.papers),
        "workers": options.workers,
        **measure(options.folder, options.workers, options.seconds),
        "known_items": known_items(options.folder),
    }
    result |= {"commit": commit(), "machine": machine(), "packages": packages()}
    built = result["built"]
    print(
        f"{built['papers']} papers: import {built['import_per_second']:.0f}/s ({built['import_per_cpu_second']:.0f} a CPU second), index {built['index_per_second']:.0f}/s"
    )
    print(
        f"database {built['database_mb']:.0f} MB, vectors {built['vectors_mb']:.0f} MB, import at most {built['import_peak_mb']:.0f} MB, a server {max(result['server_private_mb']):.0f} MB of its own"
    )
    for kind in LIMITS:
        one, many = result[kind]["at_1"], result[kind][f"at_{AT_ONCE}"]
        print(
            f"{kind:16s} alone p95 {one['p95_ms']:6.1f} ms; {AT_ONCE} at once p50 {many['p50_ms']:6.1f} p95 {many['p95_ms']:6.1f} ms (limit {LIMITS[kind]:.0f}), {many['per_second']:.0f} a second"
        )
    if options.papers >= 1_000_000:
        _keep(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())

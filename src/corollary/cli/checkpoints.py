"""What the commands on checkpoints share: progress, results that survive an interruption, and how tensors are grouped and named."""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from corollary import __version__
from corollary.claims.store import StoreError, default_store

_PATIENCE = 2.0  # seconds after which results are kept on disk too: what is done sooner is done again


class CommandError(Exception):
    """A command cannot do what was asked; the message is one line that says why and what would be right."""


def printable(text: str) -> str:
    """A name from a file as it can be shown on a terminal, in rich's markup: no control sequence gets through."""
    return escape("".join(c if c.isprintable() else "\ufffd" for c in text))


def size_text(nbytes: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return (
                f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}" if nbytes < 1000 else f"{nbytes:.0f} {unit}"
            )
        nbytes /= 1000
    raise AssertionError


def number_text(value: float | None, digits: int = 3) -> str:
    """A number of a few digits, or a dash."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.{digits}g}"


def kind_of(name: str) -> str:
    """A tensor's name with its numbers struck out: ``layers.*.weight`` for ``layers.11.weight``."""
    return re.sub(r"(?<![A-Za-z])\d+(?![A-Za-z])", "*", name)


def spread(values: Iterable[float | None]) -> str:
    """The median of numbers, with their range where there are several."""
    found = sorted(v for v in values if v is not None)
    if not found:
        return "–"
    middle, low, high = (number_text(v) for v in (statistics.median(found), found[0], found[-1]))
    return middle if low == high else f"{middle} [dim]{low}…{high}[/]"


def chosen_names(names: Sequence[str], pattern: str | None) -> list[str]:
    """The names that a shell pattern matches, all of them without one."""
    if pattern is None:
        return list(names)
    found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        near = ", ".join(map(ascii, names[:3]))
        raise CommandError(f"no tensor matches {pattern!r}; there are, for instance: {near or 'none'}")
    return found


class Journal:
    """Finished results of a long run on disk, so that the same command goes on from there after an interruption.

    Args:
        folder: where runs are kept; None for the default.
        parts: what the results depend on, as plain data: files with their sizes and times, options.
    """

    def __init__(self, folder: Path | None, parts: Any) -> None:
        digest = hashlib.sha256(json.dumps([__version__, parts], sort_keys=True).encode()).hexdigest()[:24]
        self.path = (folder or default_store()) / "checkpoints" / f"{digest}.jsonl"
        self.begin = time.monotonic()
        self.waiting: list[Mapping[str, Any]] = []
        self.works = True

    def done(self) -> list[dict[str, Any]]:
        """What an earlier run has finished; a line that was cut off is done again."""
        rows = []
        try:
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError:
                    break
        except (OSError, UnicodeDecodeError):
            return []
        return [row for row in rows if isinstance(row, dict)]

    def keep(self, row: Mapping[str, Any]) -> None:
        """One more result."""
        self.waiting.append(row)
        if self.works and time.monotonic() - self.begin > _PATIENCE:
            self.flush()

    def flush(self) -> bool:
        """Write what is waiting; whether that could be done. A run goes on without where nothing can be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in self.waiting)
        except OSError:
            self.works = False
            return False
        self.waiting.clear()
        return True

    def close(self) -> None:
        """Everything is done: nothing has to be kept, nor a folder that holds nothing else."""
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty, or never made
            self.path.parent.rmdir()
            if self.path.parent.parent == default_store():
                self.path.parent.parent.rmdir()


def stamps(files: Iterable[Path]) -> list[list[Any]]:
    """What tells whether files have changed."""
    return [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def run_all(
    console: Console,
    words: str,
    sizes: Mapping[str, int],
    journal: Journal,
    work: Callable[[list[str]], Iterator[Any]],
    load: Callable[[Mapping[str, Any]], Any],
) -> list[Any]:
    """Every result of a long run, those of an interrupted one included, with progress over bytes.

    Args:
        console: where progress is shown.
        words: what is being done.
        sizes: name of each tensor to its bytes.
        journal: keeps what is finished.
        work: gives the results of the names that are left.
        load: makes a result out of what was kept.
    """
    found: dict[str, Any] = {}
    for row in journal.done():
        try:
            result = load(row)
        except TypeError:
            continue
        if result.name in sizes:
            found[result.name] = result
    if found:
        console.print(f"[dim]{len(found)} of {len(sizes)} tensors are known from an interrupted run[/]")
    left = [name for name in sizes if name not in found]
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=28), DownloadColumn(), TransferSpeedColumn(), TextColumn("left"),
        TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    try:
        with bars:
            task = bars.add_task(words, total=sum(sizes[name] for name in left) or 1)
            for result in work(left):
                found[result.name] = result
                journal.keep(result.to_dict())
                bars.advance(task, sizes[result.name])
    except KeyboardInterrupt:
        if found and journal.flush():
            Console(stderr=True).print(
                f"corollary: interrupted; {len(found)} of {len(sizes)} tensors are kept, and the same command goes on from there",
                soft_wrap=True,
            )
        else:
            Console(stderr=True).print("corollary: interrupted; nothing was written")
        raise SystemExit(130) from None
    journal.close()
    return [found[name] for name in sizes]


def check_output(path: Path | None, what: str) -> None:
    """Refuse a place that a file cannot be written to, before any work is spent."""
    if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK) and not path.is_dir()):
        raise CommandError(f"cannot write {what} to '{path}': its folder is missing or not writable")


def write_page(path: Path, text: str) -> None:
    """Write a page to a file, whole or not at all."""
    temporary = ""
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8") as file:
            temporary = file.name
            file.write(text)
        os.chmod(temporary, 0o644)  # a temporary file is private; a page is not
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise StoreError(f"cannot write '{path}': {error.strerror}") from error


def use_threads(jobs: int) -> None:
    """One thread of torch for each tensor in work."""
    import torch

    if jobs > 1:
        torch.set_num_threads(1)

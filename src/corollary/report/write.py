"""Writing the report: all pages into a new folder, which then takes the old one's place."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corollary.claims.record import Paper
from corollary.report.html import Html
from corollary.report.paper import paper_page
from corollary.report.scoreboard import scoreboard_page
from corollary.report.statistics import statistics_page
from corollary.report.views import build_board

MARKER = ".corollary-report"


class ReportError(ValueError):
    """The report cannot be written there; the message says why and what would do."""


def write_report(out: Path, papers: Mapping[str, Paper], rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the report into a folder, replacing a report that is there.

    The pages are complete before they become visible: they are written beside ``out`` and renamed. They need no network and
    no script to be read, and the same records and rows give the same bytes.

    Args:
        out: folder that does not exist yet, is empty, or holds a report.
        papers: records by slug, in the order in which they are to be shown.
        rows: verdict rows; where several stand for one claim, the last one counts.

    Returns:
        Path of the scoreboard, ``out/index.html``.

    Raises:
        ReportError: ``out`` is a file, a folder that holds something else, or cannot be written.

    Example:
        >>> import tempfile
        >>> from corollary.claims import catalogue
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_report(Path(folder) / "report", catalogue(), []).name
        'index.html'
    """
    target = check_folder(out)
    for slug in papers:
        if not re.fullmatch(r"[\w.-]+", slug) or slug.startswith("."):
            raise ReportError(f"'{slug}' cannot name a page: a slug has letters, digits, '-', '_' and '.'")
    board = build_board(papers, rows)
    pages = {"index.html": scoreboard_page(board), "statistics.html": statistics_page(board)}
    pages |= {f"papers/{view.paper.slug}.html": paper_page(board, i) for i, view in enumerate(board.papers)}
    try:
        _swap(target, pages)
    except OSError as error:
        raise ReportError(f"cannot write the report to {target}: {error.strerror or error}; give another folder") from error
    return target / "index.html"


def check_folder(out: Path) -> Path:
    """The whole path of a folder that a report may be written to; raises `ReportError` before any work is spent."""
    target = Path(out).expanduser().resolve()
    try:
        if target.is_dir():
            if any(target.iterdir()) and not (target / MARKER).is_file():
                raise ReportError(f"{target} holds files that are no report; give an empty or a new folder")
        elif target.exists():
            raise ReportError(f"{target} is a file; the report needs a folder")
    except OSError as error:
        raise ReportError(f"cannot look into {target}: {error.strerror or error}; give another folder") from error
    return target


def _swap(target: Path, pages: Mapping[str, Html]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    name = f".{target.name}-{uuid.uuid4().hex[:12]}"
    fresh, old = target.with_name(name + ".new"), target.with_name(name + ".old")
    try:
        fresh.mkdir()
        (fresh / "papers").mkdir()
        (fresh / MARKER).write_text("This folder is written by 'corollary report' and replaced as a whole.\n", encoding="utf-8")
        for path, text in pages.items():
            (fresh / path).write_text(text, encoding="utf-8")
        if target.exists():
            os.rename(target, old)
        try:
            os.rename(fresh, target)
        except OSError:
            if old.exists():
                os.rename(old, target)
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)

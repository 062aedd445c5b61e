"""``corollary daily``: papers into the local page, and out of it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(help="Papers of the daily page: import, keep up to date, export.", no_args_is_help=True)

Database = Annotated[
    str | None,
    typer.Option("--database", metavar="URL", help="sqlite:///FILE or postgresql://... [default: your data folder]."),
]
Private = Annotated[
    bool, typer.Option("--allow-private", help="Also fetch from addresses of this machine and of private networks.")
]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON; '-' is standard output.")
]
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@contextmanager
def _told() -> Iterator[None]:
    """Failures that have their own words end with one line and status 1."""
    from corollary.web.importers import ImportFailed
    from corollary.web.store import StoreUnavailable

    try:
        yield
    except (ImportFailed, StoreUnavailable) as error:
        Console(stderr=True, soft_wrap=True).print(f"corollary: {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from error


def _open(database: str | None) -> Any:
    from corollary.web.store import open_store

    try:
        with _told():
            return open_store(database)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--database") from error


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", text.strip(), re.ASCII)
    seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not 60 <= seconds <= 30 * 86400:
        raise typer.BadParameter(f"--every must be from 60s to 30d, as 30m, 6h or 1d, not '{text}'")
    return seconds


def _say(console: Console, report: Any) -> None:
    counts = report.counts
    if report.unmodified:
        console.print(f"{escape(report.source)}: nothing new since the last time")
        return
    parts = [f"{counts.added} new", f"{counts.updated} updated", f"{counts.unchanged} unchanged"]
    if counts.rejected:
        parts.append(f"[yellow]{counts.rejected} set aside[/]")
    again = " (went on from where it was cut off)" if report.resumed else ""
    console.print(f"{escape(report.source)}: {', '.join(parts)}{again}", highlight=False)


def _index(console: Console, store: Any) -> None:
    from corollary.web.search import catch_up

    with console.status("reading what is new") as status:
        done = catch_up(store, progress=lambda done, total: status.update(f"reading what is new: {done} of {total}"))
    if done:
        console.print(f"{done} papers can now be found by meaning")


def _reasons(console: Console, store: Any, source: str) -> None:
    from sqlalchemy import func, select

    from corollary.web.store import RejectedItem

    with store.reading() as connection:
        query = (
            select(RejectedItem.reason, func.count(), func.min(RejectedItem.position))
            .where(RejectedItem.source == source)
            .group_by(RejectedItem.reason)
            .order_by(func.count().desc())
            .limit(5)
        )
        for reason, count, position in connection.execute(query):
            console.print(f"  [dim]{count} x {escape(reason)}, first at {escape(position)}[/]", highlight=False)


@app.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A file, '-', an address, hf, hf:2026-05-08, arxiv:cs.LG or arxiv:2410.01623."),
    ],
    kind: Annotated[
        str | None, typer.Option("--format", metavar="F", help="jsonl, json, arxiv, feed or bibtex [default: found out].")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Items at most.", min=1)] = None,
    allow_private: Private = False,
    database: Database = None,
    json: Json = None,
) -> None:
    """Import papers. The same twice changes nothing; interrupted, the same command goes on."""
    from corollary.cli.output import check_json, write_json
    from corollary.web.importers import Fetcher, Importer

    if json is not None:
        check_json(json)
    console = Console(stderr=json is not None and str(json) == "-")
    store = _open(database)
    try:
        with console.status("importing") as status:
            importer = Importer(
                store,
                Fetcher(store.folder, allow_private=allow_private),
                lambda counts: status.update(
                    f"importing: {counts.added} new, {counts.updated} updated, {counts.unchanged} unchanged"
                ),
            )
            try:
                with _told():
                    report = importer.run(source, kind=kind, limit=limit)
            except ValueError as error:
                raise typer.BadParameter(str(error)) from error
        _say(console, report)
        if report.counts.rejected:
            _reasons(console, store, report.source)
        _index(console, store)
        if json is not None:
            write_json(json, report.to_dict())
    finally:
        store.close()


@app.command()
def sync(
    sources: Annotated[list[str] | None, typer.Argument(metavar="SOURCE...", help="As for import [default: hf].")] = None,
    every: Annotated[
        str | None, typer.Option("--every", metavar="TIME", help="Again and again, as 30m, 6h or 1d [default: once].")
    ] = None,
    allow_private: Private = False,
    database: Database = None,
) -> None:
    """Bring sources up to date, once or every so often, until interrupted."""
    from corollary.web.importers import Fetcher, Importer, ImportFailed

    pause = _seconds(every) if every is not None else 0.0
    console = Console()
    store = _open(database)
    importer = Importer(store, Fetcher(store.folder, allow_private=allow_private))
    try:
        while True:
            failed = ""
            for source in sources or ["hf"]:
                try:
                    _say(console, importer.run(source))
                except ImportFailed as error:
                    failed = str(error)
                    console.print(f"[red]{escape(failed)}[/]", highlight=False)
                except ValueError as error:
                    raise typer.BadParameter(str(error)) from error
            _index(console, store)
            if every is None:
                raise typer.Exit(1 if failed else 0)
            time.sleep(pause)
    except KeyboardInterrupt:
        console.print("stopped; nothing is lost")
    finally:
        store.close()


@app.command()
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to; '-' is standard output.")],
    database: Database = None,
) -> None:
    """Write everything to JSONL: papers, votes, notes, lists, subscriptions. `daily import FILE` brings it back."""
    from corollary.cli.output import check_json
    from corollary.web.importers import export as write

    check_json(file)
    store = _open(database)
    try:
        count = write(store, file)
    finally:
        store.close()
    Console(stderr=str(file) == "-").print(f"{count} rows in {escape(str(file))}", highlight=False)


@app.command()
def digest(
    dry_run: Annotated[
        Path | None, typer.Option("--dry-run", metavar="DIR", help="Write the mails as .eml files; nothing is sent or changed.")
    ] = None,
    period: Annotated[str | None, typer.Option(metavar="P", help="Only daily or only weekly digests [default: both].")] = None,
    date: Annotated[
        str | None, typer.Option(metavar="DAY", help="The day of the digest, as 2026-05-08 [default: today].")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="URL", help="How readers reach the page [default: $COROLLARY_ADDRESS, else this machine]."),
    ] = None,
    database: Database = None,
    json: Json = None,
) -> None:
    """Mail the digests that are due, and whatever waits in the outbox. Run it every hour or so; killed, it goes on where it was."""
    from corollary.cli.digest import run_digest

    run_digest(dry_run, period, date, address, database, json)

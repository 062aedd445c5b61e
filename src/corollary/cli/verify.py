"""``verify``, ``tour`` and ``report``: run claims with progress, then say what they showed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from corollary.claims import stats
from corollary.claims.record import ClaimRecord, Paper, catalogue, get_paper
from corollary.claims.runner import Options, Runner
from corollary.claims.store import Row, Store, default_store, latest_verdicts, published_results
from corollary.cli.listing import check_package, verdicts
from corollary.cli.output import check_json, control_text, effect_text, verdict_text, write_json

Target = tuple[Paper, ClaimRecord]


@dataclass(frozen=True)
class Request:
    """One call of ``verify``."""

    targets: Sequence[Target]
    options: Options
    store: Path | None = None
    json: Path | None = None
    publish: bool = False


def select(slugs: Sequence[str], everything: bool, package: str | None, stale: bool) -> list[Target]:
    """The claims that the words of the command line name, in the catalogue's order."""
    if not slugs and not everything and package is None and not stale:
        raise typer.BadParameter("name at least one paper, or take --all, --package P or --stale")
    if slugs and everything:
        raise typer.BadParameter("--all takes no papers beside it")
    check_package(package)
    targets: list[Target] = []
    if slugs:
        for word in slugs:
            slug, _, claim_id = word.partition(":")
            paper = get_paper(slug)
            try:
                targets += [(paper, paper.claim(claim_id))] if claim_id else [(paper, claim) for claim in paper.claims]
            except KeyError as error:
                raise typer.BadParameter(str(error.args[0])) from error
    else:
        targets = [(paper, claim) for paper in catalogue().values() for claim in paper.claims]
    if package is not None:
        targets = [target for target in targets if target[0].package == package]
    if stale:
        papers = list({paper.slug: paper for paper, _ in targets}.values())
        rows = latest_verdicts(papers, [Store(published_results())])
        fresh = {(row["slug"], row["claim"]) for row in rows if not row["stale"]}
        targets = [(paper, claim) for paper, claim in targets if (paper.slug, claim.id) not in fresh]
    return targets


class _Bars:
    """Draws progress: one bar over the claims, one over the trials of the arm that runs."""

    def __init__(self, console: Console, claims: int) -> None:
        self.bars = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=28), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=console, transient=True,
        )  # fmt: skip
        self.console = console
        self.overall = self.bars.add_task("[bold]claims", total=claims)
        self.arm = self.bars.add_task("", total=None, visible=False)

    def start(self, paper: Paper, claim: ClaimRecord, arm: str, total: int, done: int) -> None:
        name = f"{paper.slug} · {claim.id}" + (" · control" if arm == "control" else "")
        self.bars.remove_task(self.arm)
        self.arm = self.bars.add_task(name, total=total, completed=done)

    def advance(self) -> None:
        self.bars.advance(self.arm)

    def finish(self, row: Row) -> None:
        self.bars.advance(self.overall)
        control = f"  control: {control_text(row)}" if row["control_verdict"] or row["defect"] else ""
        line = f"{verdict_text(row['verdict'])}  [cyan]{row['slug']}[/] · {row['claim']}  {effect_text(row)}{control}"
        self.console.print(f"{line}  [dim]{row['wall_seconds']:.1f} s[/]", highlight=False)
        for reason in (row["reason"], row["control_reason"]):
            if reason:
                self.console.print(f"    [magenta]{escape(reason)}[/]", highlight=False)


def run_verify(request: Request) -> int:
    """Verify the targets, show them, and give the exit status."""
    console = Console(stderr=str(request.json) == "-")
    if not request.targets:
        console.print("nothing to verify: every published verdict is fresh")
    store = Store(request.store or default_store())
    if request.json is not None:
        check_json(request.json)
    published = Store(published_results())
    if request.publish:
        published.check_writable()
    bars = _Bars(console, len(request.targets))
    rows: list[Row] = []
    try:
        with bars.bars:
            for row in Runner(store, request.options, bars).verify(request.targets):
                rows.append(row)
                if request.publish:
                    published.append(row["slug"], {key: value for key, value in row.items() if key != "traceback"})
    except KeyboardInterrupt:
        Console(stderr=True).print("corollary: interrupted; finished trials are kept, and the same command goes on from there")
        raise typer.Exit(130) from None
    if request.json is not None:
        write_json(request.json, rows)
    if rows:
        console.print(_table(rows))
        _footer(console, rows, request)
    failed = any(
        stats.COULD_NOT_RUN in (row["verdict"], row["control_verdict"]) or row["verdict"] == stats.FAILED for row in rows
    )
    return 1 if failed else 0


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="Verdicts", title_justify="left", header_style="bold", title_style="bold", show_lines=len(rows) > 1)
    table.add_column("paper and claim", overflow="fold")
    table.add_column("verdict", overflow="fold")
    table.add_column("effect [95% interval]", overflow="fold")
    table.add_column("control", overflow="fold")
    for row in rows:
        claim = f"[cyan]{row['slug']}[/]\n{row['claim']}"
        table.add_row(claim, verdict_text(row["verdict"]), effect_text(row), control_text(row))
    return table


def _footer(console: Console, rows: Sequence[Row], request: Request) -> None:
    seconds, defects = sum(row["wall_seconds"] for row in rows), sum(row["defect"] for row in rows)
    if request.options.scale == "smoke":
        said = f"{len(rows)} claims ran; smoke scale gives no verdict"
    else:
        holds = sum(row["verdict"] in stats.HOLDS and not row["defect"] for row in rows)
        said = f"{holds} of {len(rows)} claims hold at {request.options.scale} scale"
    console.print(f"{said}; {seconds:.0f} s in all.", highlight=False)
    if defects:
        console.print(f"[bold magenta]{defects} claim(s) have a control that passes or could not run: a defect of ours.[/]")


def check_report(out: Path) -> None:
    """Refuse a folder that the report cannot go into, before any work is spent."""
    from corollary.report import ReportError, check_folder

    try:
        check_folder(out)
    except ReportError as error:
        raise typer.BadParameter(str(error), param_hint="'--out'") from error


def run_report(out: Path, store: Path | None, json: Path | None = None) -> None:
    """Write the report of all verdicts, published and the user's own."""
    from corollary.report import ReportError, write_report

    papers = catalogue()
    rows = verdicts(list(papers.values()), store)
    try:
        index = write_report(out, papers, rows)
    except ReportError as error:
        raise typer.BadParameter(str(error), param_hint="'--out'") from error
    if json is not None:
        write_json(json, {"index": str(index), "verdicts": rows})
    Console(stderr=str(json) == "-").print(
        f"report: [link=file://{index.resolve()}]{escape(str(index))}[/link]  open it in a browser"
    )

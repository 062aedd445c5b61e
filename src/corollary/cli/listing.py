"""``papers`` and ``show``: read records and verdicts alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from corollary.claims import stats
from corollary.claims.record import Paper, catalogue, get_paper
from corollary.claims.store import Row, Store, default_store, latest_verdicts, published_results
from corollary.cli.output import STYLE, control_text, effect_text, verdict_text, write_json


def verdicts(papers: list[Paper], store: Path | None) -> list[Row]:
    """The newest verdicts, the user's own runs and the published ones together."""
    return latest_verdicts(papers, [Store(published_results()), Store(store or default_store())])


def check_package(package: str | None) -> None:
    """Refuse a package that no paper is in."""
    known = sorted({paper.package for paper in catalogue().values()})
    if package is not None and package not in known:
        raise typer.BadParameter(f"no package '{package}'; there are: {', '.join(known)}")


def _summary(paper: Paper, rows: list[Row]) -> str:
    counts = Counter(STYLE[row["verdict"]] for row in rows if row["slug"] == paper.slug)
    marks = [
        f"[{colour}]{mark} {counts[mark, colour]}[/]" for mark, colour in dict.fromkeys(STYLE.values()) if counts[mark, colour]
    ]
    missing = len(paper.claims) - sum(counts.values())
    if missing:
        marks.append(f"[dim]· {missing}[/]")
    if any(row["stale"] for row in rows if row["slug"] == paper.slug):
        marks.append("[dim]stale[/]")
    return "  ".join(marks)


def list_papers(query: str, package: str | None, store: Path | None, json: Path | None) -> None:
    """Print the catalogue, filtered, with the verdicts of each paper."""
    check_package(package)

    def hit(paper: Paper) -> bool:
        text = " ".join([paper.slug, paper.title, *paper.authors, paper.summary, *(c.statement for c in paper.claims)]).lower()
        return (package is None or paper.package == package) and all(word in text for word in query.lower().split())

    found = [paper for paper in catalogue().values() if hit(paper)]
    rows = verdicts(found, store)
    if json is not None:
        write_json(json, [_paper_data(paper, rows) for paper in found])
        if str(json) == "-":
            return
    console = Console()
    if not found:
        console.print(f"no paper matches '{escape(query)}'; 'corollary papers' lists all {len(catalogue())}")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("slug", no_wrap=True, style="cyan")
    table.add_column("package")
    table.add_column("year")
    table.add_column("title", overflow="fold")
    table.add_column("verdicts", no_wrap=True)
    for paper in found:
        table.add_row(paper.slug, paper.package, str(paper.year), escape(paper.title), _summary(paper, rows))
    console.print(table)
    console.print("[dim]✔ holds   ✘ does not hold here   ? inconclusive   ! could not run   · not yet measured[/]")


def _paper_data(paper: Paper, rows: list[Row]) -> dict[str, Any]:
    facts = {
        k: getattr(paper, k) for k in ("slug", "package", "title", "year", "arxiv", "date", "venue", "url", "code", "summary")
    }
    return {
        **facts,
        "authors": list(paper.authors),
        "deviations": list(paper.deviations),
        "components": [vars(component) for component in paper.components],
        "claims": [claim.to_dict() for claim in paper.claims],
        "verdicts": [row for row in rows if row["slug"] == paper.slug],
    }


def show_paper(slug: str, store: Path | None, json: Path | None) -> None:
    """Print one paper's record and what was measured."""
    paper = get_paper(slug)
    rows = verdicts([paper], store)
    if json is not None:
        write_json(json, _paper_data(paper, rows))
        if str(json) == "-":
            return
    console = Console()
    console.print(f"[bold]{escape(paper.title)}[/]")
    link = f"arXiv {paper.arxiv}" if paper.arxiv else paper.url
    console.print(f"[dim]{escape(', '.join(paper.authors))} · {paper.year} · {link} · {paper.code or 'no code published'}[/]\n")
    console.print(escape(paper.summary) + "\n")
    for component in paper.components:
        package, _, name = component.object.rpartition(".")
        peer = f"  [dim]measured against {component.peer}[/]" if component.peer else ""
        console.print(f"[cyan]from {package} import {name}[/]  [dim]{escape(component.source)}[/]{peer}", highlight=False)
    by_claim = {row["claim"]: row for row in rows}
    for claim in paper.claims:
        row = by_claim.get(claim.id)
        console.print(f"\n[bold]{claim.id}[/]  {escape(claim.statement)}  [dim]({escape(claim.source)})[/]")
        if row is None:
            console.print("  [dim]· not yet measured[/]")
        else:
            stale = "  [yellow]stale: the source has changed since[/]" if row["stale"] else ""
            p_value = f", p = {row['p_value']:.2g}" if row["p_value"] is not None else ""
            where = f"{row['pairs']} trials, {row['scale']}, seed {row['seed']}, {row['commit']}"
            console.print(
                f"  {verdict_text(row['verdict'])}  {effect_text(row)}{p_value}  [dim]{where}[/]{stale}", highlight=False
            )
            console.print(f"  control ({escape(claim.control)}): {control_text(row)}", highlight=False)
            if row["verdict"] == stats.COULD_NOT_RUN:
                console.print(f"  [magenta]{escape(row['reason'] or '')}[/]")
        if claim.note:
            console.print(f"  [dim]{escape(claim.note)}[/]")
    if paper.deviations:
        console.print("\n[bold]Deviations[/]")
        for deviation in paper.deviations:
            console.print(f"  – {escape(deviation)}")
    console.print(f"\n[dim]measure it here:[/]  corollary verify {paper.slug} --controls")

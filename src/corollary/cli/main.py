"""Commands and their options. Nothing here imports torch until a command needs it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from corollary.claims.record import RecordError, UnknownPaper
from corollary.cli import daily

app = typer.Typer(
    name="corollary",
    help="Papers you can run: methods as components, claims as measured checks, verdicts you can reproduce.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(daily.app, name="daily")

Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON; '-' is standard output.")
]
StoreDir = Annotated[
    Path | None, typer.Option("--store", metavar="DIR", help="Where your runs are kept [default: .corollary].")
]
Seed = Annotated[int, typer.Option(help="Base seed; any whole number from 0 up.", min=0)]
Jobs = Annotated[int, typer.Option(help="Trials at once; claims that measure time run one at a time all the same.", min=1)]
Threads = Annotated[int, typer.Option(help="Threads of torch and BLAS in each trial.", min=1)]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder of the report.")]


# The tour uses the machine; more than 4 processes would spend the time on starting.
_CORES = min(4, os.cpu_count() or 1)


@app.command()
def tour(out: Out = Path("report"), seed: Seed = 0, jobs: Jobs = _CORES, store: StoreDir = None, json: Json = None) -> None:
    """Verify a flagship claim of each paper on real data, then write the report."""
    from corollary.claims.record import catalogue
    from corollary.claims.runner import Options
    from corollary.cli.verify import Request, check_report, run_report, run_verify

    check_report(out)
    targets = [(paper, claim) for paper in catalogue().values() for claim in paper.claims if claim.tour]
    request = Request(targets=targets, options=Options(seed=seed, jobs=jobs), store=store, json=json)
    status = run_verify(request)
    run_report(out, store)
    raise typer.Exit(status)


@app.command()
def papers(
    query: Annotated[str, typer.Argument(help="Words to look for in titles, authors, summaries and claims.")] = "",
    package: Annotated[str | None, typer.Option(metavar="P", help="Only this package.")] = None,
    store: StoreDir = None,
    json: Json = None,
) -> None:
    """List the catalogue with its verdicts."""
    from corollary.cli.listing import list_papers

    list_papers(query, package, store, json)


@app.command()
def show(slug: str, store: StoreDir = None, json: Json = None) -> None:
    """Show one paper: what it does, its components, and each claim with what was measured."""
    from corollary.cli.listing import show_paper

    show_paper(slug, store, json)


@app.command()
def verify(
    slugs: Annotated[
        list[str] | None, typer.Argument(metavar="SLUG...", help="Papers, or single claims as SLUG:CLAIM.")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every paper.")] = False,
    package: Annotated[str | None, typer.Option(metavar="P", help="Every paper of this package.")] = None,
    scale: Annotated[str, typer.Option(help="smoke (seconds, no verdict), laptop or full (a GPU).")] = "laptop",
    pairs: Annotated[int | None, typer.Option(help="Trials for each statistical claim [default: the record's].", min=2)] = None,
    seed: Seed = 0,
    controls: Annotated[bool, typer.Option("--controls", help="Run each claim's control too: it must fail.")] = False,
    jobs: Jobs = 1,
    threads: Threads = 1,
    backend: Annotated[str, typer.Option(help="loky, dask or ray; given to joblib.")] = "loky",
    cluster: Annotated[str | None, typer.Option(metavar="ADDRESS", help="A running dask or ray cluster.")] = None,
    device: Annotated[
        str | None, typer.Option(help="As torch spells it [default: cuda at full scale if there is one].")
    ] = None,
    store: StoreDir = None,
    json: Json = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Append the verdicts, with controls, to the published ones.")
    ] = False,
    stale: Annotated[bool, typer.Option("--stale", help="Only claims whose published verdict is stale or missing.")] = False,
) -> None:
    """Measure claims on this machine. Interrupt it at will: the same command goes on where it stopped."""
    from corollary.claims.runner import Options
    from corollary.cli.verify import Request, run_verify, select

    try:
        options = Options(
            scale=scale, pairs=pairs, seed=seed, controls=controls or publish, jobs=jobs, threads=threads, backend=backend, cluster=cluster,
            device=device,
        )  # fmt: skip
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if publish and scale == "smoke":
        raise typer.BadParameter("scale 'smoke' gives no verdict to publish; take laptop or full")
    targets = select(slugs or [], all_, package, stale)
    raise typer.Exit(run_verify(Request(targets=targets, options=options, store=store, json=json, publish=publish)))


@app.command()
def report(out: Out = Path("report"), store: StoreDir = None, json: Json = None) -> None:
    """Write the report: a static page of every paper with its verdicts."""
    from corollary.cli.verify import run_report

    run_report(out, store, json)


def main() -> None:
    """Run the command line; every failure is one clear line and an exit status."""
    from corollary.claims.parallel import BackendError
    from corollary.claims.store import StoreError

    try:
        app()
    except (UnknownPaper, StoreError, BackendError) as error:
        _fail(str(error), 2)
    except RecordError as error:
        _fail(str(error), 1)
    except Exception as error:
        if os.environ.get("COROLLARY_DEBUG"):
            raise
        line = (str(error).strip().splitlines() or [""])[0]
        _fail(f"{type(error).__name__}: {line} (set COROLLARY_DEBUG=1 for the traceback)", 1)


def _fail(line: str, status: int) -> None:
    print(f"corollary: {line}", file=sys.stderr)  # noqa: T201 - the command line speaks here
    sys.exit(status)

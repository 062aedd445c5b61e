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


Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Also write a page with plots.")]
Match = Annotated[str | None, typer.Option(metavar="PATTERN", help="Only tensors whose name fits, as in 'layers.0.*'.")]
Every = Annotated[bool, typer.Option("--all", help="Show every matrix by itself, not one line for each kind.")]
Full = Annotated[bool, typer.Option("--full", help="Whole spectra of large matrices too, which takes its time.")]
Workers = Annotated[int, typer.Option("--jobs", help="Tensors at once.", min=1)]


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A .safetensors file, a shard index, or a folder with either.")],
    top: Annotated[
        int | None, typer.Option(metavar="K", help="Only the K largest singular values of each matrix.", min=1)
    ] = None,
    full: Full = False,
    match: Match = None,
    every: Every = False,
    jobs: Workers = _CORES,
    html: Html = None,
    store: StoreDir = None,
    json: Json = None,
) -> None:
    """Show what is inside a checkpoint of any size: of each tensor its norms, ranks, spectrum, outliers and NaN."""
    from corollary.cli.inspect import InspectRequest, run_inspect

    run_inspect(InspectRequest(checkpoint, top, full, match, every, jobs, html, json, store))


@app.command()
def diff(
    base: Annotated[Path, typer.Argument(help="The checkpoint that was tuned.")],
    tuned: Annotated[Path, typer.Argument(help="What came of it.")],
    k: Annotated[int, typer.Option("-k", help="Leading singular vectors that are examined.", min=1)] = 10,
    epsilon: Annotated[float, typer.Option(help="A vector below this cosine with all of the base is an intruder.")] = 0.5,
    full: Full = False,
    match: Match = None,
    every: Every = False,
    jobs: Workers = _CORES,
    html: Html = None,
    store: StoreDir = None,
    json: Json = None,
) -> None:
    """Show what tuning changed: of each tensor size and rank of the change, intruder dimensions, similar singular vectors."""
    from corollary.cli.diff import DiffRequest, run_diff

    run_diff(DiffRequest(base, tuned, k, epsilon, full, match, every, jobs, html, json, store))


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(help="The pretrained checkpoint: a .safetensors file, a shard index, or a folder.")],
    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="CKPT...", help="What was fine-tuned from it, one for each task.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder, or a .safetensors file.")],
    method: Annotated[str, typer.Option(help="average, task-arithmetic, ties or concrete.")] = "task-arithmetic",
    scale: Annotated[
        float | None, typer.Option(help="Factor of the task vectors [default: 0.3; ties 1.0; concrete the masks' own].")
    ] = None,
    density: Annotated[float | None, typer.Option(help="ties: share of entries that is kept [default: 0.2].")] = None,
    scope: Annotated[
        str | None, typer.Option(help="ties: rank entries in the 'checkpoint' [default] or each 'tensor'.")
    ] = None,
    weight: Annotated[list[float] | None, typer.Option(help="average: once for each CKPT [default: all alike].")] = None,
    masks: Annotated[Path | None, typer.Option(metavar="FILE", help="concrete: what fit_concrete_masks(...) saved.")] = None,
    shard_bytes: Annotated[int, typer.Option(help="A folder's files hold no more.", min=1)] = 5_000_000_000,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw an interrupted merge's work away.")] = False,
    json: Json = None,
) -> None:
    """Merge checkpoints larger than memory into one. Interrupt it at will: the same command goes on where it stopped."""
    from corollary.cli.merge import MergeRequest, run_merge

    options = {"scale": scale, "density": density, "scope": scope, "weight": weight or None, "masks": masks}
    raise typer.Exit(run_merge(MergeRequest(base, checkpoints, method, out, options, shard_bytes, fresh, json)))


@app.command()
def compress(
    checkpoint: Annotated[Path, typer.Argument(help="A .safetensors file, a shard index, or a folder with either.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder; corollary.compress.load reads it.")],
    method: Annotated[str, typer.Option(help="svd, lord, two-sided, feature-pca, eora, quantize or gptq.")] = "svd",
    ratio: Annotated[
        float | None,
        typer.Option(
            help="Share of the chosen layers' weights to keep [default: 0.7]; for eora of their bytes [default: rank 16]."
        ),
    ] = None,
    rank: Annotated[
        float | None, typer.Option(help="Instead of --ratio: one rank for all, or a share of each smaller side.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What corollary.compress.calibrate(model, batches).save(FILE) wrote.")
    ] = None,
    targets: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Layers, by name or its end [default: all but embeddings and heads].")
    ] = None,
    transposed: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Layers that store in × out, as GPT-2's c_attn, c_proj and c_fc do.")
    ] = None,
    allocation: Annotated[
        str | None, typer.Option(help="Ranks by one budget, global, or uniform [default: global for two-sided].")
    ] = None,
    multiple_of: Annotated[int | None, typer.Option(help="Ranks are multiples of this.", min=1)] = None,
    bits: Annotated[int | None, typer.Option(help="quantize, gptq, eora: 4 [default], 8, or 16 for none.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Entries of a row that share a step [default: 64].", min=1)] = None,
    sparsity: Annotated[str | None, typer.Option(help="quantize, eora: 2:4.")] = None,
    shard_bytes: Annotated[int, typer.Option(help="The output's files hold no more.", min=1)] = 5_000_000_000,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw interrupted work away.")] = False,
    json: Json = None,
) -> None:
    """Write a smaller copy of a checkpoint of any size. Interrupt it at will: the same command goes on where it stopped."""
    from corollary.cli.compress import CompressRequest, run_compress

    options = {
        "ratio": ratio, "rank": rank, "allocation": allocation, "multiple_of": multiple_of, "bits": bits, "group_size": group_size,
        "sparsity": sparsity,
    }  # fmt: skip
    request = CompressRequest(checkpoint, method, out, options, calibration, targets, transposed, shard_bytes, fresh, json)
    raise typer.Exit(run_compress(request))


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen at; other machines need --lab.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 takes a free one.", min=0, max=65535)] = 8000,
    database: daily.Database = None,
    lab: Annotated[bool, typer.Option("--lab", help="Many readers, with accounts that `corollary reader` makes.")] = False,
    closed: Annotated[bool, typer.Option("--closed", help="In a lab: nothing can be read without signing in.")] = False,
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="As readers reach the page, where a proxy stands before it.")
    ] = None,
    jobs: Annotated[bool, typer.Option("--jobs/--no-jobs", help="Work off the runs that readers start.")] = True,
    workers: Annotated[int, typer.Option(help="Processes that answer, for a lab: one to each core.", min=1, max=64)] = 1,
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Open a browser.")] = True,
    store: StoreDir = None,
) -> None:
    """Serve the daily page: papers by day, search, likeness, and the verdict on every card."""
    from corollary.cli.serve import run_serve

    run_serve(host, port, address, lab, closed, jobs, workers, open_, database, store)


@app.command()
def reader(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the page calls them.")],
    mail: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Where links that sign them in are sent.")] = None,
    runs: Annotated[bool | None, typer.Option("--runs/--no-runs", help="Whether they may start runs.")] = None,
    admin: Annotated[
        bool | None, typer.Option("--admin/--no-admin", help="Whether they may cancel all runs and export.")
    ] = None,
    token: Annotated[bool, typer.Option("--token", help="Also make a token for the API.")] = False,
    address: Annotated[str | None, typer.Option(metavar="URL", help="As readers reach the page.")] = None,
    database: daily.Database = None,
) -> None:
    """Make a reader of a lab's page, or change one, and print a link that signs them in."""
    from corollary.cli.serve import run_reader

    run_reader(name, mail, runs, admin, token, address, database)


def main() -> None:
    """Run the command line; every failure is one clear line and an exit status."""
    from corollary.claims.parallel import BackendError
    from corollary.claims.store import StoreError
    from corollary.cli.checkpoints import CommandError

    try:
        app()
    except (UnknownPaper, StoreError, BackendError, CommandError) as error:
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

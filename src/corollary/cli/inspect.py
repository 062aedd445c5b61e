"""``inspect``: what is inside a checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from corollary.analysis.inspect_tensor import CheckpointReport, TensorReport, checkpoint_report, iter_inspect
from corollary.cli.checkpoints import (
    CommandError,
    Journal,
    check_output,
    chosen_names,
    kind_of,
    number_text,
    printable,
    run_all,
    size_text,
    spread,
    stamps,
    use_threads,
    write_page,
)
from corollary.cli.output import check_json, write_json
from corollary.data.loaders import LoadError
from corollary.data.tensor_stream import open_checkpoint


@dataclass(frozen=True)
class InspectRequest:
    """One call of ``inspect``."""

    path: Path
    top: int | None = None
    full: bool = False
    match: str | None = None
    every: bool = False
    jobs: int = 1
    html: Path | None = None
    json: Path | None = None
    store: Path | None = None


def run_inspect(request: InspectRequest) -> None:
    """Inspect, show, write."""
    if request.json is not None:
        check_json(request.json)
    check_output(request.html, "the page")
    if request.top is not None and request.full:
        raise CommandError("--top and --full exclude each other; take one")
    console = Console(stderr=str(request.json) == "-")
    begin = time.monotonic()
    try:
        checkpoint = open_checkpoint(request.path)
        names = chosen_names(list(checkpoint), request.match)
        journal = Journal(request.store, ["inspect", stamps(checkpoint.files), request.top, request.full])
        use_threads(request.jobs)
        reports = run_all(
            console,
            "inspecting",
            {name: checkpoint[name].nbytes for name in names},
            journal,
            lambda left: iter_inspect(checkpoint, left, top=request.top, full=request.full, workers=request.jobs),
            TensorReport.from_dict,
        )
    except LoadError as error:
        raise CommandError(str(error)) from error
    report = checkpoint_report(checkpoint, reports)
    seconds = time.monotonic() - begin
    if request.html is not None:
        from corollary.report.checkpoint import inspect_page

        write_page(request.html, inspect_page(report.to_dict()))
    if request.json is not None:
        write_json(request.json, report.to_dict())
    if str(request.json) != "-":
        show_report(console, report, every=request.every, seconds=seconds)
        if request.html is not None:
            console.print(f"page: {printable(str(request.html))}", highlight=False)


def show_report(console: Console, report: CheckpointReport, *, every: bool = False, seconds: float | None = None) -> None:
    """Print a report: totals, then matrices by kind or one by one, then what is odd."""
    dtypes = ", ".join(f"{name} {count:,}" for name, count in report.dtypes.items())
    console.print(f"[bold]{printable(report.path)}[/]", highlight=False)
    console.print(
        f"[dim]{len(report.tensors)} tensors in {report.files} file{'s' if report.files != 1 else ''} · {report.parameters:,} "
        f"parameters · {size_text(report.nbytes)} · {printable(dtypes)}[/]\n",
        highlight=False,
    )
    matrices = [t for t in report.tensors if t.spectral is not None]
    groups: dict[str, list[TensorReport]] = {}
    for tensor in matrices:
        groups.setdefault(tensor.name if every else kind_of(tensor.name), []).append(tensor)
    if groups:
        console.print(_table(groups, every))
    rest = len(report.tensors) - len(matrices)
    notes = ["[dim]stable and effective rank, tail exponent: median, and range over tensors[/]"] if not every and groups else []
    if rest:
        notes.append(f"[dim]{rest} tensors without a spectrum (vectors, integers, empty ones); --json and --html hold them[/]")
    if any(t.method == "estimated" for t in matrices):
        notes.append("[dim]≈ estimated; --full computes it[/]")
    for line in notes:
        console.print(line, highlight=False)
    for tensor in report.tensors:
        if tensor.nan or tensor.inf:
            console.print(f"[red]! {printable(tensor.name)}: {tensor.nan:,} NaN, {tensor.inf:,} infinite[/]", highlight=False)
        elif tensor.note and tensor.method == "none":
            console.print(f"[yellow]! {printable(tensor.name)}: {tensor.note}[/]", highlight=False)
    if seconds is not None:
        rate = f", {size_text(report.nbytes / seconds)}/s" if seconds > 0.5 else ""
        console.print(f"[dim]{seconds:.1f} s{rate}[/]", highlight=False)


def _table(groups: dict[str, list[TensorReport]], every: bool) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("tensor", style="cyan", overflow="fold")
    if not every:
        table.add_column("count", justify="right")
    one_dtype = len({t.dtype for tensors in groups.values() for t in tensors}) == 1
    for name in ("shape",) if one_dtype else ("shape", "dtype"):
        table.add_column(name, no_wrap=True)
    for name in ("‖W‖", "σ₁", "stable rank", "effective rank", "tail α", "condition", "outliers"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, tensors in groups.items():
        shapes = sorted({"×".join(map(str, t.shape)) for t in tensors})
        shown = shapes[0] if len(shapes) == 1 else f"{shapes[0]} …"
        about = "≈ " if any(t.method == "estimated" for t in tensors) else ""
        worst = [t.condition for t in tensors]
        lost = any(t.method == "exact" and t.condition is None for t in tensors)
        outliers = sum(t.outliers for t in tensors)
        effective = spread(t.effective_rank for t in tensors)
        table.add_row(
            printable(name),
            *([] if every else [str(len(tensors))]),
            shown,
            *([] if one_dtype else [tensors[0].dtype.replace("bfloat", "bf").replace("float", "f")]),
            spread(t.frobenius for t in tensors).split(" ")[0],
            spread(t.spectral for t in tensors).split(" ")[0],
            spread(t.stable_rank for t in tensors),
            effective if effective == "–" else about + effective,
            spread(t.tail_exponent for t in tensors),
            "[yellow]singular[/]" if lost else number_text(max((c for c in worst if c is not None), default=None)),
            f"[yellow]{outliers:,}[/]" if outliers else "0",
        )
    return table

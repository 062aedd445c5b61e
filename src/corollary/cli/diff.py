"""``diff``: what fine-tuning did to a checkpoint."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from corollary.analysis.diff_tensors import CheckpointDiff, TensorDiff, check_intruder, checkpoint_diff, diff_names, iter_diff
from corollary.cli.checkpoints import (
    CommandError,
    Journal,
    check_output,
    chosen_names,
    kind_of,
    number_text,
    printable,
    run_all,
    spread,
    stamps,
    use_threads,
    write_page,
)
from corollary.cli.output import check_json, write_json
from corollary.data.tensor_stream import open_checkpoint


@dataclass(frozen=True)
class DiffRequest:
    """One call of ``diff``."""

    base: Path
    tuned: Path
    k: int = 10
    epsilon: float = 0.5
    full: bool = False
    match: str | None = None
    every: bool = False
    jobs: int = 1
    html: Path | None = None
    json: Path | None = None
    store: Path | None = None


def run_diff(request: DiffRequest) -> None:
    """Compare, show, write."""
    if request.json is not None:
        check_json(request.json)
    check_output(request.html, "the page")
    console = Console(stderr=str(request.json) == "-")
    begin = time.monotonic()
    try:
        check_intruder(request.k, request.epsilon)
        base, tuned = open_checkpoint(request.base), open_checkpoint(request.tuned)
        names = chosen_names(diff_names(base, tuned), request.match)
        settings = {"k": request.k, "epsilon": request.epsilon, "full": request.full}
        journal = Journal(request.store, ["diff", stamps(base.files), stamps(tuned.files), settings])
        use_threads(request.jobs)
        found = run_all(
            console,
            "comparing",
            {name: sum(c[name].nbytes for c in (base, tuned) if name in c) for name in names},
            journal,
            lambda left: iter_diff(
                base, tuned, left, k=request.k, epsilon=request.epsilon, full=request.full, workers=request.jobs
            ),
            TensorDiff.from_dict,
        )
    except ValueError as error:  # a file that cannot be read is one too
        raise CommandError(str(error)) from error
    diff = checkpoint_diff(base, tuned, found, request.k, request.epsilon)
    seconds = time.monotonic() - begin
    if request.html is not None:
        from corollary.report.checkpoint import diff_page

        write_page(request.html, diff_page(diff.to_dict()))
    if request.json is not None:
        write_json(request.json, diff.to_dict())
    if str(request.json) != "-":
        show_diff(console, diff, every=request.every, seconds=seconds)
        if request.html is not None:
            console.print(f"page: {printable(str(request.html))}", highlight=False)


def show_diff(console: Console, diff: CheckpointDiff, *, every: bool = False, seconds: float | None = None) -> None:
    """Print a comparison: totals, then changed matrices by kind or one by one, then what could not be compared."""
    console.print(f"[bold]{printable(diff.base)}[/] → [bold]{printable(diff.tuned)}[/]", highlight=False)
    kinds = Counter(t.status for t in diff.tensors)
    counts = " · ".join(f"{kinds[name]} {name}" for name in ("changed", "same", "only in base", "only in tuned") if kinds[name])
    relative = "" if diff.relative is None else f" · change {number_text(diff.relative)} of the weights' norm"
    console.print(f"[dim]{counts}{relative}[/]", highlight=False)
    if diff.matrices:
        looked = sum(len(t.similarity) for t in diff.tensors)
        console.print(
            f"[bold]{diff.intruders}[/] intruder dimensions among the {looked} leading singular vectors of {diff.matrices} "
            f"changed matrices [dim](cosine below {diff.epsilon:g} with every singular vector of the base)[/]",
            highlight=False,
        )
    console.print()
    groups: dict[str, list[TensorDiff]] = {}
    for tensor in diff.tensors:
        if tensor.status == "changed":
            groups.setdefault(tensor.name if every else kind_of(tensor.name), []).append(tensor)
    if groups:
        console.print(_table(groups, every))
    if any(t.method == "estimated" for t in diff.tensors):
        console.print("[dim]≈ estimated, intruders an upper bound; --full computes it[/]")
    for tensor in diff.tensors:
        if tensor.status in ("shape differs", "not compared"):
            said = f"{tensor.status}{', ' if tensor.note else ''}{tensor.note}"
            console.print(f"[yellow]! {printable(tensor.name)}: {said}[/]", highlight=False)
    if seconds is not None:
        console.print(f"[dim]{seconds:.1f} s[/]", highlight=False)


def _table(groups: dict[str, list[TensorDiff]], every: bool) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("changed tensor", style="cyan", overflow="fold")
    if not every:
        table.add_column("count", justify="right")
    for name in ("shape", "‖Δ‖/‖W‖", "rank of Δ", "effective rank", "intruders", "similarity", "overlap"):
        table.add_column(name, justify="left" if name == "shape" else "right", no_wrap=True)
    for name, tensors in groups.items():
        shapes = sorted({"×".join(map(str, t.shape)) for t in tensors})
        matrices = [t for t in tensors if t.similarity]
        about = "≈ " if any(t.method == "estimated" for t in matrices) else ""
        ranks = "over 136" if any(t.rank is None for t in matrices) else spread(t.rank for t in matrices)
        intruders, looked = sum(t.intruders or 0 for t in matrices), sum(len(t.similarity) for t in matrices)
        colour = "red" if intruders else "green"
        effective = spread(t.effective_rank for t in matrices)
        table.add_row(
            printable(name),
            *([] if every else [str(len(tensors))]),
            shapes[0] if len(shapes) == 1 else f"{shapes[0]} …",
            spread(t.relative for t in tensors),
            ranks,
            effective if effective == "–" else about + effective,
            f"[{colour}]{intruders}[/] of {looked}" if matrices else "–",
            number_text(statistics.fmean(s for t in matrices for s in t.similarity)) if matrices else "–",
            spread(t.overlap for t in matrices).split(" ")[0],
        )
    return table


__all__ = ["DiffRequest", "run_diff", "show_diff"]

"""``compress``: a smaller copy of a checkpoint, tensor by tensor, on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from corollary.claims.store import StoreError
from corollary.cli.output import check_json, write_json
from corollary.compress import (
    SVD,
    CompressConfig,
    CompressionReport,
    EoRA,
    FeaturePCA,
    LoRD,
    LowRank,
    Quantize,
    compress_checkpoint,
    load_calibration,
)
from corollary.data import LoadError, WriteError

Maker = Callable[[Mapping[str, Any]], CompressConfig]


def _low_rank(kind: type[CompressConfig]) -> Maker:
    return lambda given: kind(**{"ratio": None if "rank" in given else 0.7, **given})


_PACKED = ("bits", "group_size", "sparsity")
METHODS: dict[str, tuple[Maker, tuple[str, ...]]] = {
    "svd": (_low_rank(SVD), ("ratio", "rank", "allocation", "multiple_of")),
    "lord": (_low_rank(LoRD), ("ratio", "rank", "allocation", "multiple_of")),
    "two-sided": (
        lambda given: LowRank(
            **{"ratio": None if "rank" in given else 0.7, "metric": "both", "centered": True, "damping": 1e-4, **given}
        ),
        ("ratio", "rank", "allocation", "multiple_of"),
    ),
    "feature-pca": (_low_rank(FeaturePCA), ("ratio", "rank", "allocation", "multiple_of")),
    "eora": (lambda given: EoRA(**given), ("ratio", "rank", *_PACKED)),
    "quantize": (lambda given: Quantize(**given), _PACKED),
    "gptq": (lambda given: Quantize(method="gptq", **given), ("bits", "group_size")),
}
"""method to its configuration out of options, and the options that it takes"""


@dataclass(frozen=True)
class CompressRequest:
    """One call of ``compress``; an option that is None was not given."""

    checkpoint: Path
    method: str
    out: Path
    options: Mapping[str, Any]
    calibration: Path | None = None
    targets: str | None = None
    transposed: str | None = None
    shard_bytes: int = 5_000_000_000
    fresh: bool = False
    json: Path | None = None

    def config(self) -> CompressConfig:
        """The method with its options; raises ``StoreError`` for one that is not its own or out of range."""
        if self.method not in METHODS:
            raise StoreError(f"there is no method '{self.method}'; allowed: {', '.join(METHODS)}")
        make, allowed = METHODS[self.method]
        given = {name: value for name, value in self.options.items() if value is not None}
        for name in given:
            if name not in allowed:
                takes = ", ".join(f"--{n.replace('_', '-')}" for n in allowed)
                raise StoreError(f"--{name.replace('_', '-')} is no option of method '{self.method}', which takes {takes}")
        if "rank" in given and given["rank"] >= 1:
            if given["rank"] != int(given["rank"]):
                raise StoreError(f"--rank must be a whole number, or a share below 1, not {given['rank']}")
            given["rank"] = int(given["rank"])
        if given.get("bits") == 16:
            given["bits"] = None
        try:
            return make(given)
        except (TypeError, ValueError) as error:
            raise StoreError(str(error)) from error


def run_compress(request: CompressRequest) -> int:
    """Compress, show what was done, and give the exit status."""
    console = Console(stderr=str(request.json) == "-")
    if request.json is not None:
        check_json(request.json)
    config = request.config()
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=28), DownloadColumn(), TextColumn("left"), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    tasks: dict[str, TaskID] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task({"spectra": "choosing ranks", "layers": "compressing"}[what], total=total)
        bars.update(tasks[what], completed=done)

    try:
        seen = None if request.calibration is None else load_calibration(request.calibration)
        with bars, torch.inference_mode():
            report = compress_checkpoint(
                request.checkpoint, config, request.out, request.targets, calibration=seen, transposed=request.transposed,
                max_shard_bytes=request.shard_bytes, fresh=request.fresh, progress=progress,
            )  # fmt: skip
    except (LoadError, WriteError, ValueError) as error:
        raise StoreError(str(error)) from error
    except KeyboardInterrupt:
        Console(stderr=True).print("corollary: interrupted; what is whole is kept, and the same command goes on from there")
        return 130
    if request.json is not None:
        facts = {"checkpoint": str(request.checkpoint), "out": str(request.out), "method": request.method}
        write_json(request.json, {**facts, "settings": config.to_dict(), **report.to_dict()})
        if str(request.json) == "-":
            return 0
    show_compression(console, report, request)
    return 0


def show_compression(console: Console, report: CompressionReport, request: CompressRequest) -> None:
    """What was done to each layer, and to the whole."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("layer", overflow="fold", style="cyan")
    for column in ("shape", "rank", "bytes", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in report.layers:
        share = f"{100 * row.bytes / row.bytes_before:.0f}%" if row.method != "dense" else "[dim]dense[/]"
        error = "" if row.error is None or row.method == "dense" else f"{row.error:.2e}"
        table.add_row(
            escape("".join(c if c.isprintable() else "\ufffd" for c in row.layer)),
            "×".join(map(str, row.shape)), "" if row.rank is None else str(row.rank), share, error,
        )  # fmt: skip
    console.print(table)
    console.print(
        f"{request.method}: {report.bytes_before / 1e6:,.1f} MB are {report.bytes / 1e6:,.1f} MB, the chosen layers take "
        f"{100 * report.ratio:.0f}% of their bytes; {report.seconds:.1f} s: {escape(str(request.out))}",
        highlight=False,
    )

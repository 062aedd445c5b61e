"""Run the benchmarks, print the ratios, and keep them in ``benchmarks/results.json``, which the docs show.

Usage: python -m benchmarks [WORD ...]   only the files whose name has one of the words
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.harness import measure
from corollary.claims.environment import commit, machine, packages

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"


def main(words: list[str]) -> int:
    console = Console()
    files = [path for path in sorted(HERE.glob("*/bench_*.py")) if not words or any(word in path.stem for word in words)]
    if not files:
        console.print(
            f"no benchmark matches {' '.join(words)}; there are: {', '.join(p.stem for p in HERE.glob('*/bench_*.py'))}"
        )
        return 2
    rows: list[dict[str, Any]] = []
    for path in files:
        module = importlib.import_module(f"benchmarks.{path.parent.name}.{path.stem}")
        for bench in track(module.cases(), description=path.stem, console=console, transient=True):
            rows += measure(bench)
    _print(console, rows)
    _keep(rows)
    return 0


def _print(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(title="ours / peer: below 1 is faster or smaller", title_justify="left", header_style="bold")
    table.add_column("component, setting, peer", overflow="fold")
    for column in ("ours ms", "peer ms", "time", "memory"):
        table.add_column(column, justify="right", no_wrap=True)
    last = ""
    for row in rows:
        what = f"[cyan]{row['component'].removeprefix('corollary.')}[/] {row['setting']}"
        if what != last:
            table.add_row(what, "", "", "", "")
            last = what
        memory = f"{row['memory_ratio']:.2f}" if row["memory_ratio"] is not None else "–"
        colour = "green" if row["time_ratio"] <= 1 else "yellow"
        times = [f"{1e3 * row[key]:.3g}" for key in ("seconds", "peer_seconds")]
        table.add_row(f"  {row['peer']}", *times, f"[{colour}]{row['time_ratio']:.2f}[/]", memory)
    console.print(table)


def _keep(rows: list[dict[str, Any]]) -> None:
    """Replace the rows of the components that were measured and keep the others; whole or not at all."""
    measured = {row["component"] for row in rows}
    old = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    where = {"commit": commit(), "machine": machine(), "packages": packages()}
    new = [row for row in old if row["component"] not in measured] + [{**row, **where} for row in rows]
    new.sort(key=lambda row: (row["component"], row["setting"], row["peer"]))
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, RESULTS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

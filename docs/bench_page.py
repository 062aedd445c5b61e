"""The page of benchmarks, out of ``benchmarks/results.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paper_pages import table, text

from corollary.report.numbers import number

INTRODUCTION = """# Benchmarks

Each component is timed against its peers on the same work, in turn (ours, peer, ours, peer, ...), so that a busy machine slows
both alike; the median over rounds counts. Memory is the peak of what a call allocates beyond what stood before. A ratio is
ours / peer: below 1 is faster or smaller. Run them yourself with `python -m benchmarks`.
"""


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def benchmark_page(results: Path) -> str:
    """The table of results, or how to make them where there are none yet."""
    if not results.is_file():
        return INTRODUCTION + "\nNo results are on record yet.\n"
    rows: list[dict[str, Any]] = json.loads(results.read_text(encoding="utf-8"))
    cells = [
        [
            f"[`{row['component'].removeprefix('corollary.')}`][{row['component']}]",
            text(row["setting"]),
            f"`{row['peer']}`",
            number(1e3 * row["seconds"]),
            number(1e3 * row["peer_seconds"]),
            _ratio(row["time_ratio"]),
            _ratio(row["memory_ratio"]),
        ]
        for row in rows
    ]
    heads = ["Component", "Setting", "Peer", "Ours, ms", "Peer, ms", "Time ratio", "Memory ratio"]
    machines = sorted({_machine(row) for row in rows})
    return f"{INTRODUCTION}\n{table(heads, cells)}\nMeasured on {'; '.join(machines)}.\n"


def _machine(row: dict[str, Any]) -> str:
    machine = row.get("machine", {})
    return f"{machine.get('processor', 'an unknown processor')}, {machine.get('cores', '?')} cores, {machine.get('system', '')}"

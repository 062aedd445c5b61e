"""The daily page's table of a million papers, out of ``benchmarks/web_scale.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paper_pages import table

MARK = "<!-- scale -->"


def _recall(found: dict[str, Any]) -> str:
    told = [f"{by['words']:.3f} for {kind} ({by['fusion']:.3f} fused)" for kind, by in found.get("known_items", {}).items()]
    return f"Asked for by some of its words, a paper is among the first five hits by words: {', '.join(told)}. " if told else ""


def scale_table(text: str, results: Path) -> str:
    """The guide with the table in the place of its mark."""
    if not results.is_file():
        return text.replace(MARK, "No results are on record yet: `python -m benchmarks.web_scale`.\n")
    found: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    built, where = found["built"], found["machine"]
    kinds = [kind for kind, row in found.items() if isinstance(row, dict) and "limit_ms" in row]
    rows = [
        [
            kind[:1].upper() + kind[1:],
            f"{found[kind]['at_1']['p95_ms']:.1f}",
            f"{found[kind]['at_50']['p50_ms']:.0f}",
            f"{found[kind]['at_50']['p95_ms']:.0f}",
            f"{found[kind]['limit_ms']:.0f}",
            f"{found[kind]['at_50']['per_second']:.0f}",
        ]
        for kind in kinds
    ]
    head = ["What is asked", "alone, p95 ms", "50 at once, p50 ms", "50 at once, p95 ms", "our bar, ms", "answers a second"]
    return text.replace(
        MARK,
        f"{built['papers']:,} generated papers, {built['import_per_second']:,.0f} imported a second ({built['import_peak_mb']:,.0f} MB at "
        f"most) and {built['index_per_second']:,.0f} indexed; the database takes {built['database_mb'] / 1000:.1f} GB, the vectors "
        f"{built['vectors_mb'] / 1000:.1f} GB. `corollary serve --workers {found['workers']}`, {max(found['server_private_mb']):,.0f} MB to a process, answers "
        "50 connections that ask again as soon as they are answered, from another process:\n\n"
        + table(head, rows)
        + "\nDays' pages are asked for as readers do, the newer the more; *any day's page* takes all days alike, of which few are kept. "
        f"{_recall(found)}"
        "Run it yourself with `python -m benchmarks.web_scale`.\n\n"
        f"Measured on {where.get('processor')}, {where.get('cores')} cores, {where.get('system')}.\n",
    )

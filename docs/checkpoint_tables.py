"""Tables of the checkpoints' page, out of what ``benchmarks/inspect_scale.py`` and ``benchmarks/minilm_diff.py`` have kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paper_pages import table


def _read(path: Path) -> dict[str, Any] | None:
    data: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return data


def checkpoint_tables(text: str, benchmarks: Path) -> str:
    """The page with its marks replaced; a mark whose measurement is missing says how to make it."""
    for name, render in (("inspect_scale", _scale), ("minilm_diff", _minilm)):
        data = _read(benchmarks / f"{name}.json")
        shown = render(data) if data else f"Not measured yet: run `python -m benchmarks.{name}`."
        text = text.replace(f"<!-- table: {name} -->", shown)
    return text


def _scale(data: dict[str, Any]) -> str:
    rows = [["reading the files alone", f"{data['read_seconds']:.1f} s", "–", f"{data['read_gb_per_second']:.2f} GB/s", "–"]]
    rows += [
        [
            r["what"],
            f"{r['seconds']:.1f} s",
            f"{r['processor_seconds']:.0f} s",
            f"{r['gb_per_second']:.3f} GB/s",
            f"{r['peak_bytes'] / 1e9:.2f} GB",
        ]
        for r in data["rows"]
    ]
    words = (
        f"Measured on a generated checkpoint of {data['bytes'] / 1e9:.1f} GB in bfloat16 ({data['tensors']} tensors in {data['files']} "
        f"shards, the largest {data['largest_tensor_bytes'] / 1e9:.2f} GB), from a cold cache, {data['jobs']} tensors at once:"
    )
    place = f"{data['machine']['processor']}, {data['machine']['cores']} cores"
    return f"{words}\n\n{table(['', 'time', 'processor time', 'throughput', 'peak memory'], rows)}\nOn {place}."


def _minilm(data: dict[str, Any]) -> str:
    rows = [
        [
            r["name"], f"{r['lr']:g}", f"{r['accuracy']:.1%}", f"{r['loss']:.3f}", f"{r['relative']:.3f}", f"{r['rank']:.0f}",
            f"{r['effective_rank']:.1f}", f"{r['intruders']} of {r['vectors']}", f"{min(r['similarity']):.3f}", f"{r['forgetting']:.3f}",
        ]
        for r in data["rows"]
    ]  # fmt: skip
    heads = [
        "tuned by", "rate", "accuracy", "loss", "‖Δ‖/‖W‖", "rank of Δ", "effective rank", "intruders", "least mean similarity", "forgetting",
    ]  # fmt: skip
    closing = (
        f"{data['steps']} steps of 16 texts of {data['tokens']} tokens; each but the last the best of three rates by its loss on held-out texts. Rank and "
        "effective rank are medians over matrices; the similarity is the mean over matrices at the place where that is least; forgetting is "
        "one minus the correlation of all cosines between held-out texts before and after. Run it with `python -m benchmarks.minilm_diff`."
    )
    return f"{table(heads, rows)}\n{closing}"

"""The page of compressing a language model, out of ``benchmarks/language_compression.json``: a plot and tables."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from paper_pages import table, text

TITLE = "# Compressing a language model\n\n"
INTRODUCTION = """A LLaMA of two blocks of width 64 learns the standard library's source, {steps} steps of 16 windows of 32 bytes; its perplexity on
held-out source is {original:.3f} a byte. Its blocks are then compressed by what needs no training: decomposition of the weights (SVD) or of
the outputs (LoRD), and 4-bit weights, with or without 2:4 sparsity, whose error low-rank factors make up for (EoRA; beside it, factors that
look at no inputs). TRP and Maestro stand beside them: models that were trained as long, from the same start, to be cut.
"""
CLOSING = """
Perplexity is exp of the mean loss over {seeds} seeds, without fine-tuning after compression; a dash stands where packed weights alone take more
bytes than that. Global ranks throughout. TRP and Maestro are told by their weights' number at three shares, and their whole models' perplexity
stands at 1.

## Speed

A forward pass of {tokens} tokens by a model of width {width}, over the dense model's, all interleaved on one thread. Packed weights are unpacked
for every product here: they save bytes, not time.

"""
_STYLES = {
    "SVD": ("#9ca3af", "-"), "LoRD": ("#3949ab", "-"), "4 bits + SVD": ("#84cc16", ":"), "4 bits + EoRA": ("#3f6212", "-"),
    "2:4, 4 bits + SVD": ("#c084fc", ":"), "2:4, 4 bits + EoRA": ("#7e22ce", "-"), "TRP": ("#c2410c", "-"), "Maestro": ("#0e7490", "-"),
}  # fmt: skip


def language_page(results: Path) -> tuple[str, str]:
    """The page, and its plot as SVG; without results, a page that says how to make them and an empty plot."""
    if not results.is_file():
        return TITLE + "No results are on record yet: `python -m benchmarks.language_compression`.\n", ""
    report: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = report["rows"]
    original = next(row for row in rows if row["method"] == "original")
    methods = [name for name in dict.fromkeys(row["method"] for row in rows) if name != "original"]
    ratios = sorted({row["ratio"] for row in rows if row["method"] != "original"}, reverse=True)
    at = {(row["method"], row["ratio"]): row for row in rows}
    where = report["machine"]
    speed = {(row["model"], row["batch"]): row for row in report["speed"]}
    models = list(dict.fromkeys(row["model"] for row in report["speed"]))
    parts = [
        TITLE + INTRODUCTION.format(steps=report["steps"], original=original["perplexity"]),
        "![Perplexity against the share of the blocks' bytes](language_compression.svg)\n",
        "Perplexity a byte, by the share of the blocks' bytes that may be kept:\n",
        table(
            ["Method", *(f"{ratio:g}" for ratio in ratios)],
            [
                [text(name), *(f"{at[name, r]['perplexity']:.3f}" if (name, r) in at else "–" for r in ratios)]
                for name in methods
            ],
        ),
        CLOSING.format(seeds=report["seeds"], tokens=report["tokens"], width=report["width"]),
        table(
            ["Model", "Batch 1, ms", "of the dense one's", "Batch 32, ms", "of the dense one's"],
            [
                [
                    text(name),
                    *(
                        cell
                        for batch in (1, 32)
                        for cell in (f"{speed[name, batch]['milliseconds']:.2f}", f"{speed[name, batch]['quotient']:.2f}")
                    ),
                ]
                for name in models
            ],
        ),
        "\nRun it yourself with `python -m benchmarks.language_compression`.\n",
        f"\nMeasured on {where.get('processor')}, {where.get('cores')} cores, {where.get('system')}.\n",
    ]
    return "\n".join(parts), _plot(rows, methods, original["perplexity"])


def _plot(rows: list[dict[str, Any]], methods: list[str], original: float) -> str:
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(original, color="#111827", linewidth=0.8)
    axes.annotate("the original", (0.1, original), (2, 3), textcoords="offset points", fontsize=8)
    for name in methods:
        colour, line = _STYLES.get(name, ("#111827", "-"))
        points = sorted((row["share"], row["perplexity"]) for row in rows if row["method"] == name)
        axes.plot(*zip(*points, strict=True), line, color=colour, marker="o", markersize=3, label=name)
    axes.set_yscale("log")
    axes.set_ylim(top=3 * original)
    axes.set_yticks([5, 6, 8, 10, 12], ["5", "6", "8", "10", "12"])
    axes.minorticks_off()
    axes.set_xlabel("share of the blocks' bytes")
    axes.set_ylabel("perplexity a byte")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    target = io.StringIO()
    FigureCanvasSVG(figure).print_svg(target, metadata={"Date": None})
    return target.getvalue()

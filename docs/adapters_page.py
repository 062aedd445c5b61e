"""The page of fine-tuning with few numbers, out of ``benchmarks/adapters.json``: a plot with its Pareto front, and a table."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from paper_pages import table, text
from scipy.stats import bootstrap

TITLE = "# Accuracy against trained numbers\n\n"
INTRODUCTION = """The top layer of all-MiniLM-L6-v2, a real pretrained encoder, learns to tell docstrings of the standard library by their module
(ten classes). Every method of [`corollary.adapt`](guide/adapt.md) starts from the same weights, sees the same texts in the same order and
trains the same number of steps; its learning rate is the best of four on two seeds that are not among the {seeds} shown. The head is random
and frozen: all that is learnt is learnt by the adapter.
"""
CLOSING = """
Accuracy is on texts held out, mean over {seeds} seeds with a 95% bootstrap interval; *against LoRA* is the mean of the paired differences
from LoRA of rank {rank}, in points. A method is on the front where none with as few trained numbers is more accurate on average.
One layer, 550 texts and 80 steps say how methods compare at this scale, not at a paper's: each paper's own page has its claims.
Run it yourself with `python -m benchmarks.adapters`.

Measured on {machine}.
"""
REFERENCE = "LoRA, rank 6"


def pareto(points: list[tuple[int, float]]) -> list[bool]:
    """Whether each (trained numbers, accuracy) is on the front: nothing of at most its size is better, nor as good and smaller."""
    return [
        not any((n <= size and a > accuracy) or (n < size and a >= accuracy) for n, a in points) for size, accuracy in points
    ]


def interval(values: np.ndarray) -> tuple[float, float]:
    """95% interval of the mean; the mean itself where all are alike."""
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    found = bootstrap((values,), np.mean, rng=np.random.default_rng(0)).confidence_interval
    return float(found.low), float(found.high)


def adapters_page(results: Path) -> tuple[str, str]:
    """The page, and its plot as SVG; without results, a page that says how to make them and an empty plot."""
    if not results.is_file():
        return TITLE + "No results are on record yet: `python -m benchmarks.adapters`.\n", ""
    report: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    rows = [
        {"method": name, "trainable": row["trainable"], "rate": row["rate"], "values": np.array(row["accuracies"])}
        for name, row in report["methods"].items()
    ]
    for row, front in zip(rows, pareto([(r["trainable"], float(r["values"].mean())) for r in rows]), strict=True):
        row["front"] = front
    rows.sort(key=lambda row: row["trainable"])
    reference = next((row["values"] for row in rows if row["method"] == REFERENCE), None)
    where, seeds = report["machine"], len(rows[0]["values"])
    parts = [
        TITLE + INTRODUCTION.format(seeds=seeds),
        "![Accuracy against trained numbers, with the Pareto front](adapters.svg)\n",
        table(
            ["Method", "Trained numbers", "Learning rate", "Accuracy", "Against LoRA", "On the front"],
            [_cells(row, reference) for row in rows],
        ),
        CLOSING.format(
            seeds=seeds,
            rank=REFERENCE.rpartition(" ")[2],
            machine=f"{where.get('processor')}, {where.get('cores')} cores, {where.get('system')}",
        ),
    ]
    return "\n".join(parts), _plot(rows)


def _cells(row: dict[str, Any], reference: np.ndarray | None) -> list[str]:
    low, high = interval(row["values"])
    against = "–"
    if reference is not None and row["method"] != REFERENCE:
        gap = row["values"] - reference
        below, above = interval(gap)
        against = f"{100 * gap.mean():+.1f} [{100 * below:+.1f}, {100 * above:+.1f}]"
    return [
        text(row["method"]),
        f"{row['trainable']:,}",
        f"{row['rate']:g}",
        f"{row['values'].mean():.1%} [{low:.1%}, {high:.1%}]",
        text(against),
        "yes" if row["front"] else "",
    ]


def _plot(rows: list[dict[str, Any]]) -> str:
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.add_subplot()
    front = [row for row in rows if row["front"]]
    axes.step(
        [row["trainable"] for row in front], [row["values"].mean() for row in front], where="post", color="#c2410c",
        linewidth=1.2, label="Pareto front", zorder=1,
    )  # fmt: skip
    placed: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda row: -row["values"].mean()):
        mean, (low, high) = row["values"].mean(), interval(row["values"])
        colour = "#c2410c" if row["front"] else "#111827" if row["method"].startswith(("LoRA, ", "full")) else "#3949ab"
        axes.plot([row["trainable"]] * 2, [low, high], color=colour, linewidth=1.2, alpha=0.6)
        axes.plot(row["trainable"], mean, "o", color=colour, markersize=4.5)
        # Names go to the right of their point, each a line below those that would lie under it.
        x, y = np.log10(row["trainable"]), float(mean)
        while any(abs(x - a) < 0.55 and abs(y - b) < 0.016 for a, b in placed):
            y -= 0.004
        placed.append((x, y))
        axes.annotate(
            row["method"], (row["trainable"], mean), (10**x * 1.07, y), fontsize=7.5, va="center", color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.4},
            arrowprops=None if abs(y - mean) < 0.005 else {"arrowstyle": "-", "color": colour, "linewidth": 0.4, "alpha": 0.5},
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(right=max(row["trainable"] for row in rows) * 4)
    axes.set_xlabel("trained numbers")
    axes.set_ylabel("accuracy on texts held out: mean, 95% interval")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    target = io.StringIO()
    FigureCanvasSVG(figure).print_svg(target, metadata={"Date": None})
    return target.getvalue()

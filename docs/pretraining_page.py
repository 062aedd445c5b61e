"""The page of low-rank pre-training, out of ``benchmarks/pretraining.json``: a table and a plot."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from paper_pages import table, text

INTRODUCTION = """# Pre-training with little optimizer state

What does the state that an optimizer does not keep cost? A LLaMA of 133,000 parameters learns the standard library's source
from scratch, {steps} steps of 512 bytes. Every method has the same start, batches and schedule. The low-rank ones get the largest
rank whose optimizer state fits into the same budget of {budget:,} bytes ({share:.0%} of AdamW's); embedding and norms keep AdamW's
full state; LoRA gets the smallest rank that takes no fewer bytes. Each learning rate is the best of six on a seed that is not among the {seeds} shown here.
"""

BEST = """## A pair that no paper has

Any projector goes with any residual rule. {tried} pairs that no paper has were tried at three rates on the tuning seed; the best of
them is in the table, on the same fresh seeds as all others. Its code:

```python
from corollary.optim import ProjectedAdamW, low_rank_groups

optimizer = ProjectedAdamW(
    low_rank_groups(model, rank={rank}), lr={rate}, projector="{projector}", residual="{residual}", update_proj_gap=50
)
```
"""

CLOSING = """
Read the comparison with AdamW with care. The best single rate for the projected methods is higher than AdamW's, and trains embedding
and norms faster; AdamW with its matrices at a quarter of the rate shows how much of their lead is due to that.

Loss is in nats a byte on held-out source, with a 95% interval over seeds; the gap to AdamW is the mean over seeds of the paired
relative difference. Step time is the optimizer's step alone, refreshes included, on one thread; at this size it is mostly overhead,
see the [benchmarks](benchmarks.md) for larger matrices. A run this small says how methods compare at this scale, not at a paper's.
Run it yourself with `python -m benchmarks.pretraining`.

Measured on {machine}.
"""


def pretraining_page(results: Path) -> tuple[str, str]:
    """The page, and its plot as SVG; without results, a page that says how to make them and an empty plot."""
    if not results.is_file():
        return (
            "# Pre-training with little optimizer state\n\nNo results are on record yet: `python -m benchmarks.pretraining`.\n",
            "",
        )
    report: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = report["rows"]
    full = next(row for row in rows if row["method"] == "AdamW")
    parts = [
        INTRODUCTION.format(
            steps=report["steps"],
            seeds=report["seeds"],
            budget=report["budget_bytes"],
            share=report["budget_bytes"] / full["state_bytes"],
        ),
        "![Validation loss against bytes of optimizer state](pretraining.svg)\n",
        table(
            ["Method", "Rank", "Learning rate", "Validation loss", "Against AdamW", "State, bytes", "Step, ms"],
            [_cells(r) for r in rows],
        ),
    ]
    best = next((row for row in rows if row["method"].startswith("best pair")), None)
    if best is not None:
        projector, _, residual = best["method"].partition(": ")[2].partition(" + ")
        parts.append(
            BEST.format(
                tried=len(report["pairs_tried"]),
                rank=best["rank"],
                rate=best["rate"],
                projector=projector,
                residual=residual,
            )
        )
    where = report["machine"]
    parts.append(CLOSING.format(machine=f"{where.get('processor')}, {where.get('cores')} cores, {where.get('system')}"))
    return "\n".join(parts), _plot(rows)


def _cells(row: dict[str, Any]) -> list[str]:
    gap = f"{100 * row['gap']:+.1f}% [{100 * row['gap_low']:+.1f}, {100 * row['gap_high']:+.1f}]" if "gap" in row else "–"
    rank = "–" if row["rank"] is None else f"{row['rank']:.3g}"
    return [
        text(row["method"]),
        rank,
        f"{row['rate']:g}",
        f"{row['loss']:.3f} [{row['loss_low']:.3f}, {row['loss_high']:.3f}]",
        text(gap),
        f"{row['state_bytes']:,}",
        f"{1e3 * row['step_seconds']:.2f}",
    ]


def _plot(rows: list[dict[str, Any]]) -> str:
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    ordered = sorted(rows, key=lambda row: row["loss"])
    for place, row in enumerate(ordered):
        colour = "#6b7280" if row["method"] == "AdamW" else "#c2410c" if row["method"].startswith("best") else "#3949ab"
        axes.plot([row["loss_low"], row["loss_high"]], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(row["losses"], [place] * len(row["losses"]), "|", color=colour, alpha=0.45, markersize=9)
        axes.plot(row["loss"], place, "o", color=colour)
    axes.set_yticks(range(len(ordered)), [f"{row['method']}\n{row['state_bytes'] / 1000:,.0f} kB of state" for row in ordered])
    axes.invert_yaxis()
    axes.set_xlabel("validation loss, nats a byte: mean, 95% interval, and each seed")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", labelsize=8)
    target = io.StringIO()
    FigureCanvasSVG(figure).print_svg(target, metadata={"Date": None})
    return target.getvalue()

"""The page of compressing a real encoder, out of ``benchmarks/compression.json``: a plot and tables."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from paper_pages import table, text

INTRODUCTION = """# Compressing a real encoder

all-MiniLM-L6-v2 has {matrices} matrices in its six layers. Every method of [`corollary.compress`](guide/compress.md) brings them to a
share of their bytes, calibrated on {calibrated} docstrings of the standard library of up to {tokens} tokens. On {tested} others it is
measured how far all layers' hidden states move, with {masked:.0%} of the tokens masked, and what a classifier of docstrings by module,
trained on the original's sentence vectors and held fixed, makes of the compressed model's.
"""

CLOSING = """
The error of the states is the squared distance from the original's over their variance, mean over layers. The uncompressed model
classifies {accuracy:.1%} rightly, at a loss of {loss:.3f}. The second table has the errors of methods that look at activations over
those of the plain decomposition beside them: below 1 is better. Where packed weights lose next to nothing, as with 4 bits alone, all
classify as the original does.

Ranks by one budget go by each layer's error relative to its own output, where a method has nothing better, and a post-norm encoder does
not mind all layers' errors alike: the same share of every layer is better here. With the gradient's second moment in the metric as well
(`LowRank(metric="both")`) errors of all layers are in one unit, and the budget finds where they hurt least.

Run it yourself with `python -m benchmarks.compression`.

Measured on {machine}.
"""

_STYLES = {
    "SVD": ("#9ca3af", "-"), "SVD, global ranks": ("#9ca3af", ":"), "LoRD": ("#3949ab", "-"), "LoRD, global ranks": ("#3949ab", ":"),
    "both metrics, global ranks": ("#c2410c", "-"), "4 bits + SVD": ("#84cc16", ":"), "4 bits + EoRA": ("#3f6212", "-"),
    "2:4, 4 bits + SVD": ("#c084fc", ":"), "2:4, 4 bits + EoRA": ("#7e22ce", "-"),
}  # fmt: skip


def compression_page(results: Path) -> tuple[str, str]:
    """The page, and its plot as SVG; without results, a page that says how to make them and an empty plot."""
    if not results.is_file():
        return "# Compressing a real encoder\n\nNo results are on record yet: `python -m benchmarks.compression`.\n", ""
    report: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = report["rows"]
    where = report["machine"]
    ratios = sorted({row["ratio"] for row in rows}, reverse=True)
    names = list(dict.fromkeys(row["method"] for row in rows))
    at = {(row["method"], row["ratio"]): row for row in rows}

    def cells(name: str) -> list[str]:
        found = [at.get((name, ratio)) for ratio in ratios]
        return [text(name), *("–" if row is None else f"{row['reconstruction']:.2g} / {row['accuracy']:.1%}" for row in found)]

    quotients = [
        [text(pair), *(f"{found['reconstruction'][str(r)]:.2f}" if str(r) in found["reconstruction"] else "–" for r in ratios)]
        for pair, found in report["quotients"].items()
    ]
    parts = [
        INTRODUCTION.format(
            matrices=report["matrices"], calibrated=report["calibrated"], tokens=report["tokens"], tested=report["tested"],
            masked=report["masked"],
        ),
        "![Error of hidden states and loss of classification against the share of bytes kept](compression.svg)\n",
        "Error of the hidden states, and accuracy of the classifier, by share of the matrices' bytes:\n",
        table(["Method", *(f"{ratio:g}" for ratio in ratios)], [cells(name) for name in names]),
        "\nError of the hidden states over the plain method's:\n",
        table(["Pair", *(f"{ratio:g}" for ratio in ratios)], quotients),
        CLOSING.format(
            accuracy=report["original"]["accuracy"],
            loss=report["original"]["classification_loss"],
            machine=f"{where.get('processor')}, {where.get('cores')} cores, {where.get('system')}",
        ),
    ]  # fmt: skip
    return "\n".join(parts), _plot(names, ratios, at, report["original"])


def _plot(
    names: list[str], ratios: list[float], at: dict[tuple[str, float], dict[str, Any]], original: dict[str, float]
) -> str:
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in names:
        colour, line = _STYLES.get(name, ("#111827", "-"))
        shares = [ratio for ratio in ratios if (name, ratio) in at]
        for axes, metric in ((left, "reconstruction"), (right, "classification_loss")):
            values = [at[name, ratio][metric] for ratio in shares]
            axes.plot(shares, values, line, color=colour, marker="o", markersize=3, label=name)
    right.axhline(original["classification_loss"], color="#111827", linewidth=0.8)
    left.set_yscale("log")
    left.set_ylabel("squared error of hidden states over their variance")
    right.set_ylabel("classification loss, nats (line: the original)")
    for axes in (left, right):
        axes.set_xlabel("share of the matrices' bytes")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    target = io.StringIO()
    FigureCanvasSVG(figure).print_svg(target, metadata={"Date": None})
    return target.getvalue()

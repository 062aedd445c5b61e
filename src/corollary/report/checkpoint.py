"""Pages of one checkpoint and of the difference of two, from what the commands write as JSON: no network, no script needed."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from corollary.report.html import Child, Html, h, join
from corollary.report.numbers import MISSING, count, number
from corollary.report.shell import page
from corollary.report.svg import Axis, Plot

Row = Mapping[str, Any]
_SERIES = 6  # colours of the style sheet


def kinds(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Tensors by their name with its numbers struck out, in order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(re.sub(r"(?<![A-Za-z])\d+(?![A-Za-z])", "*", row["name"]), []).append(row)
    return found


def _shape(row: Row) -> str:
    return "×".join(map(str, row["shape"])) or "scalar"


def _spread(values: Iterable[float | None]) -> str:
    found = [v for v in values if v is not None]
    if not found:
        return MISSING
    middle, low, high = (number(float(v)) for v in (statistics.median(found), min(found), max(found)))
    return middle if low == high else f"{middle} ({low} to {high})"


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[Child]]) -> Html:
    """A table whose first column names the row; the others are numbers."""
    head = [h("th", name, scope="col", class_="num" if i else None) for i, name in enumerate(heads)]
    body = [
        h("tr", h("th", h("code", cells[0]), scope="row"), [h("td", cell, class_="num") for cell in cells[1:]])
        for cells in rows
    ]
    table = h("table", h("caption", caption), h("thead", h("tr", head)), h("tbody", body), class_="data names")
    return h("div", table, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _facts(pairs: Iterable[tuple[str, str]]) -> Html:
    return h("dl", [h("div", h("dt", name), h("dd", value)) for name, value in pairs], class_="facts")


def _figure(plot: Plot, title: str, note: str, entries: Sequence[tuple[str, str]] = ()) -> Html:
    items = []
    for class_, words in entries:
        mark = (
            h("circle", cx=12, cy=6, r=4, class_=class_) if class_.startswith("dot") else h("path", d="M1 6H23", class_=class_)
        )
        items.append(h("li", h("svg", mark, viewBox="0 0 24 12", class_="swatch", aria_hidden="true"), words))
    caption = h(
        "figcaption", h("strong", title), h("ul", items, class_="legend") if items else None, h("p", note, class_="note")
    )
    return h("figure", caption, plot.render(), class_="figure")


def _largest(groups: Mapping[str, list[Row]], size: Callable[[Row], float]) -> list[str]:
    """The kinds that hold the most, as many as there are colours, in their own order."""
    chosen = sorted(groups, key=lambda name: -sum(size(row) for row in groups[name]))[:_SERIES]
    return [name for name in groups if name in chosen]


def _by_kind(title: str, note: str, label: str, rows: Sequence[Row], value: Callable[[Row], float | None], log: bool) -> Html:
    """One number of each matrix over its place among its kind, the largest kinds in colour."""
    groups = kinds(rows)
    chosen = _largest(groups, lambda row: math.prod(row["shape"]))
    points = {name: [(i, v) for i, row in enumerate(groups[name]) if (v := value(row)) is not None] for name in chosen}
    heights = [v for found in points.values() for _, v in found]
    longest = max((i for found in points.values() for i, _ in found), default=0)
    plot = Plot(
        Axis.around([0, max(1, longest)], label="place among its kind", pad=0.03),
        Axis.around(heights, log=log, label=label),
        f"{title}: {label} for {', '.join(chosen)}.",
        height=260,
    )
    for series, name in enumerate(chosen):
        colour = f"s{series + 1}"
        plot.line([i for i, _ in points[name]], [v for _, v in points[name]], colour)
        for i, v in points[name]:
            plot.dot(i, v, colour, title=f"{groups[name][i]['name']}: {number(v)}", r=2.8)
    return _figure(plot, title, note, [(f"line s{i + 1}", name) for i, name in enumerate(chosen)])


def _spark(row: Row) -> Html | None:
    """A spectrum as a small line, both axes logarithmic."""
    points = [(x, y) for x, y in zip(row["ranks"], row["spectrum"], strict=True) if x >= 1 and y > 0]
    if len(points) < 3:
        return None
    wide, high = math.log(points[-1][0]) or 1.0, math.log(points[0][1])
    low = min(high - math.log(10), min(math.log(y) for _, y in points))
    path = "L".join(f"{1 + 88 * math.log(x) / wide:.1f} {1 + 20 * (high - math.log(y)) / (high - low):.1f}" for x, y in points)
    tip = f"singular values from {number(points[0][1])} to {number(points[-1][1])}"
    line = h("path", h("title", tip), d="M" + path, class_="line ours")
    return h("svg", line, viewBox="0 0 90 22", width="90", height="22", role="img", aria_label=tip)


def _spectra(rows: Sequence[Row], what: str) -> Html | None:
    """The spectra of the largest matrices of different kinds, each over its largest value."""
    groups = kinds(row for row in rows if len(row["spectrum"]) > 2)
    chosen = [
        max(groups[name], key=lambda row: math.prod(row["shape"])) for name in _largest(groups, lambda r: math.prod(r["shape"]))
    ]
    if not chosen:
        return None
    lines = [(row["ranks"], [v / row["spectrum"][0] for v in row["spectrum"]]) for row in chosen]
    plot = Plot(
        Axis.around([x for xs, _ in lines for x in xs], log=True, label="place", pad=0.02),
        Axis.around([y for _, ys in lines for y in ys if y > 1e-8], log=True, label="over the largest"),
        f"Singular values of {', '.join(row['name'] for row in chosen)}.",
        height=260,
    )
    for series, (xs, ys) in enumerate(lines):
        plot.line(xs, [y if y > 1e-8 else math.nan for y in ys], f"s{series + 1}")
    entries = [(f"line s{i + 1}", row["name"]) for i, row in enumerate(chosen)]
    return _figure(
        plot, f"Spectra{what}", "Singular values of one matrix of each of the largest kinds, over the largest value.", entries
    )


def inspect_page(report: Mapping[str, Any]) -> Html:
    """The page of one checkpoint.

    Args:
        report: what ``CheckpointReport.to_dict()`` gives.
    """
    rows: list[Row] = report["tensors"]
    matrices = [row for row in rows if row["spectral"] is not None]
    odd = [row for row in rows if row["nan"] or row["inf"] or (row["note"] and row["method"] == "none")]
    facts = [
        ("parameters", f"{report['parameters']:,}"),
        ("bytes", f"{report['nbytes']:,}"),
        ("tensors", f"{len(rows):,}"),
        ("files", str(report["files"])),
        ("not finite", f"{report['nan'] + report['inf']:,}"),
    ]
    said = [
        h(
            "li",
            h("code", row["name"]),
            f": {row['nan']:,} NaN, {row['inf']:,} infinite" if row["nan"] or row["inf"] else f": {row['note']}",
        )
        for row in odd
    ]
    figures: list[Child] = []
    if matrices:
        figures = [
            _by_kind(
                "Effective rank",
                "Share of the shorter side over which the singular values spread.",
                "effective rank / side",
                matrices,
                lambda r: (
                    None if r["effective_rank"] is None else r["effective_rank"] / min(r["shape"][0], math.prod(r["shape"][1:]))
                ),
                False,
            ),
            _by_kind(
                "Stable rank",
                "Squared Frobenius over squared spectral norm.",
                "stable rank",
                matrices,
                lambda r: r["stable_rank"],
                True,
            ),
            _by_kind("Largest singular value", "Spectral norm.", "σ₁", matrices, lambda r: r["spectral"], True),
            _spectra(matrices, ""),
        ]
    summary = _table(
        "Matrices by kind: median, and range",
        ("Kind", "Count", "‖W‖", "σ₁", "Stable rank", "Effective rank", "Tail α", "Condition", "Outliers"),
        [
            (
                name,
                len(group),
                *(_spread(row[key] for row in group) for key in ("frobenius", "spectral", "stable_rank", "effective_rank", "tail_exponent", "condition")),
                f"{sum(row['outliers'] for row in group):,}",
            )
            for name, group in kinds(matrices).items()
        ],
    )  # fmt: skip
    every = _table(
        "Every tensor",
        ("Tensor", "Shape", "Dtype", "‖W‖", "max |w|", "Mean", "Std", "σ₁", "Stable rank", "Effective rank", "Rank", "Tail α",
         "Condition", "Outliers", "Spectrum"),
        [
            (
                row["name"], _shape(row), row["dtype"],
                *(number(row[key]) for key in ("frobenius", "max_abs", "mean", "std", "spectral", "stable_rank", "effective_rank")),
                MISSING if row["rank"] is None else f"{row['rank']:,}",
                number(row["tail_exponent"]), number(row["condition"]), f"{row['outliers']:,}", _spark(row),
            )
            for row in rows
        ],
    )  # fmt: skip
    body = join(
        h("section", h("h1", "Checkpoint"), h("p", h("code", report["path"]), class_="lede"), _facts(facts), class_="hero"),
        h("section", h("h2", "Look at these"), h("ul", said)) if said else None,
        h("section", h("h2", "Spectra"), h("div", figures, class_="plots"), summary) if matrices else None,
        h("section", h("h2", "Tensors"), every, _meaning(_INSPECT)),
    )
    return page("Checkpoint", body, description=f"What is inside {report['path']}", kind="wide", alone=True)


_INSPECT = (
    ("Stable rank", "squared Frobenius norm over squared largest singular value."),
    ("Effective rank", "exponential of the entropy of the singular values taken as shares of their sum."),
    ("Rank", "singular values that float32 can tell from zero."),
    ("Tail α", "exponent of a power law fitted to the largest eigenvalues of WᵀW."),
    ("Condition", "largest over smallest singular value; missing where the smallest is lost in rounding."),
    ("Outliers", "entries over 6 standard deviations from the mean."),
)
_DIFF = (
    ("Rank of Δ", "singular values of the change above what rounding of the weights would bring."),
    (
        "Intruders",
        "leading singular vectors of the tuned weight whose cosine with every singular vector of the base is below ε.",
    ),
    ("Similarity", "the largest of these cosines, averaged over the leading vectors."),
    ("Overlap", "share of the leading vectors that lies in the span of as many leading ones of the base."),
)


def _meaning(pairs: Sequence[tuple[str, str]]) -> Html:
    return h("dl", [h("div", h("dt", name), h("dd", says[:1].upper() + says[1:])) for name, says in pairs], class_="meanings")


def diff_page(diff: Mapping[str, Any]) -> Html:
    """The page of a comparison.

    Args:
        diff: what ``CheckpointDiff.to_dict()`` gives.
    """
    rows: list[Row] = diff["tensors"]
    changed = [row for row in rows if row["status"] == "changed"]
    matrices = [row for row in changed if row["similarity"]]
    other = [row for row in rows if row["status"] not in ("changed", "same")]
    facts = [
        ("intruder dimensions", f"{diff['intruders']:,}"),
        ("changed matrices", f"{diff['matrices']:,}"),
        ("changed tensors", f"{diff['changed']:,} of {len(rows):,}"),
        ("change over base, in norm", number(diff["relative"])),
    ]
    said = [h("li", h("code", row["name"]), f": {row['status']}", f", {row['note']}" if row["note"] else None) for row in other]
    figures: list[Child] = []
    if matrices:
        deepest = max(len(row["similarity"]) for row in matrices)
        plot = Plot(
            Axis.around([1, deepest], label="place of the tuned singular vector", pad=0.05),
            Axis(0.0, 1.03, label="largest cosine with the base"),
            f"Similarity of {deepest} leading singular vectors in {len(matrices)} matrices; {diff['intruders']} below {diff['epsilon']}.",
            height=260,
        )
        plot.across(plot.y.low + diff["epsilon"], "threshold")
        for row in matrices:
            for place, value in enumerate(row["similarity"], start=1):
                colour = "s2" if value < diff["epsilon"] else "s1 faint"
                plot.dot(place, value, colour, title=f"{row['name']}, vector {place}: {number(value)}", r=2.6)
        note = f"A dot for each leading singular vector of each changed matrix. Below {diff['epsilon']:g} it is an intruder."
        legend = [("dot s1", "like one of the base"), ("dot s2", "intruder")]
        figures = [
            _figure(plot, "Singular vectors of the tuned weights", note, legend),
            _by_kind("Size of the change", "Frobenius norms.", "‖Δ‖ / ‖W‖", changed, lambda r: r["relative"] or None, True),
            _by_kind(
                "Effective rank of the change", "See below.", "effective rank", matrices, lambda r: r["effective_rank"], True
            ),
            _spectra(matrices, " of the change"),
        ]
    summary = _table(
        "Changed matrices by kind: median, and range",
        ("Kind", "Count", "‖Δ‖ / ‖W‖", "Rank of Δ", "Effective rank", "Intruders", "Overlap"),
        [
            (
                name,
                len(group),
                _spread(row["relative"] for row in group),
                "over 136" if any(row["rank"] is None for row in group) else _spread(row["rank"] for row in group),
                _spread(row["effective_rank"] for row in group),
                f"{sum(row['intruders'] or 0 for row in group)} of {sum(len(row['similarity']) for row in group)}",
                _spread(row["overlap"] for row in group),
            )
            for name, group in kinds(matrices).items()
        ],
    )
    every = _table(
        "Every tensor",
        ("Tensor", "Shape", "Status", "‖Δ‖", "‖Δ‖ / ‖W‖", "max |Δ|", "Rank of Δ", "Stable rank", "Effective rank", "Intruders",
         "Similarity", "Overlap", "Spectrum of Δ"),
        [
            (
                row["name"], _shape(row), row["status"],
                *(number(row[key]) for key in ("norm", "relative", "max_abs")),
                MISSING if row["rank"] is None else f"{row['rank']:,}",
                number(row["stable_rank"]), number(row["effective_rank"]),
                MISSING if row["intruders"] is None else str(row["intruders"]),
                number(statistics.fmean(row["similarity"]) if row["similarity"] else None),
                number(row["overlap"]), _spark(row),
            )
            for row in rows
        ],
    )  # fmt: skip
    words = f"{count(diff['matrices'], 'matrix', 'matrices')} changed"
    body = join(
        h(
            "section",
            h("h1", "What changed"),
            h("p", h("code", diff["base"]), " → ", h("code", diff["tuned"]), class_="lede"),
            _facts(facts),
            class_="hero",
        ),
        h("section", h("h2", "Singular vectors and ranks"), h("div", figures, class_="plots"), summary) if matrices else None,
        h("section", h("h2", "Not compared"), h("ul", said)) if said else None,
        h("section", h("h2", "Tensors"), every, _meaning(_DIFF)),
    )
    return page("What changed", body, description=words, kind="wide", alone=True)

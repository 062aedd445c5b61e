"""What a claim measured, drawn: the effect against its threshold, the raw pairs, the growth, and the trial's own figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from corollary.claims.evidence import Slope
from corollary.report.html import Html, compact, h
from corollary.report.numbers import number, plain
from corollary.report.svg import CHAR, Axis, Plot
from corollary.report.views import ClaimView, TrialView, centre

_SERIES = 6  # colours of the style sheet; further series begin again with another dash


def _wide(values: Sequence[float]) -> bool:
    """Whether positive values span so much that only a logarithmic axis shows them."""
    seen = [v for v in values if math.isfinite(v)]
    return bool(seen) and min(seen) > 0 and max(seen) / min(seen) > 20


def _figure(plot: Html, title: str, note: Html | None = None, legend: Html | None = None) -> Html:
    return h("figure", h("figcaption", h("strong", title), legend, note), plot, class_="figure")


def _legend(*entries: tuple[str, str]) -> Html:
    items = []
    for class_, words in entries:
        if class_.startswith("line"):
            swatch = h("path", d="M1 6H23", class_=class_)
        else:
            swatch = h("circle", cx=12, cy=6, r=4, class_=class_)
        svg = h("svg", swatch, viewBox="0 0 24 12", class_="swatch", aria_hidden="true")
        items.append(h("li", svg, words))
    return h("ul", items, class_="legend")


def _effect_axis(view: ClaimView) -> Axis:
    """Room for the method's trials, its interval and the threshold; a control far away is shown at the edge instead."""
    ends = [v for v in view.span if math.isfinite(v)]
    interval = [v for v in (view.effect, view.number("ci_low"), view.number("ci_high")) if v is not None]
    own = [t.value for t in view.trials] + interval
    control = [t.value for t in view.control_trials]
    log = view.claim.kind == "exact" or (view.claim.kind == "ratio" and _wide([*own, *ends, *control]))
    if view.claim.kind == "paired":
        ends.append(0.0)
    if log:
        core = [v for v in [*own, *ends] if v > 0 and math.isfinite(v)]
        near_by = max(core, default=1.0) * 1e-12, max(core, default=1.0) * 1e18
        if not core:  # all errors are zero, and so is the tolerance: only the control needs room
            near_by = 0.0, math.inf
        seen = [v for v in [*core, *control] if near_by[0] <= v <= near_by[1] and 0 < v < math.inf] or [1.0]
        if any(v == 0 for v in [*own, *control]):
            seen.append(min(seen) / 10)  # an error of exactly zero has its place at the left edge
        return Axis.around(seen, log=True, label=view.quantity)
    tight = Axis.around([*own, *ends], pad=0.08)
    reach = (tight.high - tight.low) * 2
    near = [v for v in control if tight.low - reach <= v <= tight.high + reach]
    return Axis.around([*own, *ends, *near], label=view.quantity, pad=0.08)


def _row_of_trials(plot: Plot, view: ClaimView, trials: Sequence[TrialView], at: float, label_at: float, class_: str) -> None:
    """Dots of the trials, spread a little so that equal values stay apart; values beyond the axis become arrows."""
    axis = plot.x
    beyond: dict[str, list[float]] = {"left": [], "right": []}
    for trial in trials:
        zero = axis.log and trial.value == 0
        if not zero and (trial.value < axis.low or trial.value > axis.high):
            beyond["left" if trial.value < axis.low else "right"].append(trial.value)
            continue
        spread = ((trial.index * 7) % 5 - 2) * 0.035
        tip = f"trial {trial.index}, seed {trial.seed}: {number(trial.value)}"
        plot.dot(trial.value, at + spread, class_, title=tip, r=3)
    y, words = plot.py(at), []
    for side, values in beyond.items():
        if values:
            x = plot.left + 2 if side == "left" else plot.width - plot.right - 2
            turn = -7 if side == "left" else 7
            path = f"M{compact(x)} {compact(y)}l{-turn} -5v10z"
            plot.add(h("path", h("title", f"{len(values)} beyond the axis"), d=path, class_=f"beyond {class_}"))
            extreme = min(values) if side == "left" else max(values)
            words.append(f"{len(values)} off scale, to {number(extreme)}")
    if words:
        plot.text(plot.left + 56, label_at, ", ".join(words), "small")


def effect_plot(view: ClaimView) -> Html:
    """The effect with its interval, and every trial of method and control, against the values at which the claim holds."""
    low, high = view.span
    has_control = bool(view.control_trials)
    words, bracket = view.measured
    says = f"{view.quantity}: {words} {bracket}. {view.rule}".replace(" .", ".")
    if has_control:
        middle = centre(view.claim.kind, [t.value for t in view.control_trials])
        says += f" Control: {number(middle)}{view.unit}."
    top = 24.0
    plot = Plot(_effect_axis(view), Axis(0, 1), says, height=top + (118 if has_control else 68) + 42, y_ticks=False, top=top)
    at, below = (0.66, 0.16) if has_control else (0.36, 0.0)
    plot.span(low, high, "holds")
    if view.claim.kind == "paired":
        plot.upright(0.0, "zero")
    for end in (low, high):
        if math.isfinite(end):
            plot.upright(end, "threshold")
    _name_threshold(plot, view)
    label_at = plot.top + 15
    plot.text(plot.left + 4, label_at, "method", "small strong")
    _row_of_trials(plot, view, view.trials, at, label_at, "ours faint")
    _interval(plot, view.number("ci_low"), view.number("ci_high"), at, "bar", f"95% interval {bracket}")
    if view.effect is not None:
        _diamond(plot, view.effect, at, "ours", f"effect {words}")
    if has_control:
        label_at = plot.top + 73
        plot.text(plot.left + 4, label_at, "control", "small strong")
        _row_of_trials(plot, view, view.control_trials, below, label_at, "control faint")
        ends = view.number("control_ci_low"), view.number("control_ci_high")
        _interval(plot, *ends, below, "bar control", "95% interval of the control")
        if plot.x.low <= middle <= plot.x.high:
            _diamond(plot, middle, below, "control", f"control {number(middle)}")
    return plot.render()


def _name_threshold(plot: Plot, view: ClaimView) -> None:
    """Words above the frame: where the claim holds."""
    low, high = view.span
    edge = high if low == -math.inf else low
    at = plot.px(edge)
    if view.claim.kind == "exact":
        words, anchor = f"← passes up to {plain(high)}", "end"
    elif low == -math.inf:
        words, anchor = f"← holds below {plain(high)}{view.unit}", "end"
    elif high == math.inf:
        words, anchor = f"holds above {plain(low)}{view.unit} →", "start"
    else:
        words, anchor, at = f"holds from {plain(low)} to {plain(high)}", "middle", (plot.px(low) + plot.px(high)) / 2
    wide = len(words) * CHAR
    room = {"end": (wide, plot.width), "start": (0.0, plot.width - wide), "middle": (wide / 2, plot.width - wide / 2)}[anchor]
    plot.text(min(max(at, room[0] + 2), room[1] - 2), 15, words, "small holds-name", anchor)


def _interval(plot: Plot, low: float | None, high: float | None, at: float, class_: str, title: str) -> None:
    """A bar over the part of an interval that the axis shows."""
    if low is None or high is None or high < plot.x.low or low > plot.x.high:
        return
    path = f"M{compact(plot.px(low))} {compact(plot.py(at))}H{compact(plot.px(high))}"
    plot.add(h("path", h("title", title), d=path, class_=class_))


def _diamond(plot: Plot, value: float, at: float, class_: str, title: str) -> None:
    x, y, size = plot.px(value), plot.py(at), 6.5
    path = f"M{compact(x - size)} {compact(y)}l{size} {-size} {size} {size} {-size} {size}z"
    plot.add(h("path", h("title", title), d=path, class_=f"diamond {class_}"))


def spark(view: ClaimView) -> Html | None:
    """The effect's interval against its threshold, small enough for a table's cell; the numbers stand beside it."""
    effect = view.effect
    if effect is None or not math.isfinite(effect) or (view.claim.kind == "exact" and not view.claim.tolerance):
        return None
    low, high = view.span
    ci_low, ci_high = view.number("ci_low"), view.number("ci_high")
    seen = [v for v in (effect, ci_low, ci_high, *view.span) if v is not None and math.isfinite(v)]
    log = view.claim.kind == "exact"
    if log and effect <= 0:
        seen.append(min(v for v in [*seen, 1.0] if v > 0) / 1e3)
    axis = Axis.around(seen, log=log, pad=0.18)
    width, middle, room = 132.0, 11.0, 4.0

    def at(value: float) -> float:
        return room + axis.place(value) * (width - 2 * room)

    begin = 0.0 if low == -math.inf else at(low)
    end = width if high == math.inf else at(high)
    parts = [h("rect", x=begin, y=1, width=max(0.0, end - begin), height=20, rx=2, class_="holds")]
    parts += [h("path", d=f"M{compact(at(v))} 0V22", class_="threshold") for v in (low, high) if math.isfinite(v)]
    if ci_low is not None and ci_high is not None:
        parts.append(h("path", d=f"M{compact(at(ci_low))} 11H{compact(at(ci_high))}", class_="bar"))
    parts.append(h("circle", cx=at(effect), cy=middle, r=4, class_="dot ours"))
    return h("svg", parts, viewBox=f"0 0 {compact(width)} 22", class_="spark", aria_hidden="true")


def raw_plot(view: ClaimView) -> Html | None:
    """The trials as they were measured, before they were reduced to one number; None where the effect's plot shows that."""
    if not view.trials:
        return None
    if view.claim.kind in ("paired", "ratio"):
        return _pairs(view)
    return _growth(view) if view.claim.kind == "slope" else None


def _pairs(view: ClaimView) -> Html:
    """Ours and the baseline of each trial on one line; the line's colour says who did better."""
    both = [float(t.evidence[name]) for t in view.trials for name in ("ours", "baseline")]
    metric = view.claim.metric or ("measured" if view.claim.kind == "ratio" else "metric")
    low, high = view.span
    side = f"{'below' if low == -math.inf else 'above'} {plain(high if low == -math.inf else low)}{view.unit}"
    what = "ours / baseline" if view.claim.kind == "ratio" else "ours − baseline"
    held = f"{what} is {side} in {sum(view.holds(t.value) for t in view.trials)} of {len(view.trials)} trials."
    says = f"{view.claim.metric or 'value'} of ours and of the baseline: {held}"
    step = 17 if len(view.trials) <= 20 else 340 / len(view.trials)
    plot = Plot(
        Axis.around(both, log=_wide(both), label=f"{metric} ({view.claim.better} is better)"),
        Axis(0.4, len(view.trials) + 0.6),
        says,
        height=step * len(view.trials) + 62,
        y_ticks=False,
    )
    plot.left = 26
    for row, trial in enumerate(view.trials):
        ours, baseline = float(trial.evidence["ours"]), float(trial.evidence["baseline"])
        at = len(view.trials) - row
        y = plot.py(at)
        tip = f"trial {trial.index}, seed {trial.seed}: ours {number(ours)}, baseline {number(baseline)}"
        better = "won" if view.holds(trial.value) else "lost"
        if row % max(1, len(view.trials) // 20) == 0:
            plot.text(18, y + 4, str(trial.index), "small", "end")
        stroke = h("path", d=f"M{compact(plot.px(baseline))} {compact(y)}H{compact(plot.px(ours))}", class_=f"link {better}")
        plot.add(h("g", h("title", tip), stroke, class_="pair", data_trial=trial.index))
        plot.dot(baseline, at, "baseline", title=tip, r=4)
        plot.dot(ours, at, "ours", title=tip, r=4)
    legend = _legend(("dot ours", "ours"), ("dot baseline", view.claim.baseline or "baseline"))
    title = "Each trial: ours against the baseline"
    note = h("p", held[:1].upper() + held[1:], class_="note")
    return _figure(plot.render(), title, note, legend)


def _growth(view: ClaimView) -> Html:
    """Points of every trial on logarithmic axes, the line fitted to them, and the predicted slope through their middle."""
    slopes = [Slope(t.evidence["x"], t.evidence["y"]) for t in view.trials]
    xs = [v for s in slopes for v in s.x]
    ys = [v for s in slopes for v in s.y]
    fitted = view.effect
    fitted = centre("slope", [s.value for s in slopes]) if fitted is None else fitted
    mid_x = math.exp(math.fsum(map(math.log, xs)) / len(xs))
    mid_y = math.exp(math.fsum(map(math.log, ys)) / len(ys))
    says = f"Growth on logarithmic axes: fitted exponent {number(fitted)}, predicted {plain(view.claim.exponent)}."
    y_name = view.claim.metric or "measured"
    plot = Plot(Axis.around(xs, log=True, label="size"), Axis.around(ys, log=True, label=y_name), says, height=270)
    for number_, slope in enumerate(slopes):
        plot.line(slope.x, slope.y, "ours thin")
        for x, y in zip(slope.x, slope.y, strict=True):
            plot.dot(x, y, "ours faint", title=f"trial {number_ + 1}: {number(y)} at {plain(x)}", r=2.5)

    def through_middle(exponent: float, class_: str) -> None:
        ends = []
        for edge in (plot.x.low, plot.x.high):
            x = edge
            if exponent:  # stop where the line leaves the frame
                limit = plot.y.high if (exponent > 0) == (edge > mid_x) else plot.y.low
                leaves = mid_x * math.exp(min(600.0, max(-600.0, math.log(limit / mid_y) / exponent)))
                x = min(edge, leaves) if edge > mid_x else max(edge, leaves)
            ends.append((x, mid_y * (x / mid_x) ** exponent))
        plot.line([x for x, _ in ends], [y for _, y in ends], class_)

    through_middle(view.claim.exponent, "predicted")
    through_middle(fitted, "fitted")
    legend = _legend(
        ("dot ours", "measured"),
        ("line fitted", f"fitted, exponent {number(fitted)}"),
        ("line predicted", f"predicted, exponent {plain(view.claim.exponent)}"),
    )
    return _figure(plot.render(), "Growth in every trial", None, legend)


def _floats(stored: Sequence[float | None] | None) -> list[float]:
    """Stored numbers; where JSON could not keep one (NaN, infinity) there is a gap."""
    return [math.nan if v is None else float(v) for v in stored or ()]


def trial_figure(name: str, data: Mapping[str, Any]) -> Html | None:
    """One figure that a claim kept as data."""
    x = _floats(data.get("x"))
    series = {str(label): _floats(points) for label, points in (data.get("y") or {}).items()}
    if not x or not series:
        return None
    log = str(data.get("log") or "")
    all_y = [v for points in series.values() for v in points]
    log_x, log_y = "x" in log and any(v > 0 for v in x), "y" in log and any(v > 0 for v in all_y)
    title = name.replace("_", " ")
    says = f"{title}: {data.get('ylabel') or 'value'} against {data.get('xlabel') or 'x'} for {', '.join(series)}."
    plot = Plot(
        Axis.around(x, log=log_x, label=str(data.get("xlabel") or ""), pad=0.03),
        Axis.around(all_y, log=log_y, label=str(data.get("ylabel") or "")),
        says,
        height=250,
    )
    entries = []
    for i, (label, values) in enumerate(series.items()):
        class_ = f"s{i % _SERIES + 1}" + (" again" if i >= _SERIES else "")
        plot.line(x, values, class_)
        if len(x) <= 16:
            for at, value in zip(x, values, strict=True):
                drawable = math.isfinite(value) and (value > 0 or not log_y) and (at > 0 or not log_x)
                if drawable:
                    plot.dot(at, value, class_, title=f"{label}: {number(value)} at {plain(at)}", r=2.8)
        entries.append((f"line {class_}", label))
    return _figure(plot.render(), title[:1].upper() + title[1:], None, _legend(*entries))


def verdict_bar(parts: Sequence[tuple[str, str, int]]) -> Html:
    """One bar made of (key, words, count), as wide as their counts."""
    total = sum(n for _, _, n in parts) or 1
    rects, at = [], 0.0
    for key, words, n in parts:
        if n:
            wide = 1000 * n / total
            rects.append(h("rect", h("title", f"{words}: {n}"), x=at, y=0, width=max(wide - 3, 1.0), height=14, class_=key))
            at += wide
    says = "Claims by verdict: " + ", ".join(f"{n} {words}" for _, words, n in parts if n)
    return h("svg", rects, viewBox="0 0 1000 14", preserveAspectRatio="none", class_="tally-bar", role="img", aria_label=says)


def holm_plot(p_values: Sequence[float], alpha: float) -> Html | None:
    """Sorted p values against Holm's rising threshold, on a logarithmic axis."""
    if not p_values:
        return None
    m = len(p_values)
    shown = [max(p, 1e-12) for p in p_values]
    bounds = [alpha / (m - i) for i in range(m)]
    ranks = [float(i + 1) for i in range(m)]
    says = f"{m} p values in rising order against Holm's threshold at level {alpha}."
    plot = Plot(
        Axis(0.4, m + 0.6, label="rank of the p value"),
        Axis.around([*shown, *bounds], log=True, label="p value"),
        says,
        height=250,
    )
    plot.line(ranks, bounds, "predicted")
    for rank, p in zip(ranks, shown, strict=True):
        plot.dot(rank, p, "ours", title=f"rank {rank:.0f}: p = {number(p)}")
    legend = _legend(("dot ours", "p value"), ("line predicted", f"{alpha} / (family − rank + 1)"))
    return _figure(plot.render(), "p values against Holm's threshold", None, legend)

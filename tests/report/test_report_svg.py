"""Ticks, axes and plots at any size of number."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corollary.report.numbers import duration, interval, moment, number, plain
from corollary.report.svg import Axis, Plot, linear_ticks, log_ticks, tick_labels

finite = st.floats(-1e300, 1e300, allow_subnormal=False)
positive = st.floats(1e-290, 1e290)


@given(st.floats(-1e290, 1e290, allow_subnormal=False), st.floats(1e-9, 1e9))
def test_linear_ticks_are_round_few_and_inside(low: float, size: float) -> None:
    high = low + size * max(1.0, abs(low)) * 1e-3
    ticks = linear_ticks(low, high)
    assert 1 <= len(ticks) <= 7
    assert all(a < b for a, b in pairwise(ticks))
    slack = (high - low) * 1e-6 + 4 * math.ulp(max(abs(low), abs(high)))
    assert all(low - slack <= t <= high + slack for t in ticks)
    for step in (b - a for a, b in pairwise(ticks)):
        if abs(low) < 1e6 * (high - low):  # else rounding of the ends shows in the differences
            assert min(abs(step / 10 ** math.floor(math.log10(step * 1.0001)) - m) for m in (1, 2, 5)) < 1e-2


@pytest.mark.parametrize(("low", "high"), [(1e-300, 1e300), (1e-12, 1.0), (0.9, 1.1), (3.0, 60.0), (1.0, 1e4), (2.2, 2.3)])
def test_log_ticks_are_few_and_inside(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert all(a < b for a, b in pairwise(ticks))
    assert all(low * 0.999 <= t <= high * 1.001 for t in ticks)


@given(st.lists(finite, min_size=1, max_size=9), st.booleans())
def test_an_axis_places_every_value_within_and_in_order(values: list[float], log: bool) -> None:
    axis = Axis.around(values, log=log)
    assert axis.low < axis.high
    places = [axis.place(v) for v in sorted(values)]
    assert all(0 <= p <= 1 for p in places)
    assert all(a <= b for a, b in pairwise(places))
    labels = [words for _, words in axis.ticks()]
    assert labels
    assert len(labels) == len(set(labels)), labels


def test_axis_is_linear_or_logarithmic() -> None:
    assert Axis(0, 10).place(2.5) == 0.25
    assert Axis(1, 100, log=True).place(10) == pytest.approx(0.5)
    assert Axis(1, 100, log=True).place(0) == 0
    assert Axis.around([], log=True).low > 0
    assert Axis.around([math.nan, math.inf, 2.0]).place(2.0) == pytest.approx(0.5)


def test_labels_of_ticks() -> None:
    assert tick_labels([0, 0.05, 0.1]) == ["0", "0.05", "0.10"]
    assert tick_labels([-1e7, 0, 1e7]) == ["−1×10⁷", "0", "1×10⁷"]
    assert tick_labels([0.01, 0.1, 1, 10], log=True) == ["0.01", "0.1", "1", "10"]


def test_a_line_breaks_where_there_is_no_value() -> None:
    plot = Plot(Axis(0, 4), Axis(1, 10, log=True), "made up")
    plot.line([0, 1, 2, 3, 4], [1, 10, math.nan, 0.0, 10], "s1")
    path = re.search(r'd="([^"]*)"', plot.render())
    assert path is not None
    assert [part[0] for part in re.findall(r"[ML][^ML]*", path[1])] == ["M", "L", "M"]


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=5), st.booleans(), st.booleans())
def test_a_plot_keeps_its_marks_in_its_frame(points: list[tuple[float, float]], log_x: bool, log_y: bool) -> None:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    plot = Plot(Axis.around(xs, log=log_x, label="x"), Axis.around(ys, log=log_y, label="y"), "made up")
    for x, y in points:
        plot.dot(x, y, "ours", title=f"{x}")
        assert plot.left <= plot.px(x) <= plot.width - plot.right
        assert plot.top <= plot.py(y) <= plot.height - plot.bottom
    plot.line(xs, ys, "s1")
    assert not re.search(r'"[^"]*(nan|inf)[^"]*"', plot.render())


def test_a_title_is_escaped() -> None:
    plot = Plot(Axis(0, 1, label="<x>"), Axis(0, 1), '"<svg onload=alert(1)>"')
    plot.dot(0.5, 0.5, "ours", title="</title><script>")
    text = plot.render()
    assert "<script>" not in text
    assert "<svg onload" not in text
    assert "&lt;x&gt;" in text


@given(st.one_of(finite, positive))
def test_a_number_says_what_it_is(value: float) -> None:
    for spell, error in ((number, 6e-3), (plain, 1e-6)):
        text = spell(value).replace("−", "-")
        raised = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
        if "10" in text and text.translate(raised) != text:
            mantissa, _, exponent = text.rpartition("10")
            read = float(mantissa.rstrip("×") or 1) * 10.0 ** int(exponent.translate(raised))
        else:
            read = float(text)
        assert read == pytest.approx(value, rel=error)


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ((None, None, None), ("–", "")),
        ((1.0, 0.5, 1.5), ("1.0", "[0.5, 1.5]")),
        ((0.0, 0.0, 0.0), ("0", "[0, 0]")),
        ((1e-9, 0.0, 2e-9), ("1.00×10⁻⁹", "[0, 2.00×10⁻⁹]")),
        ((123.4, 100.2, 140.9), ("123", "[100, 141]")),
        ((2.0, 1.0, math.inf), ("2.00", "[1.00, ∞]")),
    ],
)
def test_interval(given_: tuple[Any, Any, Any], expected: tuple[str, str]) -> None:
    assert interval(*given_) == expected


def test_times() -> None:
    assert [duration(s) for s in (None, 0.0, 59.99, 3599.9, math.inf)] == ["–", "0 ms", "1 min 0 s", "1 h 0 min", "–"]
    assert moment("2025-01-02T03:04:05Z") == "2025-01-02 03:04 UTC"

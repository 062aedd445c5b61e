"""Small plots as inline SVG: axes with linear and logarithmic ticks, lines, marks, bands.

Nothing here names a colour. Marks carry classes, and the page's style sheet gives them colours from its variables, so a
plot follows the light and the dark scheme like the text around it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from corollary.report.html import Html, compact, h
from corollary.report.numbers import number, plain, power

CHAR = 6.4  # width of a digit at the plots' font size, in user units; only used to leave room for labels


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between two ends: steps of 1, 2 or 5 times a power of ten, at most ``most`` of them.

    Example:
        >>> linear_ticks(0.0, 1.0)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not high > low:
        return [low]
    raw = (high - low) / max(1, most - 1)
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * factor for factor in (1, 2, 5, 10, 20) if base * factor >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    decimals = max(0, -math.floor(math.log10(step)))
    if decimals > 300:  # below what round() can take
        return [i * step for i in range(first, last + 1)]
    return [round(i * step, decimals) + 0.0 for i in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Powers of ten between two positive ends, thinned to ``most``; with 2 and 5 between them where there are few.

    Example:
        >>> log_ticks(0.001, 10.0)
        [0.001, 0.01, 0.1, 1.0, 10.0]
        >>> log_ticks(3.0, 60.0)
        [5.0, 10.0, 20.0, 50.0]
    """
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    if last - first >= 2:
        stride = math.ceil((last - first + 1) / most)
        return [float(f"1e{e}") for e in range(first, last + 1, stride)]
    between = [float(f"{m}e{e}") for e in range(first - 1, last + 1) for m in (1, 2, 5)]
    inside = [v for v in between if low * (1 - 1e-9) <= v <= high * (1 + 1e-9)]
    return inside if len(inside) >= 2 else linear_ticks(low, high, most)


def tick_labels(ticks: Sequence[float], log: bool = False) -> list[str]:
    """Labels of ticks, to the same number of decimals on a linear axis.

    Example:
        >>> tick_labels([0.0, 0.5, 1.0]), tick_labels([1e-6, 1e-3, 1.0], log=True)
        (['0', '0.5', '1.0'], ['10⁻⁶', '10⁻³', '1'])
    """
    largest = max((abs(t) for t in ticks), default=0.0)
    steps = [b - a for a, b in pairwise(ticks)]
    if log and len(ticks) > 1 and all(abs(math.log10(t) % 1) < 1e-9 for t in ticks):
        if min(ticks) >= 1e-3 and largest < 1e5:
            return [plain(t) for t in ticks]
        return ["1" if t == 1 else power(round(math.log10(t))) for t in ticks]
    if log or not steps:
        return [plain(t) for t in ticks]
    step = min(steps)
    if largest >= 1e5 or largest < 1e-3:
        top = math.floor(math.log10(largest)) if largest else 0
        digits = max(1, top - math.floor(math.log10(step)) + 1)
        return [number(t, min(digits, 6)) for t in ticks]
    decimals = min(9, max(0, -math.floor(math.log10(step) + 1e-9)))
    return ["0" if t == 0 else f"{t:.{decimals}f}".replace("-", "−") for t in ticks]


def shorten(words: str, room: float) -> str:
    """Words cut to what fits into so many user units, with an ellipsis where something is missing."""
    most = max(3, int(room / CHAR))
    return words if len(words) <= most else words[: most - 1].rstrip() + "…"


@dataclass(frozen=True)
class Axis:
    """One axis: where it begins and ends, whether it is logarithmic, what it says."""

    low: float
    high: float
    log: bool = False
    label: str = ""

    @classmethod
    def around(cls, values: Iterable[float], *, log: bool = False, label: str = "", pad: float = 0.06) -> Axis:
        """An axis with room around the finite values (on a logarithmic axis, the positive ones)."""
        seen = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
        if log:
            exponents = [min(300.0, max(-300.0, math.log10(v))) for v in seen] or [0.0, 1.0]  # what is left stays finite
            low, high = min(exponents), max(exponents)
            room = max((high - low) * pad, 0.05)
            return cls(10 ** (low - min(room, 5.0)), 10 ** (high + min(room, 5.0)), True, label)
        low, high = (min(seen), max(seen)) if seen else (0.0, 1.0)
        room = (high / 2 - low / 2) * 2 * pad or abs(high) * 0.1 or 0.5
        return cls(max(-1e308, low - room), min(1e308, high + room), False, label)

    def place(self, value: float) -> float:
        """Where a value lies, from 0 at the beginning to 1 at the end; outside values come to the nearer end."""
        if self.log:
            if value <= self.low:
                return 0.0
            if value >= self.high:
                return 1.0
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        half = self.high / 2 - self.low / 2
        share = (value / 2 - self.low / 2) / half
        return min(1.0, max(0.0, share))

    def ticks(self, most: int = 6) -> list[tuple[float, str]]:
        """Ticks with their labels."""
        ticks = log_ticks(self.low, self.high, most) if self.log else linear_ticks(self.low, self.high, most)
        return list(zip(ticks, tick_labels(ticks, self.log), strict=True))


@dataclass
class Plot:
    """A frame with two axes, and the marks that were put into it.

    Args:
        x, y: the axes.
        label: what a reader who cannot see the plot should know; becomes the accessible name.
        height: of the whole plot, in user units.
        y_ticks: whether the vertical axis has ticks and grid lines.
        top: room above the frame, for labels of lines.
    """

    x: Axis
    y: Axis
    label: str
    width: float = 360
    height: float = 230
    y_ticks: bool = True
    top: float = 10
    marks: list[Html] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._y_ticks = self.y.ticks(6) if self.y_ticks else []
        widest = max((len(text) for _, text in self._y_ticks), default=0)
        self.left = 8 + widest * CHAR + (18 if self.y.label else 0) + (4 if widest else 0)
        self.right = 14.0
        self.bottom = 24 + (18 if self.x.label else 0)

    def px(self, value: float) -> float:
        """Horizontal coordinate of a value."""
        return self.left + self.x.place(value) * (self.width - self.left - self.right)

    def py(self, value: float) -> float:
        """Vertical coordinate of a value."""
        bottom = self.height - self.bottom
        return bottom - self.y.place(value) * (bottom - self.top)

    def add(self, mark: Html) -> None:
        """Put a mark on top of those before it."""
        self.marks.append(mark)

    def line(self, xs: Sequence[float], ys: Sequence[float], class_: str) -> None:
        """A line through points; it breaks where a point is not finite, or not positive on a logarithmic axis."""
        path, pen = [], "M"
        for x, y in zip(xs, ys, strict=True):
            bad = not (math.isfinite(x) and math.isfinite(y)) or (self.x.log and x <= 0) or (self.y.log and y <= 0)
            if bad:
                pen = "M"
                continue
            path.append(f"{pen}{compact(self.px(x))} {compact(self.py(y))}")
            pen = "L"
        self.add(h("path", d="".join(path), class_=f"line {class_}"))

    def dot(self, x: float, y: float, class_: str, *, title: str = "", r: float = 3.5, **data: str | float) -> None:
        """A round mark; its title shows when the pointer rests on it."""
        tip = h("title", title) if title else None
        self.add(h("circle", tip, cx=self.px(x), cy=self.py(y), r=r, class_=f"dot {class_}", **data))

    def across(self, y: float, class_: str) -> None:
        """A horizontal line through the whole frame."""
        at = self.py(y)
        self.add(h("line", x1=self.left, x2=self.width - self.right, y1=at, y2=at, class_=class_))

    def upright(self, x: float, class_: str) -> None:
        """A vertical line through the whole frame."""
        at = self.px(x)
        self.add(h("line", x1=at, x2=at, y1=self.top, y2=self.height - self.bottom, class_=class_))

    def span(self, low: float, high: float, class_: str) -> None:
        """A band from one horizontal value to another; infinite ends reach the frame."""
        begin = self.left if low == -math.inf else self.px(low)
        end = self.width - self.right if high == math.inf else self.px(high)
        if end > begin:
            tall = self.height - self.bottom - self.top
            self.add(h("rect", x=begin, y=self.top, width=end - begin, height=tall, class_=class_))

    def text(self, x: float, y: float, words: str, class_: str = "", anchor: str = "start") -> None:
        """Words at coordinates of the plot itself (not of the data)."""
        self.add(h("text", words, x=x, y=y, class_=class_ or None, text_anchor=anchor))

    def _frame(self) -> list[Html]:
        foot, end = self.height - self.bottom, self.width - self.right
        parts = []
        for value, words in self._y_ticks:
            at = self.py(value)
            parts.append(h("line", x1=self.left, x2=end, y1=at, y2=at, class_="grid"))
            parts.append(h("text", words, x=self.left - 6, y=at + 4, text_anchor="end"))
        ticks = self.x.ticks(6)
        room = (end - self.left) / max(1, max((len(t) for _, t in ticks), default=1) * CHAR + 10)
        stride = max(1, math.ceil(len(ticks) / max(1.0, room)))
        for i, (value, words) in enumerate(ticks):
            at = self.px(value)
            parts.append(h("line", x1=at, x2=at, y1=foot, y2=foot + 4, class_="axis"))
            if i % stride == 0:
                half = len(words) * CHAR / 2
                middle = min(max(at, half), self.width - half)
                parts.append(h("text", words, x=middle, y=foot + 17, text_anchor="middle"))
        parts.append(h("line", x1=self.left, x2=end, y1=foot, y2=foot, class_="axis"))
        if self.x.label:
            name = shorten(self.x.label, end - self.left)
            parts.append(h("text", name, x=(self.left + end) / 2, y=self.height - 6, text_anchor="middle", class_="axis-name"))
        if self.y.label:
            middle = (self.top + foot) / 2
            turn = f"rotate(-90 12 {compact(middle)})"
            name = shorten(self.y.label, foot - self.top)
            parts.append(h("text", name, x=12, y=middle, transform=turn, text_anchor="middle", class_="axis-name"))
        return parts

    def render(self) -> Html:
        """The plot as one element with an accessible name."""
        box = f"0 0 {compact(self.width)} {compact(self.height)}"
        return h("svg", self._frame(), self.marks, viewBox=box, class_="plot", role="img", aria_label=self.label)

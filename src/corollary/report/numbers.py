"""Numbers, intervals, times and dates as people read them."""

from __future__ import annotations

import math
from datetime import UTC, datetime

_SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
MISSING = "–"


def _minus(text: str) -> str:
    return text.replace("-", "−")


def power(exponent: int) -> str:
    """``10`` to an exponent, with the exponent raised."""
    return "10" + str(exponent).translate(_SUPERSCRIPT)


def number(value: float | None, digits: int = 3) -> str:
    """A number to so many significant digits, in plain decimals where that is short and as a power of ten elsewhere.

    Example:
        >>> [number(v) for v in (0.04217, -3.0, 12345.6, 2.5e-9, 1e12, float("inf"))]
        ['0.0422', '−3.00', '12346', '2.50×10⁻⁹', '1.00×10¹²', '∞']
    """
    if value is None:
        return MISSING
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    size = int(exponent)
    if -4 < size < 6:
        return _minus(f"{value:.{max(0, digits - 1 - size)}f}")
    return f"{_minus(mantissa)}×{power(size)}"


def plain(value: float) -> str:
    """A number that someone wrote down: no digits beyond those given.

    Example:
        >>> [plain(v) for v in (-0.0, 0.05, 3.0, 1e-6, 2.5e-9)]
        ['0', '0.05', '3', '10⁻⁶', '2.5×10⁻⁹']
    """
    if not math.isfinite(value):
        return number(value)
    value += 0.0  # no minus before a zero
    mantissa, exponent = f"{value:.6e}".split("e")
    size = int(exponent)
    if value == 0 or -5 < size < 6:
        return _minus(f"{value:.11f}".rstrip("0").rstrip("."))
    short = mantissa.rstrip("0").rstrip(".")
    return power(size) if short == "1" else f"{_minus(short)}×{power(size)}"


def interval(effect: float | None, low: float | None, high: float | None, unit: str = "") -> tuple[str, str]:
    """The effect and its interval, both to the decimals that the interval's width warrants.

    Example:
        >>> interval(-0.02134, -0.0341, -0.0112)
        ('−0.021', '[−0.034, −0.011]')
        >>> interval(0.5, None, None)
        ('0.500', '')
    """
    if effect is None:
        return MISSING, ""
    if low is None or high is None:
        return number(effect) + unit, ""
    width = high - low
    largest = max(abs(effect), abs(low), abs(high))
    if math.isfinite(largest) and math.isfinite(width) and width > 0 and 1e-3 <= largest < 1e5:
        decimals = 1 - math.floor(math.log10(width))
        if decimals <= 6:
            effect_, low_, high_ = (_minus(f"{v:.{max(0, decimals)}f}") for v in (effect, low, high))
            return effect_ + unit, f"[{low_}, {high_}]"
    return number(effect) + unit, f"[{number(low)}, {number(high)}]"


def p_value(p: float | None) -> str:
    """A p value to two digits.

    Example:
        >>> [p_value(v) for v in (0.0009765625, 0.31, 1.0, 1e-7)]
        ['0.00098', '0.31', '1', '< 0.0001']
    """
    if p is None:
        return MISSING
    if p < 1e-4:
        return "< 0.0001"
    return f"{float(f'{p:.2g}'):.6f}".rstrip("0").rstrip(".")


def duration(seconds: float | None) -> str:
    """Wall time in the units that people use.

    Example:
        >>> [duration(s) for s in (0.004, 3.21, 75, 7260)]
        ['4 ms', '3.2 s', '1 min 15 s', '2 h 1 min']
    """
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def moment(text: str) -> str:
    """An ISO time as date and minute in UTC; a text that is no such time comes back as it is.

    Example:
        >>> moment("2025-11-20T16:30:12.5+01:00"), moment("lately")
        ('2025-11-20 15:30 UTC', 'lately')
    """
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return text
    when = when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
    return f"{when:%Y-%m-%d %H:%M} UTC"


def count(n: int, one: str, many: str = "") -> str:
    """A count with its noun.

    Example:
        >>> count(1, "paper"), count(2, "paper")
        ('1 paper', '2 papers')
    """
    return f"{n:,} {one if n == 1 else many or one + 's'}"

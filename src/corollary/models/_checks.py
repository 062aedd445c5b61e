"""Argument checks that the networks share."""

from __future__ import annotations


def need_positive(**values: int) -> None:
    """Raise unless every value is an integer above 0; the message names the argument."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"'{name}' must be an int, not {type(value).__name__} ({value!r})")
        if value < 1:
            raise ValueError(f"'{name}' must be at least 1, not {value}")


def need_divisible(name: str, value: int, by: str, divisor: int) -> None:
    """Raise ``ValueError`` unless ``divisor`` divides ``value``."""
    if value % divisor:
        raise ValueError(f"'{name}' must be a multiple of '{by}' = {divisor}, not {value}")

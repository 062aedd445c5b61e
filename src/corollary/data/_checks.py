"""Argument checks and messages that the loaders share."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any


def need_fraction(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``value`` lies strictly between 0 and 1."""
    if not 0 < value < 1:
        raise ValueError(f"'{name}' must lie strictly between 0 and 1, not {value!r}")


def need_count(name: str, value: Any, least: int = 1) -> None:
    """Raise unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"'{name}' must be an int, not {type(value).__name__} ({value!r})")
    if value < least:
        raise ValueError(f"'{name}' must be at least {least}, not {value}")


def need_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"'{name}' is {value!r}; allowed: {', '.join(allowed)}")


def need_extra(module: str, extra: str) -> ModuleType:
    """Import a module of an optional dependency; the error says which extra brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"this needs '{error.name}', which is not installed; get it with: pip install 'corollary[{extra}]'", name=error.name
        ) from error

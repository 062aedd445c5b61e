"""Griffe extension: our docstrings head their one example ``Example:``; the parser knows ``Examples:`` alone."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Renames the heading, so that the example is set as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called once for each object that griffe has read."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^(\s*)Example:[ \t]*$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)

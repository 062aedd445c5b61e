"""How numbers and verdicts are written on a terminal and as JSON."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from corollary.claims import stats
from corollary.claims.store import StoreError

STYLE = {
    stats.SUPPORTED: ("✔", "green"),
    stats.PASSED: ("✔", "green"),
    stats.NOT_SUPPORTED: ("✘", "red"),
    stats.FAILED: ("✘", "red"),
    stats.INCONCLUSIVE: ("?", "yellow"),
    stats.COULD_NOT_RUN: ("!", "magenta"),
}


def verdict_text(verdict: str | None) -> str:
    """A verdict with its mark, in rich's markup."""
    if verdict is None:
        return "[dim]ran, no verdict at smoke scale[/]"
    mark, colour = STYLE[verdict]
    return f"[{colour}]{mark} {verdict}[/]"


def control_text(row: dict[str, Any]) -> str:
    """What the control showed: it must fail."""
    if row.get("defect"):
        return (
            "[bold magenta]! defect: the control could not run[/]"
            if row["control_verdict"] == stats.COULD_NOT_RUN
            else ("[bold magenta]! defect: the control passes[/]")
        )
    if row["control_verdict"] is None:
        return "[dim]not run[/]"
    if row["control_verdict"] == stats.INCONCLUSIVE:
        return "[green]did not pass[/] [dim](inconclusive)[/]"
    return "[green]failed, as it must[/]"


def effect_text(row: dict[str, Any]) -> str:
    """The effect with its interval, in the claim's own unit."""
    if row["effect"] is None:
        return "–"
    text = f"{row['effect']:.3g}"
    if row["ci_low"] is not None:
        text += f" [{row['ci_low']:.3g}, {row['ci_high']:.3g}]"
    return f"×{text}" if row["kind"] == "ratio" else text


def check_json(path: Path) -> None:
    """Refuse a place for JSON that cannot be written, before any work is spent."""
    if str(path) != "-" and not (path.parent.is_dir() and os.access(path.parent, os.W_OK) and not path.is_dir()):
        raise StoreError(f"cannot write '{path}': its folder is missing or not writable")


def write_json(path: Path, data: Any) -> None:
    """Write JSON to a file, whole or not at all; '-' is standard output."""
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    if str(path) == "-":
        sys.stdout.write(text)
        return
    temporary = ""
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8") as file:
            temporary = file.name
            file.write(text)
        os.chmod(temporary, 0o644)  # a temporary file is private; a result is not
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise StoreError(f"cannot write '{path}': {error.strerror}") from error

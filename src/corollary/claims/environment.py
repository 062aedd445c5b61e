"""Where a verdict was measured: commit, packages and machine, as far as they matter and name nobody."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "transformers", "e3nn", "pytorch_optimizer", "geoopt", "implicit")


@cache
def commit() -> str:
    """The source tree's commit, with ``+`` where files differ from it; ``v<version>`` for an installed package."""
    tree = Path(__file__).resolve().parents[3]
    if (tree / ".git").exists():
        with suppress(OSError, subprocess.SubprocessError):
            head = _git(tree, "rev-parse", "--short=12", "HEAD")
            dirty = _git(tree, "status", "--porcelain", "--untracked-files=no", "--", "src")
            return head + ("+" if dirty else "")
    try:
        return f"v{version('corollary')}"
    except PackageNotFoundError:
        return "unknown"


def _git(tree: Path, *arguments: str) -> str:
    command = ["git", "-C", str(tree), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


@cache
def packages() -> dict[str, str]:
    """Versions of Python and of the packages that a measurement may rest on, those that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def machine() -> dict[str, str | int]:
    """System, processor, cores and memory; no host or user name."""
    processor = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    found: dict[str, str | int] = {"system": platform.system(), "processor": processor, "cores": os.cpu_count() or 1}
    with suppress(AttributeError, ValueError, OSError):
        found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    return found

"""The README shows what is published."""

from __future__ import annotations

from pathlib import Path

from corollary.report.readme import main

ROOT = Path(__file__).resolve().parents[2]


def test_the_scoreboard_in_the_readme_is_the_published_one() -> None:
    assert main([str(ROOT / "README.md"), "--check"]) == 0, "run 'make scoreboard'"

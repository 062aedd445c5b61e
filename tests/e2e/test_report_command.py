"""From claims to pages by the command line alone, on the engine's toy papers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOYS = Path(__file__).parents[1] / "claims" / "collection"


def _run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(p for p in (str(TOYS.parent), os.environ.get("PYTHONPATH", "")) if p)
    environment = {**os.environ, "COLUMNS": "400", "COROLLARY_PAPERS": str(TOYS), "PYTHONPATH": paths}
    command = [sys.executable, "-c", "from corollary.cli import main; main()", *words]
    result = subprocess.run(command, cwd=cwd, text=True, capture_output=True, env=environment, timeout=120)
    assert "Traceback" not in result.stderr + result.stdout
    return result


def test_what_was_verified_stands_in_the_report(tmp_path: Path) -> None:
    _run("verify", "steady", "--controls", "--json", "rows.json", cwd=tmp_path)
    rows = json.loads((tmp_path / "rows.json").read_text())
    done = _run("report", "--out", "pages", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "index.html" in done.stdout
    board = (tmp_path / "pages" / "index.html").read_text(encoding="utf-8")
    page = (tmp_path / "pages" / "papers" / "steady.html").read_text(encoding="utf-8")
    assert rows
    for row in rows:
        assert row["verdict"] in page
        assert f'id="{row["claim"]}"' in page
        assert f'href="papers/steady.html#{row["claim"]}"' in board
        for trial in row["values"]:
            assert str(trial["seed"]) in page
    assert "not yet measured" in board


@pytest.mark.parametrize("command", ["report", "tour"])
def test_a_folder_of_other_files_is_refused_before_any_work(tmp_path: Path, command: str) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = _run(command, "--out", ".", cwd=tmp_path)
    assert done.returncode == 2
    assert "holds files that are no report" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.txt"]


def test_claims_in_every_kind_of_trouble_have_their_page(tmp_path: Path) -> None:
    _run("verify", "troubled", "--controls", cwd=tmp_path)
    done = _run("report", "--out", "pages", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "pages" / "papers" / "troubled.html").read_text(encoding="utf-8")
    for words in ("could not run", "defect: the control passed", "∞", "Reason: ", "Traceback"):
        assert words.lower() in page.lower()

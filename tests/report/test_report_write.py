"""Writing: whole or not at all, only where a report may lie, the same bytes each time, and the README's table."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from corollary.claims.record import Paper
from corollary.report import ReportError, readme, scoreboard_markdown, write_report

Rows = list[dict[str, Any]]


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_input_same_bytes(tmp_path: Path, papers: Mapping[str, Paper], rows: Rows) -> None:
    first = write_report(tmp_path / "a" / "deep", papers, rows)
    second = write_report(tmp_path / "b", papers, rows)
    assert first == (tmp_path / "a" / "deep" / "index.html").resolve()
    assert _bytes(first.parent) == _bytes(second.parent)


def test_a_report_is_replaced_as_a_whole(tmp_path: Path, papers: Mapping[str, Paper], rows: Rows) -> None:
    out = tmp_path / "out"
    write_report(out, papers, rows)
    one = {"norms": papers["norms"]}
    write_report(out, one, [])
    assert [p.name for p in (out / "papers").iterdir()] == ["norms.html"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_and_an_empty_catalogue_do(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert "The catalogue is empty" in write_report(out, {}, []).read_text(encoding="utf-8")


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path, papers: Mapping[str, Paper]) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_report(tmp_path / "link", papers, [])
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "index.html").is_file()


def test_other_peoples_files_are_left_alone(tmp_path: Path, papers: Mapping[str, Paper]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ReportError, match="holds files that are no report"):
        write_report(tmp_path, papers, [])
    with pytest.raises(ReportError, match="is a file"):
        write_report(tmp_path / "thesis.tex", papers, [])
    with pytest.raises(ReportError, match=r"cannot .* give another folder"):
        write_report(tmp_path / "thesis.tex" / "report", papers, [])
    assert _bytes(tmp_path) == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize("slug", ["../escape", "a/b", "", ".hidden", "a b"])
def test_a_slug_cannot_leave_the_folder(tmp_path: Path, papers: Mapping[str, Paper], slug: str) -> None:
    with pytest.raises(ReportError, match="cannot name a page"):
        write_report(tmp_path / "out", {slug: papers["norms"]}, [])


@pytest.mark.parametrize("failing", ["write", "rename"])
def test_a_failure_leaves_the_old_report(
    tmp_path: Path, papers: Mapping[str, Paper], rows: Rows, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    out = tmp_path / "out"
    write_report(out, papers, rows)
    before = _bytes(out)
    if failing == "write":
        written = Path.write_text

        def full(self: Path, *args: Any, **kwargs: Any) -> int:
            if self.name == "norms.html":
                raise OSError(28, "No space left on device")
            return written(self, *args, **kwargs)

        monkeypatch.setattr(Path, "write_text", full)
    else:
        renamed = os.rename

        def refused(source: Any, target: Any) -> None:
            if str(source).endswith(".new"):
                raise OSError(16, "Device or resource busy")
            renamed(source, target)

        monkeypatch.setattr(os, "rename", refused)
    with pytest.raises(ReportError, match=r"No space left|resource busy"):
        write_report(out, papers, [])
    monkeypatch.undo()
    assert _bytes(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_torch_is_not_needed(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path\nfrom corollary.claims import catalogue\nfrom corollary.report import write_report\n"
        f"write_report(Path({str(tmp_path / 'out')!r}), catalogue(), [])\n"
        "assert not any(name.startswith(('corollary.papers.', 'matplotlib')) for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_markdown_is_one_table_that_nothing_breaks(papers: Mapping[str, Paper], rows: Rows) -> None:
    text = scoreboard_markdown(papers, rows)
    lines = text.splitlines()
    assert text.endswith("\n")
    assert len(lines) == 2 + sum(len(p.claims) for p in papers.values())
    for line in lines:
        assert len(re.split(r"(?<!\\)\|", line)) == 8, line
        assert not re.search(r"(?<!\\)<", line)
    assert "[Norms Without Decompositions](https://arxiv.org/abs/2301.00001)" in text
    assert "| Lower test error than AdamW at equal steps on handwritten digits | −0.0" in text
    assert "✓ supported at this scale | failed, as it must |" in text
    assert "**defect: the control passed**" in text
    assert "○ not yet measured |  |" in text
    assert "javascript" not in text


README = "# Made up\n\n<!-- scoreboard -->\nold\n<!-- /scoreboard -->\n\nAfter.\n"


def test_the_readme_is_brought_up_to_date_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "README.md"
    path.write_text(README)
    assert readme.main([str(path), "--check"]) == 1
    assert "make scoreboard" in capsys.readouterr().err
    assert path.read_text() == README
    assert readme.main([str(path)]) == 0
    text = path.read_text()
    assert text.startswith("# Made up\n\n<!-- scoreboard -->\n\n| Paper |")
    assert text.endswith("\n<!-- /scoreboard -->\n\nAfter.\n")
    assert readme.main([str(path), "--check"]) == 0


@pytest.mark.parametrize("text", ["none", "<!-- /scoreboard --><!-- scoreboard -->", README + README])
def test_a_readme_without_its_markers_is_refused(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "README.md"
    path.write_text(text)
    assert readme.main([str(path)]) == 2
    assert "needs one '<!-- scoreboard -->'" in capsys.readouterr().err
    assert path.read_text() == text

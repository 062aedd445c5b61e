"""The documentation builds in strict mode, needs no other host, shows every claim, and its code runs."""

from __future__ import annotations

import doctest
import importlib
import json
import logging
import os
import re
import subprocess
import sys
import textwrap
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

from corollary.claims import catalogue

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


class _Page(HTMLParser):
    """What a browser would load for a page, and the words outside of code."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.words: list[str] = []
        self._code = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "audio", "video", "embed") and values.get("src"):
            self.loads.append(str(values["src"]))
        if tag == "link" and values.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(str(values.get("href")))
        self._code += tag in ("code", "script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._code -= tag in ("code", "script", "style")

    def handle_data(self, data: str) -> None:
        if not self._code:
            self.words.append(data)


def test_pages_load_nothing_from_other_hosts(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        loads = _Page(page.read_text(encoding="utf-8")).loads
        assert loads, page
        assert not [address for address in loads if re.match(r"(https?:)?//", address)], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )['\"]?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_formulas_are_drawn_and_none_is_left_as_source(site: Path) -> None:
    drawn = 0
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        drawn += html.count("<math ")
        words = "".join(_Page(html).words)
        assert ":math:" not in words, page
        assert ".. math::" not in words, page
        assert not re.search(r"={4,} +={4,}", words), page
    assert drawn > 50


def test_every_paper_has_a_page_with_all_of_its_claims(site: Path) -> None:
    index = (site / "papers" / "index.html").read_text(encoding="utf-8")
    for paper in catalogue().values():
        html = (site / "papers" / f"{paper.slug}.html").read_text(encoding="utf-8")
        assert f"{paper.slug}.html" in index
        for claim in paper.claims:
            assert f'id="{claim.id}"' in html
        for component in paper.components:
            assert component.object in html


def test_every_exported_name_has_an_entry(site: Path) -> None:
    for package in ("linalg", "data", "models", "optim", "nn", "losses", "analysis", "recovery", "testing", "claims"):
        html = (site / "reference" / f"{package}.html").read_text(encoding="utf-8")
        module = importlib.import_module(f"corollary.{package}")
        missing = [
            name
            for name in getattr(module, "__all__", ())
            if getattr(getattr(module, name), "__doc__", None) and f'id="corollary.{package}.{name}"' not in html
        ]
        assert not missing, f"{package}: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_code_in_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks marked ``pycon`` are doctests, blocks marked ``python`` are run; the blocks of one page share their names."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    text = page.read_text(encoding="utf-8")
    for block in re.finditer(r"^( *)```(python|pycon)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
        code, line = textwrap.dedent(block[3]), text.count("\n", 0, block.start()) + 1
        if block[2] == "python":
            exec(compile(code, f"{page.name}:{line}", "exec"), names)
        else:
            test = doctest.DocTestParser().get_doctest(code, names, page.name, str(page), line)
            report: list[str] = []
            runner.run(test, out=report.append, clear_globs=False)
            names = test.globs
            assert runner.summarize(verbose=False).failed == 0, "".join(report)


@pytest.fixture(scope="module")
def mathml() -> ModuleType:
    return script("mathml")


def script(name: str) -> ModuleType:
    """A script of the docs folder; they import each other by name, as in the build."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs")
        return importlib.import_module(name)


RECORD = """
title = "A *bold* <b>title</b> | with markup"
authors = ["A. Author"]
year = 2024
arxiv = "2401.00001"
code = "javascript:alert(1)"
summary = "It does $x^2$ and `code_like_this` and a_b_c."
deviations = ["smaller"]
[[component]]
object = "corollary.optim.Thing"
kind = "optimizer"
source = "Algorithm 1"
peer = "torch.optim.SGD"
[[claim]]
id = "wins"
kind = "paired"
better = "lower"
margin = 0.5
metric = "error"
statement = "Lower error"
source = "Table 1"
baseline = "SGD"
control = "idea removed"
note = "seen at once"
"""


def test_a_paper_page_says_what_the_store_says(tmp_path: Path) -> None:
    from corollary.claims.record import read_paper
    from corollary.report.views import build_board

    record = tmp_path / "optim" / "thing.toml"
    record.parent.mkdir()
    record.write_text(RECORD)
    record.with_suffix(".py").write_text("def wins(trial):\n    ...\n")
    papers = {"thing": read_paper(record)}
    row = {
        "slug": "thing", "claim": "wins", "kind": "paired", "verdict": "inconclusive", "control_verdict": "inconclusive",
        "effect": -0.25, "ci_low": -0.7, "ci_high": 0.2, "p_value": 0.125, "pairs": 10, "seed": 3, "scale": "laptop",
        "stale": True, "defect": False, "control_effect": 0.5, "time": "2026-01-02T03:04:05+00:00", "commit": "abc", "seconds": 61,
        "machine": {"processor": "P", "cores": 2}, "reason": None,
        "values": [{"seed": 7, "evidence": {"kind": "paired", "ours": 1.0, "baseline": 1.25}, "logged": {}, "seconds": 1.0}],
    }  # fmt: skip
    pages = script("paper_pages").paper_pages(build_board(papers, [row]))
    page = pages["papers/thing.md"]
    for words in ("Lower error", "Table 1", "−0.25", "&#91;−0.70, 0.20&#93;", "0.12",
                  "inconclusive", "(stale)", "idea removed", "seen at once", "smaller", "below −0.5", "scale laptop, seed 3",
                  "1 min 1 s", "$x^2$", "`code_like_this`", "corollary verify thing --controls", "def wins"):  # fmt: skip
        assert words in page, words
    assert "<b>" not in page
    assert "javascript:" not in page
    assert "[A &#42;bold&#42;" in pages["papers/index.md"]
    unmeasured = script("paper_pages").paper_pages(build_board(papers, []))["papers/thing.md"]
    assert "not yet measured" in unmeasured


def test_the_page_of_benchmarks_reads_what_the_harness_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.harness import Bench, measure

    bench = Bench("corollary.optim.Thing", "4 | 4", lambda: sum(range(50)), {"peer": lambda: sum(range(99))}, rounds=3)
    results = tmp_path / "results.json"
    page = script("bench_page").benchmark_page
    assert "No results are on record yet" in page(results)
    rows = measure(bench)
    results.write_text(json.dumps([{**row, "machine": {"processor": "P", "cores": 2, "system": "S"}} for row in rows]))
    assert "| `peer` |" in page(results)
    assert f"{rows[0]['time_ratio']:.2f}" in page(results)
    assert "Measured on P, 2 cores, S." in page(results)


def render(mathml: ModuleType, text: str) -> str:
    import markdown

    return markdown.markdown(text, extensions=["tables", "pymdownx.superfences", mathml.MathExtension()])


@pytest.mark.parametrize("source", [
    "the norm :math:`\\|x\\|_2` of it", "the norm $\\|x\\|_2$ of it", ".. math:: x_1 + x_2\n\nmore",
    ".. math::\n    a &= b \\\\\n    c &= d\n\nmore", "$$\nx^2\n$$", "- item\n\n    .. math:: x\n",
])  # fmt: skip
def test_latex_becomes_mathml(mathml: ModuleType, source: str, caplog: pytest.LogCaptureFixture) -> None:
    html = render(mathml, source)
    assert html.count("<math ") == 1
    assert "math::" not in html
    assert "$" not in html
    assert not caplog.records


@pytest.mark.parametrize("source", ["`$HOME` and `$PATH`", "```sh\n$x$ .. math:: y\n```", "it costs $5", "a `:math:` role"])
def test_code_and_money_stay_as_they_are(mathml: ModuleType, source: str) -> None:
    assert "<math" not in render(mathml, source)


@pytest.mark.parametrize("latex", [r"\sqrt", r"\nosuchcommand x", r"\left( x"])
def test_a_broken_formula_is_a_warning(mathml: ModuleType, latex: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        html = render(mathml, f":math:`{latex}`")
    assert "<code>" in html
    assert "formula cannot be converted" in caplog.text


def test_bars_do_not_stretch_unless_told_to(mathml: ModuleType) -> None:
    html = render(mathml, r":math:`\lVert x \rVert_2 + |y| + \|z\|`")
    assert html.count('stretchy="false" lspace="0"') == 6
    assert 'stretchy="false"' not in render(mathml, r":math:`\left\| x \right\|`")


def test_literal_blocks(mathml: ModuleType) -> None:
    html = render(mathml, "Three ways::\n\n    x = 1\n")
    assert "Three ways:</p>" in html
    assert "<code>x = 1" in html


def test_simple_tables(mathml: ModuleType) -> None:
    html = render(mathml, "====  =====\nname  value\n====  =====\n``a``  one\n      more\nb|c   two\n====  =====\n")
    cells = re.findall(r"<t[hd]>(.*?)</t[hd]>", html)
    assert cells == ["name", "value", "<code>a</code>", "one more", "b|c", "two"]
    assert re.findall(r"<td>(.*?)</td>", render(mathml, "==  ==\na   1\nb   2\n==  ==\n")) == ["a", "1", "b", "2"]

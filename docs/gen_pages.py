"""Writes the pages that come from the code, the records and the stored evidence; run by mkdocs-gen-files at every build."""

from __future__ import annotations

from pathlib import Path

import mkdocs_gen_files
from adapters_page import adapters_page
from bench_page import benchmark_page
from checkpoint_tables import checkpoint_tables
from cli_page import command_line_page
from compression_page import compression_page
from language_page import language_page
from paper_pages import component_table, paper_pages
from pretraining_page import pretraining_page
from reference_pages import reference_pages
from scale_table import scale_table

from corollary.claims import catalogue
from corollary.claims.store import Store, latest_verdicts, published_results
from corollary.report.views import build_board

ROOT = Path(__file__).resolve().parents[1]


def write(name: str, text: str, source: Path | None = None) -> None:
    """One generated page; ``source`` is the file that a reader would edit."""
    with mkdocs_gen_files.open(name, "w") as page:
        page.write(text)
    if source is not None:
        mkdocs_gen_files.set_edit_path(name, source.relative_to(ROOT))


papers = catalogue()
board = build_board(papers, latest_verdicts(list(papers.values()), [Store(published_results())]))
for name, text in {**paper_pages(board), **reference_pages(ROOT / "src" / "corollary")}.items():
    write(name, text)
write("guide/cli.md", command_line_page())
write("benchmarks.md", benchmark_page(ROOT / "benchmarks" / "results.json"))
page, plot = pretraining_page(ROOT / "benchmarks" / "pretraining.json")
write("pretraining.md", page)
if plot:
    write("pretraining.svg", plot)
page, plot = adapters_page(ROOT / "benchmarks" / "adapters.json")
write("adapters.md", page)
if plot:
    write("adapters.svg", plot)
page, plot = compression_page(ROOT / "benchmarks" / "compression.json")
write("compression.md", page)
if plot:
    write("compression.svg", plot)
page, plot = language_page(ROOT / "benchmarks" / "language_compression.json")
write("language_compression.md", page)
if plot:
    write("language_compression.svg", plot)
write("contributing.md", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), ROOT / "CONTRIBUTING.md")

# A guide page names its package's components where it says so, from the records: no list is kept by hand.
for path in sorted((ROOT / "docs" / "guide").glob("*.md")):
    text = path.read_text(encoding="utf-8")
    mark = f"<!-- components: {path.stem} -->"
    if mark in text:
        write(f"guide/{path.name}", text.replace(mark, component_table(papers, path.stem)), path)
    elif path.stem == "daily":
        write("guide/daily.md", scale_table(text, ROOT / "benchmarks" / "web_scale.json"), path)
    elif path.stem == "checkpoints":
        write("guide/checkpoints.md", checkpoint_tables(text, ROOT / "benchmarks"), path)

"""The report in a real browser, opened from disk as a reader would."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page that fails its test on any error of the console, and on any request that is not to a file."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda m: wrong.append(f"console: {m.text}") if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: wrong.append(f"page: {e}"))
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else wrong.append(f"request: {r.url}"))
    yield page
    context.close()
    assert wrong == []


@pytest.fixture
def start(report: Path) -> str:
    return (report / "index.html").as_uri()


def _shown(page: Any) -> list[str]:
    found: list[str] = page.locator("tr.claim:visible .statement").all_inner_texts()
    return found


def _wait(page: Any, begin: str) -> None:
    """Wait for the count of shown claims from outside: the page's policy forbids the polling that evaluates text inside."""
    page.locator("#shown", has_text=re.compile(f"^{begin}")).wait_for()


def test_filter_by_package_verdict_and_words(page: Any, start: str) -> None:
    page.goto(start)
    assert len(_shown(page)) == 18
    page.select_option("#by-package", "analysis")
    assert page.locator("#shown").inner_text() == "5 of 18 claims, 3 of 10 papers"
    page.select_option("#by-verdict", "inconclusive")
    assert _shown(page) == ["Less time than the nuclear norm at equal size"]
    assert page.url.endswith("#package=analysis&verdict=inconclusive")
    page.get_by_role("button", name="Clear").click()
    _wait(page, "18 of 18")
    assert "#" not in page.url
    page.fill("#by-q", "outliers SPECTRUM")
    assert page.locator("tbody:visible .title").all_inner_texts() == ["Outliers of the Spectrum, Counted"]
    page.fill("#by-q", "nuclear norm")
    assert _shown(page) == ["Less time than the nuclear norm at equal size"]
    page.fill("#by-q", "nothing has these words")
    assert page.locator("#none").is_visible()
    assert not page.locator("#board").is_visible()


def test_an_address_keeps_the_filter(page: Any, start: str) -> None:
    page.goto(start + "#q=rotations&verdict=could-not-run")
    assert _shown(page) == ["Lower error than the plain product on a task of rotations"]
    assert page.input_value("#by-q") == "rotations"
    page.goto(start)
    page.locator(".tally a", has_text="exact check failed").click()
    _wait(page, "1 of")
    assert _shown(page) == ["The number of outliers equals the number of classes minus one"]
    page.locator(".warnings a", has_text="defect").click()
    _wait(page, "2 of")
    page.goto(start + "#verdict=no-such-thing")
    assert len(_shown(page)) == 18


def test_a_paper_shows_its_pairs_and_its_control(page: Any, start: str) -> None:
    page.goto(start)
    page.get_by_role("link", name="Curvature Steps").click()
    assert page.get_by_role("heading", level=1).inner_text() == "Curvature Steps: A Second-Order Method That Does Not Exist"
    claim = page.locator("#lower_error")
    assert claim.locator(".pair").count() == 10
    assert "trial 3, seed 3000015857: ours 0." in claim.locator(".pair[data-trial='3'] title").text_content()
    assert claim.get_by_text("Control failed, as it must.").is_visible()
    assert claim.get_by_role("img", name="ours − baseline, test error").is_visible()
    assert not claim.locator("table", has_text="best_learning_rate").is_visible()
    claim.get_by_text("Raw values of 10 trials").click()
    assert claim.locator("table", has_text="best_learning_rate").is_visible()
    page.get_by_role("link", name="optim", exact=True).click()
    assert page.input_value("#by-package") == "optim"


def test_marks_have_room(page: Any, report: Path) -> None:
    """No words of a plot leave it, and none is drawn over another plot."""
    for path in sorted((report / "papers").glob("*.html")):
        page.goto(path.as_uri())
        outside = page.evaluate(
            """() => [...document.querySelectorAll("svg.plot")].flatMap((svg) => {
                const frame = svg.getBoundingClientRect();
                return [...svg.querySelectorAll("text, circle, path")].filter((mark) => {
                    const box = mark.getBoundingClientRect();
                    return box.left < frame.left - 3 || box.right > frame.right + 3
                        || box.top < frame.top - 3 || box.bottom > frame.bottom + 3;
                }).map((mark) => mark.outerHTML);
            })"""
        )
        assert outside == [], path.name


def test_copying_the_command(page: Any, report: Path) -> None:
    page.goto((report / "papers" / "norms.html").as_uri())
    page.get_by_role("button", name="Copy: corollary verify norms").click()
    page.get_by_text("Copied").wait_for()


@pytest.mark.parametrize("width", [360, 768])
def test_no_sideways_scrolling(page: Any, report: Path, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    for path in sorted(report.rglob("*.html")):
        page.goto(path.as_uri())
        for details in page.locator("details").all():
            details.evaluate("(d) => { d.open = true; }")
        assert page.evaluate("document.documentElement.scrollWidth") == width, path.name


def test_the_dark_scheme(page: Any, start: str) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    page.goto(start)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(ground)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(ground)
    assert light != dark
    assert sum(map(int, dark[4:-1].split(","))) < 150 < sum(map(int, light[4:-1].split(",")))


def test_the_keyboard_reaches_everything(page: Any, start: str) -> None:
    page.goto(start)
    seen = []
    for _ in range(30):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate("document.activeElement.id || document.activeElement.className || document.activeElement.type")
        )
        if seen[-1] == "reset":
            break
    assert seen[0] == "skip"
    assert [s for s in seen if s.startswith("by-")] == ["by-q", "by-package", "by-verdict"]
    page.keyboard.press("Shift+Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_without_script_everything_is_there(browser: Any, start: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(start)
    assert len(_shown(page)) == 18
    assert not page.locator("#filter").is_visible()
    page.goto(start.replace("index.html", "papers/curve-step.html"))
    assert page.locator(".pair").count() == 20
    assert page.get_by_role("button").count() == 0
    context.close()


def test_the_policy_stops_what_slips_through(browser: Any, report: Path, tmp_path: Path) -> None:
    """Were a script to get into a page in spite of the escaping, the browser would refuse to run it."""
    text = (report / "index.html").read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    broken.write_text(text.replace("</main>", "<script>window.ran = true</script></main>"), encoding="utf-8")
    page = browser.new_page()
    page.goto(broken.as_uri())
    assert page.evaluate("window.ran") is None
    assert page.locator("#filter").is_visible()
    page.close()

"""Escaping, and every page of a report as a reader's browser and a screen reader would take it."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corollary.report.html import Html, h, inline, join, link, prose

VOID = {"br", "col", "hr", "img", "input", "link", "meta"}


class Page(HTMLParser):
    """A page taken apart by an independent parser; raises where elements do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag} has an attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a beginning"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@given(st.text())
def test_text_and_attributes_come_back_as_they_were(text: str) -> None:
    text = re.sub(r"[\x00\r]|[\ud800-\udfff]", "", text)  # no parser of HTML keeps these
    page = Page(h("p", text, title=text))
    assert "".join(page.words) == text
    assert page.elements == [("p", {"title": text})]


def test_children_and_attributes() -> None:
    assert h("p", None, ["a", [Html("<b>b</b>"), 1]], 2.5) == "<p>a<b>b</b>12.5</p>"
    assert h("input", type="search", hidden=True, disabled=False, name=None) == '<input type="search" hidden>'
    assert h("rect", x=1 / 3, y=2.0, class_="a", for_="b", aria_label="c") == (
        '<rect x="0.33" y="2" class="a" for="b" aria-label="c"></rect>'
    )
    assert join("<", Html("<i>")) == "&lt;<i>"


@pytest.mark.parametrize(
    "address",
    ["javascript:alert(1)", "data:text/html,x", "//example.org", "example.org", "http://", "http://[", "", " javascript:x"],
)
def test_only_web_addresses_become_links(address: str) -> None:
    assert link("text", address) == "text"


def test_link_escapes_its_address() -> None:
    assert link("a", 'https://example.org/?a="1"&b') == (
        '<a href="https://example.org/?a=&quot;1&quot;&amp;b" rel="noreferrer">a</a>'
    )


def test_prose() -> None:
    assert prose("one\ntwo\n\n`<three>`") == "<p>one two</p><p><code>&lt;three&gt;</code></p>"
    assert inline("a ` b") == "a ` b"


@pytest.fixture(scope="module")
def pages(report: Path) -> dict[str, Page]:
    return {str(path.relative_to(report)): Page(path.read_text(encoding="utf-8")) for path in sorted(report.rglob("*.html"))}


def test_there_is_a_page_for_every_paper(pages: dict[str, Page], papers: dict[str, object]) -> None:
    assert set(pages) == {"index.html", "statistics.html", *(f"papers/{slug}.html" for slug in papers)}


def test_nothing_from_a_record_becomes_markup(pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        assert len(page.all("script")) == len(page.all("style")) == 1, name
        assert page.all("img") == page.all("i") == []
        for tag, attributes in page.elements:
            assert not any(a.startswith("on") or a == "style" for a in attributes), f"{name}: {tag} {attributes}"
    hostile = " ".join(pages["papers/hostile.html"].words)
    assert "<script>alert('x')</script> & \"quoted\" <img src=x onerror=alert(1)>" in hostile


def test_a_page_loads_nothing(pages: dict[str, Page]) -> None:
    for page in pages.values():
        policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
        assert policy is not None
        assert policy.startswith("default-src 'none';")
        assert not any("src" in attributes for _, attributes in page.elements)
        assert [link["href"][:5] for link in page.all("link") if link["href"]] == ["data:"]
        for anchor in page.all("a"):
            href = anchor["href"] or ""
            assert re.match(r"https://|#|(\.\./)?[\w./-]+\.html", href), href


def test_every_inner_link_leads_somewhere(pages: dict[str, Page], report: Path) -> None:
    ids = {name: {a["id"] for _, a in page.elements if a.get("id")} for name, page in pages.items()}
    for name, page in pages.items():
        for anchor in page.all("a"):
            address, _, part = (anchor["href"] or "").partition("#")
            if address.startswith("https:"):
                continue
            target = (
                str((report / name).parent.joinpath(unquote(address)).resolve().relative_to(report.resolve()))
                if address
                else name
            )
            assert target in pages, f"{name}: {anchor['href']}"
            assert not part or "=" in part or part in ids[target], f"{name}: {anchor['href']}"


def test_structure_that_assistive_technology_needs(pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        tags = Counter(tag for tag, _ in page.elements)
        assert tags["main"] == tags["h1"] == 1, name
        assert page.all("html")[0]["lang"] == "en"
        ids = [a["id"] for _, a in page.elements if a.get("id")]
        assert len(ids) == len(set(ids)), name
        for _, attributes in page.elements:
            for reference in ("for", "aria-labelledby"):
                for word in (attributes.get(reference) or "").split():
                    assert word in ids, f"{name}: {word}"
        for svg in page.all("svg"):
            assert svg.get("aria-hidden") == "true" or (svg.get("role") == "img" and svg.get("aria-label")), name
        for cell in page.all("th"):
            assert cell.get("scope") in ("col", "row", "rowgroup"), name
        levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
        assert all(after <= before + 1 for before, after in pairwise(levels)), f"{name}: {levels}"


def test_no_number_is_broken(pages: dict[str, Page], report: Path) -> None:
    for name, page in pages.items():
        for tag, attributes in page.elements:
            for attribute in ("d", "x", "y", "cx", "cy", "x1", "x2", "y1", "y2", "width", "height", "viewBox"):
                value = attributes.get(attribute)
                assert value is None or not re.search(r"nan|inf|e[+-]?\d", value), f"{name}: {tag} {attribute}={value}"
                if attribute in ("width", "height") and tag == "rect":
                    assert float(value or 0) >= 0


def test_what_a_reader_must_find(pages: dict[str, Page]) -> None:
    board = " ".join(pages["index.html"].words)
    for verdict in (
        "supported at this scale", "not supported at this scale", "inconclusive", "exact check passed", "exact check failed",
        "could not run", "not yet measured",
    ):  # fmt: skip
        assert verdict in board
    assert "defect: the control passed" in board
    paper = " ".join(pages["papers/curve-step.html"].words)
    for words in (
        "corollary verify curve-step --controls", "from corollary.claims import Trial", "Control failed, as it must.",
        "the curvature estimate replaced by noise", "AdamW, learning rate tuned over the same 5 values", "lr = 0.15",
        "0123456789ab", "a made-up processor", "One trial of a claim.", "scale: str = 'laptop'", "anneals it",
        "The gap narrows as batches grow.", "Training loss", "Stale.", "2025-11-20 16:30 UTC",
    ):  # fmt: skip
        assert words in paper, words
    assert "No module named 'example'" in " ".join(pages["papers/equiv.html"].words)
    assert "the verdict above says nothing" in " ".join(pages["papers/heads.html"].words)
    assert "heads:no_longer_there" in "".join(pages["statistics.html"].words)


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _contrast(one: str, other: str) -> float:
    bright, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_the_contrast_of_wcag_aa(report: Path, scheme: str) -> None:
    css = (report / "index.html").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", css, flags=re.S)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light if scheme == "light" else dark))
    assert len(colours) > 20
    for ground in ("paper", "card", "sunk"):
        for text in ("ink", "soft", "accent"):
            assert _contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for tone in ("good", "bad", "open", "none"):
        for ground in ("paper", "card", f"{tone}-tint"):
            assert _contrast(colours[tone], colours[ground]) >= 4.5, (tone, ground)
    for series in ("s1", "s2", "s3", "s4", "s5", "s6"):
        assert _contrast(colours[series], colours["card"]) >= 3, series
    assert _contrast(colours["good"], colours["holds"]) >= 4.5
    assert _contrast(colours["soft"], colours["holds"]) >= 4.5

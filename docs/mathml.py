r"""Markdown extension: LaTeX as MathML, and the two pieces of reStructuredText that our docstrings hold.

Every browser draws MathML by itself, so the pages need no script and no font from anywhere. Understood are ``$...$``,
``:math:`...` ``, a ``.. math::`` block, ``$$`` on lines of their own, and simple tables of reStructuredText. A formula that
cannot be converted is a warning, which a strict build does not let pass.
"""

from __future__ import annotations

import logging
import re
import xml.etree.ElementTree as etree
from html import escape
from typing import Any

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor
from markdown.preprocessors import Preprocessor

log = logging.getLogger("mkdocs.mathml")

_DIRECTIVE = re.compile(r"^(?P<indent>\s*)\.\. math::\s*(?P<rest>.*)$")
_DOLLARS = re.compile(r"^(?P<indent>\s*)\$\$\s*$")
# Bars without \left and \right: as operators they would stretch to whatever stands beside them, and keep a distance.
_BARS = re.compile(r'<mo(?: fence="false")?(?: stretchy="false")?>(&#x0*(?:2016|2225|7C);|\|)</mo>')
_LITERAL = re.compile(r"(?<=[^:\s])::$")
_BORDER = re.compile(r"^\s*=+(\s+=+)+\s*$")


def to_mathml(latex: str, *, block: bool = False) -> str:
    """One formula as MathML; the LaTeX itself as code, and a warning, where it cannot be converted."""
    source = " ".join(latex.split())
    # The converter knows the starred environment only, and leaves a thin space where a negative one stands.
    source = re.sub(r"\\(begin|end)\{(aligned|split)\}", r"\\\1{align*}", source).replace(r"\!", "")
    if block and r"\begin" not in source and (r"\\" in source or "&" in source):
        source = rf"\begin{{align*}}{source}\end{{align*}}"  # as Sphinx does with several lines
    try:
        mathml: str = convert(source, display="block" if block else "inline")
        etree.fromstring(mathml)
        unknown = re.search(r"<m[io]>(\\[A-Za-z]+)</m[io]>", mathml)
        if unknown:
            raise ValueError(f"unknown command {unknown[1]}")
    except Exception as error:  # noqa: BLE001 - the converter raises many types; each is the same warning here
        log.warning("formula cannot be converted (%s: %s): %s", type(error).__name__, error, source)
        return f"<code>{escape(source)}</code>"
    mathml = _BARS.sub(r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>', mathml)
    return f'<div class="math">{mathml}</div>' if block else mathml


class _Blocks(Preprocessor):
    """Display formulas and simple tables, which take whole lines."""

    def run(self, lines: list[str]) -> list[str]:
        out: list[str] = []
        i = 0
        while i < len(lines):
            directive, dollars = _DIRECTIVE.match(lines[i]), _DOLLARS.match(lines[i])
            if directive:
                i, latex = self._indented(lines, i + 1, len(directive["indent"]), directive["rest"])
                out += ["", directive["indent"] + self.md.htmlStash.store(to_mathml(latex, block=True)), ""]
            elif dollars:
                end = next((j for j in range(i + 1, len(lines)) if _DOLLARS.match(lines[j])), len(lines))
                formula = to_mathml(" ".join(lines[i + 1 : end]), block=True)
                out += ["", dollars["indent"] + self.md.htmlStash.store(formula), ""]
                i = end + 1
            elif _BORDER.match(lines[i]):
                i, table = self._table(lines, i)
                out += ["", *table, ""]
            else:
                # Two colons announce a literal block, which Markdown knows by its indentation alone.
                out.append(_LITERAL.sub(":", lines[i]))
                i += 1
        return out

    @staticmethod
    def _indented(lines: list[str], start: int, indent: int, rest: str) -> tuple[int, str]:
        found, i = [rest], start
        while i < len(lines) and (not lines[i].strip() or len(lines[i]) - len(lines[i].lstrip()) > indent):
            found.append(lines[i])
            i += 1
        return i, " ".join(found)

    @staticmethod
    def _table(lines: list[str], start: int) -> tuple[int, list[str]]:
        end = next((i for i in range(start, len(lines)) if not lines[i].strip()), len(lines))
        borders = [i for i in range(start, end) if _BORDER.match(lines[i])]
        if len(borders) not in (2, 3):
            return start + 1, [lines[start]]
        begins = [m.start() for m in re.finditer(r"=+", lines[start])]
        spans = list(zip(begins, [*begins[1:], None], strict=True))

        def cells(line: str) -> list[str]:
            return [line[a:b].strip().replace("|", "\\|") for a, b in spans]

        # Three borders have a header between the first two; two have none.
        header = cells(lines[borders[0] + 1]) if len(borders) == 3 else [""] * len(spans)
        rows: list[list[str]] = []
        for line in lines[borders[-2] + 1 : borders[-1]]:
            row = cells(line)
            if row[0]:
                rows.append(row)
            elif rows:  # a row whose first cell is empty goes on with the row above
                rows[-1] = [f"{a} {b}".strip() for a, b in zip(rows[-1], row, strict=True)]
        table = [header, ["---"] * len(spans), *rows]
        return borders[-1] + 1, ["| " + " | ".join(row) + " |" for row in table]


class _Inline(InlineProcessor):
    def handleMatch(self, m: re.Match[str], data: str) -> tuple[Any, int, int]:
        return self.md.htmlStash.store(to_mathml(m.group(1))), m.start(0), m.end(0)


class MathExtension(Extension):
    """Registers the above; see the module."""

    def extendMarkdown(self, md: Markdown) -> None:
        # After fenced code is set aside (25), so that code is left alone; before raw HTML (20).
        md.preprocessors.register(_Blocks(md), "corollary-blocks", 24)
        # Before backticks (190), which the role uses, and dollars after them, so that code keeps its dollars.
        md.inlinePatterns.register(_Inline(r":math:`([^`]+)`", md), "corollary-role", 195)
        md.inlinePatterns.register(_Inline(r"(?<![\\$\w])\$(?!\s)([^$`]+?)(?<!\s)\$(?![\w$])", md), "corollary-dollars", 187)

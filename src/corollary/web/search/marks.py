"""Where a query's words stand in a text."""

from __future__ import annotations

import re

from corollary.web.search.text import STOP, root, stem
from corollary.web.search.types import Parsed

_PIECE = re.compile(r"[^\W_]+")


def highlight(text: str, parsed: Parsed) -> list[tuple[str, bool]]:
    """The text in pieces, in order and nothing left out; True for those that match a word of the query in any of its forms.

    Pieces are plain text: who puts them into HTML escapes each.

    Example:
        >>> from corollary.web.search.parse import parse
        >>> highlight("Optimizers save memory", parse("memory optimizer"))
        [('Optimizers', True), (' save ', False), ('memory', True)]
    """
    asked = {*parsed.words, *(w for part in (*parsed.phrases, *parsed.authors) for w in part.split() if w not in STOP)}
    wanted = {stem(word) for word in asked}
    pieces: list[tuple[str, bool]] = []
    last = 0
    for match in _PIECE.finditer(text):
        if root(match[0]) in wanted:
            if match.start() > last:
                pieces.append((text[last : match.start()], False))
            pieces.append((match[0], True))
            last = match.end()
    if last < len(text):
        pieces.append((text[last:], False))
    return pieces


def excerpt(text: str, parsed: Parsed, *, width: int = 240) -> list[tuple[str, bool]]:
    """About ``width`` letters of the text where most of the query's words stand, cut between words, in pieces as `highlight`'s."""
    if len(text) <= width:
        return highlight(text, parsed)
    places: list[tuple[int, str]] = []
    at = 0
    for piece, hit in highlight(text, parsed):
        if hit:
            places.append((at, root(piece)))
        at += len(piece)
    best, start = -1, 0
    for first, (begin, _) in enumerate(places):
        found = {word for place, word in places[first : first + 60] if place < begin + width - 40}
        if len(found) > best:
            best, start = len(found), begin
    start = max(0, min(start - 40, len(text) - width))
    if start:
        start = text.find(" ", start) + 1 or start
    end = min(len(text), start + width)
    if end < len(text):
        end = max(text.rfind(" ", start, end), start + 1)
    cut = ("… " if start else "") + text[start:end] + (" …" if end < len(text) else "")
    return highlight(cut, parsed)

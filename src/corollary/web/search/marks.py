"""Where a query's words stand in a text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache

from corollary.web.search.text import STOP, root, stem
from corollary.web.search.types import Parsed

_PIECE = re.compile(r"[^\W_]+")


@lru_cache(maxsize=64)
def _wanted(parsed: Parsed) -> frozenset[str]:
    """The stems of the words that a query asks for; a page of hits asks forty times."""
    asked = {*parsed.words, *(w for part in (*parsed.phrases, *parsed.authors) for w in part.split() if w not in STOP)}
    return frozenset(stem(word) for word in asked)


def _places(text: str, wanted: frozenset[str]) -> Iterator[tuple[int, int, str]]:
    """Begin, end and stem of each word of the text whose stem is wanted, in no order."""
    if not text.isascii():  # folded, its letters would stand elsewhere
        for match in _PIECE.finditer(text):
            if (found := root(match[0])) in wanted:
                yield match.start(), match.end(), found
        return
    # A stem is how its words begin, and most words of a text begin otherwise: they are not looked at one by one.
    low = text.lower()
    for begins in wanted:
        at = low.find(begins) if begins else -1
        while at >= 0:
            end = at + len(begins)
            if at == 0 or not low[at - 1].isalnum():
                word = _PIECE.match(text, at)
                if word is not None:
                    end = word.end()
                    if root(word[0]) == begins:
                        yield at, end, begins
            at = low.find(begins, end)


def _pieces(text: str, places: list[tuple[int, int, str]]) -> list[tuple[str, bool]]:
    pieces: list[tuple[str, bool]] = []
    last = 0
    for begin, end, _ in places:
        if begin > last:
            pieces.append((text[last:begin], False))
        pieces.append((text[begin:end], True))
        last = end
    if last < len(text):
        pieces.append((text[last:], False))
    return pieces


def highlight(text: str, parsed: Parsed) -> list[tuple[str, bool]]:
    """The text in pieces, in order and nothing left out; True for those that match a word of the query in any of its forms.

    Pieces are plain text: who puts them into HTML escapes each.

    Example:
        >>> from corollary.web.search.parse import parse
        >>> highlight("Optimizers save memory", parse("memory optimizer"))
        [('Optimizers', True), (' save ', False), ('memory', True)]
    """
    return _pieces(text, sorted(_places(text, _wanted(parsed))))


def excerpt(text: str, parsed: Parsed, *, width: int = 240) -> list[tuple[str, bool]]:
    """About ``width`` letters of the text where most of the query's words stand, cut between words, in pieces as `highlight`'s."""
    wanted = _wanted(parsed)
    if len(text) <= width:
        return _pieces(text, sorted(_places(text, wanted)))
    places = sorted(_places(text, wanted))
    best, start, last = 0, 0, 0
    inside: Counter[str] = Counter()  # the words that stand within the width from where a word begins
    for begin, _, word in places:
        while last < len(places) and places[last][0] < begin + width - 40:
            inside[places[last][2]] += 1
            last += 1
        if len(inside) > best:
            best, start = len(inside), begin
        inside[word] -= 1
        if not inside[word]:
            del inside[word]
    start = max(0, min(start - 40, len(text) - width))
    if start:
        start = text.find(" ", start) + 1 or start
    end = min(len(text), start + width)
    if end < len(text):
        end = max(text.rfind(" ", start, end), start + 1)
    cut = ("… " if start else "") + text[start:end] + (" …" if end < len(text) else "")
    shift = (2 if start else 0) - start
    return _pieces(cut, [(a + shift, b + shift, word) for a, b, word in places if start <= a and b <= end])

"""Search by words and by meaning, and likeness. The contract for pages, API and digest::

    search(store, query, filters=Filters(), *, after=None, size=20, mode="fusion") -> Results     # no query is an error
    similar(store, paper_id, *, size=10) -> list[tuple[PaperView, float]]                          # most alike first, cosine
    nearest_implemented(store, paper_id, *, size=3) -> list[tuple[PaperView, float]]               # among papers with a record
    like_text(store, text, *, size=10) -> list[tuple[PaperView, float]]                            # for digests: like these
    rank_for(store, liked_ids, candidate_ids) -> list[tuple[int, float]]                           # candidates, best first
    highlight(text, parsed) -> list[tuple[str, bool]]                     # pieces of the text, True where a word was matched
    excerpt(text, parsed, *, width=240) -> list[tuple[str, bool]]         # the same around the best place
    catch_up(store, *, progress=None) -> int                              # vectors of new papers; call it after imports
    warm(store) -> None                                                   # at start-up, in a thread: loads what the first search needs

A new paper is found by its words at once, because the index of words is written with it, and by its meaning after `catch_up`.
"""

from __future__ import annotations

from corollary.web.search.engine import catch_up, like_text, nearest_implemented, rank_for, search, similar, similar_ids, warm
from corollary.web.search.marks import excerpt, highlight
from corollary.web.search.parse import parse
from corollary.web.search.types import Filters, Hit, Mode, Parsed, Results

__all__ = [
    "Filters", "Hit", "Mode", "Parsed", "Results",
    "catch_up", "excerpt", "highlight", "like_text", "nearest_implemented", "parse", "rank_for", "search", "similar",
    "similar_ids", "warm",
]  # fmt: skip

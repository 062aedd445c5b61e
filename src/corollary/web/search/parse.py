"""Queries as people type them, made into parts."""

from __future__ import annotations

import re

from corollary.web.search.text import content, fold, tokens
from corollary.web.search.types import Parsed
from corollary.web.search.vocabulary import Vocabulary
from corollary.web.store.papers import arxiv_id

MAX_QUERY = 20_000  # a pasted abstract is a tenth of it
MAX_WORDS = 400
_PART = re.compile(r'(?P<field>author|authors|by|au)\s*:\s*(?:"(?P<quoted>[^"]*)"|(?P<word>\S+))|(?P<minus>(?<!\S)-)?"(?P<phrase>[^"]*)"|(?P<not>(?<!\S)-(?=\w)\S+)', re.IGNORECASE)  # fmt: skip
_DOI = re.compile(r"(?:https?://(?:dx\.)?doi\.org/|doi:\s*)?(10\.\d{4,9}/\S+)", re.IGNORECASE)
_URL = re.compile(r"https?://\S+", re.IGNORECASE)


def _name(text: str) -> str | None:
    found = arxiv_id(text)
    if found is not None:
        return found[0]
    match = _DOI.fullmatch(text)
    if match is not None:
        return f"doi:{match[1].lower()}"
    return f"url:{text}" if _URL.fullmatch(text) else None


def parse(query: str) -> Parsed:
    """Read a query.

    ``arxiv:2410.01623``, a bare id, a DOI or an address name a paper; ``author:chen`` and ``author:"Xi Chen"`` hold the search to
    a name; ``"a phrase"`` must stand as it is; ``-word`` and ``-"a phrase"`` must not. The rest are words. Nothing is an error:
    what is no part of this language is a word.

    Args:
        query: anything; beyond 20,000 letters it is cut.

    Example:
        >>> p = parse('low-rank "full rank training" author:chen -vision')
        >>> p.words, p.phrases, p.authors, p.excluded
        (('low', 'rank'), ('full rank training',), ('chen',), ('vision',))
        >>> parse("arXiv:2410.01623v3").name
        '2410.01623'
    """
    text = " ".join(query[:MAX_QUERY].replace("\0", " ").replace("“", '"').replace("”", '"').split())
    name = _name(text)
    phrases: list[str] = []
    authors: list[str] = []
    excluded: list[str] = []

    def take(match: re.Match[str]) -> str:
        said = match["quoted"] or match["word"] or match["phrase"] or (match["not"] or "").lstrip("-")
        part = " ".join(tokens(said))
        if part:
            target = authors if match["field"] else excluded if match["minus"] or match["not"] else phrases
            target.append(part)
        return " "

    # A pasted text is full of dashes and quotes that mean nothing.
    rest = _PART.sub(take, text) if len(text) <= 400 else text
    words = content(tokens(rest)[:MAX_WORDS])
    if not words and not phrases and not authors:  # nothing asked for but what must not be there
        words, excluded = excluded, []
    return Parsed(query, tuple(words), tuple(phrases[:8]), tuple(authors[:8]), tuple(excluded[:8]), {}, name)


def correct(parsed: Parsed, vocabulary: Vocabulary, missing: set[str]) -> Parsed:
    """Put the nearest known words in the place of those that no paper has.

    Args:
        parsed: a query as read.
        vocabulary: the words of the store.
        missing: those of the query that stand in no paper.
    """
    corrected: dict[str, str] = {}
    words: list[str] = []
    for word in parsed.words:
        near = None
        if word in missing and len(corrected) < 8:
            completed = vocabulary.complete(word, 1) if word == parsed.words[-1] and len(word) >= 3 else []
            near = completed[0] if completed else vocabulary.correct(word)
        if near is not None:
            corrected[word] = near
        words.append(near or word)
    return Parsed(
        parsed.query, tuple(dict.fromkeys(words)), parsed.phrases, parsed.authors, parsed.excluded, corrected, parsed.name
    )


def plain(parsed: Parsed) -> str:
    """What the query is about, as a text to take the meaning of."""
    if len(parsed.query) > 400:
        return parsed.query[:MAX_QUERY]
    text = _PART.sub(lambda match: f" {match['phrase'] or ''} " if not match["minus"] else " ", parsed.query)
    for wrong, right in parsed.corrected.items():
        text = re.sub(rf"(?<!\w){re.escape(wrong)}(?!\w)", right, fold(text))
    return " ".join(text.split())

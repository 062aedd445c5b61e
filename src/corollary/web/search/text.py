"""Words of a text, and what of them counts as the same."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_WORD = re.compile(r"[^\W_]+")
_GAPS = {code: " " for code in range(128) if not chr(code).isalnum()}
_SUFFIXES = (
    "izations", "ization", "ations", "ation", "ities", "ments", "ators", "ator", "ingly", "ively", "ments", "ment", "ings", "ives",
    "ers", "ors", "ing", "ies", "ity", "ive", "ion", "ions", "ate", "est", "ed", "er", "or", "es", "ly", "al", "s", "e", "y",
)  # fmt: skip

STOP = frozenset(
    [
        "a",
        "about",
        "above",
        "after",
        "again",
        "all",
        "also",
        "an",
        "and",
        "any",
        "are",
        "as",
        "at",
        "be",
        "because",
        "been",
        "before",
        "being",
        "below",
        "between",
        "both",
        "but",
        "by",
        "can",
        "could",
        "did",
        "do",
        "does",
        "doing",
        "done",
        "down",
        "during",
        "each",
        "either",
        "else",
        "even",
        "ever",
        "few",
        "for",
        "from",
        "further",
        "get",
        "gets",
        "give",
        "gives",
        "had",
        "has",
        "have",
        "having",
        "he",
        "her",
        "here",
        "hers",
        "him",
        "his",
        "how",
        "i",
        "if",
        "in",
        "into",
        "is",
        "it",
        "its",
        "itself",
        "just",
        "kind",
        "less",
        "let",
        "like",
        "made",
        "make",
        "makes",
        "many",
        "may",
        "me",
        "might",
        "more",
        "most",
        "much",
        "must",
        "my",
        "no",
        "nor",
        "not",
        "of",
        "off",
        "on",
        "once",
        "one",
        "only",
        "or",
        "other",
        "our",
        "ours",
        "out",
        "over",
        "own",
        "paper",
        "per",
        "please",
        "rather",
        "same",
        "she",
        "should",
        "show",
        "shows",
        "since",
        "so",
        "some",
        "such",
        "than",
        "that",
        "the",
        "their",
        "theirs",
        "them",
        "then",
        "there",
        "these",
        "they",
        "thing",
        "this",
        "those",
        "through",
        "to",
        "too",
        "under",
        "until",
        "up",
        "upon",
        "us",
        "use",
        "used",
        "uses",
        "using",
        "very",
        "via",
        "was",
        "way",
        "we",
        "well",
        "were",
        "what",
        "when",
        "where",
        "whether",
        "which",
        "while",
        "who",
        "whom",
        "why",
        "will",
        "with",
        "within",
        "without",
        "would",
        "you",
        "your",
    ]
)


def fold(text: str) -> str:
    """Lower case, without accents: as the index of words sees it."""
    if text.isascii():
        return text.lower()
    # Letters of other alphabets and of formulas have plain ones within, and lowering may bring accents: hence in this order.
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).lower())
    return "".join(c for c in text if not unicodedata.combining(c))


def spaced(text: str) -> str:
    """A folded text with a space before each word, so that ``" rank"`` stands where a word begins so, and nowhere else.

    Example:
        >>> spaced("(low-rank) training")
        '  low rank  training'
    """
    if not text.isascii():
        return " " + " ".join(_WORD.findall(text))
    return " " + text.translate(_GAPS)


def tokens(text: str) -> list[str]:
    """The words of a text in their order, folded.

    Example:
        >>> tokens("Low-rank SVD, à la Krylov")
        ['low', 'rank', 'svd', 'a', 'la', 'krylov']
    """
    return _WORD.findall(fold(text))


@lru_cache(maxsize=400_000)
def stem(word: str) -> str:
    """A word without its commonest endings; at least four letters stay.

    It only has to send the forms of one word to one place, for vectors and for the count of papers; the index of words has the
    stemmer of its engine.

    Example:
        >>> {stem(w) for w in ("optimizer", "optimizers", "optimization", "optimizing", "optimize")}
        {'optim'}
    """
    if len(word) < 5 or not word.isalpha():
        return word
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= 4:
            word = word[: -len(suffix)]
            break
    if word.endswith("iz") and len(word) > 6:
        word = word[:-2]
    return word


@lru_cache(maxsize=100_000)
def root(piece: str) -> str:
    """The stem of a word as it stands in a text; pages look at thousands of them, most of which they have seen.

    Example:
        >>> root("Optimizers")
        'optim'
    """
    return stem(fold(piece))


def content(words: list[str]) -> list[str]:
    """Words without those that say nothing about the subject, each once, in their order; all of them where none is left."""
    kept = [word for word in dict.fromkeys(words) if word not in STOP and (len(word) > 1 or not word.isascii())]
    return kept or list(dict.fromkeys(words))

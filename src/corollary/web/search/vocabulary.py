"""The words of the store with the number of papers each stands in: for spelling, completion and the cost of a query."""

from __future__ import annotations

import bisect
import string
from collections import defaultdict

from sqlalchemy import select

from corollary.web.search.text import stem
from corollary.web.store import Store, Term

_LETTERS = string.ascii_lowercase
MAX_LENGTH = 40


class Vocabulary:
    """Words and their counts, in memory.

    Args:
        counts: papers that each word stands in.
    """

    def __init__(self, counts: dict[str, int]) -> None:
        self.counts = counts
        self._sorted: list[str] | None = None
        self._near: dict[tuple[str, int], list[str]] | None = None
        stems: dict[str, int] = defaultdict(int)
        for word, count in counts.items():
            stems[stem(word)] += count
        self._stems = dict(stems)
        self.most = max(stems.values(), default=0)

    @classmethod
    def load(cls, store: Store) -> Vocabulary:
        """The words as they stand in the store."""
        with store.reading() as connection:
            return cls(dict(connection.execute(select(Term.term, Term.papers)).tuples().all()))

    def papers(self, word: str) -> int:
        """About how many papers a word stands in, in any of its forms."""
        return self._stems.get(stem(word), 0)

    def complete(self, start: str, limit: int = 4) -> list[str]:
        """The most frequent words that begin so."""
        if self._sorted is None:
            self._sorted = sorted(self.counts)
        low = bisect.bisect_left(self._sorted, start)
        high = bisect.bisect_left(self._sorted, start + "\U0010ffff", lo=low)
        return sorted(self._sorted[low:high], key=lambda word: -self.counts[word])[:limit]

    def correct(self, word: str) -> str | None:
        """The most frequent word at one edit (a letter more, less, other, or two swapped), else at two; None where none is near.

        Two edits are looked for among words of the same first letter that are at most two letters longer or shorter, and only
        for words of six letters and more.
        """
        if len(word) < 4 or len(word) > MAX_LENGTH or not word.isascii() or not word.isalpha():
            return None
        best = max(self._one_edit(word), key=lambda near: self.counts[near], default=None)
        if best is not None or len(word) < 6:
            return best
        if self._near is None:
            buckets = defaultdict(list)
            for known in self.counts:
                if len(known) >= 5:
                    buckets[known[0], len(known)].append(known)
            self._near = dict(buckets)
        letters = set(word)
        lengths = range(len(word) - 2, len(word) + 3)
        # Each edit brings at most two letters that only one of the words has, so most words fall out before they are compared.
        alike = (
            known
            for length in lengths
            for known in self._near.get((word[0], length), ())
            if len(letters.symmetric_difference(known)) <= 4
        )
        near = [(edits, -self.counts[known], known) for known in alike if (edits := distance(word, known, 2)) <= 2]
        return min(near)[2] if near else None

    def _one_edit(self, word: str) -> set[str]:
        cuts = [(word[:i], word[i:]) for i in range(len(word) + 1)]
        edits = {a + b[1:] for a, b in cuts if b}
        edits |= {a + b[1] + b[0] + b[2:] for a, b in cuts if len(b) > 1}
        edits |= {a + c + b[1:] for a, b in cuts if b for c in _LETTERS}
        edits |= {a + c + b for a, b in cuts for c in _LETTERS}
        return {edit for edit in edits if edit in self.counts}


def distance(a: str, b: str, most: int) -> int:
    """Optimal string alignment: insertions, deletions, substitutions and swaps of neighbours; ``most + 1`` where there are more.

    Example:
        >>> distance("optmizer", "optimizer", 2), distance("lerning", "learning", 2), distance("abc", "xyz", 2)
        (1, 1, 3)
    """
    if abs(len(a) - len(b)) > most:
        return most + 1
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, last, row = row, before, [i]
        for j, y in enumerate(b, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
        if min(row) > most:
            return most + 1
    return min(row[-1], most + 1)

"""A store of a million generated papers: how fast it fills, and how fast it answers 50 requests at once.

Usage: python -m benchmarks.web_scale [--papers 1000000] [--folder DIR] [--json FILE]
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date, timedelta
from typing import Any

import numpy as np

_SYLLABLES = [
    c + v
    for c in [
        "b",
        "c",
        "d",
        "f",
        "g",
        "h",
        "j",
        "k",
        "l",
        "m",
        "n",
        "p",
        "r",
        "s",
        "t",
        "v",
        "w",
        "z",
        "br",
        "cl",
        "dr",
        "fl",
        "gr",
        "pl",
        "pr",
        "st",
        "tr",
        "th",
        "sh",
    ]
    for v in "aeiou"
]


def vocabulary(size: int = 200_000, seed: int = 0) -> list[str]:
    """Made-up words that differ from one another, short ones first, as in a language."""
    rng = np.random.default_rng(seed)
    words: dict[str, None] = {}
    while len(words) < size:
        length = 1 + min(4, int(np.log10(len(words) + 10)) - 1) + int(rng.integers(0, 2))
        words[
            "".join(_SYLLABLES[i] for i in rng.integers(len(_SYLLABLES), size=length)) + str(rng.choice(["", "n", "r", "l"]))
        ] = None
    return list(words)


def papers(count: int, *, seed: int = 1, batch: int = 5000, last: date = date(2026, 5, 8)) -> Iterator[dict[str, Any]]:
    """Papers whose words follow Zipf's law, a third of them from the paper's own topic; 350 a day, as JSONL items.

    Title 6 to 12 words, abstract 120 to 180, 1 to 6 authors out of 40,000 surnames: about 1.2 kB of text to a paper.
    """
    rng = np.random.default_rng(seed)
    words = np.array(vocabulary())
    mass = 1 / np.arange(1, len(words) + 1) ** 1.05
    cumulative = np.cumsum(mass / mass.sum())
    topics = rng.integers(200, len(words), size=(500, 250))  # the words that a topic has for itself
    given, names = words[2000:3000], words[3000:43000]
    for start in range(0, count, batch):
        n = min(batch, count - start)
        ids = np.searchsorted(cumulative, rng.random((n, 192)))
        topic = rng.integers(len(topics), size=n)
        own = rng.random((n, 192)) < 1 / 3
        # Within a topic, too, few words are frequent.
        pick = (rng.random((n, 192)) ** 3 * topics.shape[1]).astype(np.int64)
        ids = np.where(own, topics[topic[:, None], pick], ids)
        text = words[np.minimum(ids, len(words) - 1)]
        lengths = rng.integers(120, 181, size=n)
        heads = rng.integers(6, 13, size=n)
        teams = rng.integers(1, 7, size=n)
        people = np.char.add(
            np.char.add(np.char.capitalize(given[rng.integers(1000, size=(n, 6))]), " "),
            np.char.capitalize(names[rng.integers(40000, size=(n, 6))]),
        )
        votes = rng.integers(0, 200, size=n)
        for i in range(n):
            number = start + i
            day = last - timedelta(days=number // 350)
            row = text[i]
            title = " ".join(row[: heads[i]])
            yield {
                "id": f"{day:%y%m}.{number % 350 + 350 * day.day:05d}" if number < 0 else f"gen:{number}",
                "title": title[0].upper() + title[1:],
                "authors": people[i, : teams[i]].tolist(),
                "abstract": " ".join(row[12 : 12 + lengths[i]]) + ".",
                "date": day.isoformat(),
                "votes": int(votes[i]),
                "categories": ["cs.LG" if topic[i] % 3 else "stat.ML"],
            }


if __name__ == "__main__":
    for paper in papers(3):
        print(json.dumps(paper))

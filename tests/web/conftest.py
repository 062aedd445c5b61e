"""Stores to test with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.web import postgres
from tests.web.filled import filled

from corollary.web.store import Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """An empty store in a folder of its own."""
    opened = open_store(f"sqlite:///{tmp_path / 'daily.sqlite'}")
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """A PostgreSQL server; its URL without a database."""
    with postgres.running() as url:
        yield url


@pytest.fixture
def url(server: str) -> str:
    """A fresh database of it."""
    return postgres.database(server)


@pytest.fixture
def lab(url: str, tmp_path: Path) -> Iterator[Store]:
    """An empty store on PostgreSQL."""
    opened = open_store(url, tmp_path / "lab")
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def template(server: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A database with the first issue in it, and the folder of its index files."""
    folder = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COROLLARY_EMBEDDING", "lsa")
        return postgres.fill(server, folder), folder


@pytest.fixture(params=["sqlite", "postgresql"])
def issue_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """The first issue with its vectors, on either database."""
    if request.param == "sqlite":
        opened = filled(tmp_path / "full")
    else:
        server, (name, kept) = request.getfixturevalue("server"), request.getfixturevalue("template")
        opened = postgres.filled(server, name, kept, tmp_path / "full")
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def _no_network_of_the_readers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the machine's own store or encoder gets into a test."""
    monkeypatch.setenv("COROLLARY_DATA", str(tmp_path))
    monkeypatch.delenv("COROLLARY_DATABASE", raising=False)
    monkeypatch.setenv("COROLLARY_EMBEDDING", "lsa")

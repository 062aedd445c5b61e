"""A store with the first issue in it, and the app of it."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import uvicorn
from starlette.testclient import TestClient

from corollary.web.app import create_app
from corollary.web.importers import first_issue
from corollary.web.search import catch_up
from corollary.web.settings import Settings
from corollary.web.store import Store, open_store

HERE = "http://127.0.0.1:8000"


@cache
def _first() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="corollary-filled-"))
    store = open_store(f"sqlite:///{folder / 'daily.sqlite'}")
    first_issue(store)
    catch_up(store)
    store.close()
    return folder


def filled(folder: Path) -> Store:
    """A store of one's own with the first issue and its vectors, copied from one that is made once."""
    shutil.copytree(_first(), folder, dirs_exist_ok=True)
    return open_store(f"sqlite:///{folder / 'daily.sqlite'}")


@contextmanager
def serving(store: Store, *, settings: Settings | None = None, mail: Any = None, threads: bool = True) -> Iterator[Any]:
    """The app on a port of its own, for a browser; without ``threads`` nothing works in the background."""
    app = create_app(store, settings or Settings(jobs=False), mail=mail)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="on" if threads else "off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while not server.started and time.monotonic() < until:
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    object.__setattr__(app.state.settings, "address", f"http://127.0.0.1:{port}")
    try:
        yield app
    finally:
        server.should_exit = True
        thread.join(timeout=30)


@contextmanager
def page(store: Store, *, settings: Settings | None = None, mail: Any = None) -> Iterator[TestClient]:
    """The page of a store, without its threads: what works in the background is asked for by the tests."""
    app = create_app(store, settings or Settings(jobs=False), mail=mail)
    with_address = settings.address if settings else HERE
    yield TestClient(app, base_url=with_address, raise_server_exceptions=True)

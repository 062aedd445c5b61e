"""The daily page as one ASGI app.

What a router finds in ``request.app.state``:

- ``store``, ``settings``; ``verdicts`` (`corollary.web.board.Verdicts`: records with what was measured);
- ``sessions`` and ``limits`` (`corollary.web.guard`); ``jobs``, the runner of this process, or None; ``mail``, which sends one
  message, and ``outbox``, which sends those in the store, or None where no mail is set up; ``ready``, an event that is set once
  the first search needs to wait for nothing.

``who(request)`` says who asks, ``await checked_form(request)`` reads a form that was sent from one of our own pages, and
`corollary.web.pages.render.respond` renders a template, to be kept until something changes with ``keep=True``.
"""

from __future__ import annotations

import logging
import mimetypes
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from importlib.resources import files

from anyio import to_thread
from fastapi import APIRouter, Depends, FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from corollary import __version__
from corollary.report import shell
from corollary.web import api, digest, feeds
from corollary.web.api.asking import reading
from corollary.web.board import Verdicts
from corollary.web.guard import Guard, Limits, Sessions
from corollary.web.jobs import JobRunner
from corollary.web.pages import account, catalogue, desk, errors, lists, paper, runs, search
from corollary.web.search import warm
from corollary.web.settings import Settings
from corollary.web.store import Store, record_verdicts

_LOG = logging.getLogger("corollary.web")
_STATIC = frozenset({"web.css", "app.js", "icon.svg", "vendor/htmx.min.js"})
static = APIRouter(include_in_schema=False)


@cache
def _file(name: str) -> bytes:
    if name == "report.css":
        return shell.asset(name).encode()
    return files("corollary.web").joinpath("static", *name.split("/")).read_bytes()


@static.get("/static/{name:path}")
async def static_file(name: str) -> Response:
    """A file that pages load. Its address changes with its content, so it may be kept for good."""
    if name not in _STATIC and name != "report.css":
        raise HTTPException(404, "there is nothing at this address")
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    return Response(_file(name), media_type=kind, headers={"cache-control": "public, max-age=31536000, immutable"})


@static.get("/favicon.ico")
async def favicon() -> Response:
    """Where browsers look that have not read the page."""
    return Response(_file("icon.svg"), media_type="image/svg+xml", headers={"cache-control": "public, max-age=86400"})


@static.get("/robots.txt")
async def robots() -> Response:
    """Pages of one reader's own are nothing for a search engine."""
    return Response("User-agent: *\nDisallow: /\n", media_type="text/plain")


@static.get("/healthz")
def health(request: Request) -> Response:
    """Whether the server answers and its store can be read; for whoever watches over it."""
    request.app.state.store.version()
    return JSONResponse({"status": "ok", "version": __version__})


def create_app(
    store: Store, settings: Settings | None = None, *, mail: digest.Mailer | None = None, runner: bool = True
) -> FastAPI:
    """The app of an open store.

    Args:
        store: stays the caller's, who closes it.
        settings: how the page is served; by default to one reader on this machine.
        mail: None: nothing is mailed, and subscriptions are not offered.
        runner: whether this process works off the queue of runs; False where another of the same server does.

    Returns:
        An ASGI app, to be served by any number of processes; each runs at most one job at a time.

    Example:
        >>> import tempfile
        >>> from starlette.testclient import TestClient
        >>> from corollary.web.store import open_store
        >>> folder = tempfile.TemporaryDirectory()
        >>> store = open_store(f"sqlite:///{folder.name}/daily.sqlite")
        >>> client = TestClient(create_app(store), base_url="http://127.0.0.1:8000")
        >>> client.get("/healthz").json()["status"]
        'ok'
        >>> store.close(); folder.cleanup()
    """
    settings = settings or Settings()
    verdicts, sessions = Verdicts(settings.results, settings.runs), Sessions(store, settings)

    def version() -> str:
        return f"{store.version()}.{verdicts.version()}"

    def changed() -> None:
        verdicts.changed()
        record_verdicts(store, verdicts.rows)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        def prepare() -> None:
            try:
                changed()
                warm(store)
            except Exception as error:  # noqa: BLE001 - the pages come all the same, and the first search does what failed here
                _LOG.warning("could not get ready beforehand: %s", type(error).__name__)
            finally:
                state.ready.set()

        threading.Thread(target=prepare, name="corollary-warm", daemon=True).start()
        if store.dialect == "sqlite":
            # Answers take this processor's time, not another machine's: more threads than that wait for one another.
            to_thread.current_default_thread_limiter().total_tokens = max(2, os.cpu_count() or 1)
        workers = [worker for worker in (app.state.jobs, app.state.outbox) if worker is not None]
        for worker in workers:
            worker.start()
        yield
        for worker in workers:
            worker.stop()

    app = FastAPI(
        title="Corollary", version=__version__, summary="Papers by day, and what was measured of them.", lifespan=lifespan,
        docs_url=None, redoc_url=None, openapi_url="/api/openapi.json",
    )  # fmt: skip
    state = app.state
    state.store, state.settings, state.verdicts, state.sessions = store, settings, verdicts, sessions
    state.limits, state.mail, state.ready = Limits(), mail, threading.Event()
    state.outbox = digest.OutboxRunner(store, mail) if mail is not None else None
    state.jobs = JobRunner(store, settings, changed) if settings.jobs and runner else None
    app.include_router(static)
    for router in (lists.router, search.router):  # what is asked for most is matched first
        app.include_router(router, dependencies=[Depends(reading)])
    for router in (api.router, feeds.router, digest.router, account.router):
        app.include_router(router)
    for router in (catalogue.router, paper.router, desk.router, runs.router):
        app.include_router(router, dependencies=[Depends(reading)])
    errors.install(app)
    app.add_middleware(errors.Broken)
    app.add_middleware(Guard, settings=settings, sessions=sessions, version=version)  # the outermost: added last
    return app

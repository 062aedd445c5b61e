"""Runs of `corollary verify` that readers start."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from corollary.report.views import state_of
from corollary.web.guard import Forbidden, NotSignedIn, checked_form, client, who
from corollary.web.jobs import JobView, QueueFull, cancel_job, get_job, recent_jobs, start_job
from corollary.web.pages.render import respond, wants_fragment

router = APIRouter(include_in_schema=False)


def may_run(request: Request) -> int:
    """The reader, who may start runs; raises where they may not."""
    asking = who(request)
    if asking.reader is None:
        raise NotSignedIn
    if not asking.may_run:
        raise Forbidden("your account may not start runs; whoever keeps this server can allow it")
    return asking.reader


def may_cancel(request: Request, job: JobView) -> bool:
    """Whether the reader started this run, or keeps the server."""
    asking = who(request)
    return asking.admin or (asking.reader is not None and asking.reader == job.reader_id)


def start(request: Request, slug: str, scale: str, seed: int) -> JobView:
    """Check and queue a run."""
    app, reader = request.app.state, may_run(request)
    if app.verdicts.paper(slug) is None:
        raise HTTPException(404, "there is no method of this name")
    if scale not in app.settings.scales:
        raise HTTPException(400, f"scale must be one of {', '.join(app.settings.scales)}")
    app.limits.take("run", client(request))
    try:
        job = start_job(app.store, slug, scale=scale, seed=seed, reader=reader, most=app.settings.job_queue)
    except QueueFull as error:
        raise HTTPException(503, str(error)) from error
    if app.jobs is not None:
        app.jobs.wake()
    return job


def stop(request: Request, number: int) -> JobView:
    """Check and cancel a run."""
    store = request.app.state.store
    job = get_job(store, number)
    if job is None:
        raise HTTPException(404, "there is no such run")
    if not may_cancel(request, job):
        raise Forbidden("only who started a run, or who keeps the server, can cancel it")
    return cancel_job(store, number) or job


def _with_states(job: JobView) -> list[tuple[dict[str, Any], Any]]:
    rows = (job.result or {}).get("rows", [])
    return [(row, state_of(row.get("verdict"))) for row in rows]


@router.post("/runs")
async def run_it(request: Request) -> Response:
    """Start a run."""
    form = await checked_form(request)
    seed = str(form.get("seed") or "0")
    if not (seed.isascii() and seed.isdigit() and len(seed) < 10):
        raise HTTPException(400, "a seed is a whole number from 0 up")
    job = await run_in_threadpool(start, request, str(form.get("slug") or ""), str(form.get("scale") or "laptop"), int(seed))
    return RedirectResponse(f"/runs/{job.id}", 303)


@router.get("/runs")
def all_runs(request: Request) -> Response:
    """The newest runs."""
    app = request.app.state
    jobs = recent_jobs(app.store)
    titles = {slug: view.paper.title for slug, view in app.verdicts.by_slug.items()}
    return respond(request, "runs.html", current="runs", jobs=jobs, titles=titles)


@router.get("/runs/{number}")
def one_run(request: Request, number: int) -> Response:
    """One run and its progress; asked by HTMX, the part that changes."""
    app = request.app.state
    job = get_job(app.store, number)
    if job is None:
        raise HTTPException(404, "there is no such run")
    return respond(
        request, "_run.html" if wants_fragment(request) else "run.html", current="runs", job=job, rows=_with_states(job),
        record=app.verdicts.paper(job.slug), may_cancel=may_cancel(request, job), refresh=3 if job.open else 0,
        working=app.settings.jobs,
    )  # fmt: skip


@router.post("/runs/{number}/cancel")
async def cancel(request: Request, number: int) -> Response:
    """Cancel a run."""
    await checked_form(request)
    await run_in_threadpool(stop, request, number)
    return RedirectResponse(f"/runs/{number}", 303)

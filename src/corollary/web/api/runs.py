"""Runs of `corollary verify` on this server."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request
from starlette.exceptions import HTTPException

from corollary.web.api.asking import changing, reading
from corollary.web.api.schemas import ERRORS, Error, NewRun, Run
from corollary.web.jobs import JobView, get_job, recent_jobs
from corollary.web.pages.runs import start, stop

router = APIRouter(
    prefix="/api/corollary/runs", tags=["runs"], responses={**ERRORS, 403: {"model": Error}, 503: {"model": Error}}
)
Number = Annotated[int, Path(ge=1, le=2**63 - 1)]


def run_of(job: JobView) -> Run:
    """A run as data."""
    return Run(
        id=job.id, slug=job.slug, scale=job.scale, seed=job.seed, state=job.state, progress=job.progress, error=job.error, log=job.log,
        rows=(job.result or {}).get("rows", []), created_at=job.created_at, started_at=job.started_at, finished_at=job.finished_at,
    )  # fmt: skip


@router.get("", dependencies=[Depends(reading)])
def newest_runs(request: Request) -> list[Run]:
    """The newest runs, of all papers."""
    return [run_of(job) for job in recent_jobs(request.app.state.store)]


@router.post("", status_code=201, dependencies=[Depends(changing)])
def start_run(request: Request, asked: NewRun) -> Run:
    """Start a run; one of the same paper, scale and seed that is still open is given back instead."""
    return run_of(start(request, asked.slug, asked.scale, asked.seed))


@router.get("/{number}", dependencies=[Depends(reading)])
def one_run(request: Request, number: Number) -> Run:
    """One run and its progress."""
    job = get_job(request.app.state.store, number)
    if job is None:
        raise HTTPException(404, "there is no such run")
    return run_of(job)


@router.post("/{number}/cancel", dependencies=[Depends(changing)])
def cancel_run(request: Request, number: Number) -> Run:
    """Cancel a run; one that has ended stays as it is."""
    return run_of(stop(request, number))

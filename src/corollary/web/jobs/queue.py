"""The queue: rows of `corollary.web.store.Job` of kind ``verify``."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from corollary.web.store import Job, Store, now

KIND = "verify"
OPEN = ("queued", "running")


class QueueFull(Exception):
    """As many runs wait as may."""


@dataclass(frozen=True, slots=True)
class JobView:
    """One run as the pages show it."""

    id: int
    slug: str
    scale: str
    seed: int
    state: str
    progress: float
    log: str
    result: dict[str, Any] | None
    error: str
    reader_id: int | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @property
    def open(self) -> bool:
        """Whether it still waits or runs."""
        return self.state in OPEN

    @property
    def command(self) -> str:
        """What does the same on the command line."""
        seed = f" --seed {self.seed}" if self.seed else ""
        scale = f" --scale {self.scale}" if self.scale != "laptop" else ""
        return f"corollary verify {self.slug} --controls{scale}{seed}"

    @property
    def seconds(self) -> float | None:
        """How long it has run."""
        if self.started_at is None:
            return None
        return ((self.finished_at or now()) - self.started_at).total_seconds()


def view(job: Job) -> JobView:
    """A row as the pages show it."""
    args = job.args
    return JobView(
        job.id, str(args.get("slug", "")), str(args.get("scale", "")), int(args.get("seed", 0)), job.state, job.progress, job.log,
        job.result, job.error, job.reader_id, job.created_at, job.started_at, job.finished_at,
    )  # fmt: skip


def start_job(store: Store, slug: str, *, scale: str, seed: int = 0, reader: int | None = None, most: int = 20) -> JobView:
    """Put a run into the queue. One of the same paper, scale and seed that is still open is given back instead.

    Raises:
        QueueFull: where ``most`` are open already.
    """
    args = {"slug": slug, "scale": scale, "seed": seed}
    with store.writing() as session:
        waiting = list(session.scalars(select(Job).where(Job.kind == KIND, Job.state.in_(OPEN)).order_by(Job.id)))
        for job in waiting:
            if job.args == args:
                return view(job)
        if len(waiting) >= most:
            raise QueueFull(f"{len(waiting)} runs wait already; try again when some are done")
        job = Job(kind=KIND, args=args, reader_id=reader)
        session.add(job)
        session.flush()
        return view(job)


def get_job(store: Store, job_id: int) -> JobView | None:
    """One run; None where there is none of this number."""
    if not 0 < job_id < 2**63:
        return None
    with store.reading() as connection, Session(connection) as session:
        job = session.get(Job, job_id)
        return view(job) if job is not None and job.kind == KIND else None


def recent_jobs(store: Store, *, slug: str | None = None, limit: int = 50) -> list[JobView]:
    """The newest runs, of all papers or of one."""
    query = select(Job).where(Job.kind == KIND).order_by(Job.id.desc())
    if slug is not None:
        query = query.where(Job.args["slug"].as_string() == slug)
    with store.reading() as connection, Session(connection) as session:
        return [view(job) for job in session.scalars(query.limit(limit))]


def cancel_job(store: Store, job_id: int) -> JobView | None:
    """Cancel a run that waits or runs; its worker sees it within a second. One that has ended stays as it is."""
    with store.writing() as session:
        job = session.get(Job, job_id) if 0 < job_id < 2**63 else None
        if job is None or job.kind != KIND:
            return None
        if job.state in OPEN:
            job.state, job.finished_at = "cancelled", now()
        return view(job)


def open_jobs(store: Store) -> int:
    """How many runs wait or run."""
    with store.reading() as connection:
        return connection.scalar(select(func.count()).select_from(Job).where(Job.kind == KIND, Job.state.in_(OPEN))) or 0

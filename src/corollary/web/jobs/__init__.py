"""Runs that readers start from the page: a queue in the store, a process for each run, and its progress as it goes.

A run is `corollary verify SLUG --controls` in a process of its own. Its trials go into the same store that the command line uses, so
a run that is cancelled, killed or cut off by a restart goes on where it stopped.
"""

from __future__ import annotations

from corollary.web.jobs.queue import JobView, QueueFull, cancel_job, get_job, recent_jobs, start_job
from corollary.web.jobs.runner import JobRunner

__all__ = ["JobRunner", "JobView", "QueueFull", "cancel_job", "get_job", "recent_jobs", "start_job"]

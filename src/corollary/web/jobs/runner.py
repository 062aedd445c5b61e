"""Works the queue off: one run at a time, its progress written down as it goes."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, cast

from sqlalchemy import CursorResult, select, update

from corollary.report.numbers import interval
from corollary.web.background import Background
from corollary.web.jobs.queue import KIND
from corollary.web.settings import Settings
from corollary.web.store import Job, Store, now

_LOOK_EVERY = 1.0  # seconds between looks at the queue, and between two writings of progress
_BEAT_EVERY = 5.0
_DEAD_AFTER = timedelta(seconds=30)
_LOG = 20_000  # letters kept of a log
_PATIENCE = 10.0  # seconds that a cancelled run has to end by itself


class JobRunner(Background):
    """A thread that takes runs from the queue. Stopped, it puts one that is not done back, with its finished trials kept.

    Args:
        store: where the queue is.
        settings: where runs keep their evidence.
        changed: called after a run, when verdicts may be new.
    """

    def __init__(self, store: Store, settings: Settings, changed: Callable[[], None] = lambda: None) -> None:
        self.store, self.settings, self._changed = store, settings, changed
        self.name = f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        super().__init__("corollary-jobs", _LOOK_EVERY, _PATIENCE + 5)

    def work(self) -> bool:
        """Work off one run."""
        job = self._take()
        if job is not None:
            _Run(self, *job).go()
            self._changed()
        return job is not None

    def _take(self) -> tuple[int, dict[str, Any]] | None:
        """The oldest run that waits, now ours. Runs whose worker has died are put back first."""
        with self.store.reading() as connection:
            dead = select(Job.id).where(Job.kind == KIND, Job.state == "running", Job.heartbeat < now() - _DEAD_AFTER)
            waiting = select(Job.id).where(Job.kind == KIND, Job.state == "queued").order_by(Job.id).limit(1)
            lost = list(connection.scalars(dead))
            found = connection.scalar(waiting)
        if not lost and found is None:
            return None
        with self.store.writing() as session:
            if lost:
                again = update(Job).where(Job.id.in_(lost), Job.state == "running", Job.heartbeat < now() - _DEAD_AFTER)
                session.execute(again.values(state="queued", worker=None))
            job = session.scalar(select(Job).where(Job.kind == KIND, Job.state == "queued").order_by(Job.id).limit(1))
            if job is None:
                return None
            ours = update(Job).where(Job.id == job.id, Job.state == "queued")
            taken = session.execute(
                ours.values(
                    state="running", worker=self.name, started_at=now(), heartbeat=now(), progress=0.0, log="", result=None
                )
            )
            return (job.id, dict(job.args)) if cast("CursorResult[Any]", taken).rowcount == 1 else None


class _Run:
    """One run on its way."""

    def __init__(self, runner: JobRunner, job_id: int, args: dict[str, Any]) -> None:
        self.runner, self.job_id, self.args = runner, job_id, args
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.claims = 1
        self.rows: list[dict[str, Any]] = []
        self.now: dict[str, Any] = {}
        self.log = "Loading the paper's code…\n"
        self.errors = ""
        self.ended = False
        self.fraction = 0.0

    def go(self) -> None:
        """Start the process, follow it, and write down how it ended."""
        asked = {**self.args, "store": str(self.runner.settings.runs.resolve())}
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "corollary.web.jobs.worker", json.dumps(asked)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace",
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._end("failed", f"the run could not be started: {error.strerror}")
            return
        readers = [
            threading.Thread(target=self._read, args=(process,), daemon=True),
            threading.Thread(target=self._complaints, args=(process,), daemon=True),
        ]
        for reader in readers:
            reader.start()
        try:
            cancelled = self._follow(process)
        finally:
            _end_process(process)
            for reader in readers:
                reader.join(timeout=2)
        if cancelled:
            self._write(beat=False)
            self.runner.wake()
            return
        if self.runner.stopping() and not self.ended:
            self._end("queued", "")
            return
        if self.ended:
            self._end("done", "")
            return
        said = self.errors.strip().splitlines()
        self._end("failed", said[-1][:500] if said else f"the run ended with status {process.returncode}")

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def _complaints(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            self.errors = (self.errors + line)[-_LOG:]

    def _follow(self, process: subprocess.Popen[str]) -> bool:
        """Take in what the process says until it ends; True where a reader cancelled it."""
        written = beat = time.monotonic()
        news = True
        while True:
            try:
                line = self.lines.get(timeout=0.25)
                if line is None:
                    return False
                self._hear(line)
                news = True
            except queue.Empty:
                pass
            if self.runner.stopping():
                return False
            at = time.monotonic()
            if at - written >= _LOOK_EVERY:
                written = at
                if news or at - beat >= _BEAT_EVERY:
                    beat = at
                    if not self._write():
                        return True
                    news = False
                elif self._state() != "running":
                    return True

    def _hear(self, line: str) -> None:
        try:
            said = json.loads(line)
            event = said["event"]
        except (ValueError, KeyError, TypeError):
            return  # a claim that prints something of its own
        if event == "paper":
            self.claims = max(1, int(said["claims"]))
        elif event == "start":
            self.now = said
            again = f", {said['done']} kept from before" if said["done"] else ""
            what = "control" if said["arm"] == "control" else "method"
            self.log += f"{said['claim']}: {what}, {said['total']} trials{again}\n"
        elif event == "advance":
            self.now["done"] = self.now.get("done", 0) + 1
        elif event == "finish":
            row = said["row"]
            self.rows.append(row)
            self.now = {}
            words, bracket = interval(row["effect"], row["ci_low"], row["ci_high"], "×" if row["kind"] == "ratio" else "")
            verdict = row["verdict"] or "ran; smoke scale gives no verdict"
            self.log += f"{row['claim']}: {verdict}  {words} {bracket}".rstrip() + "\n"
        elif event == "end":
            self.ended = True
        done, total = self.now.get("done", 0), max(1, self.now.get("total", 1))
        arm = 0.5 if self.now.get("arm") == "control" else 0.0
        within = arm + 0.5 * min(1.0, done / total) if self.now else 0.0
        self.fraction = min(1.0, (len(self.rows) + within) / self.claims)

    def _state(self) -> str | None:
        with self.runner.store.reading() as connection:
            return connection.scalar(select(Job.state).where(Job.id == self.job_id))

    def _write(self, *, beat: bool = True) -> bool:
        """Write progress down; False where the run is no longer ours to go on with."""
        values: dict[str, Any] = {"progress": self.fraction, "log": self.log[-_LOG:], "result": {"rows": self.rows}}
        if beat:
            values["heartbeat"] = now()
        with self.runner.store.writing() as session:
            mine = update(Job).where(Job.id == self.job_id, Job.worker == self.runner.name)
            if beat:
                mine = mine.where(Job.state == "running")
            return cast("CursorResult[Any]", session.execute(mine.values(**values))).rowcount == 1

    def _end(self, state: str, error: str) -> None:
        values: dict[str, Any] = {
            "state": state, "error": error, "progress": 1.0 if state == "done" else self.fraction, "log": self.log[-_LOG:],
            "result": {"rows": self.rows}, "finished_at": None if state == "queued" else now(), "worker": None,
        }  # fmt: skip
        with self.runner.store.writing() as session:
            session.execute(
                update(Job)
                .where(Job.id == self.job_id, Job.worker == self.runner.name, Job.state == "running")
                .values(**values)
            )


def _end_process(process: subprocess.Popen[str]) -> None:
    """Close its input, which ends it; kill it if it does not."""
    with suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()
    try:
        process.wait(timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

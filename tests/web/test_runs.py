"""Runs that readers start: worked off by a process of their own, cancelled, and gone on with after a server was killed."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from sqlalchemy import update
from tests.web.filled import filled, page
from tests.web.processes import alive, free_port, wait

from corollary.web.jobs import JobRunner, QueueFull, cancel_job, get_job, start_job
from corollary.web.settings import Settings
from corollary.web.store import Job, now

QUICK = "large-step-perceptron"


@pytest.fixture
def store(tmp_path):
    opened = filled(tmp_path / "full")
    yield opened
    opened.close()


def ended(store, number):
    job = get_job(store, number)
    return job if not job.open else None


def test_the_same_run_is_queued_once_and_the_queue_ends(store):
    first = start_job(store, QUICK, scale="smoke")
    assert start_job(store, QUICK, scale="smoke").id == first.id
    assert start_job(store, QUICK, scale="laptop").id != first.id
    with pytest.raises(QueueFull):
        start_job(store, "fira", scale="smoke", most=2)


def test_a_run_is_done_and_another_is_cancelled(store, tmp_path):
    settings = Settings(runs=tmp_path / "runs")
    job, waiting = start_job(store, QUICK, scale="smoke"), start_job(store, "fira", scale="laptop")
    runner = JobRunner(store, settings)
    runner.start()
    try:
        done = wait(lambda: ended(store, job.id))
        assert (done.state, done.progress, done.error) == ("done", 1.0, "")
        assert len(done.result["rows"]) > 1
        assert all(row["verdict"] is None for row in done.result["rows"])
        assert list((tmp_path / "runs").iterdir())
        wait(lambda: get_job(store, waiting.id).state == "running")
        cancel_job(store, waiting.id)
        assert wait(lambda: ended(store, waiting.id)).state == "cancelled"
    finally:
        runner.stop()


def test_a_run_that_cannot_start_says_why(store, tmp_path):
    job = start_job(store, "no-such-paper", scale="smoke")
    runner = JobRunner(store, Settings(runs=tmp_path / "runs"))
    runner.start()
    try:
        failed = wait(lambda: ended(store, job.id))
        assert failed.state == "failed"
        assert "no-such-paper" in failed.error
    finally:
        runner.stop()


def test_only_known_methods_and_scales_run(store):
    with page(store) as client:
        token = re.search(r'name="csrf" value="([^"]+)"', client.get("/trending").text)[1]
        for fields, status in (
            ({"slug": "nothing"}, 404),
            ({"slug": "fira", "scale": "full"}, 400),
            ({"slug": "fira", "seed": "-1"}, 400),
        ):
            assert client.post("/runs", data={"csrf": token, **fields}).status_code == status
        shown = client.post("/runs", data={"csrf": token, "slug": "fira", "scale": "smoke", "seed": "3"}).text
        assert "corollary verify fira --controls --scale smoke --seed 3" in shown or "--seed 3" in shown
        assert "Waiting for its turn" in shown


# ------------------------------------------------------------------------------------------------------ corollary serve


def serve(tmp_path, port, *more):
    command = [sys.executable, "-m", "corollary", "serve", "--no-open", "--port", str(port), "--store", str(tmp_path / "runs")]
    command += ["--database", f"sqlite:///{tmp_path / 'full' / 'daily.sqlite'}", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def up(port):
    try:
        return httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def test_a_run_outlives_a_killed_server(store, tmp_path):
    """The run's process ends with its server; the next server takes the run up, with the trials that were done."""
    port = free_port()
    first = serve(tmp_path, port)
    try:
        wait(lambda: up(port))
        answer = httpx.post(f"http://127.0.0.1:{port}/api/corollary/runs", json={"slug": "fira", "scale": "smoke"})
        assert answer.status_code == 201
        number = answer.json()["id"]
        wait(lambda: get_job(store, number).state == "running" and "fira" in children(first.pid))
        worker = children(first.pid)["fira"]
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    wait(lambda: not alive(worker), 20)
    assert get_job(store, number).state == "running"  # as it was left
    with store.writing() as session:  # half a minute goes by
        session.execute(update(Job).where(Job.id == number).values(heartbeat=now() - timedelta(seconds=40)))
    second = serve(tmp_path, port)
    try:
        wait(lambda: up(port))
        wait(lambda: get_job(store, number).state == "running" and "fira" in children(second.pid))
        cancel_job(store, number)
    finally:
        second.terminate()
        assert second.wait(timeout=30) is not None


def children(parent):
    """Runs of a server by slug: what is asked of a worker stands on its command line."""
    found = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            words = Path(f"/proc/{entry}/cmdline").read_text().split("\0")
            status = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(status[1]) == parent and "corollary.web.jobs.worker" in words:
            found[re.search(r'"slug": "([^"]+)"', " ".join(words))[1]] = int(entry)
    return found


def test_what_serve_refuses_is_one_line(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from corollary.cli.main import app

    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        cases = {
            ("--port", str(taken.getsockname()[1])): "cannot be served",
            ("--host", "0.0.0.0"): "--lab gives",
            ("--host", "no.such.host.invalid"): "is no host of this machine",
            ("--port", "0", "--address", "nonsense"): "address must be like",
            ("--port", "0", "--database", "mysql://x/y"): "must name sqlite or postgresql",
        }
        for given, words in cases.items():
            result = CliRunner().invoke(app, ["serve", "--no-open", *given])
            assert result.exit_code == 2, given
            assert words in " ".join(result.output.split()), result.output
            assert "Traceback" not in result.output
    monkeypatch.setenv("COROLLARY_SMTP", "smtp://user:hunter2@mail.example.org")
    result = CliRunner().invoke(app, ["serve", "--no-open", "--port", "0"])
    assert "COROLLARY_MAIL_FROM" in result.output
    assert "hunter2" not in result.output


def test_reader_prints_a_link_that_signs_in(tmp_path, store):
    from typer.testing import CliRunner

    from corollary.cli.main import app

    database = f"sqlite:///{tmp_path / 'full' / 'daily.sqlite'}"
    told = CliRunner().invoke(
        app, ["reader", "Ada", "--runs", "--token", "--address", "https://papers.example.org", "--database", database]
    )
    assert told.exit_code == 0, told.output
    path = re.search(r"https://papers\.example\.org(/sign-in/\S+)", told.output)[1]
    key = re.search(r"Bearer (\S+)", told.output)[1]
    with page(store, settings=Settings(address="https://papers.example.org", lab=True, jobs=False)) as lab:
        assert lab.get(path).status_code == 200
        asked = lab.post(
            "/api/corollary/runs", json={"slug": "fira", "scale": "smoke"}, headers={"authorization": f"Bearer {key}"}
        )
        assert asked.status_code == 201
        lab.cookies.clear()
        assert lab.post("/api/corollary/runs", json={"slug": "fira"}).status_code == 401

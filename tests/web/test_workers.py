"""Several processes behind one address: connections are dealt in turn, and a process that is killed is replaced."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from tests.web.filled import filled
from tests.web.processes import alive, free_port, wait

from corollary.web.app import create_app
from corollary.web.serving import Workers, WorkersFailed
from corollary.web.settings import Settings

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="processes are looked at in /proc, which is Linux's"
)


@contextmanager
def served(tmp_path, *more):
    """`corollary serve` with two workers on a store of its own: the port and the process."""
    filled(tmp_path / "full").close()
    port = free_port()
    command = [sys.executable, "-m", "corollary", "serve", "--no-open", "--workers", "2", "--port", str(port), *more]
    command += ["--store", str(tmp_path / "runs"), "--database", f"sqlite:///{tmp_path / 'full' / 'daily.sqlite'}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield port, process
    finally:
        process.kill()
        process.wait()


def workers(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


def sockets(number):
    found = 0
    for handle in os.listdir(f"/proc/{number}/fd"):
        try:
            found += os.readlink(f"/proc/{number}/fd/{handle}").startswith("socket:")
        except OSError:
            continue
    return found


def answers(port, seconds=10):
    try:
        return httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=seconds).status_code == 200
    except httpx.HTTPError:
        return False


def both_answer(port, process):
    """Whether two connections in a row, dealt to two workers, are answered."""
    return len(workers(process)) == 2 and answers(port) and answers(port)


def test_connections_are_dealt_in_turn_and_a_killed_worker_is_replaced(tmp_path):
    with served(tmp_path) as (port, process):
        wait(lambda: both_answer(port, process))
        first = workers(process)
        time.sleep(0.5)  # the connections just closed are gone on their side too
        before = [sockets(worker) for worker in first]
        clients = [httpx.Client() for _ in range(10)]
        try:
            for client in clients:
                assert client.get(f"http://127.0.0.1:{port}/papers/2410.01623").status_code == 200
                assert client.get(f"http://127.0.0.1:{port}/api/papers/search?q=low-rank").json()
            assert [sockets(worker) - had for worker, had in zip(first, before, strict=True)] == [5, 5]
        finally:
            for client in clients:
                client.close()
        os.kill(first[0], signal.SIGKILL)
        wait(lambda: len(workers(process)) == 2 and first[0] not in workers(process))
        for _ in range(6):  # the one that is left takes all until the new one is ready
            assert answers(port)
        wait(lambda: both_answer(port, process))
        last = workers(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=40) == 0
        assert not any(alive(worker) for worker in last)
        assert not answers(port, 1)
        assert "Traceback" not in process.stdout.read()


def test_workers_end_with_whoever_deals(tmp_path):
    with served(tmp_path, "--no-jobs") as (port, process):
        wait(lambda: both_answer(port, process))
        left = workers(process)
        process.kill()
        process.wait()
        wait(lambda: not any(alive(worker) for worker in left), 40)


def test_workers_that_cannot_serve_end_it(tmp_path, capfd):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        several = Workers(listener, 1, f"sqlite:///{tmp_path}", Settings(jobs=False))  # a folder is no database
        with pytest.raises(WorkersFailed, match="without --workers"):
            several.run()


def test_one_worker_works_off_the_queue(tmp_path):
    store = filled(tmp_path / "full")
    try:
        assert create_app(store, Settings()).state.jobs is not None
        assert create_app(store, Settings(), runner=False).state.jobs is None
    finally:
        store.close()

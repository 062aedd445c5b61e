"""A throwaway PostgreSQL server with Debian's binaries, where there are any."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from corollary.web.importers import first_issue
from corollary.web.search import catch_up
from corollary.web.store import Store, open_store

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres")) if Path("/usr/lib/postgresql").is_dir() else []


def _user() -> str | None:
    """Who the server runs as: it refuses root."""
    if os.getuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            pwd.getpwnam(name)
        except KeyError:
            continue
        return name
    pytest.skip("root here, and no other user for the server to run as")


@contextmanager
def running() -> Iterator[str]:
    """A server with nothing in it; its URL without a database. Skips the test, with the reason, where there can be none."""
    if not BINARIES or os.name != "posix":
        pytest.skip("no PostgreSQL server of Debian's package here")
    pytest.importorskip("psycopg", reason="extra postgres is not installed")
    user = _user()
    # The socket's path must be short, and the folder the server's own.
    root = Path(f"/tmp/corollary-pg-{os.getpid()}")
    root.mkdir()
    bin_ = BINARIES[-1].parent
    if user is not None:
        account = pwd.getpwnam(user)
        os.chown(root, account.pw_uid, account.pw_gid)
    run = {
        "user": user,
        "cwd": root,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "env": {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
    }
    made = subprocess.run(
        [bin_ / "initdb", "-D", root / "data", "-A", "trust", "-U", "lab", "-E", "UTF8", "--no-sync"], check=False, **run
    )
    if made.returncode:
        shutil.rmtree(root, ignore_errors=True)
        pytest.skip(f"initdb does not run here: {made.stdout.decode()[-200:]}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [bin_ / "postgres", "-D", root / "data", "-k", root, "-p", str(port), "-c", "listen_addresses=127.0.0.1", "-F"], **run
    )
    try:
        for _ in range(100):
            if (
                subprocess.run(
                    [bin_ / "pg_isready", "-h", "127.0.0.1", "-p", str(port)], check=False, capture_output=True
                ).returncode
                == 0
            ):
                break
            time.sleep(0.1)
        else:
            pytest.skip("the server does not come up here")
        yield f"postgresql://lab@127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)  # without waiting for who is still connected
        process.wait(timeout=20)
        shutil.rmtree(root, ignore_errors=True)


def database(server: str, template: str = "") -> str:
    """The URL of a new database, a copy of ``template`` where one is named."""
    import psycopg

    name = f"t{time.monotonic_ns()}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}" + (f" TEMPLATE {template}" if template else ""))
    return f"{server}/{name}"


def fill(server: str, folder: Path) -> str:
    """Make a database with the first issue in it, with its index files in ``folder``; its name, to copy from."""
    url = database(server)
    store = open_store(url, folder)
    first_issue(store)
    catch_up(store)
    store.close()
    return url.rpartition("/")[2]


def filled(server: str, template: str, kept: Path, folder: Path) -> Store:
    """A store of one's own with the first issue and its vectors."""
    shutil.copytree(kept, folder, dirs_exist_ok=True)
    return open_store(database(server, template), folder)

"""``corollary daily`` as a person runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from tests.web import samples
from tests.web.server import serving
from typer.testing import CliRunner

from corollary.cli import daily
from corollary.cli.main import app


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def call(*args: str, stdin: bytes | None = None):
        return CliRunner().invoke(app, ["daily", *args, *(() if args[0] == "x" else ("--database", f"sqlite:///{tmp_path / 'd.sqlite'}"))], input=stdin)  # fmt: skip

    return call


def test_import_tells_what_it_did(run, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(samples.JSONL)
    first = run("import", str(path), "--json", str(tmp_path / "r.json"))
    assert first.exit_code == 0, first.output
    assert "3 new, 0 updated, 0 unchanged, 4 set aside" in first.output
    assert "1 x title has 3000 letters; at most 2000 are taken, first at line 6" in first.output
    assert "3 papers can now be found by meaning" in first.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["added"], report["rejected"], report["source"]) == (3, 4, str(path))
    assert "0 new, 0 updated, 3 unchanged" in run("import", str(path)).output
    assert "1 new" in run("import", "-", stdin=b'{"title": "From a pipe", "year": 2020}').output


def test_export_and_back(run, tmp_path):
    (tmp_path / "a.rss").write_bytes(samples.RSS)
    run("import", str(tmp_path / "a.rss"))
    assert "4 rows" in run("export", str(tmp_path / "all.jsonl")).output
    assert "0 new, 0 updated, 2 unchanged" in run("import", str(tmp_path / "all.jsonl")).output


def test_addresses_of_this_machine_need_leave(run):
    with serving(lambda *_: (200, {}, samples.RSS)) as server:
        refused = run("import", f"{server.url}/feed")
        assert refused.exit_code == 1
        assert "--allow-private" in refused.output
        assert server.asked == []
        assert "2 new" in run("import", f"{server.url}/feed", "--allow-private").output


@pytest.mark.parametrize(
    ("args", "word"),
    [(("import", "no/such"), "no file"), (("import", "hf:tomorrow"), "hf:2026"), (("import", "x", "--format", "pdf"), "format"), (("sync", "--every", "1s"), "60s"), (("sync", "--every", "often"), "6h"), (("export", "no/such/folder/x"), "folder is missing")],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(run, args, word):
    result = run(*args)
    assert result.exit_code != 0
    text = result.output + str(result.exception)
    assert word in text
    assert "Traceback" not in result.output


def test_a_database_that_is_none():
    result = CliRunner().invoke(app, ["daily", "export", "x.jsonl", "--database", "mysql://x/y"])
    assert result.exit_code == 2
    assert "sqlite or postgresql" in result.output


@pytest.mark.parametrize(("text", "seconds"), [("60s", 60), ("30m", 1800), ("6h", 21600), ("1.5d", 129600)])
def test_times(text, seconds):
    assert daily._seconds(text) == seconds


def test_sync_goes_on_when_a_source_fails(run, tmp_path):
    (tmp_path / "a.rss").write_bytes(samples.RSS)
    with serving(lambda *_: (404, {}, b"")) as server:
        result = run("sync", f"{server.url}/gone", str(tmp_path / "a.rss"), "--allow-private")
    assert result.exit_code == 1
    assert "404" in result.output
    assert "2 new" in result.output


def test_sync_runs_until_interrupted(tmp_path):
    (tmp_path / "a.rss").write_bytes(samples.RSS)
    command = [sys.executable, "-c", "from corollary.cli import main; main()", "daily", "sync", str(tmp_path / "a.rss"), "--every", "6h", "--database", f"sqlite:///{tmp_path / 'd.sqlite'}"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}) as process:  # fmt: skip
        shown = b""
        until = time.monotonic() + 60
        while b"by meaning" not in shown and time.monotonic() < until:
            shown += process.stdout.read1(1000)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert b"2 new" in shown
    assert b"nothing is lost" in out, (out, err)
    assert process.returncode == 0

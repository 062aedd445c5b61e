"""``corollary daily digest`` as a person, or cron, runs it."""

from __future__ import annotations

import json
from email import message_from_bytes, policy

import pytest
from tests.web.mailbox import SENDER, mailbox
from tests.web.test_digest_killed import PEOPLE, confirmed
from typer.testing import CliRunner

from corollary.cli.main import app
from corollary.web.store import now, open_store


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("COROLLARY_SMTP", "COROLLARY_MAIL_FROM", "COROLLARY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    url = f"sqlite:///{tmp_path / 'd.sqlite'}"
    store = open_store(url)
    confirmed(store)
    store.close()
    return lambda *args: CliRunner().invoke(app, ["daily", "digest", "--database", url, *args])


def test_dry_run_writes_files_and_nothing_else(run, tmp_path):
    folder = tmp_path / "mails"
    for _ in range(2):
        result = run("--dry-run", str(folder), "--address", "https://papers.example.org")
        assert result.exit_code == 0, result.output
        assert "2 mails written" in result.output
    files = sorted(folder.iterdir())
    assert [file.suffix for file in files] == [".eml", ".eml"]
    mails = [message_from_bytes(file.read_bytes(), policy=policy.default) for file in files]
    assert {mail["to"] for mail in mails} == set(PEOPLE)
    assert all(str(mail["list-unsubscribe"]).startswith("<https://papers.example.org/unsubscribe/") for mail in mails)
    assert folder.stat().st_mode & 0o077 == 0


def test_sends(run, monkeypatch, tmp_path):
    with mailbox() as box:
        monkeypatch.setenv("COROLLARY_SMTP", f"smtp://127.0.0.1:{box.port}")
        monkeypatch.setenv("COROLLARY_MAIL_FROM", SENDER)
        assert "0 digests written, 0 mails sent" in run("--period", "weekly").output
        result = run("--json", str(tmp_path / "r.json"))
        assert "2 digests written, 2 mails sent, 0 waiting" in result.output
        assert json.loads((tmp_path / "r.json").read_text()) == {"written": 2, "nothing_new": 0, "failed": 0, "sent": 2, "waiting": 0, "refused": 0, "error": ""}  # fmt: skip
        assert "0 digests written, 0 mails sent, 0 waiting" in run("--date", now().date().isoformat()).output
    assert sorted(box.to) == list(PEOPLE)


def test_a_server_that_is_away(run, monkeypatch):
    monkeypatch.setenv("COROLLARY_SMTP", "smtp://user:secret-word@127.0.0.1:1")
    monkeypatch.setenv("COROLLARY_MAIL_FROM", SENDER)
    result = run()
    assert result.exit_code == 1
    assert "cannot be reached" in result.output
    assert "2 waiting" in result.output
    assert "secret-word" not in result.output


@pytest.mark.parametrize(
    ("args", "word"),
    [((), "COROLLARY_SMTP"), (("--dry-run", "x", "--period", "hourly"), "neither daily nor weekly"), (("--dry-run", "x", "--date", "soon"), "2026-05-08"), (("--dry-run", "x", "--address", "nowhere"), "address must be"), (("--dry-run", "/proc/x"), "cannot make")],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(run, args, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*args)
    assert result.exit_code == 2
    assert word in result.output
    assert "Traceback" not in result.output

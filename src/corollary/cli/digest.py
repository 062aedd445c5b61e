"""``corollary daily digest``: new papers and changed verdicts by mail."""

from __future__ import annotations

import os
import re
import tempfile
from contextlib import suppress
from datetime import date as Date
from email.headerregistry import Address
from email.message import EmailMessage
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.markup import escape


def _settings(address: str | None) -> Any:
    from corollary.web.settings import LOOPBACK, Settings

    given = address or os.environ.get("COROLLARY_ADDRESS") or Settings.address
    try:
        return Settings(address=given, lab=urlsplit(given).hostname not in LOOPBACK)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--address") from error


def _day(text: str | None) -> Date | None:
    try:
        return None if text is None else Date.fromisoformat(text)
    except ValueError as error:
        raise typer.BadParameter(f"'{text}' is no day; days go as 2026-05-08", param_hint="--date") from error


def _file(folder: Path, message: EmailMessage) -> None:
    """Write one mail, whole or not at all."""
    from corollary.web.digest.outbox import WIRE

    name = re.sub(r"[^A-Za-z0-9.-]+", "-", str(message["Message-ID"]).strip("<>").partition("@")[0])
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".digest.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(message.as_bytes(policy=WIRE))
        os.replace(temporary, folder / f"{name}.eml")
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def run_digest(
    dry_run: Path | None, period: str | None, date: str | None, address: str | None, database: str | None, json: Path | None
) -> None:
    """Write what is due into the outbox and send it; or, dry, into files."""
    from sqlalchemy.exc import IntegrityError

    from corollary.cli.daily import _open
    from corollary.cli.output import check_json, write_json
    from corollary.web.board import Verdicts
    from corollary.web.digest import Mailer, MailSettings, flush, queue_digests
    from corollary.web.guard import Sessions
    from corollary.web.store import record_verdicts

    if period not in (None, "daily", "weekly"):
        raise typer.BadParameter(f"'{period}' is neither daily nor weekly", param_hint="--period")
    if json is not None:
        check_json(json)
    day, settings = _day(date), _settings(address)
    try:
        mail = MailSettings.from_environment()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if mail is None and dry_run is None:
        raise typer.BadParameter("no mail is set up: set COROLLARY_SMTP and COROLLARY_MAIL_FROM, or take --dry-run DIR")
    if dry_run is not None:
        try:
            dry_run.mkdir(mode=0o700, parents=True, exist_ok=True)  # addresses are in it
        except OSError as error:
            raise typer.BadParameter(f"cannot make '{dry_run}': {error.strerror}", param_hint="--dry-run") from error
    sender = Mailer(mail).sender if mail is not None else Address("Corollary", addr_spec="corollary@localhost")
    store = _open(database)
    console = Console(stderr=json is not None and str(json) == "-")
    try:
        sessions, verdicts = Sessions(store, settings), Verdicts(settings.results, settings.runs)
        show = None
        if dry_run is None:
            with suppress(IntegrityError):  # the page's own process has just done it
                record_verdicts(store, verdicts.rows)
        else:
            folder = dry_run

            def show(message: EmailMessage) -> None:
                _file(folder, message)

        queued = queue_digests(
            store,
            sessions,
            settings,
            sender,
            verdicts,
            today=day,
            frequencies=(period,) if period else ("daily", "weekly"),
            show=show,
        )
        told: dict[str, Any] = {"written": queued.written, "nothing_new": queued.nothing, "failed": queued.failed}
        if mail is not None and dry_run is None:
            sent = flush(store, Mailer(mail))
            told |= {"sent": sent.sent, "waiting": sent.waiting, "refused": sent.failed, "error": sent.error}
    finally:
        store.close()
    if dry_run is not None:
        console.print(f"{queued.written} mails written to {escape(str(dry_run))}; nothing was sent", highlight=False)
    else:
        console.print(
            f"{queued.written} digests written, {told['sent']} mails sent, {told['waiting']} waiting", highlight=False
        )
    if json is not None:
        write_json(json, told)
    trouble = str(told.get("error") or "") or (f"{queued.failed} digests could not be written" if queued.failed else "")
    if trouble:
        Console(stderr=True, soft_wrap=True).print(f"corollary: {escape(trouble)}", highlight=False)
        raise typer.Exit(1)

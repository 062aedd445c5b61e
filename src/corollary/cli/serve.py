"""``corollary serve`` and ``corollary reader``: the daily page, for one reader or for a lab."""

from __future__ import annotations

import logging
import os
import socket
import webbrowser
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from corollary.cli.daily import _open, _told


def _bind(host: str, port: int) -> socket.socket:
    """A listening socket; one line where the place is taken or not ours."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)[0]
    except (socket.gaierror, UnicodeError, OverflowError) as error:
        raise typer.BadParameter(f"'{host}' is no host of this machine", param_hint="--host") from error
    # With the protocol named: asyncio turns Nagle's algorithm off only where it sees that a socket is TCP.
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise typer.BadParameter(
            f"{host}:{port} cannot be served: {error.strerror}; take another with --port", param_hint="--port"
        ) from error
    return listener


def _settings(host: str, port: int, address: str | None, lab: bool, closed: bool, jobs: bool, store: Path | None) -> Any:
    from corollary.web.settings import LOOPBACK, Settings

    if not lab and host not in LOOPBACK:
        raise typer.BadParameter(
            f"'{host}' can be reached by others: that needs accounts, which --lab gives", param_hint="--host"
        )
    more: dict[str, Any] = {} if store is None else {"runs": store}
    shown = f"[{host}]" if ":" in host else host
    try:
        return Settings(address=address or f"http://{shown}:{port}", lab=lab, open_reading=not closed, jobs=jobs, **more)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--address") from error


def _mailer() -> Any:
    from corollary.web.digest import Mailer, MailSettings

    try:
        found = MailSettings.from_environment()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return Mailer(found) if found is not None else None


def run_serve(
    host: str,
    port: int,
    address: str | None,
    lab: bool,
    closed: bool,
    jobs: bool,
    workers: int,
    open_: bool,
    database: str | None,
    store_dir: Path | None,
) -> None:
    """Open the store, put the first issue in, and serve until interrupted."""
    if workers > 1 and not hasattr(socket, "send_fds"):
        raise typer.BadParameter(
            "this system hands no connections from process to process; serve with 1", param_hint="--workers"
        )
    try:
        from corollary.web.app import create_app
        from corollary.web.serving import Workers, WorkersFailed, serve
    except ModuleNotFoundError as error:
        raise typer.BadParameter(
            f"the daily page needs the extra 'web': pip install 'corollary[web]' ({error.name} is missing)"
        ) from error
    from corollary.web.importers import first_issue
    from corollary.web.search import catch_up
    from corollary.web.store import count_papers

    listener = _bind(host, port)
    with listener:
        port = listener.getsockname()[1]
        settings, mail = _settings(host, port, address, lab, closed, jobs, store_dir), _mailer()
        console = Console(soft_wrap=True)
        store = _open(database)
        try:
            with _told(), console.status("opening the first issue") as status:
                first_issue(store)
                catch_up(store, progress=lambda done, total: status.update(f"reading what is new: {done} of {total}"))
            app = create_app(store, settings, mail=mail)
            what = f"{count_papers(store):,} papers, {len(app.state.verdicts.board.papers)} of them run here"
            console.print(f"Corollary at [bold]{escape(settings.address)}[/]: {what}. Ctrl-C ends it.", highlight=False)
            if mail is None:
                console.print("[dim]No mail: set COROLLARY_SMTP and COROLLARY_MAIL_FROM for digests.[/]", highlight=False)
            if open_ and console.is_terminal:
                webbrowser.open(settings.address)
            logging.getLogger("corollary.web").addHandler(logging.StreamHandler())
            if workers > 1:
                try:
                    Workers(listener, workers, database, settings).run()
                except WorkersFailed as error:
                    Console(stderr=True, soft_wrap=True).print(f"corollary: {escape(str(error))}", highlight=False)
                    raise typer.Exit(1) from error
            else:
                serve(app, settings, listener)
        finally:
            store.close()


def run_reader(
    name: str, mail: str | None, runs: bool | None, admin: bool | None, token: bool, address: str | None, database: str | None
) -> None:
    """Make a reader of a lab's page, or change one, and print a link that signs them in."""
    import hashlib
    import secrets

    from sqlalchemy import select

    from corollary.web.digest.mailer import check_address
    from corollary.web.guard import Sessions
    from corollary.web.settings import Settings
    from corollary.web.store import Reader

    if not name.strip() or len(name) > 200 or not name.isprintable():
        raise typer.BadParameter("a name has 1 to 200 letters", param_hint="NAME")
    try:
        settings = Settings(address=address or os.environ.get("COROLLARY_ADDRESS") or Settings.address, lab=True)
        given = check_address(mail).lower() if mail else None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    store = _open(database)
    try:
        key = secrets.token_urlsafe(32) if token else None
        with store.writing() as session:
            row = session.scalar(select(Reader).where(Reader.name == name.strip()))
            if row is None:
                row = Reader(name=name.strip(), settings={})
                session.add(row)
                session.flush()
            changes = {
                "address": given,
                "may_run": runs,
                "admin": admin,
                "api_hash": key and hashlib.sha256(key.encode()).hexdigest(),
            }
            row.settings = {**row.settings, **{field: value for field, value in changes.items() if value is not None}}
            number = row.id
        console = Console(soft_wrap=True)
        console.print(f"{escape(name.strip())} signs in, once, within a week, at", highlight=False)
        console.print(Sessions(store, settings).link(number), highlight=False, markup=False)
        if key is not None:
            console.print("and programs of theirs send this, which is not shown again:", highlight=False)
            console.print(f"Authorization: Bearer {key}", highlight=False, markup=False)
    finally:
        store.close()

"""Opening a store: where it lives, its connections, and its migrations."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.orm import Session

_MIGRATIONS = Path(__file__).parent / "migrations"
_LOCK = 0x636F726F  # one number for every process that migrates a PostgreSQL store


class StoreUnavailable(OSError):
    """The store cannot be opened; the message says where it was looked for, why it failed and what would be right."""

    def __str__(self) -> str:
        return str(self.args[0])


def data_dir() -> Path:
    """Where the daily page keeps its files: ``$COROLLARY_DATA``, else the user's data folder as the system names it."""
    own = os.environ.get("COROLLARY_DATA")
    if own:
        return Path(own)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "corollary"
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "corollary"
    return Path(os.environ.get("XDG_DATA_HOME", Path.home() / ".local" / "share")) / "corollary"


def default_url(folder: Path | None = None) -> str:
    """``$COROLLARY_DATABASE``, else a SQLite file in ``folder``."""
    return os.environ.get("COROLLARY_DATABASE") or f"sqlite:///{(folder or data_dir()) / 'daily.sqlite'}"


class Store:
    """An open store: the database and the folder of its index files.

    Use `reading` for queries and `writing` for changes; each is one transaction.
    """

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine = engine
        self.folder = folder
        self._watch: sqlite3.Connection | None = None
        self._lock = threading.Lock()

    @property
    def dialect(self) -> str:
        """``sqlite`` or ``postgresql``."""
        return self.engine.dialect.name

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that sees one state of the store; it takes no lock that a writer waits for."""
        with self.engine.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A session that commits when the block ends and rolls back when it raises. Writers of a SQLite store take turns."""
        with (
            self.engine.connect().execution_options(writes=True) as connection,
            Session(connection) as session,
            session.begin(),
        ):
            yield session

    def version(self) -> str:
        """A text that is another after any write by anyone: what a cache of pages is keyed by, in this process
        and while the store is open. Cheap enough for every request."""
        if self.dialect == "postgresql":
            with self.engine.connect() as connection:
                return str(connection.exec_driver_sql("SELECT pg_snapshot_xmax(pg_current_snapshot())").scalar())
        with self._lock:
            if self._watch is None:
                # A connection for this alone: the number tells what others wrote since this connection was opened.
                self._watch = sqlite3.connect(str(self.engine.url.database), check_same_thread=False)
            return str(self._watch.execute("PRAGMA data_version").fetchone()[0])

    def close(self) -> None:
        """Give the connections back."""
        with self._lock:
            if self._watch is not None:
                self._watch.close()
                self._watch = None
        self.engine.dispose()


def driver(connection: Connection) -> sqlite3.Connection:
    """SQLite's own connection beneath one, in its transaction: SQLAlchemy's result costs more than the rows of a small answer."""
    if not connection.in_transaction():
        connection.begin()
    return cast(sqlite3.Connection, connection.connection.driver_connection)


def rows(connection: Connection, query: str, values: Sequence[Any] = ()) -> list[Any]:
    """All rows of a statement that pages ask again and again, as the driver gives them.

    Args:
        connection: of `Store.reading`; the rows are of the state that it sees.
        query: SQL that both databases read, with ``?`` where a value goes.
        values: one for each ``?``.

    Returns:
        Tuples of what the driver makes of a column: SQLite gives times, days and JSON as text.
    """
    if connection.dialect.name != "sqlite":
        return list(connection.exec_driver_sql(query.replace("?", "%s"), tuple(values)))
    return driver(connection).execute(query, values).fetchall()


def from_json(value: Any) -> Any:
    """What a JSON column of `rows` holds: SQLite's driver gives its text, PostgreSQL's what the text says."""
    if not isinstance(value, str):
        return value
    return [] if value == "[]" else {} if value == "{}" else json.loads(value)


def places(values: Sequence[Any]) -> str:
    """A ``?`` for each of several values: a text that stays the same is read by SQLite once."""
    return ", ".join("?" * len(values))


def _sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def _connect(raw: Any, _: Any) -> None:
        raw.isolation_level = None  # the driver's own transactions end before DDL; ours are begun below
        cursor = raw.cursor()
        for pragma in (
            "journal_mode=WAL",
            "synchronous=NORMAL",  # a power cut may lose the last commits, never the store; a killed process loses nothing
            "busy_timeout=30000",
            "foreign_keys=ON",
            "mmap_size=4294967296",
            "cache_size=-16000",
            "temp_store=MEMORY",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A writer that starts as a reader would be refused, not queued, when another writes in between.
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _migrate(engine: Engine) -> None:
    """Bring the schema to the newest revision in one transaction: killed at any point, it stands as it was before."""
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    with engine.connect().execution_options(writes=True) as connection, connection.begin():
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:n)"), {"n": _LOCK})
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _current(engine: Engine) -> bool:
    """Whether the schema is the newest, found out without a lock."""
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    with engine.connect() as connection:
        found = MigrationContext.configure(connection).get_current_revision()
    head = ScriptDirectory(str(_MIGRATIONS)).get_current_head()
    if (
        found is not None
        and found != head
        and found not in {r.revision for r in ScriptDirectory(str(_MIGRATIONS)).walk_revisions()}
    ):
        raise StoreUnavailable(f"the store at {engine.url!r} is of a newer version (revision {found}); update corollary")
    return found == head


def open_store(url: str | None = None, folder: Path | None = None, *, migrate: bool = True) -> Store:
    """Open the store and bring its schema up to date.

    Args:
        url: an SQLAlchemy URL of SQLite or PostgreSQL; default `default_url`.
        folder: where index files go; default: beside the SQLite file, else `data_dir`.
        migrate: whether to bring the schema up to date.

    Raises:
        ValueError: for a URL that is none, or of another database.
        StoreUnavailable: where the database cannot be reached or written.
    """
    try:
        parsed = make_url(url or default_url(folder))
    except ArgumentError as error:
        raise ValueError(
            f"url must be like 'sqlite:////path/daily.sqlite' or 'postgresql://user@host/name', not '{url}'"
        ) from error
    if parsed.drivername == "postgres":  # as some hosts write it
        parsed = parsed.set(drivername="postgresql")
    kind = parsed.get_backend_name()
    if kind not in ("sqlite", "postgresql"):
        raise ValueError(f"url must name sqlite or postgresql, not '{kind}'")
    if kind == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
        folder = folder or data_dir()
        options: dict[str, Any] = {"pool_pre_ping": True}
    else:
        if not parsed.database or parsed.database == ":memory:":
            raise ValueError("url must name a file: the store is shared by threads and processes")
        folder = folder or Path(parsed.database).parent
        options = {"connect_args": {"check_same_thread": False, "cached_statements": 512}}
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # addresses and notes are nobody else's
        if kind == "sqlite":
            Path(str(parsed.database)).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(
            parsed, pool_size=16, max_overflow=48, hide_parameters=True, **options
        )  # errors name the statement; what it was given may be a reader's own
    except OSError as error:
        raise StoreUnavailable(f"cannot make '{folder}': {error.strerror}; choose another with COROLLARY_DATA") from error
    except ModuleNotFoundError as error:
        raise StoreUnavailable(f"a PostgreSQL store needs extra 'postgres': {error}") from error
    if kind == "sqlite":
        _sqlite(engine)
    try:
        if migrate and not _current(engine):
            _migrate(engine)
    except DBAPIError as error:
        engine.dispose()
        reason = str(error.orig).strip().splitlines()[0]
        raise StoreUnavailable(f"cannot open the store at {parsed.render_as_string(hide_password=True)}: {reason}") from error
    return Store(engine, folder)

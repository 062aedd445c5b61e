"""What Alembic runs: the upgrade on the connection, and in the transaction, of the one who called."""

from __future__ import annotations

from alembic import context

from corollary.web.store.schema import Base


def run() -> None:
    """Run the migrations that Alembic asks for."""
    connection = context.config.attributes["connection"]
    context.configure(connection=connection, target_metadata=Base.metadata, transactional_ddl=True)
    with context.begin_transaction():
        context.run_migrations()


if __name__ == "env_py":  # so Alembic names this file; to import it is to run nothing
    run()

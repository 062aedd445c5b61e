"""The steps from one schema to the next; Alembic runs them, all in one transaction."""

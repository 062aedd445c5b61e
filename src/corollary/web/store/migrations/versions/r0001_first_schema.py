"""The first schema: papers and their index of words, readers, subscriptions, jobs, verdicts, imports, vectors.

Revision 0001.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TIME = sa.DateTime(timezone=True)

# SQLite: the index of words holds no copy of the text; it reads the table where it must. Triggers keep it in step within the
# transaction that writes the paper, whoever writes it.
_COLUMNS = "title, authors, abstract, summary, keywords"
_OLD, _NEW = (", ".join(f"{side}.{name}" for name in ["id", *_COLUMNS.split(", ")]) for side in ("old", "new"))
_FORGET = f"INSERT INTO words(words, rowid, {_COLUMNS}) VALUES ('delete', {_OLD});"
_LEARN = f"INSERT INTO words(rowid, {_COLUMNS}) VALUES ({_NEW});"
_CHANGED = "(old.title, old.authors, old.abstract, old.summary, old.keywords)"
_SQLITE = (
    f"""CREATE VIRTUAL TABLE words USING fts5(
        {_COLUMNS}, content='papers', content_rowid='id', tokenize="porter unicode61 remove_diacritics 2")""",
    "CREATE VIRTUAL TABLE words_terms USING fts5vocab(words, row)",
    f"""CREATE TRIGGER papers_added AFTER INSERT ON papers BEGIN
        {_LEARN}
        INSERT INTO pending(paper_id) VALUES (new.id);
    END""",
    f"""CREATE TRIGGER papers_removed AFTER DELETE ON papers BEGIN
        {_FORGET}
    END""",
    f"""CREATE TRIGGER papers_changed AFTER UPDATE OF {_COLUMNS} ON papers
    WHEN {_CHANGED} IS NOT {_CHANGED.replace("old.", "new.")} BEGIN
        {_FORGET}
        {_LEARN}
        INSERT OR IGNORE INTO pending(paper_id) VALUES (new.id);
    END""",
)

# PostgreSQL: a generated column, so that the server itself keeps it in step. Names are not stemmed.
_POSTGRESQL = (
    """ALTER TABLE papers ADD COLUMN words tsvector GENERATED ALWAYS AS (
        setweight(to_tsvector('english', title), 'A') || setweight(to_tsvector('simple', authors), 'B')
        || setweight(to_tsvector('english', summary || ' ' || keywords), 'C') || setweight(to_tsvector('english', abstract), 'D')
    ) STORED""",
    "CREATE INDEX papers_words ON papers USING gin (words)",
    """CREATE FUNCTION papers_pending() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        INSERT INTO pending(paper_id) VALUES (new.id) ON CONFLICT DO NOTHING;
        RETURN NULL;
    END $$""",
    "CREATE TRIGGER papers_added AFTER INSERT ON papers FOR EACH ROW EXECUTE FUNCTION papers_pending()",
    f"""CREATE TRIGGER papers_changed AFTER UPDATE OF {_COLUMNS} ON papers FOR EACH ROW
    WHEN ({_CHANGED} IS DISTINCT FROM {_CHANGED.replace("old.", "new.")}) EXECUTE FUNCTION papers_pending()""",
)


def upgrade() -> None:
    """Make every table, then the index of words."""
    op.create_table(
        "fetch_states",
        sa.Column("url", sa.String(length=2000), nullable=False),
        sa.Column("etag", sa.Text(), nullable=True),
        sa.Column("modified", sa.Text(), nullable=True),
        sa.Column("fetched_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("url"),
    )
    op.create_table(
        "import_runs",
        sa.Column("id", ID, nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("cursor", sa.JSON(), nullable=False),
        sa.Column("added", sa.Integer(), nullable=False),
        sa.Column("updated", sa.Integer(), nullable=False),
        sa.Column("unchanged", sa.Integer(), nullable=False),
        sa.Column("rejected", sa.Integer(), nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.Column("started_at", TIME, nullable=False),
        sa.Column("finished_at", TIME, nullable=True),
        sa.CheckConstraint("state IN ('running', 'done', 'failed')", name="import_state"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("import_runs_by_source", "import_runs", ["source", "id"], unique=False)
    op.create_table(
        "meta",
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("value", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "papers",
        sa.Column("id", ID, nullable=False),
        sa.Column("key", sa.String(length=500), nullable=False),
        sa.Column("slug", sa.String(length=100), nullable=True),
        sa.Column("arxiv", sa.String(length=40), nullable=True),
        sa.Column("version", sa.Integer(), nullable=True),
        sa.Column("doi", sa.String(length=300), nullable=True),
        sa.Column("title", sa.Text(), nullable=False),
        sa.Column("authors", sa.Text(), nullable=False),
        sa.Column("abstract", sa.Text(), nullable=False),
        sa.Column("summary", sa.Text(), nullable=False),
        sa.Column("keywords", sa.Text(), nullable=False),
        sa.Column("categories", sa.Text(), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("published", TIME, nullable=True),
        sa.Column("updated", TIME, nullable=True),
        sa.Column("imported_votes", sa.Integer(), nullable=True),
        sa.Column("own_votes", sa.Integer(), nullable=False),
        sa.Column(
            "points", sa.Integer(), sa.Computed("coalesce(imported_votes, 0) + own_votes", persisted=True), nullable=False
        ),
        sa.Column("url", sa.Text(), nullable=True),
        sa.Column("code", sa.Text(), nullable=True),
        sa.Column("code_added_by", sa.String(length=100), nullable=True),
        sa.Column("organization", sa.Text(), nullable=True),
        sa.Column("comment", sa.Text(), nullable=True),
        sa.Column("venue", sa.Text(), nullable=True),
        sa.Column("links", sa.JSON(), nullable=False),
        sa.Column("source", sa.String(length=40), nullable=False),
        sa.Column("extra", sa.JSON(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("changed_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("key"),
        sa.UniqueConstraint("slug"),
    )
    op.create_index("papers_by_day", "papers", ["day", "points", "id"], unique=False)
    op.create_index("papers_by_doi", "papers", ["doi"], unique=False)
    op.create_table(
        "readers",
        sa.Column("id", ID, nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("token_hash", sa.String(length=128), nullable=True),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("token_hash"),
    )
    op.create_table(
        "terms",
        sa.Column("term", sa.String(length=60), nullable=False),
        sa.Column("papers", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("term"),
    )
    op.create_table(
        "verdict_changes",
        sa.Column("id", ID, nullable=False),
        sa.Column("slug", sa.String(length=100), nullable=False),
        sa.Column("claim", sa.String(length=100), nullable=False),
        sa.Column("old", sa.String(length=60), nullable=True),
        sa.Column("new", sa.String(length=60), nullable=False),
        sa.Column("row", sa.JSON(), nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("verdict_changes_by_time", "verdict_changes", ["at"], unique=False)
    op.create_table(
        "verdict_states",
        sa.Column("slug", sa.String(length=100), nullable=False),
        sa.Column("claim", sa.String(length=100), nullable=False),
        sa.Column("verdict", sa.String(length=60), nullable=False),
        sa.Column("row", sa.JSON(), nullable=False),
        sa.Column("seen_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("slug", "claim"),
    )
    op.create_table(
        "jobs",
        sa.Column("id", ID, nullable=False),
        sa.Column("kind", sa.String(length=40), nullable=False),
        sa.Column("args", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("progress", sa.Float(), nullable=False),
        sa.Column("log", sa.Text(), nullable=False),
        sa.Column("result", sa.JSON(), nullable=True),
        sa.Column("error", sa.Text(), nullable=False),
        sa.Column("worker", sa.String(length=200), nullable=True),
        sa.Column("reader_id", ID, nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("started_at", TIME, nullable=True),
        sa.Column("heartbeat", TIME, nullable=True),
        sa.Column("finished_at", TIME, nullable=True),
        sa.CheckConstraint("state IN ('queued', 'running', 'done', 'failed', 'cancelled')", name="job_state"),
        sa.ForeignKeyConstraint(["reader_id"], ["readers.id"], ondelete="SET NULL"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("jobs_by_state", "jobs", ["state", "id"], unique=False)
    op.create_table(
        "notes",
        sa.Column("reader_id", ID, nullable=False),
        sa.Column("paper_id", ID, nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("changed_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(["paper_id"], ["papers.id"], ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["reader_id"], ["readers.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("reader_id", "paper_id"),
    )
    op.create_index("notes_by_paper", "notes", ["paper_id"], unique=False)
    op.create_table(
        "pending",
        sa.Column("paper_id", ID, autoincrement=False, nullable=False),
        sa.ForeignKeyConstraint(["paper_id"], ["papers.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("paper_id"),
    )
    op.create_table(
        "reading_items",
        sa.Column("reader_id", ID, nullable=False),
        sa.Column("paper_id", ID, nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("added_at", TIME, nullable=False),
        sa.CheckConstraint("state IN ('unread', 'reading', 'read')", name="reading_state"),
        sa.ForeignKeyConstraint(["paper_id"], ["papers.id"], ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["reader_id"], ["readers.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("reader_id", "paper_id"),
    )
    op.create_index("reading_by_paper", "reading_items", ["paper_id"], unique=False)
    op.create_table(
        "rejected_items",
        sa.Column("id", ID, nullable=False),
        sa.Column("run_id", ID, nullable=True),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("position", sa.String(length=100), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("item", sa.Text(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["import_runs.id"], ondelete="SET NULL"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("digest"),
    )
    op.create_index("rejected_by_run", "rejected_items", ["run_id"], unique=False)
    op.create_table(
        "saved_searches",
        sa.Column("id", ID, nullable=False),
        sa.Column("reader_id", ID, nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("query", sa.Text(), nullable=False),
        sa.Column("filters", sa.JSON(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(["reader_id"], ["readers.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("reader_id", "name"),
    )
    op.create_table(
        "subscriptions",
        sa.Column("id", ID, nullable=False),
        sa.Column("reader_id", ID, nullable=True),
        sa.Column("address", sa.String(length=320), nullable=False),
        sa.Column("frequency", sa.String(length=10), nullable=False),
        sa.Column("kind", sa.String(length=10), nullable=False),
        sa.Column("value", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("confirm_hash", sa.String(length=128), nullable=True),
        sa.Column("confirm_expires", TIME, nullable=True),
        sa.Column("unsubscribe_hash", sa.String(length=128), nullable=True),
        sa.Column("last_period", sa.String(length=20), nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("confirmed_at", TIME, nullable=True),
        sa.Column("ended_at", TIME, nullable=True),
        sa.CheckConstraint("frequency IN ('daily', 'weekly')", name="subscription_frequency"),
        sa.CheckConstraint("kind IN ('all', 'topic', 'search', 'like')", name="subscription_kind"),
        sa.CheckConstraint("state IN ('pending', 'confirmed', 'unsubscribed')", name="subscription_state"),
        sa.ForeignKeyConstraint(["reader_id"], ["readers.id"], ondelete="SET NULL"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("confirm_hash"),
        sa.UniqueConstraint("unsubscribe_hash"),
    )
    op.create_index("subscriptions_by_address", "subscriptions", ["address"], unique=False)
    op.create_index("subscriptions_by_state", "subscriptions", ["state", "frequency"], unique=False)
    op.create_table(
        "vectors",
        sa.Column("seq", ID, nullable=False),
        sa.Column("paper_id", ID, nullable=False),
        sa.Column("model", sa.String(length=100), nullable=False),
        sa.Column("vector", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["paper_id"], ["papers.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("seq"),
        sa.UniqueConstraint("paper_id"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "votes",
        sa.Column("reader_id", ID, nullable=False),
        sa.Column("paper_id", ID, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(["paper_id"], ["papers.id"], ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["reader_id"], ["readers.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("reader_id", "paper_id"),
    )
    op.create_index("votes_by_paper", "votes", ["paper_id"], unique=False)
    op.create_table(
        "deliveries",
        sa.Column("id", ID, nullable=False),
        sa.Column("subscription_id", ID, nullable=True),
        sa.Column("dedupe", sa.String(length=200), nullable=False),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("address", sa.String(length=320), nullable=False),
        sa.Column("message_id", sa.String(length=300), nullable=False),
        sa.Column("message", sa.LargeBinary(), nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_try", TIME, nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("sent_at", TIME, nullable=True),
        sa.CheckConstraint("state IN ('queued', 'sending', 'sent', 'failed')", name="delivery_state"),
        sa.ForeignKeyConstraint(["subscription_id"], ["subscriptions.id"], ondelete="SET NULL"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("dedupe"),
        sa.UniqueConstraint("message_id"),
    )
    op.create_index("deliveries_by_state", "deliveries", ["state", "next_try"], unique=False)
    op.create_index("deliveries_by_subscription", "deliveries", ["subscription_id"], unique=False)
    for statement in _POSTGRESQL if op.get_bind().dialect.name == "postgresql" else _SQLITE:
        op.execute(statement)


def downgrade() -> None:
    """There is nothing before the first schema."""
    raise NotImplementedError("the first schema has nothing before it; delete the store instead")

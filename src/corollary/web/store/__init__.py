"""The store of the daily page: tables, connections, and the questions that pages ask.

This docstring is the contract between the store and what stands on it (pages, API, digest, feeds).

Opening::

    store = open_store()                                  # $COROLLARY_DATABASE, else daily.sqlite in the user's data folder
    store = open_store("postgresql://lab@host/corollary")  # a lab's server; the same code
    with store.reading() as connection: ...               # a Connection; takes no lock
    with store.writing() as session: ...                  # an ORM Session; commits at the end, rolls back on an exception

`open_store` runs the migrations, all in one transaction. ``store.folder`` holds index files; whoever serves pages may put files of
its own there. ``store.version()`` changes after every write by anyone and is what a cache of rendered pages is keyed by: 20
microseconds, good for every request. A `Store` may be used by all threads of a process; each process opens its own.

Tables (`corollary.web.store.schema`): `Paper`, `Reader`, `Vote`, `Note`, `ReadingItem`, `SavedSearch`, `Subscription`, `Delivery`
(the outbox), `Job`, `VerdictState`, `VerdictChange`, `ImportRun`, `RejectedItem`, `FetchState`, `Meta`; `Vector`, `Pending` and
`Term` belong to the search. Write rows of the first group as you like, inside ``store.writing()``. Papers are written by the
importers alone, and votes through `vote`, because a paper counts them. Times are aware and UTC; `now` gives them.

Reading papers gives `PaperView`, frozen and free of any session: `get_paper` (key, arXiv id in any spelling, or slug),
`papers_by_id`, `papers_of_slugs`, `papers_of_day`, `papers_between` (each a `Page` of papers
and the cursor ``next``), `nearest_day` (``either``, ``before``, ``after``), `neighbours`, `current_day`, `newest_day`, `days` (counts for a calendar),
`trending` (with `TRENDING_FORMULA` to show beside it), `papers_added_since`, `count_papers`, `vote`, `voted`.

``PaperView.text`` is the abstract, or our summary where no abstract was imported; ``PaperView.slug`` names the record in
`corollary.claims.record.catalogue` (it may name a paper that has no record yet). ``imported_votes`` is None where no source
counted any. Texts are stored as they came: whoever writes HTML escapes them.

Search and likeness are in `corollary.web.search`, imports in `corollary.web.importers`. `record_verdicts` compares the verdicts
at hand with those last seen and logs the changes, in one transaction.
"""

from __future__ import annotations

from corollary.web.store.engine import (
    Store,
    StoreUnavailable,
    data_dir,
    default_url,
    driver,
    from_json,
    open_store,
    places,
    rows,
)
from corollary.web.store.papers import (
    PAGE,
    TRENDING_DAYS,
    TRENDING_FORMULA,
    Page,
    PaperView,
    arxiv_id,
    count_papers,
    current_day,
    days,
    get_paper,
    nearest_day,
    neighbours,
    newest_day,
    paper_of,
    papers_added_since,
    papers_between,
    papers_by_id,
    papers_of_day,
    papers_of_slugs,
    trending,
    views,
    vote,
    voted,
)
from corollary.web.store.schema import (
    Base,
    Delivery,
    FetchState,
    ImportRun,
    Job,
    Meta,
    Note,
    Paper,
    Pending,
    Reader,
    ReadingItem,
    RejectedItem,
    SavedSearch,
    Subscription,
    Term,
    Vector,
    VerdictChange,
    VerdictState,
    Vote,
    now,
)
from corollary.web.store.verdicts import record_verdicts, verdict_changes_since

__all__ = [
    "Store", "StoreUnavailable", "data_dir", "default_url", "driver", "from_json", "open_store", "places", "rows",
    "PAGE", "TRENDING_DAYS", "TRENDING_FORMULA", "Page", "PaperView", "arxiv_id", "count_papers", "days", "get_paper",
    "nearest_day", "neighbours", "newest_day", "paper_of", "papers_added_since", "papers_between", "papers_by_id", "papers_of_day",
    "papers_of_slugs", "current_day", "trending", "views", "vote", "voted", "record_verdicts", "verdict_changes_since",
    "Base", "Delivery", "FetchState", "ImportRun", "Job", "Meta", "Note", "Paper", "Pending", "Reader", "ReadingItem",
    "RejectedItem", "SavedSearch", "Subscription", "Term", "Vector", "VerdictChange", "VerdictState", "Vote", "now",
]  # fmt: skip

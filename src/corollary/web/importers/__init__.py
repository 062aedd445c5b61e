"""Papers from outside: Hugging Face daily papers, arXiv, RSS and Atom, JSONL, BibTeX, from file, standard input or address.

``Importer(store).run(source)`` imports and returns a `Report`; ``sync`` brings sources up to date. What comes in twice changes
nothing; an item that is no paper is set aside with its reason (`corollary.web.store.RejectedItem`); killed at any point, the same
call goes on. `export` writes everything to JSONL, and importing that file brings it back. `first_issue` puts in the papers that
come with the package. Call `corollary.web.search.catch_up` afterwards: words are searchable at once, meaning then.
"""

from __future__ import annotations

from corollary.web.importers.archive import export
from corollary.web.importers.fetch import Fetcher, FetchError, Refused
from corollary.web.importers.first import first_issue
from corollary.web.importers.run import Importer, ImportFailed, Report
from corollary.web.importers.write import Counts

__all__ = ["Counts", "FetchError", "Fetcher", "ImportFailed", "Importer", "Refused", "Report", "export", "first_issue"]

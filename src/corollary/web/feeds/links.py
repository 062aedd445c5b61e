"""Where a list's feeds are; pages name them in their heads."""

from __future__ import annotations

from urllib.parse import urlencode

from corollary.web.feeds.write import KINDS


def feed_links(path: str, name: str, **fields: str) -> list[tuple[str, str, str]]:
    """Address, type and name of a list's three feeds.

    Args:
        path: of the list below ``/feeds``: ``papers``, ``day/2024-10-02``, ``week/2024-W40``, ``month/2024-10``, ``trending``,
            ``search``, ``methods``, ``verdicts``, ``reading``.
        name: of the list, for people.
        fields: of its query; empty ones are left out.

    Example:
        >>> feed_links("search", "Search", q="low rank", code="")[0]
        ('/feeds/search.atom?q=low+rank', 'application/atom+xml', 'Search (atom)')
    """
    kept = {key: value for key, value in fields.items() if value}
    asked = "?" + urlencode(kept) if kept else ""
    return [(f"/feeds/{path}.{kind}{asked}", media, f"{name} ({kind})") for kind, media in KINDS.items()]

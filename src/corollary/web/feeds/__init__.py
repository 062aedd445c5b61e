"""Every list as Atom, RSS and JSON feed."""

from __future__ import annotations

from corollary.web.feeds.links import feed_links
from corollary.web.feeds.routes import router

__all__ = ["feed_links", "router"]

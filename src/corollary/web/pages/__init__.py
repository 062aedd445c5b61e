"""The pages: rendered here, whole without scripts, and with HTMX where there are."""

from __future__ import annotations

from corollary.web.pages import account, catalogue, desk, errors, lists, paper, runs, search

ROUTERS = (lists.router, search.router, catalogue.router, paper.router, desk.router, runs.router, account.router)

__all__ = ["ROUTERS", "errors"]

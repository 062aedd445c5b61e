"""What stands between a request and the pages: hosts, sizes, headers, sessions, forgery, and floods."""

from __future__ import annotations

from corollary.web.guard.limits import Limits, TooMany
from corollary.web.guard.middleware import Guard
from corollary.web.guard.sessions import Forbidden, NotSignedIn, Sessions, Who, checked_form, client, who

__all__ = [
    "Forbidden", "Guard", "Limits", "NotSignedIn", "Sessions", "TooMany", "Who", "checked_form", "client", "who",
]  # fmt: skip

"""What all pages share: the frame, the badges, and the policy that forbids a page to load anything."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from urllib.parse import quote

from corollary import __version__
from corollary.report.html import Child, Html, h, join
from corollary.report.views import ClaimView, State

_ICONS = {
    "check": '<circle cx="8" cy="8" r="7.2"/><path class="cut" d="M4.6 8.3l2.3 2.3 4.5-4.9"/>',
    "cross": '<circle cx="8" cy="8" r="7.2"/><path class="cut" d="M5.3 5.3l5.4 5.4M10.7 5.3l-5.4 5.4"/>',
    "half": '<circle class="hollow" cx="8" cy="8" r="6.4"/><path d="M8 1.6a6.4 6.4 0 0 1 0 12.8z"/>',
    "equals": '<rect x=".8" y=".8" width="14.4" height="14.4" rx="3"/><path class="cut" d="M4.4 6.2h7.2M4.4 9.8h7.2"/>',
    "unequal": '<rect x=".8" y=".8" width="14.4" height="14.4" rx="3"/>'
    '<path class="cut" d="M4.4 6.2h7.2M4.4 9.8h7.2M10 3.4L6 12.6"/>',
    "alert": '<path d="M8 .9l7.4 13.4H.6z"/><path class="cut" d="M8 5.6v4M8 11.4v1.2"/>',
    "ring": '<circle class="hollow dashed" cx="8" cy="8" r="6.4"/>',
    "clock": '<circle class="hollow" cx="8" cy="8" r="6.4"/><path class="stroke" d="M8 4.2V8l2.6 1.8"/>',
}
_FAVICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><g fill="#1f5a99">'
    '<circle cx="8" cy="4" r="2.4"/><circle cx="3.4" cy="12" r="2.4"/><circle cx="12.6" cy="12" r="2.4"/></g></svg>'
)
_LOGO = Html(
    '<svg class="logo" viewBox="0 0 16 16" aria-hidden="true"><circle cx="8" cy="3.8" r="2.2"/>'
    '<circle cx="3.2" cy="12" r="2.2"/><circle cx="12.8" cy="12" r="2.2"/></svg>'
)


@cache
def asset(name: str) -> str:
    """A file that lies beside this module."""
    return (files("corollary.report") / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


@cache
def _policy() -> str:
    script, style = _digest(asset("report.js")), _digest(asset("report.css"))
    return f"default-src 'none'; script-src {script}; style-src {style}; img-src data:; base-uri 'none'; form-action 'none'"


def icon(name: str) -> Html:
    """A verdict's shape."""
    return h("svg", Html(_ICONS[name]), viewBox="0 0 16 16", class_="icon", aria_hidden="true")


def badge(state: State, *, large: bool = False) -> Html:
    """A verdict as shape, words and colour."""
    return h("span", icon(state.icon), h("span", state.label), class_=f"badge {state.tone}{' large' if large else ''}")


def flags(view: ClaimView) -> list[Html]:
    """What qualifies a verdict: a defect, a stale source, the tour."""
    found = []
    if view.defect:
        found.append(h("span", icon("alert"), "defect", class_="flag bad"))
    if view.stale:
        found.append(h("span", icon("clock"), "stale", class_="flag open"))
    return found


def page(
    title: str,
    body: Child,
    *,
    up: str = "",
    current: str = "",
    description: str = "",
    kind: str = "",
    alone: bool = False,
) -> Html:
    """A whole document.

    Args:
        title: of the page, without the project's name.
        body: what goes into ``main``.
        up: how to reach the scoreboard's folder from here, e.g. ``../``.
        current: which entry of the navigation this page is.
        description: one line for listings.
        kind: class of the body.
        alone: the page is no part of a report: it links to no other.
    """

    def entry(key: str, words: str, address: str) -> Html:
        return h("li", h("a", words, href=up + address, aria_current="page" if key == current else None))

    head = h(
        "head",
        h("meta", charset="utf-8"),
        h("meta", http_equiv="Content-Security-Policy", content=_policy()),
        h("meta", name="viewport", content="width=device-width, initial-scale=1"),
        h("meta", name="color-scheme", content="light dark"),
        h("meta", name="generator", content=f"corollary {__version__}"),
        h("meta", name="description", content=description) if description else None,
        h("title", f"{title} · Corollary"),
        h("link", rel="icon", href="data:image/svg+xml," + quote(_FAVICON)),
        h("style", Html(asset("report.css"))),
    )
    header = h(
        "header",
        h("span" if alone else "a", _LOGO, "Corollary", href=None if alone else up + "index.html", class_="brand"),
        None
        if alone
        else h(
            "nav",
            h("ul", entry("scoreboard", "Scoreboard", "index.html"), entry("statistics", "Statistics", "statistics.html")),
            aria_label="Main",
        ),
        class_="site",
    )
    origin = "" if alone else " Every number on these pages comes from a stored measurement."
    footer = h("footer", h("p", "Corollary ", __version__, ": papers you can run.", origin), class_="site")
    document = h(
        "html",
        head,
        h(
            "body",
            h("a", "Skip to the content", href="#main", class_="skip"),
            header,
            h("main", body, id="main", tabindex="-1"),
            footer,
            h("script", Html(asset("report.js"))),
            class_=kind or None,
        ),
        lang="en",
    )
    return join(Html("<!doctype html>\n"), document, "\n")

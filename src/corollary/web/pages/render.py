"""Templates, and what they call."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cache, lru_cache
from html import escape
from importlib.resources import files
from typing import Any
from urllib.parse import urlencode, urlsplit

from fastapi import Request
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import HTMLResponse, RedirectResponse, Response

from corollary import __version__
from corollary.report import html, numbers, shell
from corollary.report.plots import effect_plot, raw_plot, trial_figure
from corollary.web.board import STRENGTHS, strength
from corollary.web.guard import who
from corollary.web.guard.middleware import KEEP
from corollary.web.pages import card_html
from corollary.web.pages.words import clip, long_day, paper_address, people, short_day
from corollary.web.periods import week_name


def _markup(function: Callable[..., Any]) -> Callable[..., Markup]:
    """The report's builders escape what they are given; their result is markup to a template."""

    def wrapped(*args: Any, **kwargs: Any) -> Markup:
        made = function(*args, **kwargs)
        return Markup("") if made is None else Markup(str(made) if isinstance(made, str) else "".join(map(str, made)))

    return wrapped


def _ago(moment: datetime) -> str:
    return numbers.moment(moment.isoformat())


def _choice(name: str, words: str, options: Sequence[str | tuple[str, str]], picked: str, nothing: str = "all") -> Markup:
    """A form's field that offers values, each with its words or a word for itself."""
    pairs = tuple((item, item) if isinstance(item, str) else item for item in options)
    # What is asked for and not offered is not kept.
    return _select(name, words, pairs, picked if any(picked == value for value, _ in pairs) else "", nothing)


@lru_cache(maxsize=256)
def _select(name: str, words: str, options: tuple[tuple[str, str], ...], picked: str, nothing: str) -> Markup:
    offered = [
        f'<option value="{escape(value)}"{" selected" if value == picked else ""}>{escape(text)}</option>'
        for value, text in options
    ]
    return Markup(
        f'<p><label for="by-{escape(name)}">{escape(words)}</label>\n<select name="{escape(name)}" id="by-{escape(name)}">'
        f'<option value="">{escape(nothing)}</option>{"".join(offered)}</select></p>'
    )


def _query(**fields: Any) -> str:
    """Fields as the query of an address; empty ones are left out."""
    kept = {name: value for name, value in fields.items() if value not in (None, "", False)}
    return "?" + urlencode(kept) if kept else ""


@cache
def _static(name: str) -> str:
    """The address of a file in ``static``, which changes with its content."""
    data = (
        shell.asset("report.css").encode()
        if name == "report.css"
        else files("corollary.web").joinpath("static", *name.split("/")).read_bytes()
    )
    return f"/static/{name}?v={hashlib.sha256(data).hexdigest()[:12]}"


def _host(address: str | None) -> str:
    try:
        return (urlsplit(address or "").hostname or "").removeprefix("www.")
    except ValueError:
        return ""


@cache
def environment() -> Environment:
    """The templates; every value is escaped unless it is markup already."""
    made = Environment(
        loader=PackageLoader("corollary.web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    made.globals.update(
        version=__version__,
        static=_static,
        paper_address=paper_address,
        icon=_markup(shell.icon),
        badge=_markup(shell.badge),
        flags=_markup(shell.flags),
        inline=_markup(html.inline),
        prose=_markup(html.prose),
        effect_plot=_markup(effect_plot),
        raw_plot=_markup(raw_plot),
        trial_figure=_markup(trial_figure),
        p_value=numbers.p_value,
        duration=numbers.duration,
        count=numbers.count,
        moment=numbers.moment,
        strength=strength,
        strengths=STRENGTHS,
        strength_choices=[(s.key, s.label) for s in STRENGTHS],
        choice=_choice,
        long_day=long_day,
        short_day=short_day,
        week_of=week_name,
        ago=_ago,
        host=_host,
        query=_query,
        hidden=card_html.hidden,
        vote_form=card_html.vote,
        reading_form=card_html.reading_form,
        standing_badge=card_html.standing_badge,
        states_strip=card_html.states_strip,
        people=people,
        card_list=card_html.card_list,
    )
    made.filters.update(clip=clip, link=_markup(html.link))
    return made


def wants_fragment(request: Request) -> bool:
    """Whether HTMX asks, which takes a piece of a page."""
    return request.headers.get("hx-request") == "true"


def respond(
    request: Request,
    template: str,
    *,
    keep: bool = False,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    **context: Any,
) -> Response:
    """A page.

    Args:
        request: what was asked.
        template: name of the template.
        keep: whether the page may be kept until the store or the verdicts change: it must depend on nothing but the address,
            the reader, and these.
        status: of the answer.
        headers: further headers.
        context: what the template needs beside who is asking and how the page is served.
    """
    app = request.app.state
    common = {
        "who": who(request),
        "lab": app.settings.lab,
        "csrf": app.sessions.mark,
        "path": request.url.path + (f"?{request.url.query}" if request.url.query else ""),
        "current": "",
        "refresh": 0,
        "mail": app.mail,
        "feeds": (),
        "q": "",
    }
    text = environment().get_template(template).render({**common, **context})
    answer = HTMLResponse(text, status, dict(headers or {}))
    if keep:
        answer.headers[KEEP] = "1"
    return answer


def back(request: Request, form: Mapping[str, Any], otherwise: str = "/") -> RedirectResponse:
    """Back to the page that a form stood on, as it says; never to another site."""
    return RedirectResponse(local(str(form.get("next") or ""), otherwise), 303)


def local(address: str, otherwise: str = "/") -> str:
    """An address of this site, or ``otherwise`` for one that leads elsewhere.

    Example:
        >>> local("/day/2024-10-02?after=3.4"), local("//evil.example"), local("https://evil.example"), local("/\\\\evil.example")
        ('/day/2024-10-02?after=3.4', '/', '/', '/')
    """
    try:
        parts = urlsplit(address)
    except ValueError:
        return otherwise
    plain = address.startswith("/") and not address.startswith("//") and "\\" not in address
    return (
        address
        if plain and not parts.netloc and not parts.scheme and address.isprintable() and address.isascii()
        else otherwise
    )

"""The HTML of cards and of what stands on them.

Written out here and not in a template: a page of a day has thirty cards, and each value that a template shows costs a call or
two. Every text goes through `_text`, which escapes it, on its way into the HTML.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from markupsafe import Markup

from corollary.report import html, shell
from corollary.report.views import PaperView as RecordView
from corollary.web.board import standing
from corollary.web.pages.cards import Card
from corollary.web.pages.words import clip, paper_address, people, short_day
from corollary.web.store import PaperView

_UP = '<svg viewBox="0 0 16 16" class="icon" aria-hidden="true"><path d="M8 3.2l5.6 8.6H2.4z"/></svg>'
_RIBBON = (
    '<svg viewBox="0 0 16 16" class="icon" aria-hidden="true"><path class="mark" d="M3.8 1.8h8.4v12.6L8 11.2l-4.2 3.2z"/></svg>'
)

_text = escape


def hidden(paper: PaperView, csrf: str, path: str) -> Markup:
    """What every form about a paper sends along: its token, where to go back to, and the paper."""
    return Markup(_hidden(_stamp(csrf, path), paper))


def _stamp(csrf: str, path: str) -> str:
    return f'<input type="hidden" name="csrf" value="{_text(csrf)}"><input type="hidden" name="next" value="{_text(path)}">'


def _hidden(stamp: str, paper: PaperView) -> str:
    return f'{stamp}<input type="hidden" name="paper" value="{paper.id}">'


def _vote(paper: PaperView, own: int, voted: bool, stamp: str, title: str) -> str:
    told = ""
    if paper.imported_votes is not None:
        told = (
            f'<span class="imported" title="Counted by {_text(paper.source)}, where the paper was imported from">'
            f"<b>{paper.imported_votes:,}</b> imported</span>"
        )
    return (
        f'<form method="post" action="/vote" class="vote" hx-post="/vote" hx-swap="outerHTML">{_hidden(stamp, paper)}'
        f'<input type="hidden" name="on" value="{0 if voted else 1}">'
        f'<button aria-pressed="{"true" if voted else "false"}" title="{"Take your vote back" if voted else "Vote for this paper"}">'
        f'{_UP} <span class="unseen">Vote for {title}, </span><b>{own}</b>'
        f'<span class="unseen"> {"vote" if own == 1 else "votes"} here</span></button> {told}</form>'
    )


def vote(paper: PaperView, own: int, voted: bool, csrf: str, path: str) -> Markup:
    """The button that votes for a paper, with its votes."""
    return Markup(_vote(paper, own, voted, _stamp(csrf, path), _text(paper.title)))


def _reading(paper: PaperView, state: str, stamp: str, title: str) -> str:
    return (
        f'<form method="post" action="/reading" class="later" hx-post="/reading" hx-swap="outerHTML">{_hidden(stamp, paper)}'
        f'<input type="hidden" name="state" value="{"" if state else "unread"}">'
        f'<button class="quiet" aria-pressed="{"true" if state else "false"}">{_RIBBON} '
        f'{"On your list" if state else "Read later"}<span class="unseen">: {title}</span></button></form>'
    )


def reading_form(paper: PaperView, state: str, csrf: str, path: str) -> Markup:
    """The button that puts a paper on the reading list, or takes it off."""
    return Markup(_reading(paper, state, _stamp(csrf, path), _text(paper.title)))


def _pieces(parts: Iterable[tuple[str, bool]]) -> str:
    return "".join([f"<mark>{_text(text)}</mark>" if hit else _text(text) for text, hit in parts])


def standing_badge(record: RecordView, large: bool = False) -> Markup:
    """How a record's claims stand, as a badge."""
    s = standing(record)
    return Markup(
        f'<span class="badge {s.tone}{" large" if large else ""}">{shell.icon(s.icon)}<span>{_text(s.words)}</span></span>'
    )


def states_strip(record: RecordView) -> Markup:
    """The verdicts of a record, one mark each."""
    marks = [
        f'<li class="{c.state.tone}" title="{_text(f"{c.state.label}: {c.claim.statement}")}">{shell.icon(c.state.icon)}'
        f'<span class="unseen">{_text(c.state.label)}</span></li>'
        for c in record.claims
    ]
    return Markup(f'<ul class="strip" aria-label="Verdicts, claim by claim">{"".join(marks)}</ul>')


def _foot(card: Card) -> str:
    if card.record is not None:
        run = f'<code class="run">corollary verify {_text(card.record.paper.slug)}</code>'
        return f"{standing_badge(card.record)}{states_strip(card.record)}{run}"
    if card.nearest is not None:
        method = card.nearest[0]
        link = f'<a href="{_text(paper_address(method))}">{_text(clip(method.title, 80))}</a>'
        return f'<p class="near"><span class="soft">Nearest method that runs here:</span> {link}</p>'
    return ""


def _card(card: Card, stamp: str, level: int) -> str:
    paper = card.paper
    title = _text(paper.title)
    by = [people(paper.authors)] if paper.authors else []
    by += [short_day(paper.day), *filter(None, (paper.organization, paper.venue))]
    if card.score is not None:
        by.append(f"score {card.score:.2g}" if card.score >= 0.001 else "score below 0.001")
    said = _pieces(card.text) if card.text else _text(clip(paper.summary or paper.abstract))
    excerpt = f'<p class="excerpt">{said}</p>' if said else ""
    code = f'<span class="code">{html.link("code", paper.code)}</span>' if paper.code else ""
    return (
        f'<article class="card">{_vote(paper, paper.own_votes, card.voted, stamp, title)}<div class="what">'
        f'<h{level}><a href="{_text(paper_address(paper))}">{_pieces(card.title) if card.title else title}</a></h{level}>'
        f'<p class="by">{" ".join([f"<span>{_text(word)}</span>" for word in by])}</p>'
        f'{excerpt}<div class="foot">{_foot(card)} <span class="end">{_reading(paper, card.reading, stamp, title)}{code}</span></div>'
        "</div></article>\n"
    )


def card_list(cards: Sequence[Card], csrf: str, path: str, level: int = 2) -> Markup:
    """Cards below one another.

    Args:
        cards: of `corollary.web.pages.cards.cards`.
        csrf: the token of their forms.
        path: the page that they stand on, which their forms lead back to.
        level: of their headings.
    """
    stamp = _stamp(csrf, path)
    return Markup(f'<div class="cards">\n{"".join([_card(card, stamp, level) for card in cards])}</div>')

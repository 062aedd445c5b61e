"""The methods that run here: every paper with a record, by package, verdict and strength of evidence."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from corollary.report.views import STATES, PaperView
from corollary.web.feeds.links import feed_links
from corollary.web.pages.render import respond
from corollary.web.store import papers_of_slugs

router = APIRouter(include_in_schema=False)


def has_words(view: PaperView, query: str) -> bool:
    """Whether every word of a query stands in a record."""
    paper = view.paper
    parts = [paper.slug, paper.title, paper.package, *paper.authors, paper.summary, *(c.object for c in paper.components)]
    text = " ".join([*parts, *(claim.statement for claim in paper.claims)]).lower()
    return all(word in text for word in query.lower().split())


@router.get("/methods")
def methods(request: Request, q: str = "", package: str = "", verdict: str = "", evidence: str = "") -> Response:
    """The catalogue."""
    app = request.app.state
    board = app.verdicts.board
    found = [view for view in app.verdicts.select(package, verdict, evidence) if has_words(view, q[:1000])]
    known = {paper.slug: paper for paper in papers_of_slugs(app.store, [view.paper.slug for view in found])}
    return respond(
        request, "catalogue.html", keep=True, current="methods",
        feeds=(*feed_links("methods", "Methods", package=package, verdict=verdict, evidence=evidence), *feed_links("verdicts", "Verdicts")), board=board, found=found, known=known, q_methods=q, package=package,
        verdict=verdict, evidence=evidence, packages=app.verdicts.packages,
        verdicts=app.verdicts.choices, states=STATES,
    )  # fmt: skip

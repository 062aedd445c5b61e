"""The methods that run here, with every claim's verdict."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request
from starlette.exceptions import HTTPException

from corollary.report.views import ClaimView
from corollary.web.api.asking import reading
from corollary.web.api.papers import standing_of
from corollary.web.api.schemas import ERRORS, Claim, Component, Method
from corollary.web.board import strength
from corollary.web.pages.catalogue import has_words
from corollary.web.pages.paper import import_lines

router = APIRouter(prefix="/api/corollary", tags=["methods"], dependencies=[Depends(reading)], responses=ERRORS)


def claim_of(view: ClaimView) -> Claim:
    """A claim as data."""
    claim = view.claim

    def said(name: str) -> Any:
        return view.get(name) if view.row is not None else None

    return Claim(
        id=claim.id, kind=claim.kind, statement=claim.statement, source=claim.source, baseline=claim.baseline or None, control=claim.control,
        verdict=said("verdict"), control_verdict=said("control_verdict"), defect=view.defect, stale=view.stale, evidence=strength(view).key,
        effect=view.number("effect"), ci_low=view.number("ci_low"), ci_high=view.number("ci_high"), p_value=view.number("p_value"),
        p_adjusted=view.adjusted, pairs=said("pairs"), seed=said("seed"), scale=said("scale"),
        measured_at=str(said("time")) if said("time") else None, commit=said("commit"),
    )  # fmt: skip


def method_of(view: Any) -> Method:
    """A record as data."""
    paper, short = view.paper, standing_of(view)
    assert short is not None
    return Method(
        **short.model_dump(), title=paper.title, authors=list(paper.authors), year=paper.year, arxiv=paper.arxiv or None,
        code=paper.code or None, summary=" ".join(paper.summary.split()), deviations=list(paper.deviations), imports=import_lines(paper),
        command=f"corollary verify {paper.slug} --controls",
        components=[Component(object=c.object, kind=c.kind, source=c.source, peer=c.peer or None) for c in paper.components],
        verdicts=[claim_of(claim) for claim in view.claims],
    )  # fmt: skip


@router.get("/methods")
def methods(
    request: Request,
    q: Annotated[str, Query(max_length=1000, description="words of titles, claims, authors")] = "",
    package: Annotated[str, Query(max_length=40)] = "",
    verdict: Annotated[str, Query(max_length=40, description="with at least one claim of this verdict")] = "",
    evidence: Annotated[str, Query(max_length=40, description="strong, fair, weak or none")] = "",
) -> list[Method]:
    """The catalogue."""
    found = request.app.state.verdicts.select(package, verdict, evidence)
    return [method_of(view) for view in found if has_words(view, q)]


@router.get("/methods/{slug}")
def one_method(request: Request, slug: Annotated[str, Path(max_length=100)]) -> Method:
    """One paper that runs here."""
    view = request.app.state.verdicts.paper(slug)
    if view is None:
        raise HTTPException(404, "there is no method of this name")
    return method_of(view)

"""Papers as Hugging Face's API gives them, and what is like them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, date, datetime, time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.responses import Response

from corollary.web.api.asking import reading
from corollary.web.api.schemas import ERRORS, DailyPaper, Day, Near, Paper, SearchResults, Standing
from corollary.web.asked import LONGEST, filters_of
from corollary.web.board import standing
from corollary.web.guard import client
from corollary.web.pages.words import paper_address
from corollary.web.periods import MONTH, WEEK, month_of, week_of
from corollary.web.quick import quick
from corollary.web.search import nearest_implemented, search, similar
from corollary.web.store import Page, PaperView, current_day, days, get_paper, papers_between, trending

router = APIRouter(prefix="/api", tags=["papers"], dependencies=[Depends(reading)], responses=ERRORS)
_LAST_PAGE = 100
Limit = Annotated[int, Query(ge=1, le=100, description="entries at most")]
Name = Annotated[str, Path(max_length=600, description="arXiv id in any spelling, key, or slug")]


def answer(value: Any) -> Response:
    """Dicts and lists as JSON. They are not made into the models of the route's ``response_model`` first: that, and the
    framework's own check of them, took as long as half of the search before. The tests hold answers to the models."""
    return Response(to_json(value, inf_nan_mode="null"), media_type="application/json")


def _told(**fields: Any) -> dict[str, Any]:
    """What there is to tell: fields that are None are left out."""
    return {name: value for name, value in fields.items() if value is not None}


def standing_of(view: Any) -> Standing | None:
    """How a record's claims stand."""
    if view is None:
        return None
    found = standing(view)
    return Standing(
        slug=view.paper.slug, package=view.paper.package, claims=found.total, measured=found.measured, hold=found.holds, words=found.words
    )  # fmt: skip


def _midnight(day: date) -> datetime:
    return datetime.combine(day, time(), UTC)


def paper_of(
    request: Request, paper: PaperView, *, score: float | None = None, nearest: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """A paper in Hugging Face's words: a `Paper`."""
    app = request.app.state
    kept = paper.extra.get("huggingface", {})
    more: dict[str, Any] = dict(kept.get("paper", {})) if isinstance(kept, dict) else {}
    authors = more.pop("authors", None)
    if not isinstance(authors, list) or not all(isinstance(author, dict) for author in authors):
        authors = [{"name": name, "hidden": False} for name in paper.authors]
    else:
        authors = [
            {**author, "name": str(author.get("name") or ""), "hidden": bool(author.get("hidden"))} for author in authors
        ]
    organization = more.pop("organization", None)
    if not isinstance(organization, dict):
        organization = {"name": paper.organization} if paper.organization else None
    known = {name: value for name, value in more.items() if name not in Paper.model_fields}
    at_github = paper.code is not None and "github.com" in paper.code
    ours = _told(
        url=app.settings.address + paper_address(paper), day=paper.day, imported_votes=paper.imported_votes, own_votes=paper.own_votes,
        summary=paper.summary, doi=paper.doi, venue=paper.venue, categories=paper.categories, code=paper.code,
        code_added_by=paper.code_added_by, method=standing_of(app.verdicts.paper(paper.slug)), nearest=nearest, score=score,
    )  # fmt: skip
    return _told(
        **known, id=paper.arxiv or paper.key, title=paper.title, summary=paper.text, authors=authors,
        publishedAt=paper.published or _midnight(paper.day), submittedOnDailyAt=_midnight(paper.day), upvotes=paper.points,
        githubRepo=paper.code if at_github else None, githubRepoAddedBy=paper.code_added_by if at_github else None,
        ai_keywords=paper.keywords, organization=organization, corollary=ours,
    )  # fmt: skip


def entry_of(request: Request, paper: PaperView, score: float | None = None) -> dict[str, Any]:
    """An entry of a list in Hugging Face's words: a `DailyPaper`."""
    kept = paper.extra.get("huggingface", {})
    around = kept.get("item", {}) if isinstance(kept, dict) else {}
    more = {name: value for name, value in around.items() if name not in ("paper", "title", "summary", "publishedAt")}
    if not isinstance(more.get("numComments", 0), int):
        del more["numComments"]
    if not isinstance(more.get("isAuthorParticipating", False), bool):
        del more["isAuthorParticipating"]
    if not isinstance(more.get("submittedBy"), dict | None):
        del more["submittedBy"]
    found = paper_of(request, paper, score=score)
    # Around a paper Hugging Face dates its entry in the list; the paper's own date stands within.
    return _told(
        **{"numComments": 0, "isAuthorParticipating": False, **more}, paper=found, publishedAt=found["submittedOnDailyAt"],
        title=paper.title, summary=paper.text,
    )  # fmt: skip


def _at_page(fetch: Any, number: int) -> Sequence[PaperView]:
    """The papers of a page by its number; lists are paged by cursors, which are cheap to go along."""
    page: Page = fetch(None)
    for _ in range(number):
        if page.next is None:
            return []
        page = fetch(page.next)
    return page.papers


@router.get("/daily_papers", response_model=list[DailyPaper])
def daily_papers(
    request: Request,
    date: Annotated[date | None, Query(description="a day; without any of the three the newest that has papers")] = None,
    week: Annotated[str | None, Query(pattern=WEEK, description="an ISO week, as 2024-W40")] = None,
    month: Annotated[str | None, Query(pattern=MONTH, description="as 2024-10")] = None,
    limit: Limit = 50,
    p: Annotated[int, Query(ge=0, le=_LAST_PAGE, description="number of the page, from 0")] = 0,
    sort: Annotated[Literal["publishedAt", "trending"], Query(description="trending leaves the dates out")] = "publishedAt",
    submitter: Annotated[
        str | None, Query(max_length=200, description="of the page, only what this account put on the list")
    ] = None,
) -> Response:
    """The papers of a day, a week or a month, most votes first; or what is trending."""
    store = request.app.state.store

    def shown(papers: Sequence[PaperView], scores: Sequence[float | None]) -> Response:
        entries = [entry_of(request, paper, score) for paper, score in zip(papers, scores, strict=True)]
        kept = entries if submitter is None else [e for e in entries if submitter in _accounts(e)]
        return answer(kept)

    if sort == "trending":
        found = trending(store, size=min(200, limit * (p + 1)))[limit * p :]
        return shown([paper for paper, _ in found], [score for _, score in found])
    try:
        if week is not None:
            span = week_of(week)
        elif month is not None:
            span = month_of(month)
        else:
            day = date or current_day(store)
            if day is None:
                return shown([], [])
            span = (day, day)
    except ValueError as error:
        raise HTTPException(404, str(error)) from error
    papers = _at_page(lambda after: papers_between(store, *span, after=after, size=limit), p)
    return shown(papers, [None] * len(papers))


def _accounts(entry: dict[str, Any]) -> set[str]:
    """The names under which who put an entry on the list is known."""
    told = entry.get("submittedBy") or {}
    return {str(told[name]) for name in ("user", "name", "fullname") if told.get(name)}


@router.get("/papers/search", response_model=list[DailyPaper])
def search_papers(
    request: Request,
    q: Annotated[str, Query(max_length=LONGEST, description="words, authors, an arXiv id, a whole abstract")],
    limit: Limit = 20,
) -> Response:
    """Papers found by words and by meaning, best first."""
    _count(request)
    hits = search(request.app.state.store, q, size=limit).hits
    return answer([entry_of(request, hit.paper) for hit in hits])


def _count(request: Request) -> None:
    if request.app.state.settings.lab:
        request.app.state.limits.take("search", client(request))


@router.get("/corollary/search", response_model=SearchResults)
def search_with_filters(
    request: Request,
    q: Annotated[str, Query(max_length=LONGEST)],
    first: date | None = None,
    last: date | None = None,
    category: Annotated[str, Query(max_length=40)] = "",
    has_code: bool = False,
    package: Annotated[str, Query(max_length=40, description="only methods that run here, of this package")] = "",
    verdict: Annotated[str, Query(max_length=40, description="with at least one claim of this verdict")] = "",
    evidence: Annotated[str, Query(max_length=40, description="strong, fair, weak or none")] = "",
    mode: Literal["fusion", "words", "meaning"] = "fusion",
    after: Annotated[str | None, Query(max_length=200, description="the 'next' of the page before")] = None,
    limit: Limit = 20,
) -> Response:
    """Search with filters, paged."""
    _count(request)
    app = request.app.state
    fields = {
        "first": first.isoformat() if first else "", "last": last.isoformat() if last else "", "category": category,
        "code": "1" if has_code else "", "package": package, "verdict": verdict, "evidence": evidence,
    }  # fmt: skip
    try:
        found = search(app.store, q, filters_of(app.verdicts, fields), after=after, size=limit, mode=mode)
    except ValueError as error:
        raise HTTPException(400, "'after' must be the 'next' of an earlier page of the same search") from error
    hits = [
        _told(paper=paper_of(request, hit.paper), score=hit.score, words_rank=hit.words_rank, meaning_rank=hit.meaning_rank)
        for hit in found.hits
    ]
    return answer(_told(hits=hits, corrected=found.parsed.corrected, next=found.next))


@router.get("/corollary/days")
def days_with_papers(request: Request, first: date, last: date) -> list[Day]:
    """How many papers each day has; days without any are left out. At most 400 days at once."""
    if not 0 <= (last - first).days < 400:
        raise HTTPException(400, "'last' must be 'first' or up to 399 days after it")
    return [Day(day=day, papers=count) for day, count in days(request.app.state.store, first, last).items()]


def _one(request: Request, name: str) -> PaperView:
    paper = get_paper(request.app.state.store, name)
    if paper is None:
        raise HTTPException(404, "there is no paper of this name")
    return paper


def _near(request: Request, found: Sequence[tuple[PaperView, float]]) -> list[dict[str, Any]]:
    """Each a `Near`."""
    verdicts = request.app.state.verdicts
    return [
        {
            "id": other.arxiv or other.key,
            "title": other.title,
            "likeness": round(likeness, 4),
            "method": standing_of(verdicts.paper(other.slug)),
        }
        for other, likeness in found
    ]


@router.get("/corollary/similar/{name:path}", response_model=list[Near])
@quick
def similar_papers(request: Request, name: Name, limit: Annotated[int, Query(ge=1, le=50)] = 10) -> Response:
    """Papers that are like one, most alike first."""
    return answer(_near(request, similar(request.app.state.store, _one(request, name).id, size=limit)))


@router.get("/corollary/nearest/{name:path}", response_model=list[Near])
@quick
def nearest_methods(request: Request, name: Name, limit: Annotated[int, Query(ge=1, le=20)] = 3) -> Response:
    """The methods that run here and are nearest to a paper, nearest first."""
    return answer(_near(request, nearest_implemented(request.app.state.store, _one(request, name).id, size=limit)))


@router.get("/papers/{name:path}", response_model=Paper)
@quick
def one_paper(request: Request, name: Name) -> Response:
    """One paper, with the methods that run here and are nearest to it."""
    paper = _one(request, re.sub(r"\.json$", "", name))
    return answer(paper_of(request, paper, nearest=_near(request, nearest_implemented(request.app.state.store, paper.id))))

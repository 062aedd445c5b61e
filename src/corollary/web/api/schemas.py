"""The shapes of what the API gives, for its description and for whoever reads it with types."""

from __future__ import annotations

from datetime import date, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Error(BaseModel):
    """What went wrong."""

    error: str
    details: list[dict[str, Any]] = []


ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": Error} for status in (400, 401, 404, 422, 429)}
"""what every address may answer"""


class Claim(BaseModel):
    """One claim of a paper and what was measured of it; ``verdict`` is None before any run."""

    id: str
    kind: str
    statement: str
    source: str
    baseline: str | None
    control: str
    verdict: str | None
    control_verdict: str | None
    defect: bool = Field(description="whether the control passed too, so that the claim decides nothing")
    stale: bool = Field(description="whether the code has changed since it was measured")
    evidence: str = Field(description="strong, fair, weak or none")
    effect: float | None
    ci_low: float | None
    ci_high: float | None
    p_value: float | None
    p_adjusted: float | None = Field(description="after Holm's correction over the whole catalogue")
    pairs: int | None
    seed: int | None
    scale: str | None
    measured_at: str | None
    commit: str | None


class Component(BaseModel):
    """Something to import."""

    object: str
    kind: str
    source: str
    peer: str | None


class Standing(BaseModel):
    """How a method's claims stand, in short."""

    slug: str
    package: str
    claims: int
    measured: int
    hold: int
    words: str


class Method(Standing):
    """A paper that runs here."""

    title: str
    authors: list[str]
    year: int | None
    arxiv: str | None
    code: str | None
    summary: str
    deviations: list[str]
    imports: str
    command: str
    components: list[Component]
    verdicts: list[Claim]


class Near(BaseModel):
    """A paper that is like another; ``likeness`` is a cosine."""

    id: str
    title: str
    likeness: float
    method: Standing | None = None


class Ours(BaseModel):
    """What we add to a paper. ``nearest`` is given for one paper, not in lists."""

    url: str
    day: date
    imported_votes: int | None = Field(None, description="as a source counted them; None where none did")
    own_votes: int
    summary: str = Field(description="our own summary, where there is one")
    doi: str | None = None
    venue: str | None = None
    categories: list[str]
    code: str | None = None
    code_added_by: str | None = None
    method: Standing | None = None
    nearest: list[Near] | None = None
    score: float | None = None


class Author(BaseModel):
    """A name."""

    model_config = ConfigDict(extra="allow")
    name: str = ""
    hidden: bool = False


class Paper(BaseModel):
    """A paper in Hugging Face's words; fields that its source gave beyond these are passed on."""

    model_config = ConfigDict(extra="allow")
    id: str
    title: str
    summary: str
    authors: list[Author]
    publishedAt: datetime
    submittedOnDailyAt: datetime
    upvotes: int
    githubRepo: str | None = None
    githubRepoAddedBy: str | None = None
    ai_keywords: list[str] = []
    organization: dict[str, Any] | None = None
    corollary: Ours


class DailyPaper(BaseModel):
    """One entry of a day's list in Hugging Face's words."""

    model_config = ConfigDict(extra="allow")
    paper: Paper
    publishedAt: datetime
    title: str
    summary: str
    numComments: int = 0
    submittedBy: dict[str, Any] | None = None
    isAuthorParticipating: bool = False


class Day(BaseModel):
    """How many papers a day has."""

    day: date
    papers: int


class SearchHit(BaseModel):
    """A paper found, with its rank (from 1) by words and by meaning; None where that list lacks it."""

    paper: Paper
    score: float
    words_rank: int | None = None
    meaning_rank: int | None = None


class SearchResults(BaseModel):
    """A page of hits; ``next`` is the cursor of the next page, ``corrected`` says which words were taken for others."""

    hits: list[SearchHit]
    corrected: dict[str, str]
    next: str | None = None


class Run(BaseModel):
    """One run of `corollary verify` on this server."""

    id: int
    slug: str
    scale: str
    seed: int
    state: str
    progress: float
    error: str
    log: str
    rows: list[dict[str, Any]]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class NewRun(BaseModel):
    """What to run."""

    slug: str = Field(max_length=100)
    scale: str = Field("laptop", max_length=20)
    seed: int = Field(0, ge=0, le=999_999_999)


class Restored(BaseModel):
    """What an import did to the papers."""

    added: int
    updated: int
    unchanged: int

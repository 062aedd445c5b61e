"""One paper: what it says, what was measured of it, and what is like it."""

from __future__ import annotations

from fastapi import APIRouter, Request
from sqlalchemy import select
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from corollary.claims.record import Paper
from corollary.report.signatures import read_signature
from corollary.web.guard import who
from corollary.web.jobs import recent_jobs
from corollary.web.pages.cards import reader_marks
from corollary.web.pages.render import respond
from corollary.web.pages.words import paper_address
from corollary.web.quick import quick
from corollary.web.search import nearest_implemented, similar
from corollary.web.store import Note, Store, get_paper

router = APIRouter(include_in_schema=False)


def import_lines(paper: Paper) -> str:
    """The lines that import a paper's components, one to each package.

    Example:
        >>> from corollary.claims.record import get_paper
        >>> print(import_lines(get_paper("fira")))
        from corollary.optim import Fira, GaLore, ProjectedAdamW
    """
    by_package: dict[str, list[str]] = {}
    for component in paper.components:
        package, _, name = component.object.rpartition(".")
        by_package.setdefault(package, []).append(name)
    return "\n".join(f"from {package} import {', '.join(names)}" for package, names in by_package.items())


def note_of(store: Store, reader: int | None, paper_id: int) -> str:
    """A reader's note on a paper; '' where there is none."""
    if reader is None:
        return ""
    with store.reading() as connection:
        query = select(Note.text).where(Note.reader_id == reader, Note.paper_id == paper_id)
        return connection.scalar(query) or ""


@router.get("/papers/{name:path}")
@quick
def one_paper(request: Request, name: str) -> Response:
    """A paper by its key, arXiv id in any spelling, or slug."""
    app = request.app.state
    paper = get_paper(app.store, name[:600])
    record = app.verdicts.paper(paper.slug if paper else name)
    if paper is None and record is None:
        raise HTTPException(404, "there is no paper of this name")
    if paper is not None and paper.key != name:
        return RedirectResponse(paper_address(paper), 303)
    reader = who(request).reader
    with app.store.reading() as connection:
        voted, reading = reader_marks(connection, reader, [paper.id] if paper else [])
    near = nearest_implemented(app.store, paper.id) if paper else []
    return respond(
        request, "paper.html", keep=True, current="methods" if record else "", paper=paper, record=record,
        voted=bool(voted), reading=next(iter(reading.values()), ""), note=note_of(app.store, reader, paper.id) if paper else "",
        similar=similar(app.store, paper.id, size=6) if paper else [],
        nearest=[(method, likeness, app.verdicts.paper(method.slug)) for method, likeness in near],
        imports=import_lines(record.paper) if record else "",
        signatures={c.object: read_signature(c.object) for c in record.paper.components} if record else {},
        jobs=recent_jobs(app.store, slug=record.paper.slug, limit=3) if record else [], scales=app.settings.scales,
    )  # fmt: skip

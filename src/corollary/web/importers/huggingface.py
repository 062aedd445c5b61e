"""Daily papers as the Hugging Face API gives them: ``/api/daily_papers?date=``, nearly every field of which may be missing."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from corollary.web.importers.items import (
    BadItem,
    Item,
    arxiv_id,
    count,
    doi_of,
    finish,
    make_key,
    moment,
    names,
    web_address,
    words,
)  # fmt: skip

_OWN = frozenset(
    [
        "id",
        "title",
        "summary",
        "authors",
        "publishedAt",
        "submittedOnDailyAt",
        "upvotes",
        "githubRepo",
        "githubRepoAddedBy",
        "ai_keywords",
        "organization",
    ]
)


def read_item(data: Any) -> Item:
    """One entry of the list: ``{"paper": {...}, ...}``, or the paper alone.

    The day is that of the list (``submittedOnDailyAt``, else the entry's ``publishedAt``), the publication the paper's own.

    Raises:
        BadItem: where no paper can be made of it.
    """
    if not isinstance(data, dict):
        raise BadItem(f"an item must be an object, not {type(data).__name__}")
    paper = data.get("paper", data)
    if not isinstance(paper, dict):
        raise BadItem(f"paper must be an object, not {type(paper).__name__}")
    outer = data if paper is not data else {}
    name = words(paper.get("id"), "id")
    found = arxiv_id(name) if name else None
    if name and found is None and len(name) > 200:
        raise BadItem(f"id has {len(name)} letters; at most 200 are taken")
    title = words(paper.get("title") or outer.get("title"), "title")
    published = moment(paper.get("publishedAt") or outer.get("publishedAt"), "publishedAt")
    listed = moment(paper.get("submittedOnDailyAt") or outer.get("submittedOnDailyAt"), "submittedOnDailyAt")
    if listed is None and outer:
        listed = moment(outer.get("publishedAt"), "publishedAt")
    day = listed or published
    people = paper.get("authors")
    if isinstance(people, list):
        people = [person for person in people if not (isinstance(person, dict) and person.get("hidden"))]
    authors = names(people, "authors")
    organization = paper.get("organization") or outer.get("organization")
    code = web_address(paper.get("githubRepo"), "githubRepo")
    more = {key: value for key, value in paper.items() if key not in _OWN}
    around = {key: value for key, value in outer.items() if key not in ("paper", "title", "publishedAt", "summary")}
    if paper.get("authors"):
        more["authors"] = paper["authors"]
    if isinstance(organization, dict):
        more["organization"] = organization
        organization = organization.get("fullname") or organization.get("name")
    arxiv, version = found or (None, None)
    return finish(
        Item(
            key=make_key(
                arxiv=arxiv,
                doi=None,
                url=None if arxiv or not name else f"https://huggingface.co/papers/{name}",
                title=title,
                authors=authors,
            ),
            title=title,
            day=(day or datetime.now(UTC)).date(),
            source="huggingface",
            arxiv=arxiv,
            version=version,
            authors=authors,
            abstract=words(paper.get("summary") or outer.get("summary"), "abstract"),
            keywords=names(paper.get("ai_keywords"), "ai_keywords"),
            published=published,
            imported_votes=count(paper.get("upvotes"), "upvotes"),
            code=code,
            code_added_by=words(paper.get("githubRepoAddedBy"), "githubRepoAddedBy")[:100] or None if code else None,
            organization=words(organization, "organization") or None,
            url=f"https://arxiv.org/abs/{arxiv}" if arxiv else None,
            extra={"huggingface": {"paper": more, "item": around}},
            listed=listed is not None,
        )
    )


def read_plain(data: Any) -> Item:
    """One object of JSONL: the fields of an export's paper, or their usual names.

    ``title`` is needed; of ``id`` or ``arxiv``, ``doi`` and ``url`` one is good to have. ``abstract`` or ``summary`` (ours goes
    by ``our_summary``), ``authors``, ``date``, ``day``, ``published`` or ``year``, ``updated``, ``votes`` or ``upvotes``,
    ``categories``, ``keywords``, ``code``, ``comment``, ``venue`` are taken where they are there; the rest is kept.
    """
    if not isinstance(data, dict):
        raise BadItem(f"an item must be an object, not {type(data).__name__}")
    if (
        isinstance(data.get("paper"), dict)
        or ("paper" in data and "title" not in data)
        or "submittedOnDailyAt" in data
        or "githubRepo" in data
    ):
        return read_item(data)
    taken = set()

    def get(*keys: str) -> Any:
        for key in keys:
            if data.get(key) not in (None, "", []):
                taken.add(key)
                return data[key]
        return None

    title = words(get("title"), "title")
    name = get("arxiv", "arxiv_id", "id", "key")
    said = words(name, "id") if isinstance(name, str | None) else str(name)
    found = arxiv_id(said) if said else None
    arxiv, version = found or (None, None)
    doi = doi_of(get("doi"))
    url = web_address(get("url", "link"), "url")
    authors = names(get("authors", "author"), "authors")
    listed = moment(get("day"), "day")
    published = moment(get("published", "publishedAt", "date", "year"), "published")
    updated = moment(get("updated", "updatedAt"), "updated")
    key = make_key(arxiv=arxiv, doi=doi, url=url, title=title, authors=authors)
    if not (arxiv or doi or url) and said:
        key = f"id:{said}"[:480]
    code = web_address(get("code", "code_url", "github"), "code")
    return finish(
        Item(
            key=key,
            title=title,
            day=(listed or published or updated or datetime.now(UTC)).date(),
            source="jsonl",
            arxiv=arxiv,
            version=version,
            doi=doi,
            authors=authors,
            abstract=words(get("abstract", "summary"), "abstract"),
            summary=words(get("our_summary"), "summary"),
            keywords=names(get("keywords", "tags"), "keywords"),
            categories=names(get("categories"), "categories"),
            published=published,
            updated=updated,
            imported_votes=count(get("votes", "upvotes"), "votes"),
            url=url or (f"https://arxiv.org/abs/{arxiv}" if arxiv else None),
            code=code,
            code_added_by=(words(get("code_added_by"), "code_added_by")[:100] or "source") if code else None,
            organization=words(get("organization"), "organization") or None,
            comment=words(get("comment"), "comment") or None,
            venue=words(get("venue", "journal"), "venue") or None,
            extra={"jsonl": rest} if (rest := {k: v for k, v in data.items() if k not in taken}) else {},
            listed=listed is not None,
        )
    )

"""BibTeX, as reference managers write it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime

from corollary.web.importers.items import (
    BadItem,
    Item,
    Raw,
    arxiv_id,
    code_in,
    doi_of,
    finish,
    make_key,
    moment,
    names,
    web_address,
    words,
)

_MONTHS = {
    name: i for i, name in enumerate(["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"], 1)
}
_ARXIV_IN = re.compile(
    r"arxiv[:\s./]*(?:org/abs/|preprint\s*)?(?:arxiv:)?\s*(\d{4}\.\d{4,5}(?:v\d+)?|[a-z-]+(?:\.[a-z]{2})?/\d{7})", re.I
)


def _plain(text: str) -> str:
    """Text without LaTeX: accents as letters, braces gone."""
    from pylatexenc.latex2text import LatexNodes2Text

    try:
        return str(LatexNodes2Text(math_mode="verbatim").latex_to_text(text))
    except (ValueError, IndexError, RecursionError, AttributeError):  # what its parser raises on broken input
        return text.replace("{", "").replace("}", "")


def _author(name: str) -> str:
    parts = [part.strip() for part in name.split(",")]
    return (
        " ".join(reversed(parts))
        if len(parts) == 2
        else " ".join([parts[-1], *parts[:-1]])
        if len(parts) == 3
        else name.strip()
    )


def read_entry(kind: str, fields: dict[str, str]) -> Item:
    """One entry: its type and its fields, names in lower case."""
    get = {name: " ".join(_plain(value).split()) for name, value in fields.items() if name != "url"}
    get["url"] = fields.get("url", "").replace("\\_", "_").replace("\\%", "%").strip()
    title = words(get.get("title"), "title")
    eprint = get.get("eprint", "")
    found = arxiv_id(eprint) if get.get("archiveprefix", get.get("eprinttype", "arxiv")).lower() == "arxiv" else None
    for field in ("url", "journal", "note", "howpublished", "doi", "number"):
        if found is None and (match := _ARXIV_IN.search(get.get(field, ""))):
            found = arxiv_id(match[1])
    arxiv, version = found or (None, None)
    doi = doi_of(get.get("doi"))
    url = web_address(get["url"], "url")
    authors = names(
        [_author(part) for part in re.split(r"\s+and\s+", get.get("author", "")) if part.lower() != "others"], "authors"
    )
    year = re.search(r"\d{4}", get.get("year", "") or get.get("date", ""))
    if year is None and not arxiv:
        raise BadItem("year is missing")
    month = _MONTHS.get(get.get("month", "")[:3].lower()) or (int(get["month"]) if get.get("month", "").isdigit() else 1)
    if year is not None:
        full = re.fullmatch(r"\d{4}-\d{2}-\d{2}", get.get("date", ""))
        published = moment(full[0] if full else f"{year[0]}-{month if 1 <= month <= 12 else 1:02d}", "year")
    else:
        published = None
    comment = get.get("note", "")
    code = code_in(f"{fields.get('url', '')} {comment} {get.get('code', '')}")
    return finish(
        Item(
            key=make_key(arxiv=arxiv, doi=doi, url=url, title=title, authors=authors),
            title=title,
            day=(published or datetime.now(UTC)).date(),
            source="bibtex",
            arxiv=arxiv,
            version=version,
            doi=doi,
            authors=authors,
            abstract=words(get.get("abstract"), "abstract"),
            keywords=names([part for part in re.split(r"[,;]", get.get("keywords", "")) if part.strip()], "keywords"),
            categories=names([get["primaryclass"]], "primaryclass") if get.get("primaryclass") else (),
            published=published,
            url=url or (f"https://arxiv.org/abs/{arxiv}" if arxiv else None),
            code=code,
            code_added_by="authors" if code else None,
            venue=words(get.get("booktitle") or get.get("journal"), "venue") or None,
            comment=words(comment, "comment") or None,
            extra={"bibtex": {"type": kind, **{k: v for k, v in fields.items() if len(v) < 2000 and k != "abstract"}}},
        )
    )


def read(text: str) -> Iterator[Raw]:
    """The entries of a BibTeX file; a broken one does not stop the rest."""
    import bibtexparser

    library = bibtexparser.parse_string(text, append_middleware=[])
    for block in library.blocks:
        where = f"line {(block.start_line or 0) + 1}"
        raw = block.raw or ""
        if block in library.failed_blocks:
            yield Raw(
                where,
                raw,
                None,
                f"not readable as BibTeX: {' '.join(str(getattr(block, 'error', None) or 'broken entry').split())[:200]}",
            )
        elif type(block).__name__ == "Entry":
            try:
                fields = {field.key.lower(): str(field.value) for field in block.fields}
                yield Raw(where, raw, read_entry(block.entry_type.lower(), fields))
            except BadItem as error:
                yield Raw(where, raw, None, str(error))

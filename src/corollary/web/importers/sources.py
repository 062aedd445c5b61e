"""From a source as a person names it to items, with how far it has come."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from corollary.web.importers import arxiv, bibtex, feeds, huggingface
from corollary.web.importers.arxiv import BadAnswer
from corollary.web.importers.items import MAX_ITEM, BadItem, Item, Raw

KINDS = ("jsonl", "json", "arxiv", "feed", "bibtex", "archive")
MAX_FILE = 256 * 2**20  # of a file that has to be read whole
ARCHIVE = "corollary-daily"  # what the first line of an export says
_ARXIV_PREFIX = re.compile(r"(ti|au|abs|co|jr|cat|rn|id|all):")


@dataclass(frozen=True)
class Source:
    """What a person named: ``kind`` is ``file``, ``stdin``, ``url``, ``hf`` or ``arxiv``; ``name`` is what the run goes by."""

    kind: str
    name: str
    path: Path | None = None
    url: str = ""
    query: str = ""
    first: date | None = None
    last: date | None = None


def named(text: str) -> Source:
    """Read the name of a source.

    ``-`` is standard input; ``hf``, ``hf:2026-05-08`` and ``hf:2026-05-01..2026-05-08`` are daily papers of Hugging Face;
    ``arxiv:cs.LG``, ``arxiv:2410.01623,2403.03507`` and ``arxiv:all:"low rank" AND cat:cs.LG`` are questions to arXiv; an http or
    https address is fetched; the rest is a path.

    Raises:
        ValueError: for a day that is none, an empty question, and a path where there is no file.
    """
    if text == "-":
        return Source("stdin", "-")
    if text == "hf" or text.startswith("hf:"):
        try:
            days = [date.fromisoformat(part) for part in text[3:].split("..") if part]
        except ValueError as error:
            raise ValueError(f"source '{text}': days go as hf:2026-05-08 or hf:2026-05-01..2026-05-08") from error
        if len(days) > 2 or (len(days) == 2 and (days[1] < days[0] or (days[1] - days[0]).days > 3660)):
            raise ValueError(f"source '{text}': at most ten years, the earlier day first")
        return Source("hf", text, first=days[0] if days else None, last=days[-1] if days else None)
    if text.startswith("arxiv:"):
        query = text[6:].strip()
        if not query:
            raise ValueError("source 'arxiv:' asks for nothing; give a category, ids or a query: arxiv:cs.LG")
        return Source("arxiv", text, query=query)
    if re.match(r"https?://", text, re.IGNORECASE):
        plain = re.sub(r"[?#].*", "", re.sub(r"//[^/@]*@", "//", text))
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return Source("url", plain if plain == text else f"{plain}?{digest}", url=text)
    if re.match(r"[a-z][a-z0-9+.-]+://", text, re.IGNORECASE):
        raise ValueError(
            f"source '{text.partition(':')[0]}:': only http and https addresses are fetched; a file goes by its path"
        )
    path = Path(text)
    if not path.is_file():
        raise ValueError(f"no file at '{text}'; a source is a path, '-', an address, hf[:DAY] or arxiv:QUERY")
    return Source("file", str(path.resolve()), path=path)


def arxiv_address(base: str, query: str, start: int, count: int) -> str:
    """The API's address of one page of a question, newest first."""
    parts = [part.strip() for part in query.split(",")]
    if all(re.fullmatch(r"\d{4}\.\d{4,5}(v\d+)?|[a-z-]+(\.[A-Z]{2})?/\d{7}(v\d+)?", part) for part in parts):
        asked = f"id_list={quote(','.join(parts), safe=',/')}"
    else:
        said = query if _ARXIV_PREFIX.search(query) else f"cat:{query}"
        asked = f"search_query={quote(said)}&sortBy=submittedDate&sortOrder=descending"
    return f"{base}?{asked}&start={start}&max_results={count}"


def open_file(path: Path) -> BinaryIO:
    """A file, unpacked on the way where it is gzip."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if packed else path.open("rb")  # type: ignore[return-value]


def fingerprint(path: Path) -> str:
    """What tells whether a file is the one that a run began with: its size, its time and its first bytes."""
    stat = os.stat(path)
    with path.open("rb") as file:
        head = file.read(65_536)
    return hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns} ".encode() + head).hexdigest()[:32]


def sniff(head: bytes) -> str:
    """What a text is, by its beginning; raises BadAnswer where it is nothing that is read."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"<"):
        sure = re.search(rb"arxiv\.org/api/|arxiv\.org/schemas/atom", text)
        return "arxiv" if sure and b"<feed" in text else "feed"
    if text.startswith(b"["):
        return "json"
    if text.startswith(b"{"):
        line = text.splitlines()[0]
        if f'"format": "{ARCHIVE}"'.encode() in line or f'"format":"{ARCHIVE}"'.encode() in line:
            return "archive"
        try:
            json.loads(line)
        except ValueError:
            return "json" if len(text.splitlines()) > 1 or len(head) < 4096 else "jsonl"
        return "jsonl"
    if re.match(rb"[@%]", text) or re.search(rb"^\s*@\w+\s*\{", text, re.MULTILINE):
        return "bibtex"
    raise BadAnswer("it is none of JSONL, JSON, Atom, RSS and BibTeX, as far as its beginning shows; name it with --format")


def _item(data: Any) -> Item:
    return huggingface.read_plain(data)


def read_lines(file: BinaryIO, *, skip: int = 0) -> Iterator[Raw]:
    """JSONL, one line at a time; a line that is too long or no JSON is set aside."""
    number = 0
    while line := _readline(file):
        number += 1
        if number <= skip or not line.strip():
            continue
        where = f"line {number}"
        if len(line) > MAX_ITEM:
            yield Raw(where, line[:2000].decode("utf-8", "replace"), None, f"the line has over {MAX_ITEM} bytes")
            continue
        text = line.decode("utf-8", "replace").strip().removeprefix("\ufeff")
        try:
            yield Raw(where, text, _item(json.loads(text)))
        except BadItem as error:
            yield Raw(where, text, None, str(error))
        except RecursionError:
            yield Raw(where, text, None, "not readable as JSON: nested too deep")
        except ValueError as error:
            yield Raw(where, text, None, f"not readable as JSON: {error}"[:300])


def _readline(file: BinaryIO) -> bytes:
    """One line; of one that is too long only its beginning, and the rest is passed over."""
    line = file.readline(MAX_ITEM + 2)
    if len(line) > MAX_ITEM and not line.endswith(b"\n"):
        while (more := file.readline(MAX_ITEM)) and not more.endswith(b"\n"):
            pass
    return line


def read_json(body: bytes) -> Iterator[Raw]:
    """A JSON list of items, or an object with the list in it; raises BadAnswer where it is neither."""
    try:
        data = json.loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadAnswer(f"not readable as JSON: {error}"[:300]) from error
    if isinstance(data, dict):
        found = next((data[key] for key in ("papers", "items", "results", "data") if isinstance(data.get(key), list)), None)
        if found is None and (data.get("error") or data.get("message")):
            raise BadAnswer(f"the server answers with an error: {str(data.get('error') or data.get('message'))[:200]}")
        data = [data] if found is None else found
    if not isinstance(data, list):
        raise BadAnswer(f"a JSON list of items is needed, not {type(data).__name__}")
    for place, entry in enumerate(data):
        text = json.dumps(entry, ensure_ascii=False)
        try:
            if len(text) > MAX_ITEM:
                raise BadItem(f"the item has over {MAX_ITEM} letters")
            yield Raw(f"item {place}", text, _item(entry))
        except BadItem as error:
            yield Raw(f"item {place}", text, None, str(error))


def read_body(body: bytes, kind: str | None = None) -> Iterator[Raw]:
    """The items of a text that is in memory, of a kind given or found out."""
    kind = kind or sniff(body[:65_536])
    if kind == "jsonl":
        yield from read_lines(io.BytesIO(body))
    elif kind == "json":
        yield from read_json(body)
    elif kind == "arxiv":
        yield from arxiv.read(body).items
    elif kind == "feed":
        yield from feeds.read(body)
    elif kind == "bibtex":
        yield from bibtex.read(body.decode("utf-8", "replace"))
    else:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not '{kind}'")


def read_whole(file: BinaryIO, most: int = MAX_FILE) -> bytes:
    """A whole file or stream; raises BadAnswer where it is too long, or damaged on the way out of its packing."""
    try:
        body = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise BadAnswer(f"cannot be unpacked: {error}") from error
    if len(body) > most:
        raise BadAnswer(f"it has over {most} bytes; of such length only JSONL is read")
    return body

"""The record of a paper: facts and pre-registered claims, read from TOML and held to a schema.

Nothing here imports torch: the catalogue, the command line's listings and the web read records alone.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

KINDS = ("paired", "exact", "slope", "ratio")
COMPONENT_KINDS = (
    "optimizer", "schedule", "loss", "layer", "adapter", "compressor", "diagnostic", "estimator", "operator", "learner",
    "manifold", "function", "sampler", "continual", "steering",
)  # fmt: skip
MIN_PAIRS = 6


class RecordError(ValueError):
    """A paper's record breaks the schema; the message names the file, the field, what stood there and what may."""


class UnknownPaper(KeyError):
    """No record has this slug; the message names the nearest slugs."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Component:
    """One importable object of a paper: its dotted name, kind, source in the paper, and the peer it is measured against."""

    object: str
    kind: str
    source: str
    peer: str = ""


@dataclass(frozen=True)
class ClaimRecord:
    """One pre-registered claim. Which of the fields count depends on ``kind``; see ``docs/verdicts``."""

    id: str
    kind: str
    statement: str
    source: str
    control: str
    baseline: str = ""
    metric: str = ""
    tuning: str = ""
    better: str = ""
    margin: float = 0.0
    tolerance: float = 0.0
    exponent: float = 0.0
    bound: float = 0.0
    pairs: int = 10
    tour: bool = False
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The claim as plain data, in a stable order: what the source hash and the stores see."""
        return asdict(self)


@dataclass(frozen=True)
class Paper:
    """The whole record of one paper; ``path`` is the record's own file."""

    slug: str
    package: str
    title: str
    authors: tuple[str, ...]
    year: int
    summary: str
    arxiv: str = ""
    date: str = ""
    venue: str = ""
    url: str = ""
    code: str = ""
    deviations: tuple[str, ...] = ()
    components: tuple[Component, ...] = ()
    claims: tuple[ClaimRecord, ...] = ()
    path: Path = field(default=Path(), compare=False)

    @property
    def module(self) -> str:
        """Dotted name of the module that measures the claims, beside the record."""
        root = self.path.parent.parent
        prefix = "corollary.papers" if root == _own_root() else root.name
        return f"{prefix}.{self.package}.{self.path.stem}"

    def claim(self, claim_id: str) -> ClaimRecord:
        """The claim of this id; raises ``KeyError`` naming the ids there are."""
        for claim in self.claims:
            if claim.id == claim_id:
                return claim
        raise KeyError(f"{self.slug} has no claim '{claim_id}'; it has: {', '.join(c.id for c in self.claims)}")


_TEXT, _NUMBER, _INT, _BOOL, _LIST = (str,), (int, float), (int,), (bool,), (list,)
_PAPER_FIELDS: dict[str, tuple[tuple[type, ...], bool]] = {
    "title": (_TEXT, True), "authors": (_LIST, True), "year": (_INT, True), "summary": (_TEXT, True),
    "arxiv": (_TEXT, False), "date": (_TEXT, False), "venue": (_TEXT, False), "url": (_TEXT, False),
    "code": (_TEXT, False), "deviations": (_LIST, False), "component": (_LIST, True), "claim": (_LIST, True),
}  # fmt: skip
_COMPONENT_FIELDS: dict[str, tuple[tuple[type, ...], bool]] = {
    "object": (_TEXT, True), "kind": (_TEXT, True), "source": (_TEXT, True), "peer": (_TEXT, False),
}  # fmt: skip
_CLAIM_FIELDS: dict[str, tuple[tuple[type, ...], bool]] = {
    "id": (_TEXT, True), "kind": (_TEXT, True), "statement": (_TEXT, True), "source": (_TEXT, True),
    "control": (_TEXT, True), "baseline": (_TEXT, False), "metric": (_TEXT, False), "tuning": (_TEXT, False),
    "better": (_TEXT, False), "margin": (_NUMBER, False), "tolerance": (_NUMBER, False), "exponent": (_NUMBER, False),
    "bound": (_NUMBER, False), "pairs": (_INT, False), "tour": (_BOOL, False), "note": (_TEXT, False),
}  # fmt: skip
_NEEDED: dict[str, tuple[str, ...]] = {
    "paired": ("better", "baseline", "metric", "margin"),
    "exact": ("tolerance",),
    "slope": ("exponent", "tolerance"),
    "ratio": ("better", "bound", "baseline"),
}


def _check_fields(where: str, data: Mapping[str, Any], fields: Mapping[str, tuple[tuple[type, ...], bool]]) -> None:
    for name, value in data.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; allowed: {', '.join(fields)}"
            raise RecordError(f"{where}: unknown field '{name}'{hint}")
        types = fields[name][0]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            wanted = " or ".join(t.__name__ for t in types)
            raise RecordError(f"{where}: '{name}' must be {wanted}, not {type(value).__name__} ({value!r})")
        if isinstance(value, str) and not value.strip() and fields[name][1]:
            raise RecordError(f"{where}: '{name}' must not be empty")
    for name, (_, needed) in fields.items():
        if needed and name not in data:
            raise RecordError(f"{where}: '{name}' is missing")


def _choice(where: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RecordError(f"{where}: '{name}' is '{value}'; allowed: {', '.join(allowed)}")


def _read_claim(where: str, data: Mapping[str, Any]) -> ClaimRecord:
    where = f"{where}: claim '{data.get('id', '?')}'"
    _check_fields(where, data, _CLAIM_FIELDS)
    kind = data["kind"]
    _choice(where, "kind", kind, KINDS)
    if not str(data["id"]).isidentifier():
        raise RecordError(f"{where}: 'id' must be a Python identifier, because a function carries it")
    for name in _NEEDED[kind]:
        if name not in data:
            raise RecordError(f"{where}: '{name}' is missing (a claim of kind '{kind}' needs it)")
    if "better" in data:
        _choice(where, "better", data["better"], ("lower", "higher"))
    if "tolerance" in data and not data["tolerance"] >= 0:
        raise RecordError(f"{where}: 'tolerance' must be at least 0, not {data['tolerance']}")
    if kind == "ratio" and not data["bound"] > 0:
        raise RecordError(f"{where}: 'bound' must be above 0, not {data['bound']}")
    least = 1 if kind == "exact" else MIN_PAIRS
    if data.get("pairs", 10) < least:
        raise RecordError(f"{where}: 'pairs' must be at least {least} for kind '{kind}', not {data['pairs']}")
    return ClaimRecord(**data)


def read_paper(path: Path) -> Paper:
    """Read one record from ``<papers>/<package>/<slug>.toml``; raises ``RecordError`` where it breaks the schema."""
    where = f"{path.parent.name}/{path.name}"
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise RecordError(f"{where}: not valid TOML: {error}") from error
    _check_fields(where, data, _PAPER_FIELDS)
    for name in ("authors", "deviations"):
        if not all(isinstance(item, str) for item in data.get(name, [])):
            raise RecordError(f"{where}: '{name}' must be a list of strings")
    components = []
    for item in data["component"]:
        _check_fields(f"{where}: component", item, _COMPONENT_FIELDS)
        _choice(f"{where}: component '{item['object']}'", "kind", item["kind"], COMPONENT_KINDS)
        components.append(Component(**item))
    claims = tuple(_read_claim(where, item) for item in data["claim"])
    ids = [claim.id for claim in claims]
    if len(set(ids)) < len(ids):
        raise RecordError(f"{where}: a claim's 'id' stands twice: {', '.join(sorted({i for i in ids if ids.count(i) > 1}))}")
    facts = {k: v for k, v in data.items() if k not in ("component", "claim", "authors", "deviations")}
    return Paper(
        slug=path.stem.replace("_", "-"),
        package=path.parent.name,
        authors=tuple(data["authors"]),
        deviations=tuple(data.get("deviations", ())),
        components=tuple(components),
        claims=claims,
        path=path,
        **facts,
    )


def _own_root() -> Path:
    return Path(str(files("corollary"))) / "papers"


def papers_root() -> Path:
    """The folder that holds the records: ``$COROLLARY_PAPERS`` for a collection of your own, else this package's.

    A collection is a folder ``<name>/<package>/<slug>.toml`` with ``<slug>.py`` beside each record, importable as
    ``<name>.<package>.<slug>``.
    """
    own = os.environ.get("COROLLARY_PAPERS")
    return Path(own).resolve() if own else _own_root()


@cache
def _read_all(root: Path) -> dict[str, Paper]:
    if not root.is_dir():
        raise RecordError(f"no folder of papers at '{root}'")
    papers = [read_paper(path) for path in sorted(root.glob("*/*.toml"))]
    return {paper.slug: paper for paper in papers}


def catalogue() -> dict[str, Paper]:
    """Every paper by its slug, in the order of packages and slugs."""
    return _read_all(papers_root())


def get_paper(slug: str) -> Paper:
    """The paper of this slug; raises ``UnknownPaper`` with the nearest slugs."""
    papers = catalogue()
    if slug in papers:
        return papers[slug]
    near = difflib.get_close_matches(slug, papers, 3, cutoff=0.3)
    hint = f"nearest: {', '.join(near)}" if near else f"there are {len(papers)}; list them with 'corollary papers'"
    raise UnknownPaper(f"no paper '{slug}'; {hint}")

"""Which source a verdict rests on, and its hash: when it changes, the published verdict turns stale.

The source of a paper is its module and everything of this package that the module's imports reach, followed name by name
through ``__init__`` files so that a neighbour's change does not count. The engine and the conformance checks are left out;
``STATISTICS_VERSION`` stands for the rules of judging. What is hashed is the syntax tree without docstrings, so that
comments and layout do not count.
"""

from __future__ import annotations

import ast
import hashlib
import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from corollary.claims.record import Paper
from corollary.claims.stats import STATISTICS_VERSION

_LEFT_OUT = ("corollary.claims", "corollary.testing")


def _root() -> Path:
    return Path(str(files("corollary"))).parent


def _file(module: str) -> Path | None:
    base = _root().joinpath(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def structure(node: ast.AST) -> Any:
    """A syntax tree as nested tuples, without positions, docstrings and empty fields.

    So comments and layout do not count, and neither does the Python that parsed it: versions differ in empty fields alone.
    """
    fields = []
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = value[0] if value else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
                value = value[1:]
        if isinstance(value, ast.AST):
            value = structure(value)
        elif isinstance(value, list):
            value = tuple(structure(item) if isinstance(item, ast.AST) else repr(item) for item in value)
        elif value is not None:
            value = repr(value)
        if value not in (None, ()):
            fields.append((name, value))
    return (type(node).__name__, *fields)


@cache
def _code(path: Path) -> bytes:
    return repr(structure(_tree(path))).encode()


@cache
def _imports(module: str, path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """(module, names) of each import of this package; no names means the whole module."""
    found: list[tuple[str, tuple[str, ...]]] = []
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            target = ".".join(part for part in (base, node.module or "") if part)
            found.append((target, tuple(alias.name for alias in node.names)))
    return [(name, names) for name, names in found if name.split(".")[0] == "corollary"]


def _reach(module: str, names: tuple[str, ...], seen: set[Path]) -> None:
    path = None if module.startswith(_LEFT_OUT) else _file(module)
    if path is None:
        return
    if path.name == "__init__.py" and names:
        # A package's __init__ only hands names on: follow the ones that are asked for.
        handed_on = {name: source for source, given in _imports(module, path) for name in given}
        for name in names:
            if name in handed_on:
                _reach(handed_on[name], (name,), seen)
            elif _file(f"{module}.{name}"):
                _reach(f"{module}.{name}", (), seen)
            else:
                seen.add(path)
        return
    _follow(module, path, seen)


def _follow(module: str, path: Path, seen: set[Path]) -> None:
    if path not in seen:
        seen.add(path)
        for source, given in _imports(module, path):
            _reach(source, given, seen)


@cache
def sources(paper: Paper) -> tuple[Path, ...]:
    """The files that a paper's verdicts rest on, sorted; none where the measuring module is missing."""
    seen: set[Path] = set()
    module = paper.path.with_suffix(".py")
    if module.is_file():
        _follow(paper.module, module, seen)
    return tuple(sorted(seen))


@cache
def _code_hash(paper: Paper) -> str:
    digest = hashlib.sha256()
    for path in sources(paper):
        digest.update(path.name.encode())
        digest.update(_code(path))
    return digest.hexdigest()


def source_hash(paper: Paper, claim_id: str) -> str:
    """Hash of the code that one claim's verdict rests on and of its pre-registered record; 16 hexadecimal digits."""
    record = paper.claim(claim_id).to_dict()
    record.pop("tour")
    record.pop("note")  # what was learnt afterwards is no part of what was registered
    text = json.dumps([_code_hash(paper), record, STATISTICS_VERSION], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

"""The source hash changes with the code and the registered claim, and with nothing else."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest

from corollary.claims import source
from corollary.claims.record import Paper, read_paper

RECORD = (Path(__file__).parent / "collection" / "toy" / "steady.toml").read_text()
CODE = '''"""Docstring."""
from corollary.optim import RiemannianSGD
X = 1
'''


def _paper(tmp_path: Path, code: str = CODE, record: str = RECORD) -> Paper:
    for cached in (source._tree, source._code, source._imports):
        cached.cache_clear()
    source._code_hash.cache_clear()
    source.sources.cache_clear()
    folder = tmp_path / "mine" / "toy"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "steady.toml").write_text(record)
    (folder / "steady.py").write_text(code)
    return read_paper(folder / "steady.toml")


def _hash(tmp_path: Path, code: str = CODE, record: str = RECORD) -> str:
    return source.source_hash(_paper(tmp_path, code, record), "better")


def _structure(text: str) -> object:
    return source.structure(ast.parse(text))


def test_structure_is_blind_to_comments_docstrings_and_layout() -> None:
    plain = 'def f(a, b):\n    return f"{a}#{b}"\n\nclass C:\n    x = [1, 2]\n'
    other = (
        '"""Module."""\n# comment\ndef f(\n    a,\n    b,\n):\n    """Doc."""\n    return (f"{a}#{b}")\n'
        'class C:\n    """Doc."""\n\n    x = [\n        1,  # one\n        2,\n    ]\n'
    )
    assert _structure(plain) == _structure(other)


@pytest.mark.parametrize(
    ("old", "new"), [("a + b", "a - b"), ("a + b", "b + a"), ("1", "1.0"), ("1", "True"), ("'x'", "b'x'"), ("f(", "g(")]
)
def test_structure_sees_every_change_of_meaning(old: str, new: str) -> None:
    text = "def f(a, b=1):\n    return a + b, 'x'\n"
    assert _structure(text) != _structure(text.replace(old, new, 1))


def test_words_do_not_count_but_code_does(tmp_path: Path) -> None:
    first = _hash(tmp_path)
    assert _hash(tmp_path, CODE.replace("Docstring", "Other words") + "\n# a comment\n") == first
    assert _hash(tmp_path, CODE.replace("X = 1", "X = 2")) != first


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("margin = 0.0", "margin = 0.1", False),
        ("Ours is lower than the baseline", "Ours is much lower", False),
        ("Claims of every kind", "Other words", True),
        ("tolerance = 1e-12", "tolerance = 1e-11", True),
    ],
)
def test_only_the_claim_itself_counts(tmp_path: Path, old: str, new: str, same: bool) -> None:
    first = _hash(tmp_path)
    changed = RECORD.replace(old, new, 1)
    assert changed != RECORD
    assert (_hash(tmp_path, record=changed) == first) is same


def test_imports_are_followed_name_by_name(tmp_path: Path) -> None:
    paper = _paper(tmp_path, "from corollary.claims import claim\nfrom corollary.data import digits\n")
    names = {path.name for path in source.sources(paper)}
    assert "steady.py" in names
    assert "tables.py" in names
    assert "text.py" not in names, "a neighbour in the same package is none of its business"
    assert "trial.py" not in names, "the engine is left out"


def test_missing_module_has_no_sources(tmp_path: Path) -> None:
    paper = dataclasses.replace(_paper(tmp_path), path=tmp_path / "mine" / "toy" / "other.toml")
    source.sources.cache_clear()
    assert source.sources(paper) == ()

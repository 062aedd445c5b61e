"""The schema refuses what is wrong, and names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from corollary.claims.record import RecordError, UnknownPaper, catalogue, get_paper, read_paper

GOOD = """
title = "T"
authors = ["A"]
year = 2020
summary = "S"
[[component]]
object = "math.sqrt"
kind = "function"
source = "x"
[[claim]]
id = "one"
kind = "paired"
statement = "s"
source = "x"
metric = "m"
baseline = "b"
better = "lower"
margin = 0.0
control = "c"
"""


def _read(tmp_path: Path, text: str) -> object:
    path = tmp_path / "toy" / "a_b.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return read_paper(path)


def test_good_record(tmp_path: Path) -> None:
    paper = _read(tmp_path, GOOD)
    assert (paper.slug, paper.package) == ("a-b", "toy")
    assert paper.claim("one").pairs == 10


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "T"', "", "'title' is missing"),
        ('title = "T"', "title = 3", "'title' must be str, not int"),
        ("year = 2020", "year = true", "'year' must be int, not bool"),
        ('authors = ["A"]', "authors = [1]", "'authors' must be a list of strings"),
        ('summary = "S"', 'summary = " "', "'summary' must not be empty"),
        ('summary = "S"', 'sumary = "S"', "unknown field 'sumary'; did you mean 'summary'"),
        ('kind = "paired"', 'kind = "pared"', "'kind' is 'pared'; allowed: paired"),
        ('kind = "function"', 'kind = "thing"', "'kind' is 'thing'; allowed: optimizer"),
        ('better = "lower"', 'better = "less"', "'better' is 'less'; allowed: lower, higher"),
        ('better = "lower"', "", "'better' is missing (a claim of kind 'paired' needs it)"),
        ('control = "c"', "", "'control' is missing"),
        ('id = "one"', 'id = "one-two"', "'id' must be a Python identifier"),
        ("margin = 0.0", "margin = 0.0\npairs = 5", "'pairs' must be at least 6 for kind 'paired', not 5"),
        ("margin = 0.0", "margin = 0.0\ntolerance = -1.0", "'tolerance' must be at least 0"),
        ("year = 2020", "year = ", "not valid TOML"),
    ],
)
def test_bad_record_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(RecordError) as error:
        _read(tmp_path, GOOD.replace(old, new, 1))
    assert message in str(error.value)
    assert "toy/a_b.toml" in str(error.value)


def test_claim_twice(tmp_path: Path) -> None:
    claim = GOOD[GOOD.index("[[claim]]") :]
    with pytest.raises(RecordError, match="stands twice: one"):
        _read(tmp_path, GOOD + claim)


def test_unknown_paper_names_the_nearest(toys: Path) -> None:
    with pytest.raises(UnknownPaper, match="no paper 'stedy'; nearest: steady"):
        get_paper("stedy")
    assert set(catalogue()) == {"steady", "troubled", "slow"}


def test_unknown_claim(toys: Path) -> None:
    with pytest.raises(KeyError, match="steady has no claim 'x'; it has: better"):
        get_paper("steady").claim("x")


def test_missing_collection(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COROLLARY_PAPERS", str(tmp_path / "none"))
    with pytest.raises(RecordError, match="no folder of papers"):
        catalogue()

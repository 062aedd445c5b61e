"""Signatures read from source, against what Python itself says of the imported objects."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import corollary.claims
import corollary.report.svg
from corollary.report.signatures import read_signature


def _names(call: str) -> list[str]:
    """Names of the parameters in a signature's text."""
    tree = ast.parse(f"def {call}: ...".replace("(…)", "()"))
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    a = function.args
    star = [x.arg for x in (a.vararg, a.kwarg) if x]
    return [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)] + star


@pytest.mark.parametrize(
    "dotted",
    [f"corollary.claims.{name}" for name in corollary.claims.__all__ if name not in ("Evidence",)]
    + [f"corollary.report.svg.{name}" for name in ("Plot", "Axis", "linear_ticks")]
    + ["corollary.report.write_report", "corollary.claims.timing.interleave"],
)
def test_parameters_are_those_that_python_sees(dotted: str) -> None:
    module, _, name = dotted.rpartition(".")
    thing = getattr(importlib.import_module(module), name)
    found = read_signature(dotted)
    assert found.doc == " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
    if not isinstance(thing, type) or not issubclass(thing, BaseException):
        seen = list(inspect.signature(thing).parameters.values())
        ordered = [p.name for p in seen if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        ordered += [p.name for p in seen if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        assert _names(found.call) == ordered


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A made-up package that re-exports in every way there is."""
    home = tmp_path / "made"
    (home / "inner").mkdir(parents=True)
    (home / "__init__.py").write_text(
        "from made.inner import Child as Kid\nfrom .plain import *\nfrom .plain import both\nOther = Kid\n"
        "try:\n    from made.inner.deep import Tried\nexcept ImportError:\n    pass\n"
        "from .loop import circle\n"
    )
    (home / "loop.py").write_text("from . import circle\n")
    (home / "plain.py").write_text(
        "from typing import overload\n"
        "@overload\ndef both(x: int) -> int: ...\n@overload\ndef both(x: str) -> str: ...\n"
        'def both(x, /, y="a", *rest, flag: bool = True, **more) -> "str":\n    """Both\n    of them.\n\n    More.\n    """\n'
        "class Lazy:\n    def __init__(self, *, only): ...\n"
        "async def later(): ...\n"
    )
    (home / "inner" / "__init__.py").write_text("from .deep import Child\n")
    (home / "inner" / "deep.py").write_text(
        "from dataclasses import dataclass, field\nfrom typing import ClassVar\nimport torch\n"
        "class Base:\n    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999)): ...\n"
        'class Child(Base):\n    """A child."""\n'
        "class Unknown(torch.nn.Module): ...\n"
        "@dataclass\nclass Config:\n    rank: int\n    names: list[str] = field(default_factory=list)\n"
        "    kind: ClassVar[str] = 'x'\n    cache: int = field(init=False, default=3)\n    scale: float = field(default=1.0)\n"
        "@dataclass(frozen=True)\nclass Wider(Config):\n    extra: bool = False\n"
        "class Tried:\n    def __init__(self): ...\n"
    )
    (home / "broken.py").write_text("def (:\n")
    return tmp_path


@pytest.mark.parametrize(
    ("dotted", "call", "doc"),
    [
        ("made.Kid", "Kid(params, lr=0.001, betas=(0.9, 0.999))", "A child."),
        ("made.Other", "Other(params, lr=0.001, betas=(0.9, 0.999))", "A child."),
        ("made.both", "both(x, /, y='a', *rest, flag: bool = True, **more) -> 'str'", "Both of them."),
        ("made.Lazy", "Lazy(*, only)", ""),
        ("made.plain.later", "later()", ""),
        ("made.Tried", "Tried()", ""),
        ("made.inner.deep.Unknown", "Unknown(…)", ""),
        ("made.inner.deep.Config", "Config(rank: int, names: list[str] = list(), scale: float = 1.0)", ""),
        ("made.inner.deep.Missing", "", ""),
        ("made.circle", "", ""),
        ("made.broken.x", "", ""),
        ("made", "", ""),
        ("nowhere.at.all", "", ""),
    ],
)
def test_every_way_to_export(package: Path, dotted: str, call: str, doc: str) -> None:
    found = read_signature(dotted, root=package)
    assert (found.call, found.doc) == (call, doc)


def test_a_long_signature_has_a_line_for_each_parameter(package: Path) -> None:
    assert read_signature("made.inner.deep.Wider", root=package).call.splitlines() == [
        "Wider(", "    rank: int,", "    names: list[str] = list(),", "    scale: float = 1.0,", "    extra: bool = False,", ")",
    ]  # fmt: skip


def test_an_unknown_package_has_no_signature() -> None:
    assert read_signature("no_such_package_here.Thing").call == ""

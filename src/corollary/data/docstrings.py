"""A text classification set that is on every machine: docstrings of the standard library, labelled by their module."""

from __future__ import annotations

import ast
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from corollary.data._checks import need_count
from corollary.data.text import read_source, stdlib_files

_MIN_CHARACTERS = 40


def stdlib_docstrings(*, classes: int = 12, per_class: int = 60, seed: int = 0) -> tuple[list[str], Tensor, tuple[str, ...]]:
    """Docstrings of the running Python's standard library; the label is the top-level module or package they stand in.

    The modules are parsed, never imported. White space is collapsed; a text of less than 40 characters, or one that stands
    under two labels, is left out, and a repeated one is kept once. Classes are the public modules with the most texts.
    Nothing hides the label: a docstring of ``asyncio`` may well say so, which makes the task easier than it looks. The texts
    differ between versions of Python.

    Args:
        classes: number of labels.
        per_class: texts of each label, drawn by ``seed``.
        seed: decides which texts are drawn, and their order.

    Returns:
        The texts, their labels (n,) int64, and the labels' names in alphabetical order; as many texts under each label.

    Raises:
        ValueError: where the library has not that many modules with ``per_class`` texts; the message says how many it has.

    Example:
        >>> from corollary.data import stdlib_docstrings
        >>> texts, labels, names = stdlib_docstrings(classes=12, per_class=20)
        >>> len(texts), labels.bincount().tolist() == [20] * 12, "asyncio" in names
        (240, True, True)
    """
    need_count("classes", classes, 2)
    need_count("per_class", per_class)
    texts = _texts_by_module()
    rich = sorted(
        (name for name, found in texts.items() if len(found) >= per_class), key=lambda name: (-len(texts[name]), name)
    )
    if len(rich) < classes:
        raise ValueError(
            f"'classes' is {classes} and 'per_class' {per_class}, but only {len(rich)} modules of this Python's standard "
            f"library have {per_class} docstrings"
        )
    names = tuple(sorted(rich[:classes]))
    generator = torch.Generator().manual_seed(seed)
    drawn: list[str] = []
    for name in names:
        own = texts[name]
        drawn += [own[i] for i in torch.randperm(len(own), generator=generator)[:per_class].tolist()]
    order = torch.randperm(len(drawn), generator=generator)
    labels = torch.arange(classes).repeat_interleave(per_class)[order]
    return [drawn[i] for i in order.tolist()], labels, names


@cache
def _texts_by_module() -> dict[str, tuple[str, ...]]:
    """The cleaned docstrings of each public top-level module, in the order of files and of nodes."""
    found: dict[str, dict[str, None]] = {}
    for name, path in stdlib_files():
        module = name.partition("/")[0].removesuffix(".py")
        if not module.startswith("_"):
            found.setdefault(module, {}).update(dict.fromkeys(_docstrings(path)))
    labels = Counter(text for texts in found.values() for text in texts)
    return {module: tuple(text for text in texts if labels[text] == 1) for module, texts in found.items()}


def _owners(node: ast.AST) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """What may carry a docstring, in source order. Expressions, most of the tree, are not entered: none stands inside."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _owners(child)


def _docstrings(path: Path) -> list[str]:
    source = read_source(path)
    if source is None:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # invalid escapes in other people's strings
        tree = ast.parse(source, filename=str(path))
    raw = (ast.get_docstring(node, clean=False) for node in _owners(tree))
    texts = (re.sub(r"\s+", " ", text).strip() for text in raw if text)
    return [text for text in texts if len(text) >= _MIN_CHARACTERS]

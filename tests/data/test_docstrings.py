"""Docstrings labelled by module: true labels, balance, determinism, nothing imported."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from corollary.data import docstrings, stdlib_docstrings


def test_labels_are_true_and_balanced() -> None:
    texts, labels, names = stdlib_docstrings(classes=12, per_class=30, seed=1)
    assert len(texts) == 360
    assert labels.dtype == torch.int64
    assert labels.bincount(minlength=12).tolist() == [30] * 12
    assert list(names) == sorted(names)
    assert len(set(texts)) == 360
    assert all(len(text) >= 40 and text == " ".join(text.split()) for text in texts)


def test_a_known_docstring_stands_under_its_module() -> None:
    import logging

    expected = {" ".join(f.__doc__.split()) for f in (logging.Logger.debug, logging.Handler.emit, logging.Formatter.format)}
    by_module = docstrings._texts_by_module()
    assert expected <= set(by_module["logging"])
    assert not any(expected & set(texts) for module, texts in by_module.items() if module != "logging")


def test_seed_decides_the_draw() -> None:
    one, two, other = (stdlib_docstrings(per_class=20, seed=seed) for seed in (3, 3, 4))
    assert one[0] == two[0]
    assert torch.equal(one[1], two[1])
    assert one[2] == two[2] == other[2]
    assert one[0] != other[0]


def test_no_module_is_imported() -> None:
    code = (
        "import sys; from corollary.data import stdlib_docstrings; before = set(sys.modules); "
        "_, _, names = stdlib_docstrings(); new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "assert not new & (set(names) | {'this', 'antigravity'}), new"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_too_many_classes() -> None:
    with pytest.raises(ValueError, match=r"'classes' is 500 and 'per_class' 60, but only \d+ modules"):
        stdlib_docstrings(classes=500)

"""Every registered component under its kind's conformance checks: to register a component is to have it tested."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
from torch.multiprocessing.spawn import ProcessExitedException

from corollary.claims import ClaimFunction, catalogue
from corollary.testing import iterate_checks


def _rows() -> Iterator[Any]:
    for paper in catalogue().values():
        module = importlib.import_module(paper.module)
        for component in paper.components:
            case = module.CONFORMANCE[component.object]
            for name, check in iterate_checks(component.kind, case):
                marks = [pytest.mark.xfail(reason=case.xfail[name], strict=True)] if name in case.xfail else []
                yield pytest.param(check, case, id=f"{component.object}-{name}", marks=marks)


@pytest.mark.parametrize(("check", "case"), _rows())
def test_component(check: Any, case: Any) -> None:
    # On a busy machine a process that leaves gloo can be aborted by one of its threads, after its work is done.
    for _ in range(2):
        try:
            return check(case)
        except ProcessExitedException as error:
            if error.signal_name != "SIGABRT":
                raise
    check(case)


@pytest.mark.parametrize("paper", catalogue().values(), ids=lambda p: p.slug)
def test_record_and_module_hold_each_other(paper: Any) -> None:
    module = importlib.import_module(paper.module)
    functions = {name: f for name, f in vars(module).items() if isinstance(f, ClaimFunction)}
    assert set(functions) == {claim.id for claim in paper.claims}
    assert set(module.CONFORMANCE) == {component.object for component in paper.components}
    for component in paper.components:
        package, _, name = component.object.rpartition(".")
        assert getattr(importlib.import_module(package), name).__doc__, f"{component.object} has no docstring"

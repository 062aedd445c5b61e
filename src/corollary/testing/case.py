"""A registered component as the conformance checks see it, and how its checks are found."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """What the conformance checks need to know of one component.

    Args:
        make: factory of the component; its arguments depend on the kind (see ``corollary.testing.<kind>``).
        tags: what the component promises or cannot do, by the names that its kind's checks document.
        xfail: check's name to reason, for a known failure. It is strict: a check that passes all the same is an error.
    """

    make: Callable[..., Any]
    tags: Mapping[str, Any] = field(default_factory=dict)
    xfail: Mapping[str, str] = field(default_factory=dict)


Check = Callable[[Case], None]


def checks(kind: str) -> Mapping[str, Check]:
    """The checks of one kind of component, by name: ``CHECKS`` of ``corollary.testing.<kind>``."""
    try:
        module = importlib.import_module(f"corollary.testing.{kind}")
    except ModuleNotFoundError as error:
        raise ValueError(f"kind '{kind}' has no conformance checks (no module corollary.testing.{kind})") from error
    found: Mapping[str, Check] = module.CHECKS
    return found


def run_checks(kind: str, case: Case) -> None:
    """Run every check of a kind; raises ``AssertionError`` naming the first check that fails.

    A check listed in ``case.xfail`` must fail; if it passes, that is an error too.
    """
    for name, check in iterate_checks(kind, case):
        if name in case.xfail:
            try:
                check(case)
            except AssertionError:
                continue
            raise AssertionError(f"check '{name}' passes, but stands in xfail: {case.xfail[name]}")
        try:
            check(case)
        except AssertionError as error:
            raise AssertionError(f"check '{name}' failed: {error}") from error


def iterate_checks(kind: str, case: Case) -> Iterator[tuple[str, Check]]:
    """The checks of a kind for one case; raises ``ValueError`` where ``xfail`` names a check that there is not."""
    found = checks(kind)
    unknown = sorted(set(case.xfail) - set(found))
    if unknown:
        raise ValueError(f"xfail names checks that there are not: {', '.join(unknown)}; there are: {', '.join(found)}")
    yield from found.items()

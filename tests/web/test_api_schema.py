"""Requests made out of the OpenAPI description, sensible and not: none is answered by a server error."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress

import pytest
import schemathesis
import schemathesis.specs.openapi.schemas  # here and not where it is first used: deep in a call, pytest's rewriting of it fails
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tests.web.filled import filled, page

from corollary.web.guard import Limits

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@schemathesis.serializer("application/jsonl")
def _lines(_: object, value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")


class _NoLimits(Limits):
    def take(self, action: str, client: str) -> None:
        """Anyone, as often as they like."""


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    os.environ["COROLLARY_EMBEDDING"] = "lsa"
    store = filled(tmp_path_factory.mktemp("schema"))
    with page(store) as client:
        client.app.state.limits = _NoLimits()
        yield client.app
    store.close()


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_breaks_it(app, mode):
    """Of every operation so many requests that fit the description, and so many that break it in one place."""
    host = {"host": "127.0.0.1:8000"}
    asked: Counter[str] = Counter()
    described = schemathesis.openapi.from_asgi("/api/openapi.json", app, headers=host)
    operations = [found.ok() for found in described.get_all_operations()]
    for operation in operations:

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=25, deadline=None, database=None, derandomize=True, phases=(Phase.generate,), suppress_health_check=list(HealthCheck))  # fmt: skip
        def ask(case: Case) -> None:
            asked[case.operation.label] += 1
            answer = case.call(headers=host)
            assert answer.status_code < 500, (case.as_curl_command(), answer.text)
            case.validate_response(answer, checks=CHECKS)

        with suppress(Unsatisfiable):  # an operation without anything to ask cannot be asked wrongly
            ask()
    assert len(asked) == len(operations) if mode is GenerationMode.POSITIVE else len(asked) > 0.8 * len(operations), asked

"""Answers that take less time than a thread takes to start on them."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response


def quick(endpoint: Callable[..., Response]) -> Callable[..., Awaitable[Response]]:
    """An endpoint of a millisecond or two, answered where it is asked and in the order asked, without a thread.

    In threads the few pages that have to be made wait behind all those that were kept, which the loop sends meanwhile. This is for
    SQLite, whose readers wait for nobody; where a server is asked, its answer is waited for in a thread, and so is all that an
    app has to read before it is ready: records and evidence take seconds.

    Args:
        endpoint: a function of a route, with a parameter ``request``.
    """

    @wraps(endpoint)
    async def answered(**asked: Any) -> Response:
        state = asked["request"].app.state
        if state.store.dialect == "sqlite" and state.ready.is_set():
            return endpoint(**asked)
        return await run_in_threadpool(endpoint, **asked)

    # The framework reads the annotations, which are names in the endpoint's own module.
    answered.__signature__ = inspect.signature(endpoint, eval_str=True)  # type: ignore[attr-defined]
    return answered

"""Kill a process, as ``kill -9`` does, before its n-th statement to the database."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine, event


def killed(n: int, work: Callable[[], Any]) -> bool:
    """Run ``work`` in a process that is killed before its n-th statement or commit; whether it came to that.

    Raises:
        AssertionError: where the work failed in another way.
    """
    child = os.fork()
    if child == 0:
        count = 0

        def step(*_: Any) -> None:
            nonlocal count
            count += 1
            if count == n:
                os.kill(os.getpid(), signal.SIGKILL)

        event.listen(Engine, "before_cursor_execute", step)
        event.listen(Engine, "commit", step)
        try:
            work()
        except BaseException:  # noqa: BLE001 - the child must never return into the test runner
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    assert os.WIFEXITED(status), status
    assert os.WEXITSTATUS(status) == 0, "the work failed in the child"
    return False

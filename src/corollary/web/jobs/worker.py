"""The process of one run: verifies a paper and tells its progress as lines of JSON.

Usage: ``python -m corollary.web.jobs.worker ARGUMENTS``, where ARGUMENTS is a JSON object of ``slug``, ``scale``, ``seed`` and
``store``. It ends when its standard input does: whoever started it is gone then.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from corollary.claims.record import ClaimRecord, Paper, get_paper
from corollary.claims.store import Row, Store

# What a page needs of a row; raw values stay in the store of evidence.
_KEPT = ("claim", "statement", "kind", "verdict", "control_verdict", "defect", "effect", "ci_low", "ci_high", "p_value", "reason",
         "control_reason", "wall_seconds")  # fmt: skip


def _say(event: str, **facts: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, **facts}) + "\n")
    sys.stdout.flush()


class _Told:
    """Progress, told line by line."""

    def start(self, paper: Paper, claim: ClaimRecord, arm: str, total: int, done: int) -> None:
        _say("start", claim=claim.id, arm=arm, total=total, done=done)

    def advance(self) -> None:
        _say("advance")

    def finish(self, row: Row) -> None:
        _say("finish", row={name: row[name] for name in _KEPT})


def _end_with_parent() -> None:
    while os.read(0, 1):  # not through sys.stdin, whose lock a thread must not hold when the interpreter ends
        pass
    os._exit(3)  # finished trials are on the disk already


def main(arguments: str) -> int:
    """Verify, and give the exit status."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    asked = json.loads(arguments)
    from corollary.claims.runner import Options, Runner

    paper = get_paper(asked["slug"])
    _say("paper", claims=len(paper.claims))
    options = Options(scale=asked["scale"], seed=asked["seed"], controls=True)
    for _ in Runner(Store(Path(asked["store"])), options, _Told()).verify([(paper, claim) for claim in paper.claims]):
        pass
    _say("end")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

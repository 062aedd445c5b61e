"""Interleaved ratios to a peer: what every ``bench_<slug>.py`` gives and how it is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from corollary.claims.timing import interleave, peak_bytes


@dataclass(frozen=True)
class Bench:
    """One setting in which a component and its peers do the same work.

    Args:
        component: dotted name, as in the paper's record.
        setting: what is measured, in a few words: shapes, dtype, forward or step.
        ours: does the work once.
        peers: peer's name to a function that does the same work once.
        rounds: how many times each is timed, in turn.
        warmup: untimed calls of each before that; 0 where a call takes many seconds.
        memory: whether to measure peak bytes too.
    """

    component: str
    setting: str
    ours: Callable[[], Any]
    peers: Mapping[str, Callable[[], Any]]
    rounds: int = 9
    warmup: int = 2
    memory: bool = True


def measure(bench: Bench) -> list[dict[str, Any]]:
    """One row for each peer: medians in seconds, peak bytes, and both as ratios ours / peer."""
    seconds = interleave({"ours": bench.ours, **bench.peers}, rounds=bench.rounds, warmup=bench.warmup, min_seconds=0.01)
    ours_bytes = peak_bytes(bench.ours) if bench.memory else None
    rows = []
    for peer, call in bench.peers.items():
        peer_bytes = peak_bytes(call) if bench.memory else None
        rows.append(
            {
                "component": bench.component,
                "setting": bench.setting,
                "peer": peer,
                "seconds": seconds["ours"],
                "peer_seconds": seconds[peer],
                "time_ratio": seconds["ours"] / seconds[peer],
                "bytes": ours_bytes,
                "peer_bytes": peer_bytes,
                "memory_ratio": ours_bytes / peer_bytes if ours_bytes is not None and peer_bytes else None,
            }
        )
    return rows

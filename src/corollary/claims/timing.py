"""Times and bytes of two pieces of code, measured interleaved so that a busy machine slows both alike."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from corollary.memory import peak_bytes

__all__ = ["interleave", "keep_freed_memory", "peak_bytes"]


def keep_freed_memory() -> bool:
    """Tell the C library to keep freed memory for this process instead of giving it back, for timings that allocate much.

    glibc returns the top of its heap whenever enough of it is free, and takes it anew with thousands of page faults. In turns,
    which case pays for them depends on which case ran before it: 6 ms of a 22 ms step, in one direction. Real training, where
    one case runs alone, does not alternate so. Gives False where the C library is not glibc; then nothing is changed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # the numbers of malloc.h
    return bool(mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_threshold, 2**30) and mallopt(top_pad, 2**26))


def interleave(
    cases: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 7,
    warmup: int = 1,
    min_seconds: float = 0.0,
) -> dict[str, float]:
    """Median wall-clock seconds of one call of each case, the cases taking turns.

    Args:
        cases: name to function of no arguments.
        rounds: how many times each case is timed, in turn.
        warmup: untimed calls of each case before that.
        min_seconds: a case is called repeatedly within one timing until this much time has passed, and the mean is taken;
            raise it (0.01) where a single call is near the clock's noise.

    Returns:
        Name to seconds.

    Example:
        >>> seconds = interleave({"small": lambda: sum(range(10)), "large": lambda: sum(range(200_000))}, rounds=3)
        >>> seconds["small"] < seconds["large"]
        True
    """
    for call in cases.values():
        for _ in range(warmup):
            call()
    taken: dict[str, list[float]] = {name: [] for name in cases}
    was_on = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in cases.items():
                calls = 0
                begin = time.perf_counter()
                while True:
                    call()
                    calls += 1
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                    passed = time.perf_counter() - begin
                    if passed >= min_seconds:
                        break
                taken[name].append(passed / calls)
    finally:
        if was_on:
            gc.enable()
    return {name: statistics.median(seconds) for name, seconds in taken.items()}

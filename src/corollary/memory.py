"""Peak bytes of a piece of code: what the claims compare, and what the conformance checks hold streaming components to."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensor storages that are alive, and their peak, by watching every dispatched operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or not size:
            return

        def gone(_: object) -> None:
            self._seen.pop(key, None)
            self.live -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self._watch(tensor.untyped_storage())
        return result


def peak_bytes(call: Callable[[], Any]) -> int:
    """Peak bytes that a call allocates beyond what stood before it: torch's tensors, plus what Python and numpy allocate.

    Workspaces inside one torch operation are not seen.

    Example:
        >>> import torch
        >>> 4_000_000 <= peak_bytes(lambda: torch.zeros(1000, 1000).sum()) < 4_100_000
        True
    """
    with _LiveTensors():
        torch.zeros(1).add(1)  # the first use of a dispatch mode imports modules, which are not the call's memory
    gc.collect()
    started = not tracemalloc.is_tracing()
    if started:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    tensors = _LiveTensors()
    try:
        with tensors:
            call()
        python_peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        if started:
            tracemalloc.stop()
    return tensors.peak + max(0, python_peak)

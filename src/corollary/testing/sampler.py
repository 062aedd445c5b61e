"""Conformance checks of batch samplers whose batch size may change while a DataLoader iterates.

``make(data_source, batch_size, **options)`` is the factory, with at least the options ``max_batch_size``, ``seed``, ``shuffle``
and ``drop_last``; the sampler has ``batch_size`` (to be set), ``state_dict(seen=...)`` and ``load_state_dict``. Its tags:

===========  ================================================================================================
``sizes``    batch sizes that are set in turn, one after each batch (``(3, 1, 7, 2, 16)``)
``samples``  samples in the data set (53)
``workers``  whether ``state_dict(seen=...)`` makes up for what a DataLoader with workers draws ahead (True)
===========  ================================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from corollary.testing.case import Case, Check, run_checks
from corollary.testing.function import random_state

Batches = list[list[int]]


def _samples(case: Case) -> int:
    return int(case.tags.get("samples", 53))


def _sizes(case: Case) -> tuple[int, ...]:
    return tuple(case.tags.get("sizes", (3, 1, 7, 2, 16)))


def _make(case: Case, seed: int = 0, **options: Any) -> Any:
    return case.make(range(_samples(case)), _sizes(case)[0], seed=seed, **options)


def _epoch(case: Case, sampler: Any, loader: Iterable[Any] | None = None, begin: int = 0, stop: int | None = None) -> Batches:
    """Batches of one pass, setting the next size after each; ``begin`` counts those that came before."""
    sizes, batches = _sizes(case), []
    for number, batch in enumerate(sampler if loader is None else loader, start=begin + 1):
        batches.append(batch.tolist() if isinstance(batch, Tensor) else list(batch))
        sampler.batch_size = sizes[number % len(sizes)]
        if stop is not None and number == stop:
            break
    return batches


def coverage(case: Case) -> None:
    """Whatever sizes are set, an epoch has every sample once; ``drop_last`` leaves out less than a batch, at the end."""
    n = _samples(case)
    for shuffle in (True, False):
        order = [i for batch in _epoch(case, _make(case, shuffle=shuffle)) for i in batch]
        assert sorted(order) == list(range(n)), f"an epoch with shuffle={shuffle} does not have every sample once"
        assert shuffle == (order != list(range(n))), f"shuffle={shuffle} is not what the order shows"
        kept = [i for batch in _epoch(case, _make(case, shuffle=shuffle, drop_last=True)) for i in batch]
        assert kept == order[: len(kept)], "drop_last changes the order"
        assert n - len(kept) < max(_sizes(case)), "drop_last leaves out more than a batch"


def sizes(case: Case) -> None:
    """Each batch has the size that was last set, but for the last one, and ``len`` counts them at the present size."""
    wanted, n = _sizes(case), _samples(case)
    for drop_last in (False, True):
        batches = _epoch(case, _make(case, drop_last=drop_last))
        for number, batch in enumerate(batches[: None if drop_last else -1]):
            size = wanted[number % len(wanted)]
            assert len(batch) == size, f"batch {number} has {len(batch)} samples, set was {size}"
        sampler = _make(case, drop_last=drop_last)
        count = n // wanted[0] if drop_last else -(-n // wanted[0])
        assert len(sampler) == count, f"len is {len(sampler)} for {n} samples by {wanted[0]}, drop_last={drop_last}"
        assert len(list(sampler)) == count, "at a constant size there are not len(sampler) batches"


def epochs(case: Case) -> None:
    """Epochs have different orders, one broken off included, and one seed gives the same epochs again."""
    runs = []
    for seed in (0, 0, 1):
        sampler = _make(case, seed)
        runs.append([_epoch(case, sampler), _epoch(case, sampler, stop=2), _epoch(case, sampler)])
    assert runs[0] == runs[1], "one seed gives two orders"
    assert runs[0] != runs[2], "two seeds give one order"
    first = [epoch[0] for epoch in runs[0]]
    assert all(a != b for i, a in enumerate(first) for b in first[:i]), "two epochs begin alike"


def randomness(case: Case) -> None:
    """Making and iterating a seeded sampler leaves the global random states alone and does not look at them."""
    before = random_state()
    first = _epoch(case, _make(case))
    assert random_state() == before, "a global random state moved"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        assert _epoch(case, _make(case)) == first, "the order depends on the global random state"


def resume(case: Case) -> None:
    """Saved as JSON after any batch, the rest of the epoch and the next one are those of the uninterrupted run."""
    for drop_last in (False, True):
        whole = _make(case, drop_last=drop_last)
        wanted = [_epoch(case, whole), _epoch(case, whole)]
        for stop in range(1, len(wanted[0]) + 1):
            sampler = _make(case, drop_last=drop_last)
            _epoch(case, sampler, stop=stop)
            other = _restored(case, sampler.state_dict(), drop_last=drop_last)
            rest = _epoch(case, other, begin=stop)
            assert rest == wanted[0][stop:], f"resumed after batch {stop}, the rest of the epoch differs"
            # The next epoch begins at the size that the last batch left behind, as in the whole run.
            assert _epoch(case, other) == wanted[1], f"resumed after batch {stop}, the next epoch differs"


def _restored(case: Case, state: Any, **options: Any) -> Any:
    try:
        text = json.dumps(state, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AssertionError(f"state_dict() is not plain JSON: {error}") from error
    assert json.loads(text) == state, "state_dict() changes on its way through JSON"
    other = _make(case, seed=12345, **options)
    other.load_state_dict(json.loads(text))
    return other


def workers(case: Case) -> None:
    """In a DataLoader with and without workers an epoch has every sample once, and a resumed one goes on exactly."""
    n = _samples(case)
    for count in (0, 2) if case.tags.get("workers", True) else (0,):

        def load(sampler: Any, count: int = count) -> DataLoader[int]:
            return DataLoader(range(n), batch_sampler=sampler, num_workers=count)  # type: ignore[arg-type]

        whole = _make(case)
        wanted = _epoch(case, whole, load(whole))
        assert sorted(i for batch in wanted for i in batch) == list(range(n)), f"{count} workers lose or repeat samples"
        for stop in (2, len(wanted) - 1):
            sampler = _make(case)
            _epoch(case, sampler, load(sampler), stop=stop)
            other = _restored(case, sampler.state_dict(seen=stop))
            rest = _epoch(case, other, load(other), begin=stop)
            assert rest == wanted[stop:], f"resumed after batch {stop} of {len(wanted)} with {count} workers, the rest differs"


def arguments(case: Case) -> None:
    """Sizes out of range, empty data and a state of other data are refused by name, and leave the sampler as it was."""
    n = _samples(case)
    size = _sizes(case)[0]

    def load_other() -> None:
        _make(case).load_state_dict(case.make(range(n + 1), size, seed=0).state_dict())

    def set_size(value: Any) -> Callable[[], None]:
        def call() -> None:
            sampler = _make(case, max_batch_size=n - 1)
            try:
                sampler.batch_size = value
            finally:
                assert sampler.batch_size == size, f"the refused size {value!r} was kept"

        return call

    calls: Mapping[str, tuple[str, Callable[[], Any]]] = {
        "batch_size=0": ("batch_size", lambda: case.make(range(n), 0)),
        "no samples": ("data_source", lambda: case.make(range(0), 1)),
        "max_batch_size above the samples": ("max_batch_size", lambda: _make(case, max_batch_size=n + 1)),
        "a size of 0 while iterating": ("batch_size", set_size(0)),
        "a size above the largest": ("batch_size", set_size(n)),
        "a size of 2.5": ("batch_size", set_size(2.5)),
        "a size of True": ("batch_size", set_size(True)),
        "the state of other data": (str(n + 1), load_other),
    }
    for what, (word, call) in calls.items():
        try:
            call()
        except (TypeError, ValueError) as error:
            if word not in str(error):
                raise AssertionError(f"the error for {what} does not name '{word}': {error}") from error
        else:
            raise AssertionError(f"{what} was accepted")


def iterators(case: Case) -> None:
    """A batch is drawn when it is asked for, not before, so that a size set in between counts."""
    sampler = _make(case)
    batches: Iterator[list[int]] = iter(sampler)
    next(batches)
    sampler.batch_size = 5
    assert len(next(batches)) == 5, "a size set after the first batch does not count for the second"


CHECKS: Mapping[str, Check] = {
    check.__name__: check
    for check in (
        coverage, sizes, epochs, randomness, resume, workers, arguments, iterators,
    )
}  # fmt: skip


def check_sampler(make: Callable[..., Any], **tags: Any) -> None:
    """Run every check of this module on a batch sampler.

    Args:
        make: importable factory of (data_source, batch_size, **options).
        **tags: as in the module's table.

    Raises:
        AssertionError: names the first check that fails and why.

    Example:
        >>> from corollary.optim import AdaptiveBatchSampler
        >>> check_sampler(AdaptiveBatchSampler, workers=False)
    """
    run_checks("sampler", Case(make, tags))

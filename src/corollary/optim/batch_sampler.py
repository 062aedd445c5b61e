"""A batch sampler whose batch size may change while a DataLoader iterates."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler


class AdaptiveBatchSampler(Sampler[list[int]]):
    r"""Batches of indices, whose size is asked for anew before each batch: set ``batch_size`` at any time.

    An epoch is a permutation of the data set, a function of ``seed`` and ``epoch``, cut into batches of whatever size is set
    when the loader asks for the next. Give it to ``DataLoader(data, batch_sampler=sampler)``, and let `norm_test` or any other
    rule set the size.

    Args:
        data_source: the data set, or anything else with a length: the number of samples n >= 1.
        batch_size: size of the first batch, from 1 to ``max_batch_size``.
        max_batch_size: largest size, at most n; None means n.
        shuffle: whether to permute; otherwise indices come in order.
        drop_last: leave out the last batch of an epoch where it is smaller than the size set.
        seed: of the permutations, in [0, 2**31); None draws one from torch's global generator.

    Attributes:
        batch_size: the size of the batch that is drawn next.
        epoch: number of the epoch in progress, or of the last one; `set_epoch` chooses that of the next ``iter()``.

    **Resuming.** ``state_dict()`` is plain JSON. Loaded into a sampler over equally many samples, it goes on with the very batches
    that were still to come, in the middle of an epoch too. With ``num_workers=0`` the batches that a loader has drawn are those
    that the training loop has seen. With workers it draws ``num_workers * prefetch_factor`` batches ahead, so

    - a new size takes effect that many batches later, and
    - say how many batches the loop has got since the last ``iter()``: ``state_dict(seen=number)``. Those under way are drawn
      again with their old sizes, and with as many workers and the same ``prefetch_factor`` the rest is what it would have been.

    After a state is loaded, the next ``iter()`` finishes the epoch, which may have no batch left; every other ``iter()`` begins
    one. So ``for epoch in range(sampler.epoch, epochs)`` fits a fresh run and a resumed one.

    Raises:
        ValueError: a size out of range, or a state of another number of samples.
        TypeError: a size that is no integer, or data without a length.

    When not to use it: with an ``IterableDataset``, which takes no sampler. For data parallel training give each process its
    own share of every batch: ``batch[rank::world_size]``.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> sampler = AdaptiveBatchSampler(range(10), batch_size=2, shuffle=False)
        >>> for batch in DataLoader(range(10), batch_sampler=sampler):
        ...     print(batch.tolist())
        ...     sampler.grow(2 * sampler.batch_size)
        [0, 1]
        [2, 3, 4, 5]
        [6, 7, 8, 9]

    Reference:
        The batch-size schedule of Lau, Liu, Kolar, arXiv 2402.11215; the interface is that of
        ``torch.utils.data.BatchSampler``.
    """

    def __init__(
        self,
        data_source: Sized,
        batch_size: int,
        max_batch_size: int | None = None,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int | None = None,
    ) -> None:
        try:
            self.samples = len(data_source)
        except TypeError as error:
            raise TypeError(f"'data_source' must have a length; {type(data_source).__name__} has none") from error
        if self.samples < 1:
            raise ValueError("'data_source' is empty; it must hold at least 1 sample")
        largest = self.samples if max_batch_size is None else max_batch_size
        self.max_batch_size = _integer("max_batch_size", largest, 1, self.samples)
        self.shuffle, self.drop_last = shuffle, drop_last
        self.seed = _integer("seed", int(torch.randint(2**31, ())) if seed is None else seed, 0, 2**31 - 1)
        self.epoch = 0
        self.batch_size = batch_size
        self._begins = [0]  # where each batch drawn since the last iter() began, and where the next one begins
        self._pending: deque[int] = deque()  # sizes of batches that were under way when the state was saved
        self._finished = False  # no batch is left of this epoch once the pending ones are drawn
        self._fresh = True  # the next iter() takes up what stands here instead of beginning the next epoch

    @property
    def batch_size(self) -> int:
        """Size of the batch that is drawn next."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        self._batch_size = _integer("batch_size", value, 1, self.max_batch_size)

    def grow(self, batch_size: int) -> None:
        """Set the batch size where this one is larger, up to ``max_batch_size``: AdAdaGrad's batches never shrink."""
        wanted = _integer("batch_size", batch_size, 1, None)
        self.batch_size = max(self.batch_size, min(wanted, self.max_batch_size))

    def set_epoch(self, epoch: int) -> None:
        """The next ``iter()`` begins this epoch."""
        self.epoch = _integer("epoch", epoch, 0, 2**31 - 1)
        self._begins, self._finished, self._fresh = [0], False, True
        self._pending.clear()

    def __len__(self) -> int:
        """How many batches the next ``iter()`` gives if the size stays."""
        if not self._fresh:
            return self._whole_batches(self.samples)
        left = 0 if self._finished else self.samples - self._begins[-1] - sum(self._pending)
        return len(self._pending) + self._whole_batches(left)

    def _whole_batches(self, samples: int) -> int:
        return samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        # As a generator this begins with the first batch: a DataLoader with workers calls iter() twice before it draws one.
        if not self._fresh:
            self.set_epoch(self.epoch + 1)
        self._fresh = False
        order = self._order()
        while self._pending or not self._finished:
            begin = self._begins[-1]
            size = self._pending.popleft() if self._pending else self.batch_size
            end = min(begin + size, self.samples)
            if begin == end or (self.drop_last and end - begin < size):
                break
            self._begins.append(end)  # before the batch is out: a state saved while it is worked on is past it
            yield order[begin:end]
        self._finished = True

    def _order(self) -> list[int]:
        if not self.shuffle:
            return list(range(self.samples))
        # numpy's SeedSequence mixes both numbers; torch's generator on the CPU uses the lower 32 bits of a seed alone.
        order: list[int] = np.random.default_rng((self.seed, self.epoch)).permutation(self.samples).tolist()
        return order

    def state_dict(self, seen: int | None = None) -> dict[str, Any]:
        """Where the sampler stands, as plain JSON.

        Args:
            seen: how many batches the training loop has got since the last ``iter()``; None means as many as were drawn, which is
                right without workers.

        Raises:
            ValueError: ``seen`` is larger than the number of batches drawn.
        """
        drawn = len(self._begins) - 1
        place = drawn if seen is None else _integer("seen", seen, 0, drawn)
        sizes = [end - begin for begin, end in zip(self._begins[place:], self._begins[place + 1 :], strict=False)]
        return {
            "samples": self.samples,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "epoch": self.epoch,
            "begin": self._begins[place],
            "pending": [*sizes, *self._pending],
            "finished": self._finished,
            "batch_size": self.batch_size,
            "max_batch_size": self.max_batch_size,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the state was saved; the next ``iter()`` finishes its epoch."""
        if state_dict["samples"] != self.samples:
            raise ValueError(f"'state_dict' is that of {state_dict['samples']} samples; this sampler has {self.samples}")
        begin = _integer("state_dict['begin']", state_dict["begin"], 0, self.samples)
        self.max_batch_size = _integer("state_dict['max_batch_size']", state_dict["max_batch_size"], 1, self.samples)
        self.batch_size = state_dict["batch_size"]
        self.seed, self.epoch = int(state_dict["seed"]), int(state_dict["epoch"])
        self.shuffle, self.drop_last = bool(state_dict["shuffle"]), bool(state_dict["drop_last"])
        self._begins = [begin]
        self._pending = deque(_integer("state_dict['pending']", size, 1, self.samples) for size in state_dict["pending"])
        self._finished, self._fresh = bool(state_dict["finished"]), True


def _integer(name: str, value: Any, least: int, most: int | None) -> int:
    allowed = f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"'{name}' must be {allowed}, not {value!r} of type {type(value).__name__}")
    if value < least or (most is not None and value > most):
        raise ValueError(f"'{name}' must be {allowed}, not {value}")
    return value

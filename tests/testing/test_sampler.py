"""Each check of batch samplers passes a sound one and catches the fault that it is there for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from corollary.optim import AdaptiveBatchSampler
from corollary.testing import Case, check_sampler
from corollary.testing.sampler import CHECKS


def test_a_sound_sampler_passes() -> None:
    check_sampler(AdaptiveBatchSampler, sizes=(2, 5, 1), samples=21)


class LosesOne(AdaptiveBatchSampler):
    def _order(self) -> list[int]:
        return [super()._order()[0], *super()._order()[:-1]]


class NeverShuffles(AdaptiveBatchSampler):
    def _order(self) -> list[int]:
        return list(range(self.samples))


class KeepsItsFirstSize(AdaptiveBatchSampler):
    def __iter__(self) -> Iterator[list[int]]:
        order, size = self._order(), self.batch_size
        return iter([order[i : i + size] for i in range(0, len(order), size)])


class WrongLength(AdaptiveBatchSampler):
    def __len__(self) -> int:
        return super().__len__() + 1


class OneOrder(AdaptiveBatchSampler):
    def _order(self) -> list[int]:
        self.epoch = 0
        return super()._order()


class MovesTheGlobalState(AdaptiveBatchSampler):
    def _order(self) -> list[int]:
        torch.rand(1)
        return super()._order()


class LooksAtTheGlobalState(AdaptiveBatchSampler):
    def _order(self) -> list[int]:
        shift = torch.initial_seed() % self.samples
        order = super()._order()
        return order[shift:] + order[:shift]


class ForgetsItsPlace(AdaptiveBatchSampler):
    def state_dict(self, seen: int | None = None) -> dict[str, Any]:
        return super().state_dict(seen) | {"begin": 0}


class ForgetsItsSize(AdaptiveBatchSampler):
    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self.batch_size = 4


class SavesATensor(AdaptiveBatchSampler):
    def state_dict(self, seen: int | None = None) -> dict[str, Any]:
        return super().state_dict(seen) | {"begin": torch.tensor(0)}


class ForgetsWhatIsUnderWay(AdaptiveBatchSampler):
    def state_dict(self, seen: int | None = None) -> dict[str, Any]:
        return super().state_dict(seen) | {"pending": []}


class TakesAnySize(AdaptiveBatchSampler):
    @property
    def batch_size(self) -> int:
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        self._batch_size = value


class KeepsWhatItRefuses(AdaptiveBatchSampler):
    @property
    def batch_size(self) -> int:
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        self._batch_size = value
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= self.max_batch_size:
            raise ValueError("batch_size")


@pytest.mark.parametrize(
    ("check", "broken", "message"),
    [
        ("coverage", LosesOne, "does not have every sample once"),
        ("coverage", NeverShuffles, "is not what the order shows"),
        ("sizes", KeepsItsFirstSize, "set was"),
        ("sizes", WrongLength, "len is"),
        ("epochs", OneOrder, "begin alike"),
        ("epochs", NeverShuffles, "two seeds give one order"),
        ("randomness", MovesTheGlobalState, "global random state moved"),
        ("randomness", LooksAtTheGlobalState, "depends on the global random state"),
        ("resume", ForgetsItsPlace, "the rest of the epoch differs"),
        ("resume", ForgetsItsSize, "the rest of the epoch differs"),
        ("resume", SavesATensor, "not plain JSON"),
        ("workers", ForgetsWhatIsUnderWay, "with 2 workers, the rest differs"),
        ("arguments", TakesAnySize, "was accepted"),
        ("arguments", KeepsWhatItRefuses, "was kept"),
        ("iterators", KeepsItsFirstSize, "does not count for the second"),
    ],
)
def test_each_check_catches_its_fault(check: str, broken: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        CHECKS[check](Case(broken))


def test_every_check_has_a_fault() -> None:
    marks = test_each_check_catches_its_fault.pytestmark
    assert {row[0] for mark in marks for row in mark.args[1]} == set(CHECKS)

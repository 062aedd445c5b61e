"""Every conformance check of schedules passes on sound ones and catches one that breaks just what it checks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from corollary.optim import MultiplierLR
from corollary.testing import Case, check_schedule, checks
from corollary.testing.schedule import CHECKS


class Triangle(MultiplierLR):
    """Up to 1 over ``up`` steps, then down to 0 at ``total``; small, so that one part at a time can be broken below."""

    def __init__(self, optimizer: Optimizer, total: int = 9, up: int = 2, last_epoch: int = -1) -> None:
        if not 0 <= up < total:
            raise ValueError(f"'up' must be in [0, total), not {up}")
        self.total, self.up = total, up
        super().__init__(optimizer, last_epoch)

    def multiplier(self, step: int) -> float:
        if step < self.up:
            return (step + 1) / (self.up + 1)
        return max(0.0, (self.total - step) / (self.total - self.up))


def oracle(step: int, lr: float, total: int = 9, up: int = 2) -> float:
    points = [lr * (i + 1) / (up + 1) for i in range(up)] + [lr * i / (total - up) for i in range(total - up, -1, -1)]
    return points[step] if step < len(points) else 0.0


def total_of(total: int = 9, up: int = 2) -> int:
    return total


TAGS: dict[str, Any] = {
    "oracle": oracle,
    "options": ({}, {"total": 13, "up": 0}),
    "end": total_of,
    "bad": {"up beyond the end": {"up": 10}},
}


def inverse_root(optimizer: Optimizer, last_epoch: int = -1) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: 1 / math.sqrt(step + 1), last_epoch)


@pytest.mark.parametrize("name", CHECKS)
def test_a_sound_schedule_passes(name: str) -> None:
    CHECKS[name](Case(Triangle, TAGS))


@pytest.mark.parametrize("name", [name for name in CHECKS if name != "arguments"])  # LambdaLR takes 'SGD' for an optimizer
def test_lambda_lr_of_torch_passes(name: str) -> None:
    tags = {"oracle": lambda step, lr: lr * (step + 1) ** -0.5, "added_group": "refused"}
    CHECKS[name](Case(inverse_root, tags))


# --------------------------------------------------------------------------------------------- one broken part in each class


class OffByOne(Triangle):
    def multiplier(self, step: int) -> float:
        return super().multiplier(step + 1)


class OneRateForAll(Triangle):
    def get_lr(self) -> list[Any]:
        rates = super().get_lr()
        return [rates[0] for _ in rates]


class TellsInitial(Triangle):
    def get_last_lr(self) -> list[Any]:
        return list(self.base_lrs)


class Warns(Triangle):
    def multiplier(self, step: int) -> float:
        warnings.warn("the schedule is experimental", UserWarning, stacklevel=2)
        return super().multiplier(step)


class NoSchedule:
    def __init__(self, optimizer: Optimizer, **options: Any) -> None:
        pass


class ForgetsInitial(Triangle):
    def __init__(self, optimizer: Optimizer, *args: Any, **options: Any) -> None:
        super().__init__(optimizer, *args, **options)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]


class ChangesMomentum(Triangle):
    def __init__(self, optimizer: Optimizer, *args: Any, **options: Any) -> None:
        super().__init__(optimizer, *args, **options)
        for group in optimizer.param_groups:
            group["momentum"] = 0.9


class MovesParameters(Triangle):
    def __init__(self, optimizer: Optimizer, *args: Any, **options: Any) -> None:
        super().__init__(optimizer, *args, **options)
        for group in optimizer.param_groups:
            group["params"][0].data.mul_(2)


class StartsFromCurrent(Triangle):
    def __init__(self, optimizer: Optimizer, *args: Any, **options: Any) -> None:
        for group in optimizer.param_groups:
            group.pop("initial_lr", None)
        super().__init__(optimizer, *args, **options)


class RisesAgain(Triangle):
    def multiplier(self, step: int) -> float:
        return abs(self.total - step) / (self.total - self.up) if step > self.up else super().multiplier(step)


class EndsInNan(Triangle):
    def multiplier(self, step: int) -> float:
        return math.nan if step > self.total else super().multiplier(step)


class FixedGroups(Triangle):
    def get_lr(self) -> list[Any]:
        factor = self.multiplier(self.last_epoch)
        return [base * factor for base in self.base_lrs]


class AddedGroupStands(Triangle):
    def get_lr(self) -> list[Any]:
        count = len(self.base_lrs)
        rates = super().get_lr()
        del self.base_lrs[count:]
        return [*rates[:count], *(group["lr"] for group in self.optimizer.param_groups[count:])]


class CountsElsewhere(Triangle):
    """Its step is not ``last_epoch`` but a count that the state leaves out."""

    def multiplier(self, step: int) -> float:
        self.count = getattr(self, "count", -1) + 1
        return super().multiplier(self.count)

    def state_dict(self) -> dict[str, Any]:
        return {k: v for k, v in super().state_dict().items() if k != "count"}


class KeepsObjects(Triangle):
    def __init__(self, *args: Any, **options: Any) -> None:
        self.generator = torch.Generator()
        super().__init__(*args, **options)


class RefusesNothing(Triangle):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        LRScheduler.load_state_dict(self, state_dict)

    def get_lr(self) -> list[Any]:
        return super().get_lr()[: len(self.optimizer.param_groups)]


class StartsAnew(Triangle):
    def __init__(self, optimizer: Optimizer, *args: Any, last_epoch: int = -1, **options: Any) -> None:
        super().__init__(optimizer, *args, **options)


class OnlyOneClass(Triangle):
    def get_lr(self) -> list[Any]:
        rates = super().get_lr()
        return rates if isinstance(self.optimizer, torch.optim.SGD) else [2 * rate for rate in rates]


class ReplacesTensors(Triangle):
    def _update_lr(self, epoch: int | None = None) -> None:
        super()._update_lr(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = float(group["lr"])


class RoundsTensors(Triangle):
    def get_lr(self) -> list[Any]:
        return [rate.bfloat16().float() * 1.001 if isinstance(rate, torch.Tensor) else rate for rate in super().get_lr()]


class IgnoresRestart(Triangle):
    def _update_lr(self, epoch: int | None = None) -> None:
        super()._update_lr(None if epoch is None else epoch + 1)


class WritesEarly(Triangle):
    """Sets rates before the step that calls it, so that no other schedule may come first."""

    def __init__(self, optimizer: Optimizer, *args: Any, **options: Any) -> None:
        super().__init__(optimizer, *args, **options)
        optimizer.register_step_pre_hook(lambda *_: self._set())

    def _set(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate


class AnyOptimizer(Triangle):
    def __init__(self, optimizer: Any, *args: Any, **options: Any) -> None:
        super().__init__(torch.optim.SGD([torch.ones(1)]) if isinstance(optimizer, str) else optimizer, *args, **options)


class AnyOptions(Triangle):
    def __init__(self, optimizer: Optimizer, total: int = 9, up: int = 2, last_epoch: int = -1) -> None:
        super().__init__(optimizer, total, min(up, total - 1), last_epoch)


class NamesNothing(Triangle):
    def __init__(self, optimizer: Optimizer, total: int = 9, up: int = 2, last_epoch: int = -1) -> None:
        if up >= total:
            raise ValueError("bad value")
        super().__init__(optimizer, total, up, last_epoch)


BROKEN: list[tuple[str, Callable[..., Any], dict[str, Any], str]] = [
    ("values", OffByOne, {}, "the oracle says"),
    ("values", OneRateForAll, {}, "group 1 has rate"),
    ("values", TellsInitial, {}, r"get_last_lr\(\) tells"),
    ("values", Warns, {}, "a warning: the schedule is experimental"),
    ("values", NoSchedule, {}, "not an LRScheduler"),
    ("start", ForgetsInitial, {}, "'initial_lr' of the groups"),
    ("start", ChangesMomentum, {}, "besides the rate"),
    ("start", MovesParameters, {}, "moved parameters"),
    ("start", StartsFromCurrent, {}, "second schedule"),
    ("end", RisesAgain, {}, "stay"),
    ("end", RisesAgain, {"beyond": "oracle"}, "past the end: "),
    ("end", EndsInNan, {}, "nan"),
    ("end", Triangle, {"beyond": "refused"}, "nothing was raised"),
    ("added_group", AddedGroupStands, {}, "with a group added"),
    ("added_group", Triangle, {"added_group": "refused"}, "nothing was raised"),
    ("resume", CountsElsewhere, {}, "differ|has rates"),
    ("resume", KeepsObjects, {}, "only tensors and plain values"),
    ("last_epoch", StartsAnew, {}, "built with last_epoch"),
    ("foreign_state", RefusesNothing, {}, "nothing was raised"),
    ("optimizers", OnlyOneClass, {}, "AdamW: step 0"),
    ("tensor_lr", ReplacesTensors, {}, "replaced the tensor"),
    ("tensor_lr", RoundsTensors, {}, "held as tensor"),
    ("composed", IgnoresRestart, {}, "in SequentialLR"),
    ("composed", WritesEarly, {}, "disturbs"),
    ("arguments", AnyOptimizer, {}, "raises no TypeError"),
    ("arguments", AnyOptions, {}, "was accepted"),
    ("arguments", NamesNothing, {}, "names none of up"),
]


@pytest.mark.parametrize(
    ("name", "make", "tags", "words"), BROKEN, ids=[f"{b[0]}-{b[1].__name__}-{i}" for i, b in enumerate(BROKEN)]
)
def test_a_broken_schedule_is_caught(name: str, make: Any, tags: dict[str, Any], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        CHECKS[name](Case(make, {**TAGS, **tags}))


def test_every_check_has_a_schedule_that_it_catches() -> None:
    assert {name for name, *_ in BROKEN} == set(CHECKS)


def test_groups_that_cannot_be_added_raise() -> None:
    """Without the base's care for added groups torch raises, which only the tag 'refused' allows."""
    CHECKS["added_group"](Case(FixedGroups, {**TAGS, "added_group": "refused"}))
    with pytest.raises(ValueError, match="zip"):
        CHECKS["added_group"](Case(FixedGroups, TAGS))


def test_without_an_oracle_nothing_passes() -> None:
    with pytest.raises(AssertionError, match="'oracle' is needed"):
        check_schedule(Triangle)


def test_an_unknown_tag_value_is_named() -> None:
    with pytest.raises(AssertionError, match="tag 'beyond' is 'repeats'; allowed: holds"):
        CHECKS["end"](Case(Triangle, {**TAGS, "beyond": "repeats"}))


def test_the_checks_are_found_by_kind() -> None:
    assert checks("schedule") is CHECKS


def test_a_state_of_another_schedule_is_named() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    schedule = Triangle(optimizer)
    with pytest.raises(ValueError, match="'state_dict' is of another schedule"):
        schedule.load_state_dict(inverse_root(optimizer).state_dict())

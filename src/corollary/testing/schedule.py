"""Conformance checks of learning-rate schedules.

``make(optimizer, **options)`` is the factory of a ``torch.optim.lr_scheduler.LRScheduler``. Its tags:

===========  ===========================================================================================================
tag          meaning (default)
===========  ===========================================================================================================
oracle       needed: ``oracle(step, lr, **options)`` gives the rate at step 0, 1, 2, ... of a group whose initial rate is
             ``lr``, computed apart from the component, beyond the run's end too
options      option sets that ``make`` and ``oracle`` both get (``({},)``)
end          the step at which the run is over, or a function of the options that gives it; None where a schedule has no
             end (None)
beyond       past the end: 'holds' (the rate of ``end`` stays), 'oracle' (what the oracle says) or 'refused' (the step past
             the end raises) ('holds')
tolerance    largest difference from the oracle, relative to the initial rate (1e-12)
added_group  a group added to the optimizer during the run: 'joins' (at the next step, its own rate as its initial one) or
             'refused' ('joins')
sequential   whether ``SequentialLR`` can start it in the middle of a run (True)
last_epoch   whether ``make`` takes ``last_epoch``, to be built in the middle of a run (True)
bad          name to options that must be refused with a ValueError or TypeError (``{}``)
===========  ===========================================================================================================
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, LRScheduler, SequentialLR

from corollary.optim import JointOptimizer
from corollary.testing.case import Case, Check, run_checks

_RATES = (0.25, 0.125, 0.0625)
_REFUSALS = (TypeError, ValueError, RuntimeError)
_OPEN_END = 12


def check_schedule(make: Callable[..., LRScheduler], **tags: Any) -> None:
    """Run every conformance check of a schedule; raises ``AssertionError`` naming the first that fails.

    Args:
        make: factory of (optimizer, **options).
        tags: as in the module's table; ``oracle`` is needed.

    Example:
        >>> from corollary.optim import MultiplierLR
        >>> from corollary.testing import check_schedule
        >>> class Halving(MultiplierLR):
        ...     def multiplier(self, step):
        ...         return 0.5**step
        >>> check_schedule(Halving, oracle=lambda step, lr: lr / 2**step)
    """
    run_checks("schedule", Case(make, tags))


# ---------------------------------------------------------------------------------------------------------------- helpers


def _params(count: int = 3) -> list[nn.Parameter]:
    return [nn.Parameter(torch.linspace(1, 2 + i, 4, dtype=torch.float64)) for i in range(count)]


def _sgd(rates: Sequence[Any] = _RATES, **options: Any) -> Optimizer:
    groups = [{"params": [p], "lr": rate} for p, rate in zip(_params(len(rates)), rates, strict=True)]
    return torch.optim.SGD(groups, momentum=0.5, **options)


def _options(case: Case) -> Sequence[Mapping[str, Any]]:
    sets: Sequence[Mapping[str, Any]] = case.tags.get("options", ({},))
    return sets


def _oracle(case: Case, step: int, lr: float, options: Mapping[str, Any]) -> float:
    assert "oracle" in case.tags, "tag 'oracle' is needed: without an independent reference nothing is checked"
    return float(case.tags["oracle"](step, lr, **options))


def _end(case: Case, options: Mapping[str, Any]) -> int:
    end = case.tags.get("end")
    end = end(**options) if callable(end) else end
    return _OPEN_END if end is None else int(end)


def _tag(case: Case, name: str, default: str, allowed: Sequence[str]) -> str:
    value = case.tags.get(name, default)
    assert value in allowed, f"tag '{name}' is {value!r}; allowed: {', '.join(allowed)}"
    return str(value)


def _train(optimizer: Optimizer) -> None:
    """One step of the optimizer on Σ p², whatever its rates."""
    optimizer.zero_grad()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    torch.stack([(p**2).sum() for p in params]).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def _compare(
    case: Case, optimizer: Optimizer, initial: Sequence[float], step: int, options: Mapping[str, Any], where: str = ""
) -> None:
    tolerance = float(case.tags.get("tolerance", 1e-12))
    for i, (rate, lr) in enumerate(zip(_rates(optimizer), initial, strict=True)):
        wanted = _oracle(case, step, lr, options)
        assert abs(rate - wanted) <= tolerance * abs(lr), (
            f"{where}step {step} of group {i} has rate {rate!r}, the oracle says {wanted!r}, with options {dict(options)}"
        )


@contextmanager
def _refusing(what: str, *words: str) -> Iterator[None]:
    try:
        yield
    except _REFUSALS as error:
        if not any(word.lower() in str(error).lower() for word in words):
            raise AssertionError(f"the error for {what} does not name it: {error}") from error
        return
    raise AssertionError(f"{what} must be refused, but nothing was raised")


@contextmanager
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            yield
        except Warning as warning:
            raise AssertionError(f"a warning: {warning}") from warning


def _through_files(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state as it comes back from JSON, with its tensors from safetensors: what survives without pickle."""
    tensors: dict[str, Tensor] = {}

    def store(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = value.detach().clone().contiguous()
            return {"tensor": path}
        if isinstance(value, Mapping):
            return {"dict": [[store(k, f"{path}/k{i}"), store(v, f"{path}/{i}")] for i, (k, v) in enumerate(value.items())]}
        if isinstance(value, list | tuple):
            return {"list": [store(v, f"{path}/{i}") for i, v in enumerate(value)]}
        ok = value is None or isinstance(value, (bool, int, float, str))
        assert ok, f"the state holds a {type(value).__name__} ({path}): only tensors and plain values survive without pickle"
        return value

    def restore(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        [(kind, content)] = value.items()
        if kind == "tensor":
            return loaded[content]
        if kind == "list":
            return [restore(v) for v in content]
        return {restore(k): restore(v) for k, v in content}

    text = json.dumps({name: store(value, name) for name, value in state.items()})
    loaded = safetensors.load(safetensors.save(tensors)) if tensors else {}
    return {name: restore(value) for name, value in json.loads(text).items()}


# ----------------------------------------------------------------------------------------------------------------- checks


def values(case: Case) -> None:
    """At every step of the run each group has the oracle's rate, and ``get_last_lr`` tells it; nothing warns."""
    for options in _options(case):
        optimizer = _sgd()
        with _no_warnings():
            schedule = case.make(optimizer, **options)
            assert isinstance(schedule, LRScheduler), f"make gave a {type(schedule).__name__}, not an LRScheduler"
            for step in range(_end(case, options)):
                _compare(case, optimizer, _RATES, step, options)
                told = [float(rate) for rate in schedule.get_last_lr()]
                assert told == _rates(optimizer), f"at step {step} get_last_lr() tells {told}, in use are {_rates(optimizer)}"
                _train(optimizer)
                schedule.step()


def start(case: Case) -> None:
    """Building a schedule sets the rates of step 0, keeps the initial ones, and touches nothing else.

    A second schedule built on the same optimizer at the end of the first starts from the initial rates again.
    """
    for options in _options(case):
        optimizer = _sgd()
        before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
        settings = [{k: v for k, v in g.items() if k not in ("lr", "params")} for g in optimizer.param_groups]
        schedule = case.make(optimizer, **options)
        _compare(case, optimizer, _RATES, 0, options)
        kept = [group.get("initial_lr") for group in optimizer.param_groups]
        assert kept == list(_RATES), f"'initial_lr' of the groups is {kept} after building, not the rates given, {list(_RATES)}"
        after = [p for group in optimizer.param_groups for p in group["params"]]
        assert all(torch.equal(p, b) for p, b in zip(after, before, strict=True)), "building the schedule moved parameters"
        now = [{k: v for k, v in g.items() if k not in ("lr", "params", "initial_lr")} for g in optimizer.param_groups]
        assert now == settings, "building the schedule changed settings of the groups besides the rate"
        for _ in range(3):
            _train(optimizer)
            schedule.step()
        case.make(optimizer, **options)
        _compare(case, optimizer, _RATES, 0, options, "second schedule: ")


def end(case: Case, steps: int = 5) -> None:
    """At the end of the run and past it rates do what the tag says, and they are finite."""
    does = _tag(case, "beyond", "holds", ("holds", "oracle", "refused"))
    if case.tags.get("end") is None:
        return
    for options in _options(case):
        optimizer = _sgd()
        schedule = case.make(optimizer, **options)
        last = _end(case, options)
        for _ in range(last):
            _train(optimizer)
            schedule.step()
        _compare(case, optimizer, _RATES, last, options)
        held = _rates(optimizer)
        for step in range(last + 1, last + 1 + steps):
            _train(optimizer)
            if does == "refused":
                with _refusing(f"step {step} of a run of {last}", "step", "end"):
                    schedule.step()
                break
            schedule.step()
            rates = _rates(optimizer)
            assert torch.tensor(rates).isfinite().all(), f"step {step}, past the end {last}, has rates {rates}"
            assert does != "holds" or rates == held, (
                f"step {step}, past the end {last}, has rates {rates}; promised: {held} stay"
            )
            _compare(case, optimizer, _RATES, step, options, "past the end: ")


def added_group(case: Case) -> None:
    """A group added during the run joins with its own rate as the initial one, or is refused, as tagged."""
    joins = _tag(case, "added_group", "joins", ("joins", "refused")) == "joins"
    for options in _options(case):
        optimizer = _sgd()
        schedule = case.make(optimizer, **options)
        for _ in range(2):
            _train(optimizer)
            schedule.step()
        optimizer.add_param_group({"params": _params(1), "lr": 0.5})
        _train(optimizer)
        if not joins:
            with _refusing("an added group", "group", "zip"):
                schedule.step()
            continue
        schedule.step()
        _compare(case, optimizer, (*_RATES, 0.5), 3, options, "with a group added at step 2: ")
        assert len(schedule.get_last_lr()) == len(_RATES) + 1, "get_last_lr() leaves out the added group"


def resume(case: Case) -> None:
    """Saved and loaded at any step, through files without pickle and through ``copy.deepcopy``, the run goes on bit by bit.

    The optimizer's state may be loaded before or after the schedule's; either way its rates are those of the saved run.
    """
    refused = case.tags.get("beyond") == "refused"
    for options in _options(case):
        last = _end(case, options)
        total = last + (0 if refused else 3)
        for cut in sorted({0, 1, last // 2, last - 1, last} - {-1}):
            for route in (_through_files, copy.deepcopy):
                for optimizer_first in (True, False):
                    whole = _sgd()
                    schedule = case.make(whole, **options)
                    for _ in range(cut):
                        _train(whole)
                        schedule.step()
                    states = route({"schedule": schedule.state_dict(), "optimizer": whole.state_dict()})
                    rest = _sgd([1e-8] * len(_RATES))
                    resumed = case.make(rest, **options)
                    for copied, p in zip(_flat(rest), _flat(whole), strict=True):
                        copied.data.copy_(p.detach())
                    loads = [(rest, "optimizer"), (resumed, "schedule")]
                    for target, name in loads if optimizer_first else reversed(loads):
                        target.load_state_dict(states[name])
                    assert _rates(rest) == _rates(whole), (
                        f"loaded at step {cut}, the rates are {_rates(rest)}, not {_rates(whole)}"
                    )
                    assert list(resumed.get_last_lr()) == list(schedule.get_last_lr()), "loading loses get_last_lr()"
                    for step in range(cut, total):
                        _train(whole)
                        schedule.step()
                        _train(rest)
                        resumed.step()
                        assert _rates(rest) == _rates(whole), (
                            f"resumed at step {cut} through {route.__name__.strip('_')}, step {step + 1} has rates {_rates(rest)}, "
                            f"not {_rates(whole)}, with options {dict(options)}"
                        )
                    same = all(torch.equal(a, b) for a, b in zip(_flat(rest), _flat(whole), strict=True))
                    assert same, f"resumed at step {cut}, the parameters differ from those of the whole run"


def _flat(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def last_epoch(case: Case, done: int = 4) -> None:
    """Built with ``last_epoch`` on an optimizer that carries ``initial_lr``, it goes on where torch's own schedules do."""
    if not case.tags.get("last_epoch", True):
        return
    for options in _options(case):
        whole = _sgd()
        first = case.make(whole, **options)
        for _ in range(done):
            _train(whole)
            first.step()
        schedule = case.make(whole, **options, last_epoch=first.last_epoch - 1)
        _compare(case, whole, _RATES, done, options, "built with last_epoch: ")
        _train(whole)
        schedule.step()
        _compare(case, whole, _RATES, done + 1, options, "built with last_epoch: ")
        with _refusing_key("last_epoch without 'initial_lr'"):
            case.make(_sgd(), **options, last_epoch=3)


@contextmanager
def _refusing_key(what: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, ValueError) as error:
        if "initial_lr" not in str(error):
            raise AssertionError(f"the error for {what} does not name it: {error}") from error
        return
    raise AssertionError(f"{what} must be refused, but nothing was raised")


def foreign_state(case: Case) -> None:
    """A state saved for another number of groups raises by the next step, instead of setting wrong rates."""
    for options in _options(case):
        state = copy.deepcopy(case.make(_sgd(), **options).state_dict())
        optimizer = _sgd(_RATES[:1])
        schedule = case.make(optimizer, **options)
        with _refusing("a state of three groups for an optimizer of one", "group", "zip"):
            schedule.load_state_dict(state)
            _train(optimizer)
            schedule.step()


def optimizers(case: Case, steps: int = 4) -> None:
    """Whatever the optimizer, joint ones included, every group has the oracle's rate at every step, and nothing warns."""

    def joint() -> Optimizer:
        one, two, three = _params()
        return JointOptimizer([torch.optim.SGD([one], lr=_RATES[0]), torch.optim.Adam([{"params": [two], "lr": _RATES[1]},
                                                                                      {"params": [three], "lr": _RATES[2]}])])  # fmt: skip

    def groups() -> list[dict[str, Any]]:
        return [{"params": [p], "lr": rate} for p, rate in zip(_params(), _RATES, strict=True)]

    makers: dict[str, Callable[[], Optimizer]] = {
        "SGD": _sgd,
        "AdamW": lambda: torch.optim.AdamW(groups()),
        "Adagrad": lambda: torch.optim.Adagrad(groups(), lr_decay=0.1),
        "JointOptimizer": joint,
    }
    for options in _options(case):
        for name, maker in makers.items():
            optimizer = maker()
            with _no_warnings():
                schedule = case.make(optimizer, **options)
                for step in range(min(steps, _end(case, options))):
                    _compare(case, optimizer, _RATES, step, options, f"{name}: ")
                    _train(optimizer)
                    schedule.step()


def tensor_lr(case: Case, steps: int = 4) -> None:
    """A rate that is a tensor stays the same tensor, with the oracle's values within float32's rounding."""
    for options in _options(case):
        tensors = [torch.tensor(rate) for rate in _RATES]
        optimizer = _sgd(tensors, foreach=False)
        schedule = case.make(optimizer, **options)
        for step in range(min(steps, _end(case, options))):
            for i, (group, own, lr) in enumerate(zip(optimizer.param_groups, tensors, _RATES, strict=True)):
                assert group["lr"] is own, f"step {step} replaced the tensor that is the rate of group {i}"
                wanted = _oracle(case, step, lr, options)
                assert abs(float(own) - wanted) <= 1e-6 * lr, (
                    f"step {step}: a rate held as tensor is {float(own)}, not {wanted}"
                )
            _train(optimizer)
            schedule.step()


def composed(case: Case, before: int = 3, steps: int = 5) -> None:
    """Started by ``SequentialLR`` in the middle of a run it begins at its own step 0, and ``ChainedScheduler`` may hold it."""
    for options in _options(case):
        last = _end(case, options)
        if case.tags.get("sequential", True):
            optimizer = _sgd()
            warm = ConstantLR(optimizer, factor=0.5, total_iters=before + 1)
            joined = SequentialLR(optimizer, [warm, case.make(optimizer, **options)], milestones=[before])
            for step in range(before + min(steps, last)):
                if step < before:
                    halves = [rate / 2 for rate in _RATES]
                    assert _rates(optimizer) == halves, f"in SequentialLR it disturbs the schedule before it at step {step}"
                else:
                    _compare(case, optimizer, _RATES, step - before, options, "in SequentialLR: ")
                _train(optimizer)
                joined.step()
        optimizer = _sgd()
        chain = ChainedScheduler([case.make(optimizer, **options), ConstantLR(optimizer, factor=1.0, total_iters=last + 9)])
        for step in range(min(steps, last)):
            _compare(case, optimizer, _RATES, step, options, "in ChainedScheduler: ")
            _train(optimizer)
            chain.step()


def arguments(case: Case) -> None:
    """What is no optimizer is refused with a TypeError, and so are the options that the case names as bad."""
    good = _options(case)[0]
    try:
        case.make("SGD", **good)
    except TypeError as error:
        if "optimizer" not in str(error).lower():
            raise AssertionError(f"the error for optimizer='SGD' does not name it: {error}") from error
    else:
        raise AssertionError("optimizer='SGD' raises no TypeError")
    for name, options in case.tags.get("bad", {}).items():
        try:
            case.make(_sgd(), **options)
        except (ValueError, TypeError) as error:
            if not any(repr(option)[1:-1] in str(error) for option in options):
                raise AssertionError(f"the error for {name} names none of {', '.join(options)}: {error}") from error
        else:
            raise AssertionError(f"{name} was accepted")


CHECKS: Mapping[str, Check] = {
    check.__name__: check
    for check in (
        values, start, end, added_group, resume, last_epoch, foreign_state, optimizers, tensor_lr, composed, arguments,
    )
}  # fmt: skip

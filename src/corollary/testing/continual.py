"""Conformance checks of continual learners: objects that change an optimizer's steps, so that old tasks survive new ones.

``make(model, **options)`` builds the learner on a model of ``Linear`` and ``Conv2d`` layers with biases. It has ``attach(optimizer)``,
``remove()``, ``begin_task(loss)``, ``end_task(loss)``, ``state_dict()``, ``load_state_dict()``, ``memory_bytes()``, where ``loss`` is a
function of no arguments that gives one loss for each sample. Its tags:

===========  =========================================================================================================
``options``  option sets that ``make`` gets; default ``({},)``
``dtypes``   floating dtypes of models that it takes; default float32 and float64
``remedy``   whether it is to keep more of an old task than plain SGD does; default True
===========  =========================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor, nn
from torch.nn import functional as F

from corollary.testing.case import Case, Check, run_checks
from corollary.testing.function import random_state

_Data = tuple[Tensor, Tensor]


def _net(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = (
            nn.Conv2d(1, 3, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(27, 12),
            nn.Tanh(),
            nn.Linear(12, 4),
        )
        return nn.Sequential(*layers).to(dtype)


def _task(seed: int, dtype: torch.dtype = torch.float64) -> _Data:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(12, 1, 6, 6, generator=g, dtype=torch.float64).to(dtype), torch.randint(4, (12,), generator=g)


def _loss(net: nn.Module, data: _Data) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(net(data[0]), data[1], reduction="none")


def _train(net: nn.Module, data: _Data, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        _loss(net, data)().mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _sgd(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=0.1)


def _hooks(net: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules())


def _apart(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


def _second_task(case: Case, net: nn.Module, options: Mapping[str, Any], dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """A learner that has learnt one task and begun the next."""
    learner, optimizer = case.make(net, **options), _sgd(net)
    learner.attach(optimizer)
    _train(net, _task(1, dtype), optimizer)
    learner.end_task(_loss(net, _task(1, dtype)))
    learner.begin_task(_loss(net, _task(2, dtype)))
    return learner, optimizer


def _sets(case: Case) -> Any:
    return case.tags.get("options", ({},))


def first_task(case: Case) -> None:
    """Until a task has ended, steps are the optimizer's own, to the bit."""
    for options in _sets(case):
        net, twin = _net(), _net()
        optimizer = _sgd(net)
        case.make(net, **options).attach(optimizer)
        _train(net, _task(1), optimizer)
        _train(twin, _task(1), _sgd(twin))
        assert _apart(net, twin) == 0, f"{options}: the first task's steps differ from the plain optimizer's"


def remembers(case: Case) -> None:
    """After a task, the next one changes the old one's outputs less than plain steps of the same size do, and still learns."""
    if not case.tags.get("remedy", True):
        return
    for options in _sets(case):
        net = _net()
        _, optimizer = _second_task(case, net, options)
        plain = _net()
        plain.load_state_dict(net.state_dict())
        old, new = _task(1)[0], _task(2)
        before, start = net(old).detach(), _loss(net, new)().mean().item()
        _train(net, new, optimizer)
        _train(plain, new, _sgd(plain))
        ours, theirs = ((model(old) - before).norm().item() for model in (net, plain))
        assert ours < theirs, f"{options}: the old outputs moved by {ours:.2e}, without the learner by {theirs:.2e}"
        assert _loss(net, new)().mean().item() < start, f"{options}: the new task is not learnt"


def removal(case: Case) -> None:
    """``remove()`` and the end of a ``with`` leave optimizer and model as they were: steps, hooks and state dict."""
    for options in _sets(case):
        net = _net()
        keys = list(net.state_dict())
        learner, optimizer = _second_task(case, net, options)
        with learner:
            pass
        learner.remove()
        assert list(net.state_dict()) == keys, f"{options}: the model's state dict has other keys"
        assert not _hooks(net), f"{options}: {_hooks(net)} hooks are left on the model"
        twin = _net()
        twin.load_state_dict(net.state_dict())
        _train(net, _task(2), optimizer)
        _train(twin, _task(2), _sgd(twin))
        assert _apart(net, twin) == 0, f"{options}: after remove() steps are not the optimizer's own"


def reattached(case: Case) -> None:
    """A second ``attach`` takes the place of the first: no step is changed twice."""
    for options in _sets(case):
        net, twin = _net(), _net()
        (learner, optimizer), (_, other) = (_second_task(case, model, options) for model in (net, twin))
        learner.attach(optimizer)
        _train(net, _task(2), optimizer)
        _train(twin, _task(2), other)
        assert _apart(net, twin) == 0, f"{options}: attaching twice changes the steps"


def resumed(case: Case) -> None:
    """The state goes through safetensors in the middle of a task, and the run goes on with the same bits."""
    for options in _sets(case):
        net = _net()
        learner, optimizer = _second_task(case, net, options)
        _train(net, _task(2), optimizer, steps=2)
        state = learner.state_dict()
        for key, tensor in state.items():
            assert isinstance(tensor, Tensor), f"{options}: '{key}' of the state is no tensor but {type(tensor).__name__}"
        loaded = safetensors.load(safetensors.save({key: tensor.contiguous() for key, tensor in state.items()}))
        twin = _net(seed=9)
        twin.load_state_dict(net.state_dict())
        other, again = case.make(twin, **options), _sgd(twin)
        other.load_state_dict(loaded)
        other.attach(again)
        for model, step in ((net, optimizer), (twin, again)):
            _train(model, _task(2), step, steps=2)
        assert _apart(net, twin) == 0, f"{options}: the resumed run differs by {_apart(net, twin):.1e}"


def memory(case: Case) -> None:
    """``memory_bytes()`` is the size of the state."""
    for options in _sets(case):
        learner, _ = _second_task(case, _net(), options)
        held = sum(t.numel() * t.element_size() for t in learner.state_dict().values())
        assert learner.memory_bytes() == held > 0, (
            f"{options}: memory_bytes() is {learner.memory_bytes()}, the state has {held}"
        )


def dtypes(case: Case) -> None:
    """It takes models of each promised dtype, and what they learn stays finite and in that dtype."""
    for options in _sets(case):
        for dtype in case.tags.get("dtypes", (torch.float32, torch.float64)):
            net = _net(dtype)
            _, optimizer = _second_task(case, net, options, dtype)
            _train(net, _task(2, dtype), optimizer)
            for name, p in net.named_parameters():
                assert p.dtype == dtype, f"{options}: '{name}' became {p.dtype}"
                assert p.isfinite().all(), f"{options}, {dtype}: '{name}' is not finite"


def side_effects(case: Case) -> None:
    """Ending and beginning a task move no global random state, no parameter and no gradient, and need no enabled grad mode."""
    for options in _sets(case):
        net = _net()
        learner, optimizer = _second_task(case, net, options)
        _train(net, _task(2), optimizer, steps=1)
        before, grads = random_state(), [None if p.grad is None else p.grad.clone() for p in net.parameters()]
        values = [p.detach().clone() for p in net.parameters()]
        with torch.no_grad():
            learner.end_task(_loss(net, _task(2)))
            learner.begin_task(_loss(net, _task(3)))
        assert random_state() == before, f"{options}: a global random state moved"
        assert not _hooks(net), f"{options}: hooks are left on the model"
        for p, value, grad in zip(net.parameters(), values, grads, strict=True):
            assert torch.equal(p, value), f"{options}: a parameter moved"
            same = p.grad is None if grad is None else p.grad is not None and torch.equal(p.grad, grad)
            assert same, f"{options}: a gradient changed"


def bad_input(case: Case) -> None:
    """What is no model, optimizer, loss or state is refused, and a loss that fails leaves no hook."""
    for options in _sets(case):
        _refusals(case, options)


def _refusals(case: Case, options: Mapping[str, Any]) -> None:
    net = _net()
    learner = case.make(net, **options)

    def fails() -> Tensor:
        return net(torch.zeros(2, 2, dtype=torch.float64))  # type: ignore[no-any-return]

    cases: tuple[tuple[str, Callable[[], Any]], ...] = (
        ("a number as model", lambda: case.make(3, **options)),
        ("a list as optimizer", lambda: learner.attach([])),
        ("a tensor as loss", lambda: learner.end_task(torch.ones(3))),
        ("a NaN loss", lambda: learner.end_task(lambda: _loss(net, _task(1))() * torch.nan)),
        ("an empty state", lambda: learner.load_state_dict({})),
        ("a loss that raises", lambda: learner.end_task(fails)),
    )
    for name, call in cases:
        refused = (TypeError, ValueError, RuntimeError) if name == "a loss that raises" else (TypeError, ValueError)
        try:
            call()
        except refused:
            assert not _hooks(net), f"{options}: {name} leaves hooks on the model"
            continue
        raise AssertionError(f"{options}: {name} is taken")


CHECKS: Mapping[str, Check] = {
    check.__name__: check
    for check in (first_task, remembers, removal, reattached, resumed, memory, dtypes, side_effects, bad_input)
}


def check_continual(make: Callable[..., Any], **tags: Any) -> None:
    """Run every check of this module on the learner that ``make(model, **options)`` builds.

    Args:
        make: builds the learner.
        **tags: what it promises; see the module's table.

    Raises:
        AssertionError: names the first check that fails and why.

    Example:
        >>> from corollary.adapt import EWC
        >>> check_continual(EWC, options=({"strength": 2.0},))
    """
    run_checks("continual", Case(make, tags))

"""Every conformance check of optimizers passes on a sound optimizer and catches one that breaks just what it checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import ProcessExitedException
from torch.optim import Optimizer

from corollary.testing import Case, Problem, check_optimizer, checks
from corollary.testing.optimizer import CHECKS, separable


class Momentum(Optimizer):
    """Gradient descent with momentum, kept small so that one part at a time can be broken below."""

    rounding: torch.dtype | None = None

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.5, foreach: bool | None = None) -> None:
        if lr < 0:
            raise ValueError(f"'lr' must be at least 0, not {lr}")
        super().__init__(params, {"lr": lr, "beta": beta, "foreach": foreach})
        for group in self.param_groups:
            for p in group["params"]:
                self.refuse(p)

    def refuse(self, p: Tensor) -> None:
        if p.is_complex():
            raise TypeError("complex parameters are not supported")

    def call(self, closure: Callable[[], Any]) -> Any:
        with torch.enable_grad():
            return closure()

    def members(self) -> Iterable[tuple[dict[str, Any], Tensor]]:
        return ((group, p) for group in self.param_groups for p in group["params"] if p.grad is not None)

    def gradient(self, p: Tensor) -> Tensor:
        assert p.grad is not None
        if p.grad.is_sparse:
            raise RuntimeError("sparse gradients are not supported")
        return p.grad

    def start(self, p: Tensor) -> dict[str, Any]:
        return {"step": torch.zeros(()), "mean": torch.zeros_like(p)}

    def move(self, group: dict[str, Any], p: Tensor, gradient: Tensor, state: dict[str, Any]) -> None:
        state["step"] += 1
        state["mean"].mul_(group["beta"]).add_(gradient)
        p.add_(state["mean"], alpha=-group["lr"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = self.call(closure) if closure is not None else None
        for group, p in self.members():
            gradient = self.gradient(p)
            if not self.state[p]:
                self.state[p].update(self.start(p))
            self.move(group, p, gradient, self.state[p])
        return loss


def momentum_oracle(problem: Problem, steps: int, lr: float = 0.1, beta: float = 0.5) -> list[list[np.ndarray]]:
    params = [p.copy() for p in problem.start]
    means = [np.zeros_like(p) for p in params]
    path = []
    for _ in range(steps):
        for i, g in enumerate(problem.gradient(params)):
            means[i] = beta * means[i] + g
        params = [p - lr * m for p, m in zip(params, means, strict=True)]
        path.append(params)
    return path


def adamw_oracle(problem: Problem, steps: int, lr: float = 0.05, weight_decay: float = 0.01) -> list[list[np.ndarray]]:
    params = [p.copy() for p in problem.start]
    m = [np.zeros_like(p) for p in params]
    v = [np.zeros_like(p) for p in params]
    path = []
    for t in range(1, steps + 1):
        gradients = problem.gradient(params)
        for i, g in enumerate(gradients):
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g * g
            step = m[i] / (1 - 0.9**t) / (np.sqrt(v[i] / (1 - 0.999**t)) + 1e-8)
            params[i] = params[i] - lr * (step + weight_decay * params[i])
        path.append([p.copy() for p in params])
    return path


def adamw(params: Any, lr: float = 0.05, **options: Any) -> Optimizer:
    return torch.optim.AdamW(params, lr=lr, **options)


TAGS = {"oracle": momentum_oracle, "options": ({}, {"beta": 0.9}), "foreach": True}
ADAMW_TAGS = {"oracle": adamw_oracle, "options": ({}, {"weight_decay": 0.1}), "complex": "works"}


@pytest.mark.parametrize("name", CHECKS)
def test_adamw_of_torch_passes(name: str) -> None:
    # On a busy machine a process that leaves gloo can be aborted by one of its threads, after its work is done.
    for _ in range(2):
        try:
            return CHECKS[name](Case(adamw, ADAMW_TAGS))
        except ProcessExitedException as error:
            if error.signal_name != "SIGABRT":
                raise
    CHECKS[name](Case(adamw, ADAMW_TAGS))


@pytest.mark.parametrize("name", [name for name in CHECKS if name not in ("compiled", "fsdp2")])
def test_the_sound_optimizer_below_the_broken_ones_passes(name: str) -> None:
    CHECKS[name](Case(Momentum, TAGS))


# ------------------------------------------------------------------------------------------- one broken part in each class


class ForgetsMomentum(Momentum):
    def move(self, group: Any, p: Tensor, gradient: Tensor, state: Any) -> None:
        p.add_(gradient, alpha=-group["lr"])


class DrawsGlobally(Momentum):
    def move(self, group: Any, p: Tensor, gradient: Tensor, state: Any) -> None:
        super().move(group, p, gradient * (1 + 0.1 * torch.rand(())), state)


class HidesState(Momentum):
    """Keeps its mean outside ``state``, where ``state_dict`` does not see it."""

    def move(self, group: Any, p: Tensor, gradient: Tensor, state: Any) -> None:
        hidden = self.__dict__.setdefault("hidden", {})
        hidden[p] = hidden.get(p, 0) * group["beta"] + gradient
        p.add_(hidden[p], alpha=-group["lr"])


class KeepsObjects(Momentum):
    def start(self, p: Tensor) -> dict[str, Any]:
        return {**super().start(p), "generator": torch.Generator()}


class ForeachDiffers(Momentum):
    def move(self, group: Any, p: Tensor, gradient: Tensor, state: Any) -> None:
        super().move(group, p, gradient * (1.001 if group["foreach"] else 1), state)


class OneRateForAll(Momentum):
    def move(self, group: Any, p: Tensor, gradient: Tensor, state: Any) -> None:
        super().move(self.param_groups[0], p, gradient, state)


class RateAtStart(Momentum):
    """Takes the learning rate once, so that schedulers have no hold on it."""

    def move(self, group: Any, p: Tensor, gradient: Tensor, state: Any) -> None:
        state.setdefault("lr", group["lr"])
        super().move({**group, "lr": state["lr"]}, p, gradient, state)


class ClosureWithoutGradients(Momentum):
    def call(self, closure: Callable[[], Any]) -> Any:
        return closure()


class ClosureLossLost(Momentum):
    def call(self, closure: Callable[[], Any]) -> Any:
        super().call(closure)


class ClosureIgnored(Momentum):
    def call(self, closure: Callable[[], Any]) -> Any:
        return torch.zeros(())


class DecaysUnused(Momentum):
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.999)
        return loss


class StateForUnused(Momentum):
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("mean", torch.zeros_like(p))
                self.state[p].setdefault("step", torch.zeros(()))
        return super().step(closure)


class ShakenByEmpty(Momentum):
    def members(self) -> Iterable[tuple[dict[str, Any], Tensor]]:
        members = list(super().members())
        size = min((p.numel() for _, p in members), default=1)
        return members if size else members[:1]


class TooSmallToDivide(Momentum):
    def move(self, group: Any, p: Tensor, gradient: Tensor, state: Any) -> None:
        super().move(group, p, gradient / (gradient.abs().max() + 1e-3) * gradient.abs().max(), state)


class WidensState(Momentum):
    def move(self, group: Any, p: Tensor, gradient: Tensor, state: Any) -> None:
        super().move(group, p, gradient, state)
        if state["step"] > 1:
            state["mean"] = state["mean"].double()


class StateInDouble(Momentum):
    def start(self, p: Tensor) -> dict[str, Any]:
        return {**super().start(p), "mean": torch.zeros_like(p, dtype=torch.float64)}


class Climbs(Momentum):
    def move(self, group: Any, p: Tensor, gradient: Tensor, state: Any) -> None:
        super().move(group, p, -gradient, state)


class SwallowsNan(Momentum):
    def gradient(self, p: Tensor) -> Tensor:
        return super().gradient(p).nan_to_num()


class SpreadsNan(Momentum):
    def members(self) -> Iterable[tuple[dict[str, Any], Tensor]]:
        members = list(super().members())
        norm = math.sqrt(sum(float(p.grad.to_dense().norm()) ** 2 for _, p in members if p.grad is not None))
        for _, p in members:
            if p.grad is not None:
                p.grad.mul_(1 / max(1.0, norm / 1e6) if not math.isnan(norm) else norm)
        return members


class AnyRate(Momentum):
    def __init__(self, params: Any, lr: float = 0.1, **options: Any) -> None:
        super().__init__(params, lr=abs(lr), **options)


class WrongWords(Momentum):
    def __init__(self, params: Any, lr: float = 0.1, **options: Any) -> None:
        if lr < 0:
            raise ValueError("bad value")
        super().__init__(params, lr=lr, **options)


class TakesSparse(Momentum):
    def gradient(self, p: Tensor) -> Tensor:
        assert p.grad is not None
        return p.grad.to_dense()


class TakesComplex(Momentum):
    def refuse(self, p: Tensor) -> None:
        pass


class MumblesOnComplex(Momentum):
    def refuse(self, p: Tensor) -> None:
        if p.is_complex():
            raise TypeError("no")


class DiffersWhenCompiled(Momentum):
    def move(self, group: Any, p: Tensor, gradient: Tensor, state: Any) -> None:
        super().move(group, p, gradient * (2 if torch.compiler.is_compiling() else 1), state)


class LocalNorm(Momentum):
    """Normalizes by the norm of the local shard: right on one process, wrong on two."""

    def move(self, group: Any, p: Tensor, gradient: Tensor, state: Any) -> None:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        super().move(group, p, gradient / float(local.norm() + 1e-3), state)


BROKEN = [
    ("trajectory", ForgetsMomentum, {}, "off the oracle"),
    ("resume", DrawsGlobally, {}, "differs from the whole one"),
    ("resume", HidesState, {}, "differs from the whole one"),
    ("resume", KeepsObjects, {}, "only tensors and plain values"),
    ("foreach", ForeachDiffers, {}, "foreach differs"),
    ("param_groups", OneRateForAll, {}, "off the oracle"),
    ("param_groups", RateAtStart, {}, "scheduler"),
    ("closure", ClosureWithoutGradients, {}, "gradients disabled"),
    ("closure", ClosureLossLost, {}, "does not give back"),
    ("closure", ClosureIgnored, {}, "never calls"),
    ("none_gradients", DecaysUnused, {}, "without any gradient moved"),
    ("none_gradients", StateForUnused, {}, "got state"),
    ("empty", ShakenByEmpty, {}, "changes the others"),
    ("empty", Momentum, {"empty": "refused"}, "nothing was raised"),
    ("dtypes", WidensState, {}, "changes its keys"),
    ("dtypes", StateInDouble, {}, "promised is"),
    ("dtypes", Momentum, {"half_state": "float32"}, "promised is torch.float32"),
    ("dtypes", Momentum, {"wide_state": ("mean",)}, "promised is torch.float64"),
    ("dtypes", Climbs, {}, "does not fall"),
    ("nan_gradient", SwallowsNan, {}, "promised to show"),
    ("nan_gradient", SpreadsNan, {}, "spreads to other parameters"),
    ("nan_gradient", Momentum, {"nan": "raises"}, "nothing was raised"),
    ("nan_gradient", Momentum, {"nan": "skips"}, "promised to be skipped"),
    ("arguments", AnyRate, {}, "raises no ValueError"),
    ("arguments", WrongWords, {}, "does not name it"),
    ("sparse", TakesSparse, {}, "nothing was raised"),
    ("complex_params", TakesComplex, {}, "nothing was raised"),
    ("complex_params", MumblesOnComplex, {}, "does not name it"),
    ("compiled", DiffersWhenCompiled, {}, "compiled step differs"),
    ("fsdp2", LocalNorm, {}, "differ from one process"),
    ("fsdp2", Momentum, {"fsdp2": "refused"}, "nothing was raised"),
]


@pytest.mark.parametrize(
    ("name", "make", "tags", "words"), BROKEN, ids=[f"{b[0]}-{b[1].__name__}-{i}" for i, b in enumerate(BROKEN)]
)
def test_a_broken_optimizer_is_caught(name: str, make: Any, tags: dict[str, Any], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        CHECKS[name](Case(make, {**TAGS, **tags}))


def test_every_check_has_an_optimizer_that_it_catches() -> None:
    assert {name for name, *_ in BROKEN} == set(CHECKS)


# ------------------------------------------------------------------------------- methods that evaluate the loss themselves


class TwoEvaluations(Optimizer):
    """Gradient descent with half the gradient from a look-ahead point, over one group: it cannot do without its closure."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        if lr < 0:
            raise ValueError(f"'lr' must be at least 0, not {lr}")
        super().__init__(params, {"lr": lr})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.param_groups:
            raise ValueError("only one parameter group is allowed")
        if any(p.is_complex() for p in param_group["params"]):
            raise TypeError("complex parameters are not supported")
        super().add_param_group(param_group)

    def need(self, closure: Callable[[], Tensor] | None) -> None:
        if closure is None:
            raise ValueError("'closure' is needed: it gives the loss")

    def members(self) -> list[Tensor]:
        return [p for p in self.param_groups[0]["params"] if p.requires_grad]

    def evaluate(self, closure: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
        with torch.enable_grad():
            loss = closure()
        gradients = torch.autograd.grad(loss, self.members(), materialize_grads=True)
        if any(g.is_sparse for g in gradients):
            raise RuntimeError("sparse gradients are not supported")
        if not all(g.isfinite().all() for g in gradients):
            raise RuntimeError("a gradient is not finite")
        return loss.detach(), list(gradients)

    def give(self, loss: Tensor) -> Any:
        return loss

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Any:  # type: ignore[override]
        self.need(closure)
        if closure is None:
            return None
        params, lr = self.members(), self.param_groups[0]["lr"]
        loss, first = self.evaluate(closure)
        torch._foreach_add_(params, first, alpha=-lr)
        _, second = self.evaluate(closure)
        torch._foreach_add_(params, first, alpha=lr / 2)
        torch._foreach_add_(params, second, alpha=-lr / 2)
        return self.give(loss)


def two_evaluations_oracle(problem: Problem, steps: int, lr: float = 0.1) -> list[list[np.ndarray]]:
    params, path = list(problem.start), []
    for _ in range(steps):
        first = problem.gradient(params)
        second = problem.gradient([p - lr * g for p, g in zip(params, first, strict=True)])
        params = [p - lr / 2 * (g + h) for p, g, h in zip(params, first, second, strict=True)]
        path.append(params)
    return path


def with_closure(optimizer: Optimizer, params: Any, loss: Callable[[Any], Tensor]) -> Any:
    return optimizer.step(lambda: loss(params))  # type: ignore[arg-type, return-value]


CLOSURE_TAGS = {
    "oracle": two_evaluations_oracle,
    "step": with_closure,
    "groups": "refused",
    "foreach": False,
    "nan": "raises",
    "options": ({}, {"lr": 0.2}),
}


@pytest.mark.parametrize("name", [name for name in CHECKS if name != "fsdp2"])
def test_a_sound_method_that_needs_its_closure_passes(name: str) -> None:
    CHECKS[name](Case(TwoEvaluations, CLOSURE_TAGS))


class StepsWithoutClosure(TwoEvaluations):
    def need(self, closure: Callable[[], Tensor] | None) -> None:
        pass


class MumblesWithoutClosure(TwoEvaluations):
    def need(self, closure: Callable[[], Tensor] | None) -> None:
        if closure is None:
            raise ValueError("bad call")


class EvaluatesWithoutGradients(TwoEvaluations):
    def evaluate(self, closure: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
        loss = closure()
        return loss, [torch.zeros_like(p) for p in self.members()]


class GivesAnotherLoss(TwoEvaluations):
    def give(self, loss: Tensor) -> Any:
        return loss + 1


class GivesNoLoss(TwoEvaluations):
    def give(self, loss: Tensor) -> Any:
        return torch.zeros(())


class TakesGroups(TwoEvaluations):
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        Optimizer.add_param_group(self, param_group)


class KeepsRefusedGroup(TwoEvaluations):
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        Optimizer.add_param_group(self, param_group)
        if len(self.param_groups) > 1:
            raise ValueError("only one parameter group is allowed")


class MovesBeforeRefusing(TwoEvaluations):
    def evaluate(self, closure: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
        torch._foreach_mul_(self.members(), 0.9)
        return super().evaluate(closure)


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("closure", StepsWithoutClosure, "nothing was raised"),
        ("closure", MumblesWithoutClosure, "does not name it"),
        ("closure", EvaluatesWithoutGradients, "gradients disabled"),
        ("closure", GivesAnotherLoss, "another loss"),
        ("closure", GivesNoLoss, "another loss"),
        ("param_groups", TakesGroups, "nothing was raised"),
        ("param_groups", KeepsRefusedGroup, "stays among"),
        ("nan_gradient", MovesBeforeRefusing, "moved parameters"),
        ("trajectory", MovesBeforeRefusing, "off the oracle"),
    ],
)
def test_a_broken_method_that_needs_its_closure_is_caught(name: str, make: Any, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        CHECKS[name](Case(make, CLOSURE_TAGS))


def test_state_promised_in_float64_may_be_so() -> None:
    checks("optimizer")["dtypes"](Case(StateInDouble, {"oracle": momentum_oracle, "wide_state": ("mean",)}))


def test_sparse_that_works_must_leave_other_rows() -> None:
    CHECKS["sparse"](Case(TakesSparse, {**TAGS, "sparse": "works"}))

    class MovesAll(TakesSparse):
        def move(self, group: Any, p: Tensor, gradient: Tensor, state: Any) -> None:
            super().move(group, p, gradient + 1, state)

    with pytest.raises(AssertionError, match="moved rows"):
        CHECKS["sparse"](Case(MovesAll, {**TAGS, "sparse": "works"}))


def test_without_an_oracle_nothing_passes() -> None:
    with pytest.raises(AssertionError, match="'oracle' is needed"):
        check_optimizer(Momentum)


def test_an_unknown_tag_value_is_named() -> None:
    with pytest.raises(AssertionError, match="tag 'nan' is 'ignored'; allowed: propagates"):
        CHECKS["nan_gradient"](Case(Momentum, {**TAGS, "nan": "ignored"}))


def test_a_factory_that_other_processes_cannot_import_is_named() -> None:
    with pytest.raises(AssertionError, match="must be importable"):
        CHECKS["fsdp2"](Case(lambda params, **options: Momentum(params, **options), TAGS))


def test_the_checks_are_found_by_kind() -> None:
    assert checks("optimizer") is CHECKS


def test_the_problem_has_the_derivatives_it_says() -> None:
    problem = separable()
    params = [torch.tensor(p, requires_grad=True) for p in problem.start]
    gradients = torch.autograd.grad(problem.loss(params), params, create_graph=True)
    curvatures = torch.autograd.grad(gradients, params, [torch.ones_like(p) for p in params])  # rows' sums: H is diagonal
    assert problem.hessian_diagonal is not None
    for ours, closed in zip(gradients, problem.gradient(problem.start), strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), closed, rtol=1e-12, atol=1e-12)
    for ours, closed in zip(curvatures, problem.hessian_diagonal(problem.start), strict=True):
        np.testing.assert_allclose(ours.numpy(), closed, rtol=1e-12)

"""Target-based surrogates, SSO (arXiv 2302.02607): how its claims are measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.optim import Optimizer

from corollary.claims import Exact, Paired, Trial, claim
from corollary.data import digits, tabular
from corollary.models import MLP
from corollary.optim import SSO, TargetSurrogate
from corollary.testing import Case, Problem

Array = NDArray[np.float64]


def oracle(
    problem: Problem,
    steps: int,
    lr: float = 0.3,
    inner: type[Optimizer] | None = None,
    inner_options: dict[str, float] | None = None,
    inner_steps: int = 10,
    schedule: str = "constant",
) -> list[list[Array]]:
    """SSO where the targets are the parameters themselves: the surrogate is Σ G(z - z₀) + (z - z₀)²/2η, entry by entry."""
    params, path = [p.copy() for p in problem.start], []
    for t in range(1, steps + 1):
        eta = lr / np.sqrt(t) if schedule == "sqrt" else lr
        slopes = problem.gradient(params)
        moves = [np.zeros_like(p) for p in params]
        size = 10.0
        for _ in range(inner_steps):
            gradients = [g + d / eta for g, d in zip(slopes, moves, strict=True)]
            square = sum(float((g * g).sum()) for g in gradients)
            if inner is not None:  # gradient descent with a constant step size
                size = (inner_options or {})["lr"]
            elif square:
                # On this quadratic f(z - ηg) - f(z) = -η‖g‖² + η²‖g‖²/2η_t: Armijo with c = 1/2 asks for η ≤ η_t.
                while size > eta:
                    size *= 0.9
            moves = [d - size * g for d, g in zip(moves, gradients, strict=True)]
            if inner is None:
                size *= 1.8
        params = [p + d for p, d in zip(params, moves, strict=True)]
        path.append([p.copy() for p in params])
    return path


def step(optimizer: Optimizer, params: Sequence[Tensor], loss: Callable[[Sequence[Tensor]], Tensor]) -> Any:
    """One step with the parameters as their own targets."""
    return optimizer.step(lambda: ([p * 1 for p in params], lambda *z: loss(z)))  # type: ignore[arg-type, return-value]


CONFORMANCE = {
    "corollary.optim.SSO": Case(
        partial(SSO, lr=0.3, reduction="sum"),
        tags={
            "oracle": oracle,
            "options": (
                {"inner_steps": 4},
                {"lr": 0.5, "schedule": "sqrt", "inner_steps": 3},
                {"lr": 0.4, "inner": torch.optim.SGD, "inner_options": {"lr": 0.1}, "inner_steps": 4},
                {"lr": 0.4, "inner": torch.optim.SGD, "inner_options": {"lr": 0.2}, "inner_steps": 1},
            ),
            "step": step,
            "groups": "refused",
            "foreach": False,
            "nan": "raises",
            "fsdp2": "refused",
        },
    ),
}


# -------------------------------------------------------------------------------------------------------- the upper bound


def _losses(trial: Trial) -> Iterator[tuple[str, nn.Module, Tensor, Callable[[Tensor], Tensor], float]]:
    """Name, model, inputs, loss of the targets, and L of one sample's loss, each on real data."""
    images, table = digits(seed=trial.seed % 2**31, flat=True), tabular("breast_cancer", seed=trial.seed % 2**31)
    x, y = images.train_x[:64].double(), images.train_y[:64]
    yield "cross-entropy", MLP(64, [16], 10, nn.Tanh).double(), x, lambda z: cross_entropy(z, y), 0.5
    rows, labels = table.train_x[:64].double(), table.train_y[:64].double()
    yield "logistic", MLP(30, [], 1).double(), rows, lambda z: binary_cross_entropy_with_logits(z[:, 0], labels), 0.25
    onehot = torch.eye(10, dtype=torch.float64)[y]
    yield "squared error", MLP(64, [16], 10, nn.ReLU).double(), x, lambda z: (z - onehot).square().sum(1).mean() / 2, 1.0


@claim(control={"times": 4.0})
def upper_bound(trial: Trial, times: float = 1.0) -> Exact:
    """By how much the loss rises above the surrogate, over targets that the model reaches and others sought out for it."""
    errors = []
    for name, model, x, loss_fn, smoothness in _losses(trial):
        for scale in trial.pick(smoke=(1.0,), laptop=(0.3, 1.0, 3.0, 10.0)):
            start = scale * model(x).detach() / 0.3
            leaf = start.clone().requires_grad_()
            loss = loss_fn(leaf)
            gradients = torch.autograd.grad(loss, [leaf])
            surrogate = TargetSurrogate([start], gradients, float(loss.detach()), times / smoothness, len(x))
            others = [start - times / smoothness * len(x) * gradients[0]]  # the surrogate's own minimum
            with torch.no_grad():
                for size in (0.01, 0.1, 1.0):
                    for p in model.parameters():
                        p.add_(torch.randn(p.shape, dtype=p.dtype, generator=trial.generator), alpha=size)
                    others.append(model(x))
            worst = start.clone().requires_grad_()  # climbs the difference, from where it is smallest: zero
            climb = torch.optim.Adam([worst], lr=0.3, maximize=True)
            with torch.no_grad():
                worst.add_(torch.randn(worst.shape, dtype=worst.dtype, generator=trial.generator))
            for _ in range(trial.pick(smoke=3, laptop=60)):
                climb.zero_grad()
                (loss_fn(worst) - surrogate(worst)).backward()  # type: ignore[no-untyped-call]
                climb.step()
            above = [float((loss_fn(z) - surrogate(z)).detach()) for z in (*others, worst)]
            errors.append(max(0.0, *above) / max(1.0, surrogate.loss))
            trial.log(**{f"{name.replace('-', '_').replace(' ', '_')}_{scale:g}": errors[-1]})
    return Exact(errors)


# ------------------------------------------------------------------------------------------------- counting expensive calls

LINEAR_RATES = {
    "SSO": (2.0, 4.0, 8.0, 16.0, 32.0),  # η in units of 1/L
    "one searched step": (2.0, 4.0, 8.0, 16.0, 32.0),
    "one plain step": (0.3, 1.0, 3.0, 10.0, 30.0),
    "SGD": (0.3, 1.0, 3.0, 10.0, 30.0),
    "Adam": (0.01, 0.03, 0.1, 0.3, 1.0),
}
IMITATION_RATES = {
    "SSO": (0.25, 0.5, 1.0, 2.0, 4.0),
    "one plain step": (0.03, 0.1, 0.3, 1.0, 3.0),
    "SGD": (0.03, 0.1, 0.3, 1.0, 3.0),
    "Adam": (0.003, 0.01, 0.03, 0.1, 0.3),
}
BASELINES = ("SGD", "Adam")
Method = tuple[str, float]
Calls = Callable[[Method, int, int], int]  # method, seed and cap to the number of calls


def _tune(calls: Calls, rates: Mapping[str, tuple[float, ...]], cap: int) -> Callable[..., Mapping[str, Any]]:
    def tune(trial: Trial, method: str = "SSO") -> Mapping[str, Any]:
        most = trial.pick(smoke=3, laptop=cap)

        def cost(choice: Method) -> float:
            return sum(math.log2(calls(choice, trial.seed + i, most)) for i in range(2))

        ours = min(((method, rate) for rate in rates[method]), key=cost)
        baseline = min(((name, rate) for name in BASELINES for rate in rates[name]), key=cost)
        return {"method": list(ours), "baseline": list(baseline)}

    return tune


def _pair(trial: Trial, calls: Calls, cap: int) -> Paired:
    most = trial.pick(smoke=3, laptop=cap)
    counts = {}
    for role in ("method", "baseline"):
        name, rate = trial.tuned[role]
        counts[role] = calls((name, rate), trial.seed, most)
    trial.log(calls=counts["method"], baseline=trial.tuned["baseline"][0], baseline_calls=counts["baseline"])
    return Paired(ours=math.log2(counts["method"]), baseline=math.log2(counts["baseline"]))


class Counter:
    """A loss that counts how often its gradient is asked for."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.loss, self.calls = loss, 0

    def at(self, y: Tensor) -> Callable[[Tensor], Tensor]:
        def expensive(z: Tensor) -> Tensor:
            self.calls += 1
            return self.loss(z, y)

        return expensive


def _stepper(method: Method, model: nn.Module, counter: Counter, smoothness: float) -> Callable[..., None]:
    """A function of a batch (x, y) that takes one step: exactly one gradient of the loss, whatever the method."""
    name, rate = method
    if name == "one plain step":  # the control: nothing is amortized
        sso = SSO(model.parameters(), inner=torch.optim.SGD, inner_options={"lr": rate}, inner_steps=1)
        return lambda x, y: (sso.step(lambda: (model(x), counter.at(y))), None)[1]
    if name in ("SSO", "one searched step"):
        inner_steps = 20 if name == "SSO" else 1
        search = {"backtrack": 0.5, "expand": 2.0}  # coarser than the default: fewer evaluations of the model
        sso = SSO(model.parameters(), lr=rate / smoothness, inner_steps=inner_steps, inner_options=search)
        return lambda x, y: (sso.step(lambda: (model(x), counter.at(y))), None)[1]
    optimizer: Optimizer = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}[name](model.parameters(), lr=rate)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        counter.at(y)(model(x)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


# ---------------------------------------------------------------------------------------------------------- linear models


@lru_cache(maxsize=512)
def _linear_calls(table: str, method: Method, seed: int, cap: int, goal: float) -> int:
    """Gradient calls on batches of 100 until a linear classifier's loss on the whole training part is below the goal."""
    data = digits(seed=seed % 2**31, flat=True) if table == "digits" else tabular(table, seed=seed % 2**31)
    x, y = data.train_x.double(), data.train_y
    model = MLP(x.shape[1], [], data.num_classes).double()
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    counter = Counter(cross_entropy)
    step = _stepper(method, model, counter, 0.5)
    generator = torch.Generator().manual_seed(seed)
    while counter.calls < cap:
        rows = torch.randperm(len(x), generator=generator)[:100]
        step(x[rows], y[rows])
        with torch.no_grad():
            loss = float(cross_entropy(model(x), y))
        if loss <= goal:
            return counter.calls
        if not math.isfinite(loss):
            break
    return cap


def _digits_calls(method: Method, seed: int, cap: int) -> int:
    return _linear_calls("digits", method, seed, cap, 0.25)


def _table_calls(method: Method, seed: int, cap: int) -> int:
    return _linear_calls("breast_cancer", method, seed, cap, 0.05)


@claim(control={"method": "one searched step"}, tune=_tune(_digits_calls, LINEAR_RATES, 80))
def fewer_calls_linear(trial: Trial, method: str = "SSO") -> Paired:
    """Gradient calls to a training loss of 0.25 with linear logits on digits, in powers of two."""
    return _pair(trial, _digits_calls, 80)


@claim(control={"method": "one plain step"}, tune=_tune(_table_calls, LINEAR_RATES, 100))
def fewer_calls_table(trial: Trial, method: str = "SSO") -> Paired:
    """Gradient calls to a training loss of 0.05 with logistic regression on the breast cancer table, in powers of two."""
    return _pair(trial, _table_calls, 100)


# ------------------------------------------------------------------------------------------------------ imitation learning


START = np.array([1.0, 0.5, 0.3, 0.5])  # half the width of each state's first range


class CartPole:
    """A pole on a cart in many copies at once, and the linear-quadratic regulator of its linearization as the expert.

    State: position, velocity, angle from upright, angular velocity. Action: force over ``scale``; the expert's goes through
    tanh, so that no linear policy equals it.
    """

    def __init__(self, seed: int, copies: int) -> None:
        from scipy.linalg import solve_discrete_are

        rng = np.random.default_rng(seed)
        self.cart, self.pole, self.length = rng.uniform(0.8, 1.2), rng.uniform(0.08, 0.12), rng.uniform(0.4, 0.6)
        self.dt, self.scale, self.copies, self.rng = 0.05, 20.0, copies, rng
        a, b = np.zeros((4, 4)), np.zeros((4, 1))
        rest = np.zeros((1, 4))
        for i in range(4):
            shift = np.zeros((1, 4))
            shift[0, i] = 1e-6
            a[:, i] = (self.move(rest + shift, np.zeros(1)) - self.move(rest - shift, np.zeros(1)))[0] / 2e-6
        b[:, 0] = (self.move(rest, np.full(1, 1e-6)) - self.move(rest, np.full(1, -1e-6)))[0] / 2e-6
        cost = np.diag([1.0, 0.1, 10.0, 0.1])
        p = solve_discrete_are(a, b, cost, np.eye(1) * 0.1)
        self.gain = np.linalg.solve(b.T @ p @ b + 0.1, b.T @ p @ a)[0]

    def move(self, state: Array, force: Array) -> Array:
        """The states (copies, 4) a moment later, by Euler's method."""
        _, v, angle, spin = state.T
        sin, cos = np.sin(angle), np.cos(angle)
        total = self.cart + self.pole
        push = (force + self.pole * self.length * spin**2 * sin) / total
        turn = (9.8 * sin - cos * push) / (self.length * (4 / 3 - self.pole * cos**2 / total))
        roll = push - self.pole * self.length * turn * cos / total
        return state + self.dt * np.stack([v, roll, spin, turn], axis=1)

    def expert(self, state: Array) -> Array:
        """What the regulator does, in [-1, 1]."""
        return np.asarray(np.tanh(-(state @ self.gain) / self.scale), dtype=np.float64)

    def visit(self, policy: nn.Module, steps: int) -> tuple[Tensor, Tensor]:
        """States that the policy itself comes to, and the expert's actions there."""
        state = self.rng.uniform(-1, 1, (self.copies, 4)) * START
        states = []
        for _ in range(steps):
            states.append(state)
            with torch.no_grad():
                action = policy(torch.from_numpy(state))[:, 0].numpy().clip(-1, 1)
            state = self.move(state, self.scale * action)
            fallen = np.abs(state[:, 2]) > 1.2
            state[fallen] = self.rng.uniform(-1, 1, (int(fallen.sum()), 4)) * START
        visited = np.concatenate(states)
        return torch.from_numpy(visited), torch.from_numpy(self.expert(visited))[:, None]


@lru_cache(maxsize=512)
def _imitation_calls(method: Method, seed: int, cap: int, goal: float) -> int:
    """Rounds of querying the expert on the policy's own states until its mean squared error on fresh ones is below the goal.

    Each round uses only what it has just seen (online gradient descent on the loss of the round), one gradient for each.
    """
    torch.manual_seed(seed)
    world, judge = CartPole(seed, 16), CartPole(seed, 64)
    judge.rng = np.random.default_rng(seed + 1)
    policy = MLP(4, [32], 1, nn.Tanh).double()
    counter = Counter(lambda z, y: (z - y).square().mean() / 2)
    step = _stepper(method, policy, counter, 1.0)
    while counter.calls < cap:
        step(*world.visit(policy, 10))
        x, y = judge.visit(policy, 10)
        with torch.no_grad():
            error = float((policy(x) - y).square().mean())
        if error <= goal:
            return counter.calls
        if not math.isfinite(error):
            break
    return cap


def _cart_pole_calls(method: Method, seed: int, cap: int) -> int:
    return _imitation_calls(method, seed, cap, 0.01)


@claim(control={"method": "one plain step"}, tune=_tune(_cart_pole_calls, IMITATION_RATES, 80))
def fewer_calls_imitation(trial: Trial, method: str = "SSO") -> Paired:
    """Rounds of online imitation on a cart-pole until the policy's error on its own states is 0.01, in powers of two."""
    return _pair(trial, _cart_pole_calls, 80)

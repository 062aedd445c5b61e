"""Lion-K (arXiv 2310.05898): how its claims are measured."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from corollary.claims import Exact, Ratio, Trial, claim
from corollary.claims.timing import interleave, keep_freed_memory
from corollary.data import digits, tabular
from corollary.models import GPT, MLP
from corollary.optim import L1, Entropic, GroupL2, Huber, Kappa, LionK, LogCosh, Lp
from corollary.testing import Case, Problem

Array = NDArray[np.float64]


# ------------------------------------------------------------------------------------------------------------ conformance


def oracle(
    problem: Problem,
    steps: int,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    kappa: Kappa | None = None,
) -> list[list[Array]]:
    """Lion-K as the paper writes it, with the gradient's negative as momentum and each gradient of kappa in numpy."""
    params = [p.copy() for p in problem.start]
    momenta = [np.zeros(p.shape) for p in params]
    path = []
    for _ in range(steps):
        for i, g in enumerate(problem.gradient(params)):
            mixed = betas[0] * momenta[i] - (1 - betas[0]) * g
            momenta[i] = betas[1] * momenta[i] - (1 - betas[1]) * g
            params[i] = params[i] + lr * (_slope(mixed, kappa) - weight_decay * params[i])
        path.append([p.copy() for p in params])
    return path


def _slope(x: Array, kappa: Kappa | None) -> Array:
    match kappa:
        case Lp(p=p):
            return np.asarray(np.sign(x) * (np.abs(x) / (np.abs(x) ** p).sum() ** (1 / p)) ** (p - 1))
        case GroupL2():
            return np.stack([row / np.sqrt((row**2).sum()) for row in x])
        case Huber(delta=delta):
            return np.clip(x / delta, -1, 1)
        case LogCosh(temperature=t):
            return np.tanh(x / t)
        case Entropic(temperature=t):
            return np.asarray(np.exp(x / t) / np.exp(x / t).sum())
        case _:
            return np.sign(x)


CONFORMANCE = {
    "corollary.optim.LionK": Case(
        partial(LionK, lr=0.02),  # of the bfloat16 numbers around 1, steps of 0.0001 would move none
        tags={
            "oracle": oracle,
            "options": (
                {"lr": 0.02},
                {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.3},
                {"lr": 0.05, "kappa": Lp(2), "weight_decay": 0.3},
                {"lr": 0.05, "kappa": Lp(1.5), "weight_decay": 0.3},
                {"lr": 0.05, "kappa": GroupL2(), "weight_decay": 0.3},
                {"lr": 0.05, "kappa": Huber(0.5), "weight_decay": 0.3},
                {"lr": 0.05, "kappa": LogCosh(0.5), "weight_decay": 0.3},
                {"lr": 0.05, "kappa": Entropic(0.5), "weight_decay": 0.3},
            ),
        },
    ),
}


# ---------------------------------------------------------------------------------------------------- problems and solver

KAPPAS: tuple[Kappa, ...] = (L1(), Lp(2), Lp(1.5), GroupL2(), Huber(0.5), LogCosh(0.5), Entropic(0.5))
BETAS = (0.9, 0.99)


class CoupledLionK(LionK):
    """The control: weight decay goes into the gradient, as L2 regularization does, instead of beside it."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.add_(p, alpha=group["weight_decay"])
            group["weight_decay"] = 0.0
        try:
            return super().step(closure)
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay


@dataclass(frozen=True)
class Quadratic:
    """f(x) = (x - c)' H (x - c) / 2 of a matrix x, read row by row; its gradient has the Lipschitz constant L."""

    hessian: Tensor
    centre: Tensor
    lipschitz: float

    @classmethod
    def draw(cls, generator: torch.Generator, shape: tuple[int, int], spread: float) -> Quadratic:
        n = shape[0] * shape[1]
        root = torch.randn(n, 2 * n, generator=generator, dtype=torch.float64)
        hessian = root @ root.T / (2 * n)
        centre = spread * torch.randn(n, generator=generator, dtype=torch.float64)
        return cls(hessian, centre, float(torch.linalg.eigvalsh(hessian)[-1]))

    def value(self, x: Tensor) -> float:
        gap = x.flatten() - self.centre
        return float(gap @ self.hessian @ gap / 2)

    def gradient(self, x: Tensor) -> Tensor:
        return (self.hessian @ (x.flatten() - self.centre)).view(x.shape)


def convex_optimum(f: Quadratic, kappa: Kappa, decay: float, shape: tuple[int, int]) -> Array:
    """The minimum of f(x) + κ*(λx)/λ, each κ* written out, by an interior-point solver."""
    import cvxpy as cp

    x = cp.Variable(shape)
    y = decay * x
    factor = np.linalg.cholesky(f.hessian.numpy())
    loss = cp.sum_squares(factor.T @ (cp.vec(x, order="C") - f.centre.numpy())) / 2
    penalty: Any = 0.0
    match kappa:
        case L1():
            inside = [cp.abs(y) <= 1]
        case Lp(p=p):
            inside = [cp.pnorm(cp.vec(y, order="C"), p / (p - 1)) <= 1]
        case GroupL2():
            inside = [cp.norm(y, 2, axis=1) <= 1]
        case Huber(delta=delta):
            inside, penalty = [cp.abs(y) <= 1], delta / 2 * cp.sum_squares(y)
        case LogCosh(temperature=t):
            inside, penalty = [cp.abs(y) <= 1], -t / 2 * (cp.sum(cp.entr(1 + y)) + cp.sum(cp.entr(1 - y)))
        case Entropic(temperature=t):
            inside, penalty = [cp.sum(y) == 1, y >= 0], -t * cp.sum(cp.entr(y))
        case _:
            raise ValueError(f"no convex program is written for {kappa!r}")
    problem = cp.Problem(cp.Minimize(loss + penalty / decay), inside)
    with warnings.catch_warnings():
        # A gap of 1e-9 leaves the point itself 1e-5 off; asked for more than doubles hold, the solver stops at its best and says so.
        warnings.filterwarnings("ignore", message="Solution may be inaccurate")
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    point = np.asarray(x.value)
    return _polished(f, point, 1 / decay) if isinstance(kappa, GroupL2) else point


def _polished(f: Quadratic, point: Array, radius: float) -> Array:
    """The solver's point carried on by projected gradient descent: on balls of rows its last digits are only the square root of
    the precision that it reaches in the objective."""
    hessian, centre = f.hessian.numpy(), f.centre.numpy()
    for _ in range(5000):
        point = point - (hessian @ (point.ravel() - centre)).reshape(point.shape) / f.lipschitz
        norms = np.linalg.norm(point, axis=1, keepdims=True)
        point = point * np.minimum(1, radius / norms)
    return point


def _descend(optimizer: Optimizer, x: Tensor, gradient: Callable[[Tensor], Tensor], decay: float, steps: int) -> None:
    """Rates that first carry every coordinate to its bound, e^-20 off, and then fall geometrically so that signs settle."""
    flat = steps // 5
    for step in range(steps):
        fallen = max(0.0, (step - flat) / (steps - flat))
        optimizer.param_groups[0]["lr"] = 20 / (decay * flat) * 10 ** (-5 * fallen)
        x.grad = gradient(x.detach())
        optimizer.step()


# -------------------------------------------------------------------------------------------------- what the limit solves


@claim(control={"method": CoupledLionK})
def solves_every_kappa(trial: Trial, method: type[LionK] = LionK) -> Exact:
    """Largest distance of any entry from the convex solver's optimum, over random quadratics, for each kappa."""
    shape, steps = (3, 4), trial.pick(smoke=300, laptop=3000)
    errors = {}
    for kappa in KAPPAS:
        f = Quadratic.draw(trial.generator, shape, spread=4.0)
        decay = float(0.5 + torch.rand((), generator=trial.generator))
        wanted = convex_optimum(f, kappa, decay, shape)
        x = nn.Parameter(torch.randn(shape, generator=trial.generator, dtype=torch.float64))
        _descend(method([x], betas=BETAS, weight_decay=decay, kappa=kappa), x, f.gradient, decay, steps)
        errors[repr(kappa)] = float(np.abs(x.detach().numpy() - wanted).max())
    trial.log(**errors)
    return Exact(list(errors.values()))


@claim(control={"method": CoupledLionK})
def box_regression(trial: Trial, method: type[LionK] = LionK) -> Exact:
    """Lion's coefficients for the diabetes regression against SciPy's least squares within the box of radius 1/λ."""
    from scipy.optimize import lsq_linear

    data = tabular("diabetes", seed=trial.seed)
    x, y = data.train_x.double(), data.train_y.double()
    decay = float(4 + 4 * torch.rand((), generator=trial.generator))  # a radius between 1/8 and 1/4
    wanted = lsq_linear(x.numpy(), y.numpy(), bounds=(-1 / decay, 1 / decay), tol=1e-14).x
    w = nn.Parameter(torch.randn(x.shape[1], generator=trial.generator, dtype=torch.float64))
    gram, moment = x.T @ x / len(x), x.T @ y / len(x)
    optimizer = method([w], betas=BETAS, weight_decay=decay)
    _descend(optimizer, w, lambda w: gram @ w - moment, decay, trial.pick(smoke=300, laptop=3000))
    trial.log(at_the_bound=int((np.abs(wanted) > 1 / decay - 1e-6).sum()), coefficients=len(wanted))
    return Exact(np.abs(w.detach().numpy() - wanted))


# ---------------------------------------------------------------------------------------------------------- the two phases


@claim(control={"method": CoupledLionK})
def enters_and_stays(trial: Trial, method: type[LionK] = LionK) -> Exact:
    """How far a network's λx, started outside, exceeds the promised rate 1 - ηλ of approach to the feasible set at any step.

    For Lion the set is the box of radius 1/λ. A parameter within it must be within it after the step, to rounding.
    """
    data = digits(seed=trial.seed, flat=True)
    x, y = data.train_x.double(), data.train_y
    lr, decay, steps = 0.01, 4.0, trial.pick(smoke=20, laptop=100)
    worst, curves = 0.0, {}
    for kappa in KAPPAS:
        net = MLP(x.shape[1], [16], len(data.classes)).double()
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(4)
        optimizer = method(net.parameters(), lr=lr, weight_decay=decay, kappa=kappa)
        before = [float(kappa.excess(decay * p.detach())) for p in net.parameters()]
        begin, curve = max(before), []
        for _ in range(steps):
            rows = torch.randint(len(x), (64,), generator=trial.generator)
            optimizer.zero_grad()
            cross_entropy(net(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            after = [float(kappa.excess(decay * p.detach())) for p in net.parameters()]
            worst = max(worst, *(a - (1 - lr * decay) * b for a, b in zip(after, before, strict=True)))
            before = after
            curve.append(max(after))
        worst = max(worst, before[0] - begin * (1 - lr * decay) ** steps)
        curves[repr(kappa)] = [max(c, 1e-16) for c in curve]
    trial.figure("excess", x=range(1, steps + 1), y=curves, xlabel="step", ylabel="how far outside", log="y")
    return Exact(max(worst, 0.0))


def _objective(optimizer: LionK, loss: float) -> float:
    """The control: the objective f + κ*(λx)/λ by itself, without the momentum's part of the Lyapunov function."""
    [group] = optimizer.param_groups
    [x] = group["params"]
    return loss + float(group["kappa"].conjugate(group["weight_decay"] * x.detach())) / float(group["weight_decay"])


def _lyapunov(optimizer: LionK, loss: float) -> float:
    return float(optimizer.lyapunov(loss))


def _feasible_start(kappa: Kappa, decay: float, shape: tuple[int, int], generator: torch.Generator) -> nn.Parameter:
    """A point whose λx is a gradient of kappa, hence inside the feasible set."""
    return nn.Parameter(kappa.gradient(torch.randn(shape, generator=generator, dtype=torch.float64)) / decay)


Measure = Callable[[LionK, float], float]


@claim(control={"measure": _objective})
def lyapunov_second_order(trial: Trial, measure: Measure = _lyapunov) -> Exact:
    """By how much any step raises the function more than L/2 times the step's squared length, for each kappa and rate."""
    shape, decay, steps = (3, 4), 0.5, trial.pick(smoke=20, laptop=100)
    worst = 0.0
    for kappa in KAPPAS:
        for lr in (0.3, 0.1, 0.03, 0.01):
            f = Quadratic.draw(trial.generator, shape, spread=2.0)
            x = _feasible_start(kappa, decay, shape, trial.generator)
            optimizer = LionK([x], lr=lr, betas=BETAS, weight_decay=decay, kappa=kappa)
            before = measure(optimizer, f.value(x.detach()))
            for _ in range(steps):
                old = x.detach().clone()
                x.grad = f.gradient(old)
                optimizer.step()
                after = measure(optimizer, f.value(x.detach()))
                worst = max(worst, after - before - f.lipschitz / 2 * float((x.detach() - old).square().sum()))
                before = after
    return Exact(worst)


@claim(control={"measure": _objective})
def lyapunov_never_rises(trial: Trial, measure: Measure = _lyapunov) -> Exact:
    """The largest rise between two recordings, as a share of the whole fall, for each kappa at small rates.

    A smooth kappa (gradient 1/δ-Lipschitz) is recorded at every step, at the largest rate for which the paper's inequality
    leaves no rise: ε = 2δ/L. One that is not smooth is recorded ten times a unit of time at a rate near the flow's.
    """
    shape, decay = (3, 4), 0.5
    worst, curves = 0.0, {}
    for kappa in KAPPAS:
        f = Quadratic.draw(trial.generator, shape, spread=2.0)
        width = getattr(kappa, "delta", getattr(kappa, "temperature", None))
        if width is None:
            lr = trial.pick(smoke=0.01, laptop=1e-3)
            every, records = round(0.1 / lr), trial.pick(smoke=5, laptop=60)
        else:
            step = 2 * width / f.lipschitz
            lr, every, records = step / (1 + step * decay), 1, trial.pick(smoke=20, laptop=400)
        x = _feasible_start(kappa, decay, shape, trial.generator)
        optimizer = LionK([x], lr=lr, betas=_betas(lr) if width is None else BETAS, weight_decay=decay, kappa=kappa)
        values = [measure(optimizer, f.value(x.detach()))]
        for _ in range(records):
            for _ in range(every):
                x.grad = f.gradient(x.detach())
                optimizer.step()
            values.append(measure(optimizer, f.value(x.detach())))
        rise = max(b - a for a, b in pairwise(values))
        worst = max(worst, rise / (max(values) - min(values)))
        curves[repr(kappa)] = [v - min(values) for v in values[:61]]
    trial.figure("lyapunov", x=range(61), y={k: v for k, v in curves.items() if len(v) == 61}, xlabel="recording")
    return Exact(max(worst, 0.0))


def _betas(lr: float) -> tuple[float, float]:
    """Momentum with the time constants of Lion's defaults at a rate of 0.1, so that a smaller rate nears one same flow."""
    return 1 - (1 - BETAS[0]) * lr / 0.1, 1 - (1 - BETAS[1]) * lr / 0.1


# ------------------------------------------------------------------------------------------------------------------- speed


class LoopingLionK(LionK):
    """The control: the same step one parameter after the other, each operation into new memory."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                direction = group["kappa"].gradient(beta1 * m + (1 - beta1) * p.grad)
                p.copy_(p * (1 - lr * group["weight_decay"]) - lr * direction)
                m.copy_(beta2 * m + (1 - beta2) * p.grad)


def _lions() -> Mapping[str, Callable[..., Optimizer]]:
    import lion_pytorch
    import pytorch_optimizer
    from lion_pytorch.foreach import Lion as ForeachLion

    return {
        "pytorch_optimizer.Lion": pytorch_optimizer.Lion,
        "lion_pytorch.Lion": lion_pytorch.Lion,
        "lion_pytorch.foreach.Lion": ForeachLion,
    }


def _seconds(trial: Trial, makers: Mapping[str, Callable[..., Optimizer]]) -> dict[str, float]:
    keep_freed_memory()
    cases = {name: make(llama(trial.seed), lr=1e-7, weight_decay=0.1).step for name, make in makers.items()}
    return interleave(cases, rounds=trial.pick(smoke=2, laptop=31), warmup=2, min_seconds=0.01)


def _fastest(trial: Trial, method: Callable[..., Optimizer] = LionK) -> dict[str, Any]:
    """Chosen once: the least of three noisy times, taken anew in each trial, would be less than any of the three."""
    seconds = _seconds(trial, _lions())
    return {"baseline": min(seconds, key=lambda name: seconds[name])}


@claim(control={"method": LoopingLionK}, tune=_fastest)
def step_time(trial: Trial, method: Callable[..., Optimizer] = LionK) -> Ratio:
    """Time of a step with the sign against the fastest Lion at hand, on a LLaMA's parameters with real gradients."""
    baseline = trial.tuned["baseline"]
    seconds = _seconds(trial, {"ours": method, "baseline": _lions()[baseline]})
    trial.log(baseline=baseline)
    return Ratio(**seconds)


def llama(seed: int) -> Sequence[Tensor]:
    """The 39 parameters of a LLaMA with 1.9 million entries, with gradients."""
    torch.manual_seed(seed)
    net = GPT(256, dim=192, depth=4, heads=6, context=64)
    tokens = torch.randint(256, (8, 65))
    cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
    return list(net.parameters())

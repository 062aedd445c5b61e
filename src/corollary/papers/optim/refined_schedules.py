"""Linear decay and refined schedules (arXiv 2310.07831): how their claims are measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import fmin_l_bfgs_b
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    SequentialLR,
)

from corollary.claims import Exact, Paired, Trial, claim
from corollary.data import TokenStream, digits, image_patches, stdlib_text, tabular
from corollary.models import GPT, MLP, ResNet
from corollary.optim import LinearDecay, RefinedSchedule, refine_schedule
from corollary.testing import Case

# ------------------------------------------------------------------------------------------------------ the ten problems

Data = tuple[Tensor, Tensor, Tensor, Tensor]  # inputs and labels to train on, inputs and labels held out
PENALTY = 0.01  # of the logistic regressions: weight of half the squared parameters


@dataclass(frozen=True)
class Problem:
    """A problem on real data, trained on many seeds and at many rates at once.

    Args:
        data: gives the split of a seed.
        steps: length of the run.
        batch: samples in a step.
        rates: learning rates to choose from, the same for every schedule.
        net: makes the network; None is logistic regression with an l2 penalty, where what counts is the training objective's
            excess over its minimum, as in the theory. For a network it is the held-out loss.
        adam: Adam with betas (0.9, 0.99); otherwise SGD, with momentum 0.9 for networks.
        warmup: steps of linear warm-up before every schedule alike.
    """

    data: Callable[[int], Data]
    steps: int
    batch: int
    rates: tuple[float, ...]
    net: Callable[[], nn.Module] | None = None
    adam: bool = False
    warmup: int = 0


def _rates(low: float, high: float, count: int) -> tuple[float, ...]:
    return tuple(float(rate) for rate in np.geomspace(low, high, count))


def _table(name: str) -> Callable[[int], Data]:
    def data(seed: int) -> Data:
        split = tabular(name, seed=seed)
        labels = [(y > 0).long() if name == "diabetes" else y for y in (split.train_y, split.test_y)]
        return split.train_x, labels[0], split.test_x, labels[1]

    return data


def _digits(flat: bool) -> Callable[[int], Data]:
    def data(seed: int) -> Data:
        split = digits(seed=seed, flat=flat)
        return split.train_x, split.train_y, split.test_x, split.test_y

    return data


def _patches(seed: int) -> Data:
    split = image_patches(size=8, per_image=200, seed=seed)
    return split.train_x.flatten(1) - 0.5, split.train_y, split.test_x.flatten(1) - 0.5, split.test_y


def _text(seed: int) -> Data:
    stream = TokenStream(stdlib_text(1_000_000), context=16, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return (*stream.batch(4096, generator), *stream.batch(256, generator, split="val"))


def _logistic(data: Callable[[int], Data]) -> Problem:
    return Problem(data, steps=300, batch=4, rates=_rates(0.03, 10, 8))


PROBLEMS: Mapping[str, Problem] = {
    "breast cancer, logistic": _logistic(_table("breast_cancer")),
    "wine, logistic": _logistic(_table("wine")),
    "iris, logistic": _logistic(_table("iris")),
    "diabetes, logistic": _logistic(_table("diabetes")),
    "digits, logistic": _logistic(_digits(True)),
    "patches, logistic": _logistic(_patches),
    "digits, MLP": Problem(_digits(True), 300, 16, _rates(0.01, 1, 6), lambda: MLP(64, [32], 10)),
    "patches, MLP": Problem(_patches, 300, 32, _rates(0.002, 0.1, 5), lambda: MLP(192, [32], 10), adam=True),
    "digits, ResNet": Problem(
        _digits(False), 100, 16, _rates(0.003, 0.1, 5), lambda: ResNet(1, 10, width=4, norm="group"), adam=True
    ),
    "Python source, LLaMA": Problem(
        _text, 250, 8, _rates(0.003, 0.1, 5), lambda: GPT(256, 16, depth=1, heads=2, context=16), adam=True, warmup=25
    ),
}
LOGISTIC = tuple(name for name, problem in PROBLEMS.items() if problem.net is None)


@lru_cache(maxsize=64)
def _stacked(name: str, seeds: tuple[int, ...]) -> list[Tensor]:
    """The four parts of the data of each seed, stacked."""
    return [torch.stack(parts) for parts in zip(*(PROBLEMS[name].data(seed) for seed in seeds), strict=True)]


def _batches(
    problem: Problem, train_x: Tensor, train_y: Tensor, seeds: tuple[int, ...], steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs (seeds, batch, ...) and labels (seeds, batch) of each step; the same for every rate and schedule."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    everyone = torch.arange(len(seeds))[:, None]
    for _ in range(steps):
        rows = torch.stack([torch.randint(train_x.shape[1], (problem.batch,), generator=g) for g in generators])
        yield train_x[everyone, rows], train_y[everyone, rows]


@lru_cache(maxsize=1024)
def _minimum(name: str, seed: int) -> float:
    """The least value of a logistic regression's training objective, to about 1e-7."""
    x, y, *_ = PROBLEMS[name].data(seed)
    inputs, shape = x.double(), (int(y.max()) + 1, x.shape[1] + 1)

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        w = torch.from_numpy(flat).view(shape).requires_grad_()
        value = cross_entropy(inputs @ w[:, :-1].T + w[:, -1], y) + PENALTY / 2 * w.square().sum()
        [gradient] = torch.autograd.grad(value, w)
        return value.item(), gradient.reshape(-1).numpy()

    _, least, _ = fmin_l_bfgs_b(objective, np.zeros(shape[0] * shape[1]), pgtol=3e-6, factr=100.0, maxiter=2000, maxfun=4000)
    return float(least)


def _train_logistic(
    name: str, multipliers: Tensor, rates: Tensor, seeds: tuple[int, ...], batch: int | None = None
) -> tuple[Tensor, Tensor]:
    """Excess of the final objective (runs, seeds) and l2 gradient norms (runs, seeds, steps), by SGD from zero.

    The weights of all runs of a seed lie side by side, so that a step is two products for each seed.

    Args:
        multipliers: (runs, steps), or (runs, seeds, steps) where every seed has its own schedule.
        rates: (runs,).
        batch: other than the problem's.
    """
    problem = PROBLEMS[name] if batch is None else replace(PROBLEMS[name], batch=batch)
    train_x, train_y, *_ = _stacked(name, seeds)
    x = torch.cat([train_x, torch.ones(*train_x.shape[:2], 1)], 2)
    n_seeds, n_runs, features, classes = len(seeds), len(rates), x.shape[2], int(train_y.max()) + 1
    eta = (rates.view(-1, 1, 1) * multipliers.view(n_runs, -1, multipliers.shape[-1])).transpose(0, 1)[..., None, None]
    w = torch.zeros(n_seeds, n_runs, features, classes)
    norms = []
    for step, (rows, labels) in enumerate(_batches(problem, x, train_y, seeds, multipliers.shape[-1])):
        residual = (rows[:, None] @ w).softmax(-1)
        residual -= nn.functional.one_hot(labels, classes)[:, None]
        gradient = rows[:, None].mT @ residual / problem.batch + PENALTY * w
        norms.append(gradient.flatten(2).norm(dim=2))
        w -= eta[:, :, step] * gradient
    log_odds = (x[:, None] @ w).log_softmax(-1)
    picked = log_odds.gather(-1, train_y[:, None, :, None].expand(-1, n_runs, -1, 1))
    objective = (PENALTY / 2 * w.double().square().sum((2, 3)) - picked.double().mean((2, 3))).T
    excess = objective - torch.tensor([_minimum(name, seed) for seed in seeds], dtype=torch.float64)
    return _bounded(excess), torch.stack(norms, -1).transpose(0, 1)


def _bounded(losses: Tensor) -> Tensor:
    """A run that diverged counts as a bad one, and float32 cannot tell an excess below 1e-6 from none."""
    return losses.double().nan_to_num(nan=1e3).clamp(1e-6, 1e3)


def _train_network(name: str, multipliers: Tensor, rates: Tensor, seeds: tuple[int, ...]) -> Tensor:
    """Final held-out losses (runs, seeds): ``multipliers`` (runs, steps), ``rates`` (runs,)."""
    problem = PROBLEMS[name]
    assert problem.net is not None
    train_x, train_y, test_x, test_y = _stacked(name, seeds)
    nets = []
    for seed in seeds:
        torch.manual_seed(seed)
        nets.append(problem.net())
    start, _ = stack_module_state(nets)
    params = {key: value.detach().expand(len(rates), *value.shape).clone() for key, value in start.items()}

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(nets[0], params, (x,)).flatten(0, -2), y.flatten())

    gradients = vmap(vmap(grad(loss)), in_dims=(0, None, None))
    first = {key: torch.zeros_like(value) for key, value in params.items()}
    second = {key: torch.zeros_like(value) for key, value in params.items()}
    for step, (x, y) in enumerate(_batches(problem, train_x, train_y, seeds, multipliers.shape[-1])):
        found = gradients(params, x, y)
        for key, value in params.items():
            eta = (rates * multipliers[:, step]).view(-1, *[1] * (value.dim() - 1))
            if problem.adam:
                first[key].lerp_(found[key], 0.1)
                second[key].mul_(0.99).addcmul_(found[key], found[key], value=0.01)
                size = (second[key] / (1 - 0.99 ** (step + 1))).sqrt_().add_(1e-8)
                value -= eta / (1 - 0.9 ** (step + 1)) * first[key] / size
            else:
                first[key].mul_(0.9).add_(found[key])
                value -= eta * first[key]
    with torch.no_grad():
        return _bounded(vmap(vmap(loss), in_dims=(0, None, None))(params, test_x, test_y))


def _final_losses(name: str, multipliers: Tensor, rates: Tensor, seeds: tuple[int, ...]) -> Tensor:
    if PROBLEMS[name].net is None:
        return _train_logistic(name, multipliers, rates, seeds)[0]
    return _train_network(name, multipliers, rates, seeds)


# ------------------------------------------------------------------------------------------------------------- schedules

Schedule = Callable[[Optimizer, int], LRScheduler]


def _after_warmup(schedule: Schedule) -> Callable[[Optimizer, int, int], LRScheduler]:
    def make(optimizer: Optimizer, steps: int, warmup: int) -> LRScheduler:
        if not warmup:
            return schedule(optimizer, steps)
        ramp = LinearLR(optimizer, start_factor=1 / warmup, total_iters=max(1, warmup - 1))
        return SequentialLR(optimizer, [ramp, schedule(optimizer, steps - warmup)], milestones=[warmup])

    return make


SCHEDULES: Mapping[str, Callable[[Optimizer, int, int], LRScheduler]] = {
    "linear": LinearDecay,
    "cosine": _after_warmup(lambda optimizer, steps: CosineAnnealingLR(optimizer, steps)),
    "step": _after_warmup(lambda optimizer, steps: MultiStepLR(optimizer, [steps // 2, 3 * steps // 4], gamma=0.1)),
    "constant": _after_warmup(lambda optimizer, steps: ConstantLR(optimizer, factor=1.0)),
    "inverse root": _after_warmup(lambda optimizer, steps: LambdaLR(optimizer, lambda t: (t + 1) ** -0.5)),
    # The control of linear decay: as much in sum, but the rate grows to its peak where it should vanish.
    "rising": _after_warmup(lambda optimizer, steps: LambdaLR(optimizer, lambda t: (t + 1) / steps)),
}
BASELINES = ("cosine", "step", "constant", "inverse root")


def _read_off(make: Callable[[Optimizer], LRScheduler], steps: int) -> Tensor:
    """The multipliers that a schedule sets, (steps,): its rates on an optimizer with rate 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, read = make(optimizer), []
    for _ in range(steps):
        read.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return torch.tensor(read)


@lru_cache(maxsize=128)
def _multipliers(schedule: str, steps: int, warmup: int) -> Tensor:
    return _read_off(lambda optimizer: SCHEDULES[schedule](optimizer, steps, warmup), steps)


# ---------------------------------------------------------------------------------------------- linear decay on ten problems


def _seeds(seed: int, count: int) -> tuple[int, ...]:
    """Seeds that no other trial has: a trial's own are far apart."""
    return tuple(int(s) for s in np.random.SeedSequence(seed).generate_state(count) >> 1)


@lru_cache(maxsize=256)
def _best_rate(name: str, schedule: str, seeds: tuple[int, ...], steps: int) -> float:
    """The rate with the least final loss, in geometric mean over the seeds."""
    problem = PROBLEMS[name]
    m = _multipliers(schedule, steps, min(problem.warmup, steps // 2))
    rates = problem.rates if len(seeds) > 1 else problem.rates[:2]  # one seed only at smoke scale
    losses = _final_losses(name, m.expand(len(rates), -1), torch.tensor(rates), seeds)
    return rates[int(losses.log().mean(1).argmin())]


def _steps(trial: Trial, name: str) -> int:
    return trial.pick(smoke=3, laptop=PROBLEMS[name].steps, full=4 * PROBLEMS[name].steps)


def _tune_ten(trial: Trial, method: str = "linear") -> dict[str, dict[str, float]]:
    """Every schedule has the same rates to choose from, on the same seeds."""
    chosen: dict[str, dict[str, float]] = {}
    for name, problem in PROBLEMS.items():
        count = trial.pick(smoke=1, laptop=8 if problem.net is None else 2)
        seeds = _seeds(trial.seed, count)
        chosen[name] = {s: _best_rate(name, s, seeds, _steps(trial, name)) for s in (method, *BASELINES)}
    return chosen


@claim(control={"method": "rising"}, tune=_tune_ten)
def linear_decay_on_ten_problems(trial: Trial, method: str = "linear") -> Exact:
    """How many of the ten problems linear decay loses to any of the four baselines."""
    lost, table = 0, {}
    for name, problem in PROBLEMS.items():
        seeds = _seeds(trial.seed, trial.pick(smoke=2, laptop=16 if problem.net is None else 6))
        steps, rates = _steps(trial, name), trial.tuned[name]
        names = (method, *BASELINES)
        m = torch.stack([_multipliers(s, steps, min(problem.warmup, steps // 2)) for s in names])
        losses = _final_losses(name, m, torch.tensor([rates[s] for s in names]), seeds).log()
        behind = losses[:1] - losses[1:]  # (baselines, seeds), in logarithms
        mean, error = behind.mean(1), behind.std(1) / math.sqrt(len(seeds))
        lost += bool(((mean > math.log(1.02)) & (mean > 2 * error)).any())
        table[name] = {s: round(float(ratio), 4) for s, ratio in zip(BASELINES, mean.exp(), strict=True)}
    trial.log(lost=lost, ratio_to=table)
    trial.figure(
        "loss",
        x=range(1, len(table) + 1),
        y={s: [row[s] for row in table.values()] for s in BASELINES},
        xlabel="problem, in the record's order",
        ylabel="final loss of linear decay over that of the baseline",
        log="y",
    )
    return Exact(float(lost))


def _tune_suite(trial: Trial, method: str, baselines: Sequence[str]) -> dict[str, Any]:
    """For each logistic regression the method's rate, and which of the baselines is best there at which rate."""
    seeds, chosen = _seeds(trial.seed, trial.pick(smoke=1, laptop=12)), {}
    for name in LOGISTIC:
        steps = _steps(trial, name)
        rates = {s: _best_rate(name, s, seeds, steps) for s in (method, *baselines)}
        m = torch.stack([_multipliers(s, steps, 0) for s in baselines])
        losses = _final_losses(name, m, torch.tensor([rates[s] for s in baselines]), seeds)
        best = baselines[int(losses.log().mean(1).argmin())]
        chosen[name] = {"lr": rates[method], "baseline": best, "baseline_lr": rates[best]}
    return chosen


def _suite(trial: Trial, method: str, count: int) -> Paired:
    """Mean over the logistic regressions of the logarithm of the final excess, beside each one's baseline."""
    seeds, ours, baseline, table = _seeds(trial.seed, trial.pick(smoke=1, laptop=count)), [], [], {}
    for name in LOGISTIC:
        steps, tuned = _steps(trial, name), trial.tuned[name]
        m = torch.stack([_multipliers(s, steps, 0) for s in (method, tuned["baseline"])])
        losses = _final_losses(name, m, torch.tensor([tuned["lr"], tuned["baseline_lr"]]), seeds).log().mean(1)
        ours.append(float(losses[0]))
        baseline.append(float(losses[1]))
        table[name] = {tuned["baseline"]: round(math.exp(ours[-1] - baseline[-1]), 4)}
    trial.log(ratio_to=table)
    return Paired(ours=float(np.mean(ours)), baseline=float(np.mean(baseline)))


def _tune_others(trial: Trial, method: str = "linear") -> dict[str, Any]:
    return _tune_suite(trial, method, ("step", "constant", "inverse root"))


def _tune_cosine(trial: Trial, method: str = "linear") -> dict[str, Any]:
    return _tune_suite(trial, method, ("cosine",))


@claim(control={"method": "rising"}, tune=_tune_others)
def beats_step_constant_and_root(trial: Trial, method: str = "linear") -> Paired:
    """Final excess beside the best of step, constant and 1/sqrt(t) decay on each problem."""
    return _suite(trial, method, 2)


@claim(control={"method": "rising"}, tune=_tune_cosine)
def matches_cosine(trial: Trial, method: str = "linear") -> Paired:
    """Final excess beside that of cosine decay."""
    return _suite(trial, method, 4)


# -------------------------------------------------------------------------------------------------------- refined schedules


def _refined(norms: Tensor, steps: int) -> Tensor:
    """The schedules refined from the norms of each run, (runs, steps), as `RefinedSchedule` sets them."""

    def make(multipliers: Tensor) -> Callable[[Optimizer], LRScheduler]:
        return lambda optimizer: RefinedSchedule(optimizer, multipliers, steps)

    return torch.stack([_read_off(make(refine_schedule(run.double())), steps) for run in norms])


def _in_order(norms: Tensor, generator: torch.Generator) -> Tensor:
    return norms


def _shuffled(norms: Tensor, generator: torch.Generator) -> Tensor:
    """The control: the same norms at other times, so that they tell nothing of the run."""
    return norms[..., torch.randperm(norms.shape[-1], generator=generator)]


Order = Callable[[Tensor, torch.Generator], Tensor]
BATCH = 32  # for refinement: norms of larger batches tell more of the task and less of the draw


def _linear_run(name: str, rates: Sequence[float], seeds: tuple[int, ...], steps: int) -> tuple[Tensor, Tensor]:
    """Final losses and gradient norms of linear decay, by rate and seed."""
    m = _multipliers("linear", steps, 0).expand(len(rates), -1)
    return _train_logistic(name, m, torch.tensor(rates), seeds, BATCH)


def _tune_linear(trial: Trial, order: Order = _in_order) -> dict[str, float]:
    """The rate of linear decay on each logistic regression, of eight."""
    seeds, chosen = _seeds(trial.seed, trial.pick(smoke=1, laptop=8)), {}
    for name in LOGISTIC:
        rates = PROBLEMS[name].rates
        losses, _ = _linear_run(name, rates, seeds, _steps(trial, name))
        chosen[name] = rates[int(losses.log().mean(1).argmin())]
    return chosen


def _tune_refined(trial: Trial, order: Order = _in_order) -> dict[str, dict[str, float]]:
    """The rate of linear decay, and that of the schedules refined from its runs at that rate, each of the same eight."""
    seeds, chosen = _seeds(trial.seed, trial.pick(smoke=1, laptop=8)), {}
    for name in LOGISTIC:
        rates, steps = PROBLEMS[name].rates, _steps(trial, name)
        losses, norms = _linear_run(name, rates, seeds, steps)
        best = int(losses.log().mean(1).argmin())
        m = _refined(order(norms[best], trial.generator), steps).expand(len(rates), -1, -1)
        refined, _ = _train_logistic(name, m, torch.tensor(rates), seeds, BATCH)
        chosen[name] = {"linear": rates[best], "refined": rates[int(refined.log().mean(1).argmin())]}
    return chosen


def _shapes(trial: Trial, order: Order) -> Tensor:
    """The mean over the logistic regressions of the schedules refined from this trial's runs, as a curve of 101 points."""
    curves = []
    for name in LOGISTIC:
        steps = _steps(trial, name)
        _, norms = _linear_run(name, [trial.tuned[name]], _seeds(trial.seed, 1), steps)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        curve = RefinedSchedule(optimizer, refine_schedule(order(norms[0, 0], trial.generator).double()), 100)
        curves.append(torch.tensor(curve.multipliers))
    mean = torch.stack(curves).mean(0)
    trial.figure(
        "schedule",
        x=range(101),
        y={"refined": mean.tolist(), "linear decay": [1 - i / 100 for i in range(101)]},
        xlabel="per cent of the run",
        ylabel="multiplier of the learning rate",
    )
    return mean


@claim(control={"order": _shuffled}, tune=_tune_linear)
def warm_up(trial: Trial, order: Order = _in_order) -> Paired:
    """Where the refined schedule starts, as a share of its peak, beside linear decay, which starts at its peak."""
    return Paired(ours=float(_shapes(trial, order)[0]), baseline=1.0)


@claim(control={"order": _shuffled}, tune=_tune_linear)
def rapid_annealing(trial: Trial, order: Order = _in_order) -> Paired:
    """What is left of the refined schedule's peak for its last tenth, in which it falls to 0, beside linear decay's tenth."""
    return Paired(ours=float(_shapes(trial, order)[90]), baseline=0.1)


@claim(control={"order": _shuffled}, tune=_tune_refined)
def refined_improves(trial: Trial, order: Order = _in_order) -> Paired:
    """Final loss with the schedule refined from the run with linear decay, beside that run, at rates tuned alike."""
    seeds = _seeds(trial.seed, trial.pick(smoke=1, laptop=4))
    ours, baseline, table = [], [], {}
    for name in LOGISTIC:
        steps, rates = _steps(trial, name), trial.tuned[name]
        linear, norms = _linear_run(name, [rates["linear"]], seeds, steps)
        m = _refined(order(norms[0], trial.generator), steps)[None]
        refined, _ = _train_logistic(name, m, torch.tensor([rates["refined"]]), seeds, BATCH)
        ours.append(float(refined.log().mean()))
        baseline.append(float(linear.log().mean()))
        table[name] = round(math.exp(ours[-1] - baseline[-1]), 4)
    trial.log(ratio_to_linear=table)
    return Paired(ours=float(np.mean(ours)), baseline=float(np.mean(baseline)))


# ------------------------------------------------------------------------------------------------------------ the theorem


def _decayed(weights: Tensor) -> Tensor:
    """The share of the weights that is still to come after each step: linear decay where they are equal."""
    later = weights.flip(0).cumsum(0).flip(0)
    return torch.cat([later[1:], torch.zeros(1, dtype=weights.dtype)]) / later[0]


def _undecayed(weights: Tensor) -> Tensor:
    """The control: the updates at their full size to the end, as with a constant schedule."""
    return torch.ones_like(weights)


@claim(control={"shares": _undecayed})
def last_iterate_bound(trial: Trial, shares: Callable[[Tensor], Tensor] = _decayed) -> Exact:
    """By how much f(x_T) - f(u) exceeds the weighted regret, for updates of four kinds on a real convex loss in float64."""
    split = tabular("breast_cancer", seed=trial.seed)
    x, sign = split.train_x.double(), (2 * split.train_y - 1).double()
    steps, features = trial.pick(smoke=10, laptop=60, full=1000), split.train_x.shape[1]

    def value(w: Tensor) -> float:
        return float(nn.functional.softplus(-sign * (x @ w)).mean())

    def gradient(w: Tensor) -> Tensor:
        return -(x * (sign * torch.sigmoid(-sign * (x @ w)))[:, None]).mean(0)

    def normal() -> Tensor:
        return torch.randn(features, generator=trial.generator, dtype=torch.float64)

    worst = 0.0
    for kind in ("weighted gradients", "momentum", "signs", "random walk"):
        for equal in (True, False) * trial.pick(smoke=1, laptop=4):
            drawn = torch.rand(steps, generator=trial.generator, dtype=torch.float64).square() + 0.01
            weights = torch.ones_like(drawn) if equal else drawn
            share, start, goal = shares(weights), normal(), normal()
            size = 10.0 ** trial.rng.uniform(-2, 1)
            w, base, velocity, regret = start, start, torch.zeros(features, dtype=torch.float64), 0.0
            for t in range(steps):
                g = gradient(w)
                regret += float(weights[t] * (g @ (base - goal)) / weights.sum())
                if t == steps - 1:
                    break
                velocity = 0.9 * velocity + g
                update = {
                    "weighted gradients": -size * weights[t] * g,
                    "momentum": -size * velocity,
                    "signs": -size * g.sign(),
                    "random walk": size * normal(),
                }[kind]
                base = base + update
                w = w + share[t] * update
            worst = max(worst, (value(w) - value(goal) - regret) / max(1.0, abs(regret)))
    return Exact(worst)


# ------------------------------------------------------------------------------------------------------------ conformance


def _oracle_linear(step: int, lr: float, total_steps: int = 9, warmup_steps: int = 0) -> float:
    """The corners of the line, interpolated."""
    ramp = [lr * (i + 1) / warmup_steps for i in range(warmup_steps)]
    return float([*ramp, *np.linspace(lr, 0.0, total_steps - warmup_steps + 1), *[0.0] * 20][step])


def _oracle_refined(step: int, lr: float, multipliers: Sequence[float] = (), total_steps: int | None = None) -> float:
    """The weighted mean of the two points on either side of where the step stands."""
    total = len(multipliers) if total_steps is None else total_steps
    place = min(step, total) * (len(multipliers) - 1) / total
    left = min(int(place), len(multipliers) - 2)
    return lr * (multipliers[left] * (left + 1 - place) + multipliers[left + 1] * (place - left))


def _norms(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor]:
    return (torch.rand(40, generator=generator, dtype=torch.float64).add(0.5).to(dtype),)


CURVE = [0.25, 1.0, 0.75, 0.5, 0.1, 0.0]

CONFORMANCE = {
    "corollary.optim.LinearDecay": Case(
        LinearDecay,
        tags={
            "oracle": _oracle_linear,
            "options": ({"total_steps": 9}, {"total_steps": 12, "warmup_steps": 3}, {"total_steps": 7, "warmup_steps": 6}),
            "end": lambda total_steps, warmup_steps=0: total_steps,
            "bad": {"no steps": {"total_steps": 0}, "warm-up to the end": {"total_steps": 3, "warmup_steps": 3}},
        },
    ),
    "corollary.optim.RefinedSchedule": Case(
        RefinedSchedule,
        tags={
            "oracle": _oracle_refined,
            "options": (
                {"multipliers": CURVE},
                {"multipliers": CURVE, "total_steps": 5},
                {"multipliers": CURVE, "total_steps": 13},
                {"multipliers": [0.0, 1.0], "total_steps": 8},
            ),
            "end": lambda multipliers, total_steps=None: total_steps or len(multipliers),
            "bad": {
                "one multiplier": {"multipliers": [1.0]},
                "a negative multiplier": {"multipliers": [1.0, -1.0]},
                "no steps": {"multipliers": CURVE, "total_steps": 0},
            },
        },
    ),
    "corollary.optim.refine_schedule": Case(
        lambda: refine_schedule,
        tags={
            "inputs": _norms,
            "batched": False,
            "differentiable": False,
            "bad": {
                "one norm": (torch.ones(1),),
                "a matrix": (torch.ones(3, 3),),
                "negative norms": (torch.tensor([1.0, -1.0]),),
                "vanished gradients": (torch.zeros(5),),
            },
        },
    ),
}

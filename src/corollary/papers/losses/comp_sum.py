"""How the claims on comp-sum losses are measured: bounds on enumerated distributions, robust training on real digits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby, product
from typing import Any

import torch
from torch import Tensor, nn

from corollary.claims import Exact, Paired, Trial, claim
from corollary.data import digits
from corollary.losses import (
    CompSumLoss,
    SmoothAdversarialCompSumLoss,
    TradesLoss,
    comp_sum_bound,
    comp_sum_loss,
    kl_shift,
    margin_shift,
    pgd,
    smooth_adversarial_comp_sum_loss,
)
from corollary.models import MLP
from corollary.testing import Case

CONFORMANCE: dict[str, Case] = {
    "corollary.losses.CompSumLoss": Case(
        partial(CompSumLoss, 0.5),
        {"function": partial(comp_sum_loss, tau=0.5), "spatial": True, "probabilities": True},
    ),
    "corollary.losses.SmoothAdversarialCompSumLoss": Case(
        # The shift of logits of 1e4 does not fit into float16, whatever computes it.
        partial(SmoothAdversarialCompSumLoss, 1.5),
        {"function": partial(smooth_adversarial_comp_sum_loss, tau=1.5), "inputs": 2, "extreme": 1e3},
    ),
    "corollary.losses.TradesLoss": Case(TradesLoss, {"inputs": 2, "extreme": 1e3}),
}


# The bound: points on a line, every class scored by a line of its own.
#
# This hypothesis set is symmetric (each class takes its score from the same lines) and complete (an intercept gives every
# score at a given point), as the theorem asks, yet too small for six random points: both gaps are above zero.

TAUS = (0.0, 0.5, 1.0, 1.5, 2.0)


def _reachable(points: int, classes: int) -> Tensor:
    """All predictions that lines can make on ordered points: each class at most one run, in any order. (K, points)."""
    runs = [labels for labels in product(range(classes), repeat=points) if len(list(groupby(labels))) == len(set(labels))]
    return torch.tensor(runs)


def _conditional_best(p: Tensor, tau: float) -> Tensor:
    """The least conditional comp-sum risk over all scores, for class probabilities ``p`` (..., C)."""
    if tau >= 2:  # concave in the shares of the classes, so the likeliest takes all
        return (1 - p.amax(-1)) / (tau - 1)
    if tau == 1:
        return -torch.xlogy(p, p).sum(-1)
    return ((p ** (1 / (2 - tau))).sum(-1) ** (2 - tau) - 1) / (1 - tau)


def _risk(lines: Tensor, x: Tensor, mass: Tensor, p: Tensor, tau: float) -> Tensor:
    """Comp-sum risk of each hypothesis: lines (I, K, C, 2), points (I, m), masses (I, m), p (I, m, C) -> (I, K)."""
    scores = _scores(lines, x)
    flat = scores.flatten(0, 2)
    losses = comp_sum_loss(flat, p[:, None].expand_as(scores).reshape(flat.shape), tau=tau, reduction="none")
    return (losses.view(scores.shape[:3]) * mass[:, None]).sum(-1)


def _scores(lines: Tensor, x: Tensor) -> Tensor:
    return lines[..., 0].unsqueeze(2) * x[:, None, :, None] + lines[..., 1].unsqueeze(2)


def _fit_lines(
    x: Tensor, mass: Tensor, p: Tensor, tau: float, generator: torch.Generator, steps: int, starts: int = 3
) -> tuple[Tensor, Tensor]:
    """Least comp-sum risk from several starts: hypotheses on the way (I, K, C, 2) and the ends (I, starts, C, 2)."""
    lines = torch.randn(len(x), starts, p.shape[-1], 2, generator=generator, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([lines], lr=0.2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    way = []
    for step in range(steps):
        if step % (steps // 8) == 0:
            way.append(lines.detach().clone())
        optimizer.zero_grad()
        torch.autograd.backward(_risk(lines, x, mass, p, tau).sum())
        optimizer.step()
        schedule.step()
    return torch.cat(way, 1), lines.detach()


@claim(control={"gaps": False})
def bound_holds(trial: Trial, gaps: bool = True) -> Exact:
    """Largest violation of the bound over distributions, tau and hypotheses; every term of it computed by itself."""
    instances, points, classes = trial.pick(smoke=2, laptop=6), 6, 3
    g = trial.generator
    x = torch.rand(instances, points, generator=g, dtype=torch.float64).mul(4).sub(2).sort(1).values
    mass = torch.rand(instances, points, generator=g, dtype=torch.float64) + 0.1
    mass = mass / mass.sum(1, keepdim=True)
    p = torch.rand(instances, points, classes, generator=g, dtype=torch.float64) ** 3 + 1e-3
    p = p / p.sum(-1, keepdim=True)

    # Zero-one: enumerated.
    every = _reachable(points, classes)
    right = p.gather(2, every.T.expand(instances, -1, -1))  # (I, m, K): probability of being right there
    best_01 = 1 - (right * mass[..., None]).sum(1).amax(1)
    gap_01 = best_01 - 1 + (p.amax(-1) * mass).sum(1)

    worst = torch.zeros(())
    for tau in TAUS:
        way, ends = _fit_lines(x, mass, p, tau, g, steps=trial.pick(smoke=40, laptop=120))
        # Hypotheses: the way of the fit, random lines of all sizes (near zero the scores almost tie), and mixtures of both.
        count = trial.pick(smoke=50, laptop=300)
        random = torch.randn(instances, count, classes, 2, generator=g, dtype=torch.float64)
        random = random * 10 ** torch.empty(instances, count, 1, 1, dtype=torch.float64).uniform_(-6, 1, generator=g)
        share = torch.rand(instances, count, 1, 1, generator=g, dtype=torch.float64)
        end = ends[:, torch.randint(ends.shape[1], (count,), generator=g)]
        lines = torch.cat([way, ends, random, share * end + (1 - share) * random], 1)

        risk = _risk(lines, x, mass, p, tau)
        best = risk.amin(1)
        gap = best - (_conditional_best(p, tau) * mass).sum(1)
        predicted = _scores(lines, x).argmax(-1)  # (I, K, m)
        risk_01 = 1 - (p.gather(2, predicted.transpose(1, 2)).transpose(1, 2) * mass[:, None]).sum(-1)

        excess, excess_01 = risk - best[:, None], risk_01 - best_01[:, None]
        bound = comp_sum_bound(excess + gap[:, None] if gaps else excess, tau, classes)
        violation = excess_01 - (bound - gap_01[:, None] if gaps else bound)
        trial.log(**{f"slack at tau={tau:g}": float(-violation.max()), f"gap at tau={tau:g}": float(gap.mean())})
        worst = torch.maximum(worst, violation.max())
    trial.log(zero_one_gap=float(gap_01.mean()))
    return Exact(worst)


def _simple_bound(excess: Tensor, tau: float, num_classes: int) -> Tensor:
    """The explicit majorant of the bound: ``sqrt(2^tau (2 - tau) t)`` for tau up to 1."""
    return (2**tau * (2 - tau) * excess).sqrt()


@claim(control={"explicit": True})
def bound_is_tight(trial: Trial, explicit: bool = False) -> Exact:
    """Both sides of the bound at the distributions of the proof: two classes alike in score, apart by beta in probability."""
    g, count = trial.generator, trial.pick(smoke=20, laptop=200)
    bound = _simple_bound if explicit else comp_sum_bound
    errors = []
    for tau in (0.0, 0.25, 0.5, 0.75, 1.0):
        beta = 0.05 + 0.95 * torch.rand(count, generator=g, dtype=torch.float64)
        classes = int(torch.randint(2, 9, (), generator=g))
        p = torch.zeros(count, classes, dtype=torch.float64)
        p[:, 0], p[:, 1] = (1 + beta) / 2, (1 - beta) / 2
        # The two scores tie and the label of the highest index is predicted, as in the paper; the other classes are out of
        # the race by 60, which is as good as infinity to float64.
        scores = torch.full_like(p, -60.0)
        scores[:, :2] = 0.0
        predicted = classes - 1 - scores.flip(1).argmax(1)
        risk = comp_sum_loss(scores, p, tau=tau, reduction="none")
        # One input, all scores allowed: the best risk is the best conditional risk, so both gaps are zero.
        excess = risk - _conditional_best(p, tau)
        excess_01 = p.amax(1) - p.gather(1, predicted[:, None])[:, 0]
        errors.append((bound(excess, tau, classes) - excess_01).abs().max())
    order = torch.linspace(0.05, 1, 40, dtype=torch.float64)
    pair = torch.stack([1 + order, 1 - order], 1) / 2
    level = comp_sum_loss(torch.zeros(40, 2, dtype=torch.float64), pair, tau=1.0, reduction="none")
    level = level - _conditional_best(pair, 1.0)
    trial.figure(
        "tightness at tau=1",
        x=level.tolist(),
        y={
            "zero-one excess": order.tolist(),
            "bound": comp_sum_bound(level, 1.0, 2).tolist(),
            "explicit majorant": _simple_bound(level, 1.0, 2).tolist(),
        },
        xlabel="cross-entropy excess risk",
        ylabel="zero-one excess risk",
    )
    return Exact(torch.stack(errors))


# Robust training on the digits.

EPS = 0.15  # of the pixels' range [0, 1], in the maximum norm
BETAS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
NUS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
HIDDEN = (64, 64)
# Logits for one unit of the perceptron's output, for both methods alike: so short a training fits better at this scale.
SCALE = 4.0
# Points of clean accuracy that robustness may cost, against training without a robust term.
COST = 0.01


@dataclass(frozen=True)
class Setting:
    """Sizes of one robust training; ``broken`` names what a control takes out of our loss."""

    epochs: int
    attack_steps: int
    eval_steps: int
    broken: str = ""


def _setting(trial: Trial, broken: str = "") -> Setting:
    epochs, attack, evaluate = trial.pick(smoke=(1, 2, 3), laptop=(15, 5, 25), full=(60, 10, 50))
    return Setting(epochs, attack, evaluate, broken)


def _objective(method: str, clean: Tensor, moved: Tensor, y: Tensor) -> Tensor:
    return kl_shift(clean, moved) if method == "trades" else margin_shift(clean, moved, y)


class Stack:
    """Perceptrons trained side by side as one batched program, each started from its own seed."""

    def __init__(self, seeds: list[int], device: str) -> None:
        networks = []
        for seed in seeds:
            torch.manual_seed(seed)  # the same start for every method of this seed
            networks.append([layer for layer in MLP(64, HIDDEN, 10).modules() if isinstance(layer, nn.Linear)])
        self.layers = []
        for same in zip(*networks, strict=True):
            weight = torch.stack([layer.weight.detach().T for layer in same]).to(device).requires_grad_()
            bias = torch.stack([layer.bias.detach()[None] for layer in same]).to(device).requires_grad_()
            self.layers.append((weight, bias))

    @property
    def parameters(self) -> list[Tensor]:
        return [p for layer in self.layers for p in layer]

    def __call__(self, x: Tensor, frozen: bool = False) -> Tensor:
        """Logits (S, B, 10) of x (S, B, 64)."""
        for i, (weight, bias) in enumerate(self.layers):
            if frozen:
                weight, bias = weight.detach(), bias.detach()
            x = torch.baddbmm(bias, x if i == 0 else x.relu(), weight)
        return SCALE * x

    def attacked(self, x: Tensor) -> Tensor:
        """The same without gradients of the parameters."""
        return self(x, frozen=True)


def _criterion(method: str, weight: float) -> nn.Module:
    if method == "trades":
        return TradesLoss(weight)
    return SmoothAdversarialCompSumLoss(nu=weight)


def _train(
    method: str, weights: list[float], x: Tensor, y: Tensor, seeds: list[int], setting: Setting, generator: torch.Generator
) -> Stack:
    """Train one network for each (weight, seed, x[i], y[i]): x (S, n, 64), y (S, n)."""
    stack = Stack(seeds, str(x.device))
    batch, count = 128, x.shape[1]
    criteria = [_criterion(method, weight) for weight in weights]
    optimizer = torch.optim.Adam(stack.parameters, lr=4e-3)
    total = setting.epochs * (count // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=total)
    for _ in range(setting.epochs):
        order = torch.randperm(count, generator=generator, device=x.device)
        for rows in order[: count // batch * batch].view(-1, batch):
            inputs, labels = x[:, rows], y[:, rows]
            with torch.no_grad():
                before = stack.attacked(inputs)
            moved = pgd(
                stack.attacked,
                inputs,
                labels,
                eps=EPS,
                step_size=EPS / 4,
                steps=setting.attack_steps,
                loss=lambda z, t, before=before: _objective(method, before, z, t),  # type: ignore[misc]
                generator=generator,
            )
            if setting.broken == "random":  # any point of the ball instead of the worst
                noise = torch.rand(inputs.shape, generator=generator, device=x.device).mul(2 * EPS).sub(EPS)
                moved = (inputs + noise).clamp(0, 1)
            both = stack(torch.cat([inputs, moved], 1))
            clean, shifted = both[:, :batch], both[:, batch:]
            losses = [criterion(clean[i], shifted[i], labels[i]) for i, criterion in enumerate(criteria)]
            if setting.broken == "no comp-sum":
                losses = [margin_shift(clean[i], shifted[i], labels[i]).mean() for i in range(len(criteria))]
            optimizer.zero_grad()
            torch.autograd.backward(torch.stack(losses).sum())
            optimizer.step()
            schedule.step()
    return stack


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    """How far the best wrong class is ahead: above 0 where the sample is misclassified."""
    own = logits.gather(-1, y.unsqueeze(-1))
    return (logits.scatter(-1, y.unsqueeze(-1), -torch.inf).amax(-1, keepdim=True) - own).squeeze(-1)


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return -torch.log_softmax(logits, -1).gather(-1, y.unsqueeze(-1)).squeeze(-1)


def _accuracy(stack: Stack, x: Tensor, y: Tensor, steps: int, generator: torch.Generator) -> tuple[list[float], list[float]]:
    """Clean and robust accuracy of each network; robust means right under every attack: two losses, two restarts each."""
    right = stack.attacked(x).argmax(-1) == y
    clean = right.double().mean(1)
    for loss in (_cross_entropy, _margin):
        for _ in range(2):
            moved = pgd(stack.attacked, x, y, eps=EPS, step_size=EPS / 8, steps=steps, loss=loss, generator=generator)
            right = right & (stack.attacked(moved).argmax(-1) == y)
    return clean.tolist(), right.double().mean(1).tolist()


@cache
def _measured(method: str, weight: float, seed: int, setting: Setting, device: str) -> tuple[float, float]:
    """Clean and robust test accuracy of one training. Kept, because a claim and its control share the baseline."""
    split = digits(seed=seed, flat=True)
    generator = torch.Generator(device).manual_seed(seed)
    train = split.train_x.to(device)[None], split.train_y.to(device)[None]
    stack = _train(method, [weight], *train, [seed], setting, generator)
    test = split.test_x.to(device)[None], split.test_y.to(device)[None]
    clean, robust = _accuracy(stack, *test, setting.eval_steps, generator)
    return clean[0], robust[0]


@cache
def _validated(method: str, weights: tuple[float, ...], seed: int, setting: Setting, device: str) -> list[list[float]]:
    """Clean and robust accuracy of each weight, the mean of two splits."""
    splits = [digits(seed=seed + k, flat=True) for k in range(2)]
    x, y, val_x, val_y = (
        torch.stack([getattr(split, part) for split in splits]).repeat_interleave(len(weights), 0).to(device)
        for part in ("train_x", "train_y", "test_x", "test_y")
    )
    seeds = [seed + k for k in range(2) for _ in weights]
    generator = torch.Generator(device).manual_seed(seed)
    stack = _train(method, list(weights) * 2, x, y, seeds, setting, generator)
    measured = _accuracy(stack, val_x, val_y, setting.eval_steps, generator)
    return [torch.tensor(values).view(2, -1).mean(0).tolist() for values in measured]


def tune(trial: Trial, broken: str = "") -> Mapping[str, Any]:
    """The weight of each method's robust term: the most robust at a bounded cost in clean accuracy."""
    setting = _setting(trial)
    (plain,), _ = _validated("ours", (0.0,), trial.seed, setting, trial.device)
    tuned: dict[str, Any] = {"plain_clean_accuracy": plain}
    # What is broken keeps the weight that the sound method found: the control differs in the idea alone.
    for method, grid in (("trades", BETAS), ("ours", NUS)):
        weights = grid[: trial.pick(smoke=2, laptop=len(grid))]
        clean, robust = _validated(method, weights, trial.seed, setting, trial.device)
        cheap = [i for i, value in enumerate(clean) if value >= plain - COST]
        if not cheap:  # nothing is: what costs least
            cheap = [max(range(len(weights)), key=clean.__getitem__)]
        tuned[method] = weights[max(cheap, key=robust.__getitem__)]
        tuned[f"{method}_validated"] = [clean, robust]
    return tuned


def _against_trades(trial: Trial, broken: str) -> tuple[tuple[float, float], tuple[float, float]]:
    ours = _measured("ours", trial.tuned["ours"], trial.seed, _setting(trial, broken), trial.device)
    theirs = _measured("trades", trial.tuned["trades"], trial.seed, _setting(trial), trial.device)
    trial.log(
        clean_accuracy=ours[0], robust_accuracy=ours[1], trades_clean_accuracy=theirs[0], trades_robust_accuracy=theirs[1]
    )
    return ours, theirs


@claim(control={"broken": "random"}, tune=tune)
def beats_trades(trial: Trial, broken: str = "") -> Paired:
    """Robust test accuracy under one strong attack for both, each at the same bounded cost in clean accuracy."""
    ours, theirs = _against_trades(trial, broken)
    curves = {name: trial.tuned[f"{name}_validated"] for name in ("ours", "trades")}
    trial.figure(
        "accuracy on the tuning splits",
        x=list(range(len(curves["ours"][0]))),
        y={f"{name}, {kind}": curve[i] for name, curve in curves.items() for i, kind in enumerate(("clean", "robust"))},
        xlabel="weight of the robust term, in the order of the grid",
        ylabel="accuracy",
    )
    return Paired(ours=ours[1], baseline=theirs[1])


@claim(control={"broken": "no comp-sum"}, tune=tune)
def keeps_clean_accuracy(trial: Trial, broken: str = "") -> Paired:
    """Clean test accuracy of the trainings that ``beats_trades`` compares."""
    ours, theirs = _against_trades(trial, broken)
    return Paired(ours=ours[0], baseline=theirs[0])

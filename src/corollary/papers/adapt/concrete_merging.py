"""How the claims on Concrete masks are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy, normalize

from corollary.adapt import (
    ConcreteMasks,
    average,
    concrete,
    fit_adamerging,
    fit_concrete_masks,
    task_arithmetic,
    ties,
)
from corollary.adapt.merging.masks import concrete_sample
from corollary.claims import Exact, Paired, Trial, claim
from corollary.data import digits
from corollary.testing import Case

# ------------------------------------------------------------------------------------------------------------------ tasks

# What becomes of an image; every task has all ten classes, and a head of its own.
TASKS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "upright": lambda x: x,
    "quarter turn": lambda x: x.rot90(1, (-2, -1)),
    "mirrored": lambda x: x.flip(-1),
    "inverted": lambda x: 1 - x,
    "shifted": lambda x: x.roll((4, 4), (-2, -1)),
}
WIDTH = 256
SHARPNESS = 20.0
SCALES = (0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
ADAPTED = tuple((start, rate) for start in (0.3, 0.5) for rate in (0.003, 0.01))
INNER = tuple((start, rate) for start in (0.3, 0.5) for rate in (0.03, 0.1))
TIES_SCALES = (0.3, 0.5, 0.7, 1.0, 1.4, 2.0)


def _head(weight: Tensor, features: Tensor) -> Tensor:
    """Cosines of features and class vectors, sharpened: the form of CLIP's zero-shot heads."""
    return SHARPNESS * normalize(features, dim=-1) @ normalize(weight, dim=-1).mT


@dataclass(frozen=True)
class Suite:
    """A pretrained encoder, what it became on each task, and the tasks' heads and test parts."""

    model: nn.Module
    base: Mapping[str, Tensor]
    checkpoints: Sequence[Mapping[str, Tensor]]
    heads: Sequence[Callable[[Tensor], Tensor]]
    inputs: Sequence[Tensor]
    labels: Tensor

    @torch.no_grad()
    def accuracies(self, merged: Mapping[str, Tensor]) -> Tensor:
        """Test accuracy on each task."""
        return torch.stack([
            (head(functional_call(self.model, dict(merged), (x,))).argmax(1) == self.labels).double().mean()
            for head, x in zip(self.heads, self.inputs, strict=True)
        ])  # fmt: skip


def _encoder() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


@lru_cache(maxsize=32)
def suite(seed: int, tuned_steps: int) -> Suite:
    """Pre-train on few samples of every task, then fine-tune the encoder on each task alone; heads stay as pre-training left them."""
    torch.manual_seed(seed)
    split = digits(seed=seed, test_size=0.4)
    train = torch.stack([task(split.train_x) for task in TASKS.values()]).flatten(2)
    model = _encoder()
    heads = nn.Parameter(torch.randn(len(TASKS), 10, WIDTH))
    optimizer = torch.optim.Adam([*model.parameters(), heads], lr=3e-3)
    for _ in range(100):
        picked = torch.randint(60, (32,))
        logits = _head(heads, model(train[:, picked].flatten(0, 1)).unflatten(0, (len(TASKS), -1)))
        loss = cross_entropy(logits.flatten(0, 1), split.train_y[picked].repeat(len(TASKS)))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    weights = heads.detach()
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tuned = {name: tensor.expand(len(TASKS), *tensor.shape).clone().requires_grad_() for name, tensor in base.items()}
    forward = vmap(lambda parameters, x: functional_call(model, parameters, (x,)))
    optimizer = torch.optim.Adam(tuned.values(), lr=3e-4)
    for _ in range(tuned_steps):
        picked = torch.randint(len(split.train_y), (32,))
        logits = _head(weights, forward(tuned, train[:, picked]))
        # The sum over tasks: each has parameters of its own, so each takes the step that it would take alone.
        loss = len(TASKS) * cross_entropy(logits.flatten(0, 1), split.train_y[picked].repeat(len(TASKS)))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    checkpoints = [{name: tensor[t].detach() for name, tensor in tuned.items()} for t in range(len(TASKS))]
    inputs = [task(split.test_x) for task in TASKS.values()]
    return Suite(model.requires_grad_(), base, checkpoints, [partial(_head, w) for w in weights], inputs, split.test_y)


# ---------------------------------------------------------------------------------------------------------------- methods


@lru_cache(maxsize=256)
def _masks(
    seed: int, tuned_steps: int, steps: int, scale: float, merging: str = "task_arithmetic", inner: float = 0.0
) -> ConcreteMasks:
    """Masks fitted to the test inputs, whose labels are not looked at: the paper's own setting."""
    s = suite(seed, tuned_steps)
    return fit_concrete_masks(
        s.model, s.checkpoints, s.inputs, heads=s.heads, merging=merging, scale=scale, steps=steps, lr=0.05, inner_lr=inner,
        adapt_steps=100, adapt_lr=0.01, batch_size=64, seed=seed,
    )  # fmt: skip


def _shuffled(masks: ConcreteMasks, seed: int) -> ConcreteMasks:
    """The same logits in each tensor, each at a place that has nothing to do with it."""
    generator = torch.Generator().manual_seed(seed)
    moved = {name: x.flatten()[torch.randperm(x.numel(), generator=generator)].view_as(x) for name, x in masks.items()}
    return ConcreteMasks(moved, masks.scales, temperature=masks.temperature, seed=masks.seed)


def _merged(method: str, scale: float, s: Suite, seed: int, sizes: tuple[int, int]) -> Mapping[str, Tensor]:
    if method == "averaging":
        return average(s.base, s.checkpoints)
    if method == "task arithmetic":
        return task_arithmetic(s.base, s.checkpoints, scale=scale)
    if method == "TIES":
        return ties(s.base, s.checkpoints, scale=scale)
    masks = _masks(seed, *sizes, scale)
    return concrete(s.base, s.checkpoints, masks if method == "Concrete" else _shuffled(masks, seed))


def _sizes(trial: Trial) -> tuple[int, int]:
    """Steps of fine-tuning and of the masks."""
    return trial.pick(smoke=(30, 5), laptop=(300, 100), full=(300, 400))


def _score(accuracies: Tensor, worst: bool) -> float:
    return float(accuracies.min() if worst else accuracies.mean())


def _tune(worst: bool, trial: Trial, method: str = "Concrete") -> dict[str, float]:
    """Each method's best factor of six, over two seeds."""
    sizes = _sizes(trial)
    grids: dict[str, tuple[float, ...]] = {"task arithmetic": SCALES, "TIES": TIES_SCALES, method: SCALES}
    if trial.scale == "smoke":
        grids = {name: grid[2:4] for name, grid in grids.items()}

    def score(name: str, scale: float) -> float:
        seeds = (trial.seed, trial.seed + 1)
        suites = [suite(seed, sizes[0]) for seed in seeds]
        merged = [_merged(name, scale, s, seed, sizes) for s, seed in zip(suites, seeds, strict=True)]
        return sum(_score(s.accuracies(m), worst) for s, m in zip(suites, merged, strict=True))

    return {name: max(grid, key=partial(score, name)) for name, grid in grids.items()}


def _versus_best(trial: Trial, method: str, worst: bool) -> Paired:
    sizes = _sizes(trial)
    s = suite(trial.seed, sizes[0])
    found = {
        name: s.accuracies(_merged(name, trial.tuned.get(name, 0.0), s, trial.seed, sizes))
        for name in ("averaging", "task arithmetic", "TIES", method)
    }
    own = torch.stack([s.accuracies(checkpoint)[t] for t, checkpoint in enumerate(s.checkpoints)])
    trial.log(**{f"{name}, mean": float(a.mean()) for name, a in found.items()})
    trial.log(**{f"{name}, worst": float(a.min()) for name, a in found.items()})
    trial.log(**{"each by its own model, mean": float(own.mean())})
    shown = {name: sorted(a.tolist()) for name, a in {**found, "own model": own}.items()}
    trial.figure(
        "accuracy", x=list(range(1, len(TASKS) + 1)), y=shown, xlabel="task, from its worst to its best", ylabel="test accuracy"
    )
    scores = {name: _score(a, worst) for name, a in found.items()}
    return Paired(ours=scores.pop(method), baseline=max(scores.values()))


# ----------------------------------------------------------------------------------------------------------------- claims


@claim(control={"method": "Concrete, shuffled"}, tune=partial(_tune, False))
def beats_merging_on_the_mean(trial: Trial, method: str = "Concrete") -> Paired:
    """Mean accuracy over the tasks against the best of three ways of merging."""
    return _versus_best(trial, method, worst=False)


@claim(control={"method": "Concrete, shuffled"}, tune=partial(_tune, True))
def beats_merging_on_the_worst_task(trial: Trial, method: str = "Concrete") -> Paired:
    """Accuracy on each method's worst task against the best of three ways of merging."""
    return _versus_best(trial, method, worst=True)


def _adapted(seed: int, steps: int, start: float, rate: float) -> Mapping[str, Tensor]:
    s = suite(seed, steps)
    factors = fit_adamerging(
        s.model, s.checkpoints, s.inputs, heads=s.heads, scale=start, steps=100, lr=rate, batch_size=64, seed=seed
    )
    return task_arithmetic(s.base, s.checkpoints, scale=factors)


def _adapted_concrete(seed: int, sizes: tuple[int, int], learned: bool, start: float, rate: float) -> Mapping[str, Tensor]:
    s = suite(seed, sizes[0])
    steps = sizes[1] if learned else 0
    return concrete(s.base, s.checkpoints, _masks(seed, sizes[0], steps, start, "layerwise_adamerging", rate))


def _tune_adamerging(trial: Trial, learned: bool = True) -> dict[str, list[float]]:
    """The best of four settings of each, over two seeds."""
    sizes = _sizes(trial)

    def score(merge: Callable[..., Mapping[str, Tensor]], setting: tuple[float, float]) -> float:
        seeds = (trial.seed, trial.seed + 1)
        return sum(float(suite(seed, sizes[0]).accuracies(merge(seed, *setting)).mean()) for seed in seeds)

    plain = partial(_adapted, steps=sizes[0])
    masked = partial(_adapted_concrete, sizes=sizes, learned=learned)
    count = 1 if trial.scale == "smoke" else 4
    return {
        "AdaMerging": list(max(ADAPTED[:count], key=partial(score, lambda seed, a, b: plain(seed, start=a, rate=b)))),
        "Concrete": list(max(INNER[:count], key=partial(score, lambda seed, a, b: masked(seed, start=a, rate=b)))),
    }


@claim(control={"learned": False}, tune=_tune_adamerging)
def beats_adamerging(trial: Trial, learned: bool = True) -> Paired:
    """Mean accuracy of Concrete AdaMerging against AdaMerging's, both fitted to the same inputs."""
    sizes = _sizes(trial)
    s = suite(trial.seed, sizes[0])
    ours = s.accuracies(_adapted_concrete(trial.seed, sizes, learned, *trial.tuned["Concrete"]))
    plain = s.accuracies(_adapted(trial.seed, sizes[0], *trial.tuned["AdaMerging"]))
    trial.log(ours_worst=float(ours.min()), adamerging_worst=float(plain.min()))
    return Paired(ours=float(ours.mean()), baseline=float(plain.mean()))


@claim(control={"temperature": 0.5})
def cold_mask_is_bernoulli(trial: Trial, temperature: float = 1e-9) -> Exact:
    """The mask at a temperature near zero against the discrete mask that the same noise decides on."""
    logits = 4 * torch.randn(20_000, generator=trial.generator, dtype=torch.float64)
    noise = torch.rand(20_000, generator=trial.generator, dtype=torch.float64)
    discrete = (noise > 1 - torch.special.expit(logits)).double()
    return Exact((concrete_sample(logits, noise, temperature) - discrete).abs())


# ------------------------------------------------------------------------------------------------------------ conformance

Merge = Callable[..., Mapping[str, Tensor]]


def _one_tensor(merge: Merge) -> Callable[..., Tensor]:
    """A merging function as one of tensors: the base's and those of two checkpoints."""
    return lambda base, a, b: merge({"w": base}, [{"w": a}, {"w": b}])["w"]


def _average_two(a: Tensor, b: Tensor) -> Tensor:
    return average({"w": torch.zeros_like(a)}, [{"w": a}, {"w": b}])["w"]  # the base is no part of a mean


def _concrete_one(base: Tensor, a: Tensor, b: Tensor, logits: Tensor) -> Tensor:
    masks = ConcreteMasks({"w": logits}, {"w": torch.tensor([0.3, 0.4], dtype=torch.float64)})
    return concrete({"w": base}, [{"w": a}, {"w": b}], masks)["w"]


def _three(generator: torch.Generator, dtype: torch.dtype, count: int = 3) -> tuple[Tensor, ...]:
    return tuple(torch.randn(4, 5, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count))


def _fitted(fit: Callable[..., Mapping[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """A fit as a function of the weights of a linear model and of two that it became."""

    def call(weight: Tensor, *tuned: Tensor) -> dict[str, Tensor]:
        model = nn.Linear(5, 4, bias=False, device="meta")  # no random numbers are drawn for it
        model.weight = nn.Parameter(weight.detach(), requires_grad=weight.is_floating_point())
        x = torch.linspace(-1, 1, 60, dtype=torch.float64).reshape(2, 6, 5).to(weight)
        return dict(fit(model, [{"weight": w} for w in tuned], list(x), steps=3, lr=0.05))

    return call


_FIT = {
    "inputs": _three,
    "batched": False,
    "differentiable": False,
    "dtypes": (torch.float32, torch.float64),
    "precision": {torch.float32: 1e-3},
}
_MERGE = {"inputs": _three, "batched": False}

CONFORMANCE = {
    "corollary.adapt.concrete": Case(lambda: _concrete_one, tags={"inputs": partial(_three, count=4), "batched": False}),
    "corollary.adapt.fit_concrete_masks": Case(lambda: _fitted(fit_concrete_masks), tags=_FIT),
    "corollary.adapt.fit_adamerging": Case(lambda: _fitted(fit_adamerging), tags=_FIT),
    "corollary.adapt.average": Case(lambda: _average_two, tags={**_MERGE, "inputs": partial(_three, count=2)}),
    "corollary.adapt.task_arithmetic": Case(lambda: _one_tensor(task_arithmetic), tags=_MERGE),
    "corollary.adapt.ties": Case(lambda: _one_tensor(ties), tags=_MERGE),
}

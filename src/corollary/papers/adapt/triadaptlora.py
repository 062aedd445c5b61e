"""How TriAdaptLoRA's claims are measured."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch import nn

from corollary.adapt import LoRA, RankGrowth, TriAdaptLoRA, adapt
from corollary.adapt.triadaptlora import TriAdaptLoRAAdapter
from corollary.claims import Exact, Paired, Trial, claim
from corollary.papers.adapt import _minilm as task
from corollary.testing import Case

Array = NDArray[np.float64]

# ------------------------------------------------------------------------------------------------------------ conformance


def triadapt_oracle(weight: Array, state: dict[str, Array], config: TriAdaptLoRA) -> Array:
    """The double sum over the acting entries of the core."""
    rank = int(state["active"].sum())
    scale = (config.rank if config.alpha is None else config.alpha) / rank
    total = np.zeros_like(weight)
    for i in range(rank):
        for j in range(rank):
            total += scale * state["lora_C"][i, j] * np.outer(state["lora_B"][:, i], state["lora_A"][j])
    return total


CONFORMANCE = {
    "corollary.adapt.TriAdaptLoRA": Case(
        lambda: TriAdaptLoRA(rank=2, max_rank=3, alpha=3),
        tags={"oracle": triadapt_oracle, "parameters": lambda site: 3 * (site.in_features + site.out_features) + 9},
    ),
}

# ----------------------------------------------------------------------------------------------------------------- claims

TARGET = 6
RATES = (0.0025, 0.005, 0.01, 0.02)
ADALORA_RATES = (0.005, 0.01, 0.02, 0.04)
Train = Callable[[float, int, int], task.Run]


def _after(growth: RankGrowth) -> Callable[[int], None]:
    return lambda step: growth.step()


@lru_cache(maxsize=512)
def grown(lr: float, seed: int, steps: int, threshold: str = "linear", reverse: bool = False) -> task.Run:
    """TriAdaptLoRA from rank 1 to 6 on average, three ranks at a time, decided every fourth step after the fourth."""
    model = adapt(task.encoder(seed), TriAdaptLoRA(rank=1, max_rank=3 * TARGET, alpha=TARGET), task.names())
    kind = InOrder if reverse else RankGrowth
    growth = kind(
        model, target_rank=TARGET, total_steps=steps, warmup=min(4, steps - 1), interval=4, increment=3, threshold=threshold
    )
    run = task.fit(model, lr, seed, steps, after_step=_after(growth))
    return task.Run(run.accuracy, _numbers(model), run.curve)


class InOrder(RankGrowth):
    """A control: one layer, the first, takes all the growth that it can, then the next."""

    def chosen(self, left: int) -> int:
        for adapter in self.adapters.values():
            if adapter.rank < len(adapter.active):
                adapter.grow(min(len(adapter.active), left))
                break
        return 0


def _numbers(model: nn.Module) -> int:
    """Trained numbers that act."""
    total = 0
    for module in model.modules():
        if isinstance(module, TriAdaptLoRAAdapter):
            rank = module.rank
            total += rank * (module.site.in_features + module.site.out_features) + rank**2
    return total


@lru_cache(maxsize=512)
def fixed(lr: float, seed: int, steps: int) -> task.Run:
    """The same core at rank 6 from the start."""
    model = adapt(task.encoder(seed), TriAdaptLoRA(rank=TARGET, max_rank=TARGET), task.names())
    return task.fit(model, lr, seed, steps)


def lora(lr: float, seed: int, steps: int) -> task.Run:
    """LoRA of rank 6."""
    return task.fine_tune(LoRA(rank=TARGET), lr, seed, steps)


@lru_cache(maxsize=512)
def adalora(lr: float, seed: int, steps: int) -> task.Run:
    """peft's AdaLoRA from rank 9 to 6 on average: the budget falls from the eighth step to the middle of training."""
    import peft

    config = peft.AdaLoraConfig(
        init_r=9,
        target_r=TARGET,
        lora_alpha=TARGET,
        tinit=steps // 10,
        tfinal=steps // 2,
        deltaT=max(1, steps // 20),
        total_step=max(4, steps),
        target_modules=[rf"layers.{i}.{name}" for i in range(task.TOP) for name in _layers()],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(task.encoder(seed), config)

    def allocate(step: int) -> None:
        model.base_model.update_and_allocate(step + 1)

    return task.fit(model, lr, seed, steps, after_step=allocate)


def _layers() -> list[str]:
    block = task.docstrings().layers[0]
    return [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]


METHODS: dict[str, tuple[Train, Sequence[float]]] = {
    "grown": (grown, RATES),
    "grown in order": (lambda lr, seed, steps: grown(lr, seed, steps, "linear", True), RATES),
    "fixed": (fixed, RATES),
    "LoRA": (lora, task.RATES["LoRA"]),
    "AdaLoRA": (adalora, ADALORA_RATES),
}
"""``train(lr, seed, steps)`` by name, and the rates that it is tuned over"""


def _tune(baseline: str) -> Callable[..., dict[str, float]]:
    def hook(trial: Trial, method: str = "grown") -> dict[str, float]:
        steps = task.steps_of(trial)
        found = {}
        for key in (method, baseline):
            train, rates = METHODS[key]
            tried = rates[:1] if trial.scale == "smoke" else rates
            scores = {lr: sum(train(lr, trial.seed + i, steps).accuracy for i in range(2)) for lr in tried}
            found[key] = max(scores, key=scores.__getitem__)
        return found

    return hook


def _versus(trial: Trial, method: str, baseline: str) -> Paired:
    steps = task.steps_of(trial)
    ours, other = (METHODS[key][0](trial.tuned[key], trial.seed, steps) for key in (method, baseline))
    trial.log(trainable=ours.trainable, baseline_trainable=other.trainable, rate=trial.tuned[method])
    trial.figure(
        "loss",
        x=list(range(1, steps + 1)),
        y={method: list(ours.curve), baseline: list(other.curve)},
        xlabel="step",
        ylabel="training loss",
    )
    return Paired(ours=ours.accuracy, baseline=other.accuracy)


@claim(control={"method": "grown in order"}, tune=_tune("LoRA"))
def beats_lora(trial: Trial, method: str = "grown") -> Paired:
    """Accuracy against LoRA's."""
    return _versus(trial, method, "LoRA")


@claim(control={"method": "grown in order"}, tune=_tune("AdaLoRA"))
def beats_adalora(trial: Trial, method: str = "grown") -> Paired:
    """Accuracy against AdaLoRA's."""
    return _versus(trial, method, "AdaLoRA")


@claim(control={"method": "grown in order"}, tune=_tune("fixed"))
def growth_beats_fixed_rank(trial: Trial, method: str = "grown") -> Paired:
    """Accuracy with growth against the accuracy of the same core at the final rank from the start."""
    return _versus(trial, method, "fixed")


class Uncut(RankGrowth):
    """A control: every layer that is chosen grows by the whole increment, whatever is left."""

    def step(self) -> None:
        super().step()
        if 0 < self.target - sum(self.ranks.values()) < self.increment:
            for adapter in self.adapters.values():
                adapter.grow(self.increment)


@claim(control={"kind": Uncut})
def ends_at_its_budget(trial: Trial, kind: type[RankGrowth] = RankGrowth) -> Exact:
    """How far the total rank is from its target at the end, over random targets, increments and thresholds on a real encoder."""
    errors = []
    for threshold in ("linear", "exponential", 2):
        target, increment = int(trial.rng.integers(2, 5)), int(trial.rng.integers(2, 5))
        model = adapt(task.encoder(trial.seed), TriAdaptLoRA(rank=1, max_rank=12), task.names())
        steps = trial.pick(smoke=12, laptop=16)
        growth = kind(model, target_rank=target, total_steps=steps, increment=increment, threshold=threshold)
        task.fit(model, 0.005, trial.seed, steps, after_step=_after(growth))
        errors.append(abs(sum(growth.ranks.values()) - target * len(growth.ranks)))
    return Exact(np.array(errors, dtype=float))

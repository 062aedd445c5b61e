"""How RandLoRA's claims are measured."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from corollary.adapt import LoRA, RandLoRA, Site, VeRA
from corollary.claims import Exact, Paired, Trial, claim
from corollary.papers.adapt import _minilm as task
from corollary.testing import Case

Array = NDArray[np.float64]

# ------------------------------------------------------------------------------------------------------------ conformance


def randlora_oracle(weight: Array, state: dict[str, Array], config: RandLoRA) -> Array:
    """The sum over bases, one product of dense diagonal matrices after the other."""
    a, b = state["randlora_A"], state["randlora_B"]
    scale = 20 if config.alpha is None else config.alpha / config.rank
    total = np.zeros((b.shape[0], a.shape[1]))
    for j in range(b.shape[1]):
        total += scale * b[:, j] @ np.diag(state["randlora_lambda"][j]) @ a @ np.diag(state["randlora_gamma"][j])
    return total if weight.shape[0] >= weight.shape[1] else total.T


def vera_oracle(weight: Array, state: dict[str, Array], config: VeRA) -> Array:
    """The product of four dense matrices."""
    change: Array = np.diag(state["vera_lambda_b"]) @ state["vera_B"] @ np.diag(state["vera_lambda_d"]) @ state["vera_A"]
    return change


def _numbers(site: Site) -> int:
    shorter = min(site.out_features, site.in_features)
    return -(-shorter // 3) * (3 + shorter)


CONFORMANCE = {
    "corollary.adapt.RandLoRA": Case(
        lambda: RandLoRA(rank=3, alpha=2), tags={"oracle": randlora_oracle, "parameters": _numbers}
    ),
    "corollary.adapt.VeRA": Case(
        lambda: VeRA(rank=5), tags={"oracle": vera_oracle, "parameters": lambda site: 5 + site.out_features}
    ),
}

# ----------------------------------------------------------------------------------------------------------------- claims

LARGE, SMALL = 16, 128
"""ranks of the bases: 57,600 and 9,216 trained numbers on the encoder's layer"""
VERA = VeRA(rank=256)
RATES = (0.0005, 0.001, 0.002, 0.004)


@dataclass(frozen=True)
class OneBasis(RandLoRA):
    """A control: the first basis in the place of all, which all the same are trained."""

    def prepare(self, sites: Mapping[str, tuple[Site, Tensor]], calibration: Any = None) -> Mapping[str, Any]:
        return {name: (a, b[:, :1].expand_as(b)) for name, (a, b) in super().prepare(sites, calibration).items()}


@claim(control={"kind": OneBasis})
def update_has_full_rank(trial: Trial, kind: type[RandLoRA] = RandLoRA) -> Exact:
    """The shorter side less the numerical rank, over the layers, and any excess of trained numbers over LoRA's."""
    steps = trial.pick(smoke=2, laptop=10)
    model = task.put_on(task.encoder(trial.seed), kind(rank=LARGE), 0.001, trial.seed)
    run = task.fit(model, 0.001, trial.seed, steps)
    lacking = []
    for layer in model.modules():
        held = layer._modules.get("adapters")
        if held is not None:
            # The factors were trained in float32; their product is formed in float64, where rounding is no rank.
            change = copy.deepcopy(held["default"]).double().delta().detach()  # type: ignore[index]
            lacking.append(min(change.shape) - int(torch.linalg.matrix_rank(change)))
    lora = sum(p.numel() for p in task.put_on(task.encoder(trial.seed), LoRA(rank=9), 0.001, 0).parameters() if p.requires_grad)
    trial.log(trainable=run.trainable, lora_trainable=lora)
    return Exact([*map(float, lacking), float(max(0, run.trainable - lora))])


@claim(
    control={"method": OneBasis(rank=LARGE)}, tune=task.tuning(RandLoRA(rank=LARGE), RATES, LoRA(rank=9), task.RATES["LoRA"])
)
def closes_more_of_the_gap_than_lora(trial: Trial, method: RandLoRA = RandLoRA(rank=LARGE)) -> Paired:  # noqa: B008 - frozen
    """Accuracy of RandLoRA against LoRA's."""
    return task.versus(trial, method, LoRA(rank=9))


@claim(control={"method": OneBasis(rank=LARGE)}, tune=task.tuning(RandLoRA(rank=LARGE), RATES, VERA, task.RATES["VeRA"]))
def closes_more_of_the_gap_than_vera(trial: Trial, method: RandLoRA = RandLoRA(rank=LARGE)) -> Paired:  # noqa: B008 - frozen
    """Accuracy of RandLoRA against VeRA's."""
    return task.versus(trial, method, VERA)


def _tune_gains(trial: Trial, kind: type[RandLoRA] = RandLoRA) -> dict[str, float]:
    large = task.tuning(kind(rank=LARGE), RATES, LoRA(rank=9), task.RATES["LoRA"])(trial)
    small = task.tuning(kind(rank=SMALL), RATES, LoRA(rank=2), task.RATES["LoRA"])(trial)
    return {f"{key} {size}": rate for size, found in (("large", large), ("small", small)) for key, rate in found.items()}


@claim(control={"kind": OneBasis}, tune=_tune_gains)
def gains_more_from_more_parameters(trial: Trial, kind: type[RandLoRA] = RandLoRA) -> Paired:
    """What each gains from the larger budget."""
    steps = task.steps_of(trial)
    pairs: dict[str, tuple[Any, Any]] = {"ours": (kind(rank=LARGE), kind(rank=SMALL)), "baseline": (LoRA(rank=9), LoRA(rank=2))}
    gains = {}
    for key, (large, small) in pairs.items():
        ends = [
            task.fine_tune(method, trial.tuned[f"{key} {size}"], trial.seed, steps).accuracy
            for method, size in ((large, "large"), (small, "small"))
        ]
        gains[key] = ends[0] - ends[1]
        trial.log(**{f"{key}_accuracies": ", ".join(f"{a:.3f}" for a in ends)})
    return Paired(ours=gains["ours"], baseline=gains["baseline"])

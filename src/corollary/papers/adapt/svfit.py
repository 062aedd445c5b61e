"""How SVFit's claims are measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from corollary.adapt import AdapterConfig, LoRA, Site, SVFit, adapt
from corollary.adapt.diagonal import need_all
from corollary.adapt.svfit import SVFitAdapter
from corollary.claims import Paired, Ratio, Trial, claim
from corollary.papers.adapt import _minilm as task
from corollary.testing import Case

Array = NDArray[np.float64]

# ------------------------------------------------------------------------------------------------------------ conformance


def svfit_oracle(weight: Array, state: dict[str, Array], config: SVFit) -> Array:
    """The weight rebuilt from its decomposition with the trained values in the place of the leading ones, less the weight."""
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    rank = config.rank or len(s)
    moved = s.copy()
    moved[:rank] = state["sigma"]
    rebuilt: Array = sum(moved[i] * np.outer(u[:, i], vt[i]) for i in range(len(s)))
    return rebuilt - weight


def lora_oracle(weight: Array, state: dict[str, Array], config: LoRA) -> Array:
    """The scaled sum of outer products of B's columns and A's rows."""
    alpha = config.rank if config.alpha is None else config.alpha
    scale = alpha / (config.rank**0.5 if config.use_rslora else config.rank)
    product: Array = sum(np.outer(state["lora_B"][:, i], state["lora_A"][i]) for i in range(config.rank))  # type: ignore[assignment]
    return scale * product


CONFORMANCE = {
    "corollary.adapt.SVFit": Case(lambda: SVFit(rank=3), tags={"oracle": svfit_oracle, "parameters": lambda site: 3}),
    "corollary.adapt.LoRA": Case(
        lambda: LoRA(rank=2, alpha=3, use_rslora=True),
        tags={"oracle": lora_oracle, "parameters": lambda site: 2 * (site.in_features + site.out_features)},
    ),
}

# ----------------------------------------------------------------------------------------------------------------- claims

BASELINE = LoRA(rank=6)
RATES = (0.05, 0.1, 0.2, 0.4)


@dataclass(frozen=True)
class RandomVectors(SVFit):
    """A control: as many numbers, between random orthonormal vectors; the values begin as the weight's singular values."""

    def build(self, site: Site, weight: Tensor, extra: Any = None) -> SVFitAdapter:
        true = super().build(site, weight)
        rank = need_all(self.rank, site)
        left = torch.linalg.qr(torch.randn(site.out_features, rank)).Q
        right = torch.linalg.qr(torch.randn(site.in_features, rank)).Q.T
        return SVFitAdapter(site, left.contiguous(), true.start, right.contiguous())


@claim(control={"method": RandomVectors()}, tune=task.tuning(SVFit(), RATES, BASELINE, task.RATES["LoRA"]))
def matches_lora(trial: Trial, method: SVFit = SVFit()) -> Paired:  # noqa: B008 - frozen
    """Accuracy of SVFit against LoRA's less a point."""
    return task.versus(trial, method, BASELINE, allowance=0.01)


@claim(control={"method": LoRA(rank=1)})
def sixteen_times_fewer(trial: Trial, method: AdapterConfig = SVFit()) -> Ratio:  # noqa: B008 - frozen
    """Trained numbers of both on the linear layers of a Transformer block of random width."""
    width = 32 * int(trial.rng.integers(2, 9))
    shapes = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
    counts = []
    for config in (method, BASELINE):
        block = adapt(nn.ModuleList(nn.Linear(*shape) for shape in shapes), config)
        counts.append(sum(p.numel() for p in block.parameters() if p.requires_grad))
    trial.log(width=width, ours=counts[0], lora=counts[1])
    return Ratio(ours=counts[0], baseline=counts[1])

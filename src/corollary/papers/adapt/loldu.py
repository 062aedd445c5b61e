"""How LoLDU's claims are measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from corollary.adapt import LoLDU, LoRA, Site, adapt
from corollary.adapt.diagonal import DiagonalAdapter, working
from corollary.adapt.loldu import LoLDUAdapter
from corollary.claims import Exact, Paired, Trial, claim
from corollary.papers.adapt import _minilm as task
from corollary.testing import Case

Array = NDArray[np.float64]

# ------------------------------------------------------------------------------------------------------------ conformance


def eliminate(matrix: Array) -> tuple[Array, Array, Array]:
    """Gaussian elimination with partial pivoting, entry by entry: the order of rows, L and U with ``matrix[order] = L U``."""
    upper = matrix.copy()
    m, n = upper.shape
    k = min(m, n)
    order = np.arange(m)
    lower = np.zeros((m, k))
    for j in range(k):
        pivot = j + int(np.argmax(np.abs(upper[j:, j])))
        for array in (upper, lower, order):
            array[[j, pivot]] = array[[pivot, j]]
        lower[j, j] = 1.0
        for i in range(j + 1, m):
            lower[i, j] = upper[i, j] / upper[j, j]
            upper[i] -= lower[i, j] * upper[j]
    return order, lower, upper[:k]  # type: ignore[return-value]


def loldu_oracle(weight: Array, state: dict[str, Array], config: LoLDU) -> Array:
    """What the trained diagonal and scale make of the eliminated weight, less what they made of it at the start."""
    order, lower, upper = eliminate(weight)
    rank = config.rank or len(upper)
    start = (config.alpha or rank) / rank
    change = np.zeros_like(weight)
    for i in range(rank):
        d = upper[i, i]
        change[order] += (float(state["scaling_factor"][0]) * state["z"][i] - start * d) * np.outer(lower[:, i], upper[i] / d)
    return change


CONFORMANCE = {
    "corollary.adapt.LoLDU": Case(lambda: LoLDU(rank=3, alpha=1.5), tags={"oracle": loldu_oracle, "parameters": lambda site: 4})
}

# ----------------------------------------------------------------------------------------------------------------- claims

BASELINE = LoRA(rank=34)
RATES = (0.0025, 0.005, 0.01, 0.02)


@dataclass(frozen=True)
class Unpermuted(LoLDU):
    """A control: the triangles without the permutation that makes them the weight's."""

    def build(self, site: Site, weight: Tensor, extra: Any = None) -> LoLDUAdapter:
        true = super().build(site, weight)
        lower = torch.linalg.lu(working(site.matrix(weight))).L[:, : true.start.numel()]
        true.left = lower.to(weight.dtype).contiguous()
        return true


@claim(control={"method": Unpermuted()}, tune=task.tuning(LoLDU(), RATES, BASELINE, task.RATES["LoRA"]))
def within_a_point_of_lora(trial: Trial, method: LoLDU = LoLDU()) -> Paired:  # noqa: B008 - frozen
    """Accuracy of LoLDU against LoRA's less a point."""
    return task.versus(trial, method, BASELINE, allowance=0.01)


@claim(control={"method": Unpermuted()})
def starts_as_the_model(trial: Trial, method: LoLDU = LoLDU()) -> Exact:  # noqa: B008 - frozen
    """Outputs before and after, and each weight against its factors' product."""
    data = task.docstrings()
    chosen = torch.randperm(len(data.labels), generator=trial.generator)[: trial.pick(smoke=4, laptop=64)]
    model = task.encoder(trial.seed).eval()
    with torch.no_grad():
        before = model(data.hidden[chosen], data.mask[chosen])
        adapt(model, method, task.names())
        after = model(data.hidden[chosen], data.mask[chosen])
        errors = [float((after - before).abs().max() / before.abs().max())]
        for _, layer in model.layers.named_modules():
            if hasattr(layer, "adapters"):
                adapter = cast(DiagonalAdapter, layer.adapters["default"])
                weight = adapter.site.matrix(layer.weight)
                rebuilt = (adapter.left * adapter.start) @ adapter.right  # type: ignore[operator]
                errors.append(float((rebuilt - weight).norm() / weight.norm()))
    return Exact(errors)

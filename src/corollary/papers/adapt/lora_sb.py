"""How LoRA-SB's claims are measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from corollary.adapt import LoRA, LoRASB, LoRAXS, Site, adapt, mean_gradients
from corollary.adapt.lora_sb import LoRASBAdapter
from corollary.claims import Exact, Paired, Trial, claim
from corollary.papers.adapt import _minilm as task
from corollary.testing import Case

Array = NDArray[np.float64]

# ------------------------------------------------------------------------------------------------------------ conformance


def core_oracle(weight: Array, state: dict[str, Array], config: LoRASB) -> Array:
    """The double sum over the core's entries; the bases must be orthonormal."""
    b, r, a = state["lora_B"], state["lora_R"], state["lora_A"]
    assert np.abs(b.T @ b - np.eye(len(r))).max() < 1e-9
    assert np.abs(a @ a.T - np.eye(len(r))).max() < 1e-9
    change: Array = sum(r[i, j] * np.outer(b[:, i], a[j]) for i in range(len(r)) for j in range(len(r)))
    return change


def xs_oracle(weight: Array, state: dict[str, Array], config: LoRAXS) -> Array:
    """Between the singular vectors of the weight, whose signs are taken from the adapter: the core does not know them."""
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    rank = config.rank
    sign = np.sign((vt[:rank] * state["lora_A"]).sum(1))
    scale = 1.0 if config.alpha is None else config.alpha / rank
    return scale * (u[:, :rank] * s[:rank] * sign) @ state["lora_R"] @ (sign[:, None] * vt[:rank])  # type: ignore[no-any-return]


def _random_gradients(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64).to(layer.weight)
        for name, layer in model.named_modules()
        if isinstance(getattr(layer, "weight", None), Tensor)
    }


CONFORMANCE = {
    "corollary.adapt.LoRASB": Case(
        lambda: LoRASB(rank=3, lr=0.01),
        tags={
            "oracle": core_oracle,
            "parameters": lambda site: 9,
            "identity": False,
            "calibration": _random_gradients,
        },
    ),
    "corollary.adapt.LoRAXS": Case(
        lambda: LoRAXS(rank=3, alpha=2), tags={"oracle": xs_oracle, "parameters": lambda site: 9, "identity": 1e-3}
    ),
}

# ------------------------------------------------------------------------------------------------------------ identities


def _gradients(seed: int, texts: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Gradients of a real encoder's weights over training texts of this seed's split."""
    data = task.docstrings()
    model = task.encoder(seed).to(dtype)
    chosen = task.split(seed)[0][:texts]
    hidden = data.hidden.to(dtype)
    return mean_gradients(
        model,
        lambda i: cross_entropy(model(hidden[i], data.mask[i]), data.labels[i]),
        chosen.split(max(1, texts // 4)),  # type: ignore[no-untyped-call]
        task.names(),
    )


def _best(matrix: Array, rank: int) -> Array:
    u, s, vt = np.linalg.svd(matrix)
    best: Array = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return best


@claim(control={"from_weight": True})
def first_update_is_best_of_its_rank(trial: Trial, from_weight: bool = False) -> Exact:
    """The distance between the update at the start and the truncated decomposition of the first step, over a block's layers."""
    model = task.encoder(trial.seed).double()
    gradients = _gradients(trial.seed, trial.pick(smoke=4, laptop=40), torch.float64)
    lr, rank, errors = 0.001, int(trial.rng.integers(1, 25)), []
    adapt(model, LoRASB(rank=rank, lr=lr), task.names(), calibration=gradients)
    for name, layer in list(model.named_modules()):
        if not hasattr(layer, "adapters"):
            continue
        step = -lr * np.sign(gradients[name].numpy())
        update = layer.adapters["default"].delta().detach().numpy()
        if from_weight:
            u, _, vt = np.linalg.svd(layer.weight.detach().numpy(), full_matrices=False)
            u, vt = u[:, :rank], vt[:rank]
            update = u @ (u.T @ step @ vt.T) @ vt
        best = _best(step, rank)
        errors.append(float(np.linalg.norm(update - best) / np.linalg.norm(best)))
    trial.log(rank=rank)
    return Exact(errors)


@claim(control={"scaled": True})
def gradient_is_best_of_its_rank(trial: Trial, scaled: bool = False) -> Exact:
    """B g A, with g the core's gradient from autograd, against the truncated decomposition of the weight's gradient."""
    data = task.docstrings()
    texts = trial.pick(smoke=4, laptop=40)
    model = task.encoder(trial.seed).double()
    gradients = _gradients(trial.seed, texts, torch.float64)
    rank = int(trial.rng.integers(1, 25))
    adapt(model, LoRASB(rank=rank, lr=0.0, step="gradient"), task.names(), calibration=gradients)
    adapters = {name: layer.adapters["default"] for name, layer in model.named_modules() if hasattr(layer, "adapters")}
    if scaled:
        for name, adapter in adapters.items():
            adapter.lora_B.mul_(torch.linalg.svdvals(adapter.site.matrix(gradients[name]))[:rank] * 100)
    chosen = task.split(trial.seed)[0][:texts]
    cross_entropy(model(data.hidden[chosen].double(), data.mask[chosen]), data.labels[chosen]).backward()  # type: ignore[no-untyped-call]
    errors = []
    for name, adapter in adapters.items():
        step = (adapter.lora_B @ adapter.lora_R.grad @ adapter.lora_A).detach().numpy()
        best = _best(gradients[name].numpy(), rank)
        errors.append(float(np.linalg.norm(step - best) / np.linalg.norm(best)))
    trial.log(rank=rank)
    return Exact(errors)


# -------------------------------------------------------------------------------------------------------------- accuracy

LORA, XS = LoRA(rank=6), LoRAXS(rank=16)
RATES = (0.005, 0.01, 0.02, 0.04)


@dataclass(frozen=True)
class _Random(LoRASB):
    """A control: a random matrix in the place of the gradient."""

    def build(self, site: Site, weight: Tensor, extra: Any = None) -> LoRASBAdapter:
        return super().build(site, weight, torch.randn_like(weight))


def lora_sb(model: nn.Module, lr: float, seed: int) -> nn.Module:
    """LoRA-SB of rank 16 from the gradients of 200 training texts."""
    return adapt(model, LoRASB(rank=16, lr=lr / 8), task.names(), calibration=_gradients(seed, 200))


def random_bases(model: nn.Module, lr: float, seed: int) -> nn.Module:
    """The control: the same rank, bases and first step from noise."""
    return adapt(model, _Random(rank=16, lr=lr / 8), task.names(), calibration=_gradients(seed, 200))


@claim(control={"method": random_bases}, tune=task.tuning(lora_sb, RATES, XS, task.RATES["LoRAXS"]))
def beats_lora_xs(trial: Trial, method: task.Method = lora_sb) -> Paired:
    """Accuracy of LoRA-SB against LoRA-XS's."""
    return task.versus(trial, method, XS)


@claim(control={"method": random_bases}, tune=task.tuning(lora_sb, RATES, LORA, task.RATES["LoRA"]))
def beats_lora_with_27_times_fewer(trial: Trial, method: task.Method = lora_sb) -> Paired:
    """Accuracy of LoRA-SB against LoRA's."""
    return task.versus(trial, method, LORA)

"""How the claims on scalable neural network kernels are measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corollary.adapt import (
    Adapter,
    AdapterConfig,
    BundledSNNK,
    Site,
    SNNKAdapter,
    SNNKLinear,
    urf_input,
    urf_weight,
)
from corollary.adapt.snnk_adapter import SNNKAdapterModule
from corollary.claims import Exact, Paired, Slope, Trial, claim
from corollary.data import tabular
from corollary.papers.adapt import _minilm as task
from corollary.testing import Case

# ------------------------------------------------------------------------------------------------------------ conformance

_GENERATOR = torch.Generator().manual_seed(0)
_DIRECTIONS = torch.randn(7, 5, generator=_GENERATOR, dtype=torch.float64)
_FREQUENCIES = torch.randn(7, generator=_GENERATOR, dtype=torch.float64)


def _rows(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return ((torch.randn(4, 5, generator=generator, dtype=torch.float64) / 2).to(dtype),)


def _rows_and_bias(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (*_rows(generator, dtype), torch.randn(4, generator=generator, dtype=torch.float64).to(dtype))


def _weight_map(weight: Tensor, bias: Tensor) -> Tensor:
    return urf_weight(weight, _DIRECTIONS, _FREQUENCIES, bias, damping=0.1, balance=1.5)


_DTYPES = (torch.bfloat16, torch.float32, torch.float64)
_MAP_TAGS = {"dtypes": _DTYPES, "empty": False}


def _numbers(site: Site) -> int:
    return site.out_features * (3 + 1) + 3 * 6


CONFORMANCE = {
    "corollary.adapt.urf_input": Case(
        lambda: partial(urf_input, directions=_DIRECTIONS, frequencies=_FREQUENCIES, damping=0.1, balance=1.5),
        tags={"inputs": _rows, **_MAP_TAGS},
    ),
    "corollary.adapt.urf_weight": Case(lambda: _weight_map, tags={"inputs": _rows_and_bias, **_MAP_TAGS}),
    "corollary.adapt.SNNKLinear": Case(
        lambda: SNNKLinear(9, 5, 12, activation="sin", balance=1.5), tags={"inputs": ((9,),), "output": (5,)}
    ),
    "corollary.adapt.BundledSNNK": Case(
        lambda: BundledSNNK(9, 5, (12, 8), activation="relu"), tags={"inputs": ((9,),), "output": (5,)}
    ),
    "corollary.adapt.SNNKAdapter": Case(
        lambda: SNNKAdapter(num_features=6, rank=3), tags={"oracle": None, "parameters": _numbers, "mergeable": False}
    ),
}

# ------------------------------------------------------------------------------------------------------- kernel estimates

Map = Callable[..., Tensor]


def uncorrected(
    weight: Tensor, directions: Tensor, frequencies: Tensor, bias: Tensor, balance: float = 1.0, **options: float
) -> Tensor:
    """A control: the weights' features without the factor exp(-|z|²/2) of Λ, that makes the mean that of the wave."""
    features = urf_weight(weight, directions, frequencies, bias, balance=balance, **options)
    factor = torch.exp(weight.square().sum(-1, keepdim=True) * (frequencies.abs() * (balance**2 / 2)))
    return features * torch.cat([factor, factor], -1)


NODES = 96


@claim(control={"weight_map": uncorrected})
def kernel_estimate_is_unbiased(trial: Trial, weight_map: Map = urf_weight) -> Exact:
    """The estimate's expectation over the directions, by Gauss-Hermite quadrature in the plane, against f(W x + b)."""
    points, weights = np.polynomial.hermite_e.hermegauss(NODES)
    weights = weights / weights.sum()
    directions = torch.tensor(np.stack([a.ravel() for a in np.meshgrid(points, points)], 1))
    mass = torch.tensor(np.outer(weights, weights).ravel())
    draws = trial.pick(smoke=4, laptop=32)
    x = torch.randn(draws, 2, generator=trial.generator, dtype=torch.float64)
    w = torch.randn(draws, 2, generator=trial.generator, dtype=torch.float64)
    b = torch.randn(draws, generator=trial.generator, dtype=torch.float64)
    z = x @ w.T + b
    errors = []
    for phase, activation in ((0.0, torch.cos), (-torch.pi / 2, torch.sin)):
        for damping, balance in ((0.0, 1.0), (0.05, 1.5)):
            # Features carry m^-1/2 of a plain average; with m · mass in the place of it their product is the expectation.
            options = {"damping": damping, "balance": balance}
            ones = torch.ones(len(mass), dtype=torch.float64)
            phi = urf_input(x, directions, ones, **options)
            psi = weight_map(w, directions, ones, b, phase=phase, **options)
            expectation = (phi * (mass * len(mass)).repeat(2)) @ psi.T
            errors.append(float((expectation - activation(z)).abs().max()))
    return Exact(errors)


SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@claim(control={"weight_map": uncorrected})
def error_falls_with_the_root_of_features(trial: Trial, weight_map: Map = urf_weight) -> Slope:
    """Root mean square error of the kernel over pairs, with draws of its own for each repetition."""
    dim, pairs, repeats = 16, 32, trial.pick(smoke=4, laptop=48)
    generator = trial.generator
    x = torch.randn(pairs, dim, generator=generator, dtype=torch.float64) / 6
    w = torch.randn(pairs, dim, generator=generator, dtype=torch.float64) / 6
    b = torch.randn(pairs, generator=generator, dtype=torch.float64)
    true = torch.exp(-(x @ w.T + b).square() / 2)
    errors = []
    for m in SIZES:
        squared = []
        for _ in range(repeats):
            directions = torch.randn(m, dim, generator=generator, dtype=torch.float64)
            frequencies = torch.randn(m, generator=generator, dtype=torch.float64)
            estimate = urf_input(x, directions, frequencies) @ weight_map(w, directions, frequencies, b).T
            squared.append((estimate - true).square().mean())
        errors.append(float(torch.stack(squared).mean().sqrt()))
    trial.figure("error", x=SIZES, y={"root mean square error": errors}, xlabel="draws", ylabel="error", log="xy")
    return Slope(SIZES, errors)


# --------------------------------------------------------------------------------------------------------------- adapters


class BottleneckModule(Adapter):
    """y + U max(D y + a, 0) + b on a layer's output y: the adapter that SNNK's stands for."""

    def __init__(self, site: Site, rank: int, like: Tensor) -> None:
        super().__init__(site)
        self.down = nn.Linear(site.out_features, rank, device=like.device, dtype=like.dtype)
        self.up = nn.Linear(rank, site.out_features, device=like.device, dtype=like.dtype)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        changed: Tensor = out + self.up(F.relu(self.down(out)))
        return changed


@dataclass(frozen=True)
class Bottleneck(AdapterConfig):
    """The baseline: Houlsby's bottleneck adapter, started as the authors' comparison starts it (kaiming below, zero above)."""

    supports: ClassVar[frozenset[str]] = frozenset({"linear"})

    rank: int = 48

    def build(self, site: Site, weight: Tensor, extra: object = None) -> BottleneckModule:
        return BottleneckModule(site, self.rank, weight)


TARGETS = ("output.dense",)
"""the second layer of the feed-forward network and attention's output: where Houlsby's adapters sit"""
BASELINE = Bottleneck(rank=48)
SNNK = SNNKAdapter(num_features=192, rank=12, activation="sin")
RATES: dict[str, tuple[float, ...]] = {"ours": (0.0075, 0.015, 0.03, 0.06), "baseline": (0.0025, 0.005, 0.01, 0.02)}
ALLOWANCE = 0.02


@dataclass(frozen=True)
class Unlinked(SNNKAdapter):
    """A control: each text gets the features of the next one in the batch, so that Φ's link with the input is cut."""

    def build(self, site: Site, weight: Tensor, extra: Any = None) -> SNNKAdapterModule:
        adapter = super().build(site, weight, extra)
        adapter.features.register_forward_hook(lambda features, args, out: out.roll(1, 0))
        return adapter


def _accuracy(trial: Trial, method: AdapterConfig, lr: float, seed: int) -> task.Run:
    return task.fine_tune(method, lr, seed, task.steps_of(trial), TARGETS)


def _tune_adapters(trial: Trial, method: SNNKAdapter = SNNK) -> dict[str, float]:
    found = {}
    for key, tried in (("ours", method), ("baseline", BASELINE)):
        rates = RATES[key]
        if trial.scale == "smoke":
            found[key] = rates[0]
        else:
            found[key] = max(rates, key=lambda lr: sum(_accuracy(trial, tried, lr, trial.seed + i).accuracy for i in range(2)))
    return found


@claim(control={"method": Unlinked(num_features=192, rank=12, activation="sin")}, tune=_tune_adapters)
def a_fifth_of_the_parameters(trial: Trial, method: SNNKAdapter = SNNK) -> Paired:
    """Accuracy of an SNNK adapter against that of a bottleneck adapter five times its size, less an allowance."""
    ours = _accuracy(trial, method, trial.tuned["ours"], trial.seed)
    other = _accuracy(trial, BASELINE, trial.tuned["baseline"], trial.seed)
    small = _accuracy(trial, Bottleneck(rank=9), trial.tuned["baseline"], trial.seed)
    assert 5 * ours.trainable <= other.trainable
    trial.log(
        ours_trainable=ours.trainable,
        baseline_trainable=other.trainable,
        rate=trial.tuned["ours"],
        baseline_rate=trial.tuned["baseline"],
        baseline_accuracy=other.accuracy,
        bottleneck_of_our_size_trainable=small.trainable,
        bottleneck_of_our_size_accuracy=small.accuracy,
    )
    return Paired(ours=ours.accuracy, baseline=other.accuracy - ALLOWANCE)


# --------------------------------------------------------------------------------------------------------------- bundling


class UnbundledEnd(BundledSNNK):
    """A control: the last activation stays outside the kernel, so that the output is not linear in what is fitted."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(super().forward(x))


@claim(control={"kind": UnbundledEnd})
def bundled_regression_in_closed_form(trial: Trial, kind: type[BundledSNNK] = BundledSNNK) -> Exact:
    """The loss's gradient at the closed form, by backpropagation, and how far the loss stands above numpy's least squares."""
    data = tabular("diabetes", seed=trial.seed)
    scale = data.train_y.double().std()
    x = data.train_x.double() / data.train_x.shape[1] ** 0.5 / 2
    y = (data.train_y.double().reshape(-1, 1) - data.train_y.double().mean()) / scale
    errors = []
    for activation, ridge in (("relu", 0.0), ("relu", 1e-2), ("cos", 1e-2), ("sin", 1e-2)):
        network = kind(x.shape[1], 1, (64, 32), activation=activation).double()
        network.fit(x, y, ridge=ridge)
        loss = (network(x) - y).square().sum() + ridge * network.weight.square().sum()
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        phi = network.features(x).numpy()
        # Relative to the gradient at zero, where the residual is the target itself.
        size = float(np.linalg.norm(2 * phi.T @ y.numpy()))
        errors.append(float(torch.cat([g.flatten() for g in gradients]).norm()) / size)
        rows = np.sqrt(ridge) * np.eye(phi.shape[1], phi.shape[1] + 1)
        stacked = np.vstack([np.hstack([phi, np.ones((len(phi), 1))]), rows])
        wanted = np.vstack([y.numpy(), np.zeros((len(rows), 1))])
        best = stacked @ np.linalg.lstsq(stacked, wanted, rcond=None)[0] - wanted
        errors.append(abs(float(loss.detach()) / float((best**2).sum()) - 1))
    return Exact(errors)

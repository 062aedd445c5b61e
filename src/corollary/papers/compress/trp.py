"""How trained rank pruning's claims are measured."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.optim import SGD, AdamW

from corollary.claims import Paired, Trial, claim
from corollary.compress import TrainedRankPruning, rank_pruning_groups
from corollary.papers.compress._small_gpt import RATIOS, factorized_gpt, fresh_gpt, pretrain, stream_of, validation_loss
from corollary.papers.compress._small_nets import accuracy, factorized, fit, fresh, split_of
from corollary.testing import Case
from corollary.testing.optimizer import Problem

Array = NDArray[np.float64]

# ------------------------------------------------------------------------------------------------------------ conformance


def make_trp(params: Any, lr: float = 0.05, **options: Any) -> TrainedRankPruning:
    """The wrapper around SGD with momentum, as the paper trains."""
    return TrainedRankPruning(params, SGD, lr=lr, **{"momentum": 0.9, **options})


def _cut(weight: Array, energy: float, scheme: str) -> tuple[Array, Array]:
    """Truncation and nuclear direction from numpy's decomposition, one singular value after the other."""
    matrix = weight
    if weight.ndim == 4:
        n, c, h, w = weight.shape
        matrix = weight.reshape(n, -1) if scheme == "channel" else weight.transpose(1, 2, 0, 3).reshape(c * h, n * w)
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    cut, direction, kept = np.zeros_like(matrix), np.zeros_like(matrix), 0.0
    for i in range(len(s)):
        if kept >= energy * (s**2).sum():
            break
        cut += s[i] * np.outer(u[:, i], vh[i])
        direction += np.outer(u[:, i], vh[i])
        kept += s[i] ** 2
    if weight.ndim == 4 and scheme == "spatial":
        n, c, h, w = weight.shape
        return cut.reshape(c, h, n, w).transpose(2, 0, 1, 3), direction.reshape(c, h, n, w).transpose(2, 0, 1, 3)
    return cut.reshape(weight.shape), direction.reshape(weight.shape)


def trp_oracle(
    problem: Problem,
    steps: int,
    lr: float = 0.05,
    momentum: float = 0.9,
    period: int = 20,
    energy: float = 0.9,
    nuclear_weight: float = 3e-4,
    scheme: str = "channel",
) -> list[list[Array]]:
    """The authors' loop over one weight after the other, in numpy."""
    params = [p.copy() for p in problem.start]
    buffers: list[Array | None] = [None] * len(params)
    extra: list[Array | float] = [0.0] * len(params)
    path = []
    for t in range(1, steps + 1):
        for i, g in enumerate(problem.gradient(params)):
            full = g + nuclear_weight * np.asarray(extra[i])
            before = buffers[i]
            buffers[i] = now = full if before is None else momentum * before + full
            params[i] = params[i] - lr * now
            extra[i] = 0.0
        if t % period == 0:
            for i, p in enumerate(params):
                if p.ndim > 1:
                    params[i], extra[i] = _cut(p, energy, scheme)
        path.append([p.copy() for p in params])
    return path


CONFORMANCE = {
    "corollary.compress.TrainedRankPruning": Case(
        make_trp,
        tags={
            "oracle": trp_oracle,
            "options": (
                {},
                {"period": 3, "energy": 0.8, "nuclear_weight": 0.2},
                {"period": 4, "energy": 0.6, "nuclear_weight": 0.1, "scheme": "spatial", "lr": 0.02, "momentum": 0.5},
                {"period": 1, "energy": 0.95},
            ),
            "tolerance": 1e-8,
            "fsdp2": "refused",
        },
    )
}


# --------------------------------------------------------------------------------------------------------------- networks

RATE, PERIOD, ENERGY, CAP = 0.3, 5, 0.9, 0.4
WHOLE = ("head", "stem")  # as the authors leave the first convolution and the classifier whole


@lru_cache(maxsize=128)
def _trained(
    seed: int, epochs: int, energy: float | None, scheme: str, nuclear_weight: float = 3e-4, cap: float = CAP
) -> tuple[float, float, float]:
    """Accuracy before and after factorization under the cap, and the share of products left; energy None is plain SGD."""
    split = split_of("digits", seed)
    net = fresh("digits", seed)
    options: dict[str, Any] = {"lr": RATE, "momentum": 0.9, "weight_decay": 1e-3}
    optimizer: Any
    if energy is None:
        optimizer = SGD(net.parameters(), **options)
    else:
        groups = rank_pruning_groups(net, scheme=scheme, skip=WHOLE)
        own: dict[str, Any] = {"period": PERIOD, "energy": energy, "nuclear_weight": nuclear_weight}
        optimizer = TrainedRankPruning(groups, SGD, **own, **options)
    fit(net, optimizer, split, epochs, seed)
    smaller, share = factorized(net, split, cap, scheme, WHOLE)
    return accuracy(net, split), accuracy(smaller, split), share


def _epochs(trial: Trial) -> int:
    return trial.pick(smoke=2, laptop=10, full=40)


def _log(trial: Trial, **runs: tuple[float, float, float]) -> None:
    for name, (before, after, share) in runs.items():
        trial.log(**{f"{name}_before": before, f"{name}_after": after, f"{name}_share": share})


@claim(control={"energy": 1.0})
def loses_under_half_a_point(trial: Trial, energy: float = ENERGY) -> Paired:
    """Points that factorization under the cap costs a network trained by TRP, against half a point."""
    ours = _trained(trial.seed, _epochs(trial), energy, "channel")
    _log(trial, trp=ours)
    return Paired(ours=ours[0] - ours[1], baseline=0.5)


def _lost(trial: Trial, energy: float, scheme: str) -> Paired:
    ours = _trained(trial.seed, _epochs(trial), energy, scheme)
    plain = _trained(trial.seed, _epochs(trial), None, scheme)
    _log(trial, trp=ours, plain=plain)
    return Paired(ours=ours[0] - ours[1], baseline=plain[0] - plain[1])


@claim(control={"energy": 1.0})
def plain_training_loses_many(trial: Trial, energy: float = ENERGY) -> Paired:
    """Points lost by TRP's network against those lost by a plainly trained one, both under the cap; channel-wise."""
    return _lost(trial, energy, "channel")


@claim(control={"energy": 1.0})
def spatial_scheme_too(trial: Trial, energy: float = ENERGY) -> Paired:
    """The same with the spatial decomposition."""
    return _lost(trial, energy, "spatial")


@claim(control={"energy": 1.0})
def more_accurate_at_equal_flops(trial: Trial, energy: float = ENERGY) -> Paired:
    """Accuracy under the cap, of TRP's network and of a plainly trained one."""
    ours = _trained(trial.seed, _epochs(trial), energy, "channel")
    plain = _trained(trial.seed, _epochs(trial), None, "channel")
    _log(trial, trp=ours, plain=plain)
    return Paired(ours=ours[1], baseline=plain[1])


@claim(control={"nuclear_weight": 0.0})
def nuclear_term_lowers_rank(trial: Trial, nuclear_weight: float = 0.1) -> Paired:
    """Share of products that the factorized network has, with the nuclear sub-gradient and without."""
    ours = _trained(trial.seed, _epochs(trial), ENERGY, "channel", nuclear_weight, 1.0)
    without = _trained(trial.seed, _epochs(trial), ENERGY, "channel", 0.0, 1.0)
    _log(trial, nuclear=ours, without=without)
    return Paired(ours=ours[2], baseline=without[2])


# -------------------------------------------------------------------------------------------------------------- language


GPT_PERIOD, GPT_ENERGY = 10, 0.95
GPT_RATE = 0.008


@lru_cache(maxsize=64)
def _language(seed: int, steps: int, energy: float | None) -> dict[float, float]:
    """Validation loss by the share of the blocks' weights that is left, 1 for the whole model; energy None is plain AdamW."""
    stream = stream_of(seed)
    net = fresh_gpt(seed)
    optimizer: Any
    if energy is None:
        optimizer = AdamW(net.parameters(), lr=GPT_RATE)
    else:
        groups = rank_pruning_groups(net, skip=["head"])
        optimizer = TrainedRankPruning(groups, AdamW, lr=GPT_RATE, period=GPT_PERIOD, energy=energy, nuclear_weight=3e-4)
    pretrain(net, optimizer, stream, steps, seed)
    return {1.0: validation_loss(net, stream)} | {r: validation_loss(factorized_gpt(net, r), stream) for r in RATIOS}


@claim(control={"energy": 1.0})
def language_model_at_a_tenth(trial: Trial, energy: float = GPT_ENERGY) -> Paired:
    """Validation loss of a LLaMA with a tenth of its blocks' weights: trained by TRP, and by AdamW with SVD after it."""
    steps = trial.pick(smoke=20, laptop=200, full=3000)
    ours, plain = _language(trial.seed, steps, energy), _language(trial.seed, steps, None)
    trial.figure(
        "perplexity",
        x=list(ours),
        y={"TRP": np.exp(list(ours.values())).tolist(), "SVD after training": np.exp(list(plain.values())).tolist()},
        xlabel="share of the blocks' weights",
        ylabel="perplexity of a byte",
        log="y",
    )
    return Paired(ours=ours[0.1], baseline=plain[0.1])

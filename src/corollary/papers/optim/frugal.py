"""How FRUGAL's claims are measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from corollary.claims import Exact, Paired, Trial, claim
from corollary.data import digits
from corollary.models import MLP
from corollary.optim import BAdam, Frugal, low_rank_groups, state_bytes
from corollary.papers.optim._low_rank import Array, best_rate, column_basis, pretrain, projected_oracle, signed, steps_of
from corollary.testing import Case
from corollary.testing.optimizer import Problem

BUDGETS = (0.125, 0.25)
GALORE_RANKS = {0.125: 7, 0.25: 13}
"""GaLore's rank at each budget: the smallest whose state takes no fewer bytes than Frugal's"""
RATES = (0.002, 0.004, 0.008, 0.016, 0.032)


def _size(method: str, density: float) -> float:
    return GALORE_RANKS[density] if method == "GaLore" else density


# ------------------------------------------------------------------------------------------------------------ conformance


def make_frugal(params: Any, lr: float = 0.02, density: float = 0.5, projector: str = "columns", **options: Any) -> Frugal:
    """Frugal on half of the columns."""
    return Frugal(params, lr, density=density, projector=projector, **{"seed": 3, **options})


def make_badam(params: Any, lr: float = 0.05, **options: Any) -> BAdam:
    """BAdam with every matrix active, so that one that is added or alone takes part at once."""
    return BAdam(params, lr, active=1.0, **{"seed": 3, **options})


def frugal_oracle(
    problem: Problem,
    steps: int,
    lr: float = 0.02,
    density: float = 0.5,
    residual: str = "sign",
    residual_lr_scale: float = 1.0,
    **options: Any,
) -> list[list[Array]]:
    """Adam on the drawn columns, the rest by its sign or as it is, moments from zero at every draw; in numpy."""

    def choose(matrix: Array, rank: int, index: int, refreshes: int, seed: int) -> tuple[Array, int]:
        return column_basis(matrix, int(density * matrix.shape[1]), index, refreshes, seed)

    def plain(rest: Array, *_: Any) -> Array:
        return residual_lr_scale * rest

    rule = signed(residual_lr_scale) if residual == "sign" else plain
    return projected_oracle(problem, steps, lr, seed=3, choose=choose, rest=rule, reset=True, **options)


def badam_oracle(
    problem: Problem, steps: int, lr: float = 0.05, update_proj_gap: int = 100, **options: Any
) -> list[list[Array]]:
    """With everything active: AdamW that forgets its moments of matrices at every turn."""

    def choose(matrix: Array, rank: int, index: int, refreshes: int, seed: int) -> tuple[Array, int]:
        return np.eye(matrix.shape[1]), 1

    return projected_oracle(problem, steps, lr, choose=choose, reset=True, update_proj_gap=update_proj_gap, **options)


_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-2, "weight_decay": 0.1, "update_proj_gap": 3},
)

CONFORMANCE = {
    "corollary.optim.Frugal": Case(
        make_frugal,
        tags={
            "oracle": frugal_oracle,
            "options": (
                *_OPTIONS,
                {"density": 0.75, "residual_lr_scale": 0.5, "update_proj_gap": 4},
                {"residual": "sgd", "residual_lr_scale": 0.3, "scale": 0.5},
            ),
            "fsdp2": "refused",
            "tolerance": 1e-8,
        },
    ),
    "corollary.optim.BAdam": Case(
        make_badam, tags={"oracle": badam_oracle, "options": _OPTIONS, "fsdp2": "refused", "tolerance": 1e-8}
    ),
}


# ----------------------------------------------------------------------------------------------------------- pre-training


def _hook(baseline: str) -> Callable[..., dict[str, float]]:
    def hook(trial: Trial, method: str = "Frugal", **_: Any) -> dict[str, float]:
        return {
            f"{name} {density}": best_rate(trial, name, _size(name, density), RATES)
            for name in (method, baseline)
            for density in BUDGETS
        }

    return hook


def _at_every_budget(trial: Trial, method: str, baseline: str) -> Paired:
    steps, gaps = steps_of(trial), []
    for density in BUDGETS:
        ours = pretrain(method, trial.tuned[f"{method} {density}"], trial.seed, steps, _size(method, density))
        other = pretrain(baseline, trial.tuned[f"{baseline} {density}"], trial.seed, steps, _size(baseline, density))
        gaps.append((ours.loss - other.loss, ours.loss, other.loss))
        trial.log(**{f"ours_{density}": ours.loss, f"{baseline}_{density}": other.loss})
        trial.log(**{f"ours_bytes_{density}": ours.state_bytes, f"{baseline}_bytes_{density}": other.state_bytes})
    _, ours_loss, other_loss = max(gaps)
    return Paired(ours=ours_loss, baseline=other_loss)


@claim(control={"method": "Frugal, signs misplaced"}, tune=_hook("GaLore"))
def beats_galore_at_every_budget(trial: Trial, method: str = "Frugal") -> Paired:
    """The budget at which Frugal fares worst against GaLore."""
    return _at_every_budget(trial, method, "GaLore")


@claim(control={"method": "BAdam, drawn otherwise"}, tune=_hook("BAdam"))
def beats_badam_at_every_budget(trial: Trial, method: str = "Frugal") -> Paired:
    """The budget at which Frugal fares worst against BAdam."""
    return _at_every_budget(trial, method, "BAdam")


# ------------------------------------------------------------------------------------------------------------------ bytes


def _after_a_step(density: float, projector: str, hidden: list[int], seed: int) -> tuple[Frugal, list[Tensor], int]:
    """An optimizer after one step on digits, the weights it projects, and the bytes of AdamW's state on all else."""
    data = digits(seed=seed, flat=True)
    net = MLP(64, hidden, 10)
    optimizer = Frugal(low_rank_groups(net, rank=density), projector=projector, seed=seed)
    loss: Tensor = nn.functional.cross_entropy(net(data.train_x[:64]), data.train_y[:64])
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    weights = list(optimizer.param_groups[0]["params"])
    return optimizer, weights, sum(2 * 4 * p.numel() for p in net.parameters() if p.dim() == 1)


@claim(control={"everything": True})
def state_bytes_equal_formula(trial: Trial, everything: bool = False) -> Exact:
    """Bytes counted after a step on digits, against the formulas, for random widths and densities."""
    density, seed = float(trial.rng.uniform(0.1, 0.6)), int(trial.rng.integers(1000))
    hidden = [int(trial.rng.integers(20, 90)) for _ in range(2)]
    used = 1.0 if everything else density

    optimizer, weights, rest = _after_a_step(used, "columns", hidden, seed)
    kept = [max(1, math.floor(density * w.shape[1])) for w in weights]
    columns = rest + sum(2 * 4 * w.shape[0] * k + 4 * k for w, k in zip(weights, kept, strict=True))
    errors = [abs(state_bytes(optimizer) - columns) / columns]

    optimizer, weights, rest = _after_a_step(used, "blocks", hidden, seed)
    draw = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, 0)).generate_state(1)[0]))
    order = torch.randperm(len(weights), generator=draw)
    active = [i for i in range(len(weights)) if int((order == i).nonzero()) < max(1, round(density * len(weights)))]
    blocks = rest + sum(2 * 4 * weights[i].numel() for i in active)
    errors.append(abs(state_bytes(optimizer) - blocks) / blocks)
    return Exact(max(errors))

"""How Q-GaLore's claims are measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize
from torch.optim import AdamW, Optimizer

from corollary.claims import Exact, Paired, Ratio, Slope, Trial, claim
from corollary.data import minilm
from corollary.linalg import Quantized, dequantize
from corollary.models import GPT
from corollary.optim import Int8Weight, QGaLore, low_rank_groups, quantize_weights_, state_bytes, weight_bytes
from corollary.optim.projectors import SVD, Projector, RandomBasis, Site
from corollary.papers.optim._low_rank import RANK, Array, Run, int4_basis, pretrain, projected_oracle
from corollary.testing import Case
from corollary.testing.optimizer import Problem

RATES = (0.008, 0.016, 0.032)
"""learning rates that the baseline is tuned over; Q-GaLore then takes the baseline's"""

# ------------------------------------------------------------------------------------------------------------ conformance


def make_q_galore(params: Any, rank: int = 1, lr: float = 0.05, scale: float = 1.0, **options: Any) -> QGaLore:
    """Q-GaLore at a rank that fits the checks' small matrices."""
    return QGaLore(params, lr, rank=rank, scale=scale, **{"seed": 0, **options})


def oracle(
    problem: Problem,
    steps: int,
    lr: float = 0.05,
    lazy_threshold: float | None = 0.4,
    lazy_window: int = 5,
    lazy_factor: int = 2,
    **options: Any,
) -> list[list[Array]]:
    """Its update with floating weights, in numpy: codes entry by entry, and the schedule from a list of all similarities."""
    lazy = None if lazy_threshold is None else (lazy_threshold, lazy_window, lazy_factor)
    return projected_oracle(problem, steps, lr, choose=int4_basis, lazy=lazy, **options)


def int8_linear() -> nn.Module:
    """A linear layer whose weight is in 8 bits, in groups that do not fit its rows."""
    return quantize_weights_(nn.Linear(9, 6), group_size=16)


CONFORMANCE = {
    "corollary.optim.QGaLore": Case(
        make_q_galore,
        tags={
            "oracle": oracle,
            "options": (
                {},
                {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-2, "weight_decay": 0.1, "update_proj_gap": 3},
                {"rank": 2, "update_proj_gap": 4, "scale": 0.5},
                {"update_proj_gap": 1},
                {"update_proj_gap": 1, "lazy_threshold": 0.0, "lazy_window": 2, "lazy_factor": 3},
                {"update_proj_gap": 1, "lazy_threshold": None},
            ),
            "fsdp2": "refused",
            "tolerance": 1e-8,
        },
    ),
    "corollary.optim.Int8Weight": Case(
        int8_linear,
        tags={
            "inputs": ((9,),),
            "output": (6,),
            "dtypes": (torch.float32, torch.float64, torch.bfloat16),
            # A write rounds to codes, so that finite differences in the weight do not exist; its gradient has tests of its own.
            "no_grad": ("weight",),
        },
    ),
}


# ----------------------------------------------------------------------------------------------------------- pre-training


@dataclass(frozen=True)
class LostZero(SVD):
    """A control: the codes are read back without their zero point."""

    def basis(self, state: dict[str, Any], site: Site) -> Tensor:
        stored = Quantized(state["basis_codes"], state["basis_scale"], torch.zeros_like(state["basis_zero"]))
        return dequantize(stored, (site.shape[site.dim], site.rank), 4, group_size=self.group_size)


INT4, FLOAT, RANDOM, BROKEN = SVD(bits=4), SVD(), RandomBasis(bits=4), LostZero(bits=4)


def _gap(trial: Trial) -> int:
    """Steps between the first refreshes: few, so that laziness has room within a short run."""
    return trial.pick(smoke=1, laptop=5, full=50)


def _run(trial: Trial, method: str, lr: float, gap: int | None = None, **options: Any) -> Run:
    steps = trial.pick(smoke=8, laptop=200, full=3000)
    chosen = {"update_proj_gap": _gap(trial) if gap is None else gap, **options}
    return pretrain(method, lr, trial.seed, steps, RANK, tuple(chosen.items()))


def _tune_galore(trial: Trial, **_: Any) -> dict[str, Any]:
    """GaLore's rate and gap; Q-GaLore takes the rate, so that only the baseline is tuned."""
    grid = [(lr, gap) for gap in (_gap(trial), 4 * _gap(trial)) for lr in RATES]
    lr, gap = min(grid, key=lambda point: _run(trial, "GaLore, exact", *point).loss)
    return {"lr": lr, "gap": gap}


def _tune_float(trial: Trial, **_: Any) -> dict[str, Any]:
    """The rate of the unquantized projection; the 4-bit one takes it."""
    return {"lr": min(RATES, key=lambda lr: _run(trial, "QGaLore", lr, projector=FLOAT).loss)}


def _within_one_percent(trial: Trial, ours: Run, baseline: Run, names: tuple[str, str]) -> Paired:
    trial.log(
        loss=ours.loss,
        baseline_loss=baseline.loss,
        relative=ours.loss / baseline.loss - 1,
        refreshes=ours.refreshes,
        baseline_refreshes=baseline.refreshes,
        rate=trial.tuned["lr"],
    )
    trial.figure(
        "loss",
        x=list(range(1, len(ours.curve) + 1)),
        y=dict(zip(names, (ours.curve, baseline.curve), strict=True)),
        xlabel="step",
        ylabel="training loss, nats a byte",
    )
    return Paired(ours=ours.loss, baseline=1.01 * baseline.loss)


@claim(control={"projector": BROKEN}, tune=_tune_galore)
def matches_galore(trial: Trial, projector: Projector = INT4) -> Paired:
    """Validation loss of Q-GaLore, weights in 8 bits, against 1.01 times GaLore's."""
    lr = trial.tuned["lr"]
    ours = _run(trial, "QGaLore", lr, projector=projector)
    galore = _run(trial, "GaLore, exact", lr, trial.tuned["gap"])
    trial.log(galore_gap=trial.tuned["gap"])
    return _within_one_percent(trial, ours, galore, ("Q-GaLore", "GaLore"))


@claim(control={"projector": RANDOM})
def fewer_svds(trial: Trial, projector: Projector = INT4) -> Exact:
    """How far the share of GaLore's decompositions that Q-GaLore makes lies above one half."""
    ours = _run(trial, "QGaLore", 0.016, projector=projector)
    matrices = len(low_rank_groups(GPT(256, dim=64, depth=2, heads=4, context=32), rank=RANK)[0]["params"])
    eager = matrices * math.ceil(len(ours.curve) / _gap(trial))
    trial.log(share=ours.refreshes / eager, refreshes=ours.refreshes, galore=eager, loss=ours.loss)
    return Exact(max(0.0, ours.refreshes / eager - 0.5))


@claim(control={"projector": BROKEN}, tune=_tune_float)
def int4_projection(trial: Trial, projector: Projector = INT4) -> Paired:
    """Validation loss with the projection in 4 bits against 1.01 times that with it in 32."""
    lr = trial.tuned["lr"]
    ours = _run(trial, "QGaLore", lr, projector=projector)
    return _within_one_percent(trial, ours, _run(trial, "QGaLore", lr, projector=FLOAT), ("in 4 bits", "in 32 bits"))


# ------------------------------------------------------------------------------------------------------------------ bytes


class _Added(nn.Module):
    """W + B A, as LoRA adds it."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        m, n = weight.shape
        self.a = nn.Parameter(torch.randn(rank, n).to(weight.dtype))
        self.b = nn.Parameter(torch.zeros(m, rank).to(weight.dtype))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def _bytes(net: nn.Module, optimizer: Optimizer) -> int:
    """Weights and state after a step."""
    tokens = torch.randint(256, (2, 16))
    cross_entropy(net(tokens).flatten(0, 1).float(), tokens.flatten()).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return weight_bytes(net) + state_bytes(optimizer)


def _fine_tuned(dim: int, depth: int, dtype: torch.dtype) -> nn.Module:
    """A model whose embedding and norms are frozen, as LoRA's users freeze them."""
    net = GPT(256, dim=dim, depth=depth, heads=4, context=16).to(dtype)
    for module in net.modules():
        for param in module.parameters(recurse=False):
            param.requires_grad_(isinstance(module, nn.Linear))
    return net


def _ours_and_lora(dim: int, depth: int, rank: int, dtype: torch.dtype, int8: bool) -> tuple[int, int]:
    net = _fine_tuned(dim, depth, dtype)
    if int8:
        quantize_weights_(net)
    ours = _bytes(net, QGaLore(low_rank_groups(net, rank=rank), seed=0))
    net = _fine_tuned(dim, depth, dtype)
    for module in list(net.modules()):
        if isinstance(module, nn.Linear):
            module.weight.requires_grad_(False)
            parametrize.register_parametrization(module, "weight", _Added(module.weight, rank))
    return ours, _bytes(net, AdamW([p for p in net.parameters() if p.requires_grad], foreach=False))


@claim(control={"int8": False})
def half_of_lora_bytes(trial: Trial, int8: bool = True) -> Ratio:
    """Bytes of weights and optimizer state against LoRA's at equal rank, both in float32."""
    dim, depth = int(trial.rng.choice((64, 96, 128, 192))), int(trial.rng.integers(2, 5))
    rank = dim // 4
    ours, lora = _ours_and_lora(dim, depth, rank, torch.float32, int8)
    half = _ours_and_lora(dim, depth, rank, torch.bfloat16, int8)
    trial.log(dim=dim, depth=depth, rank=rank, ours=ours, lora=lora, bfloat16_ratio=half[0] / half[1])
    return Ratio(ours=ours, baseline=lora)


# --------------------------------------------------------------------------------------------------------------- rounding


@claim(control={"stochastic": False})
def small_updates_add_up(trial: Trial, stochastic: bool = True) -> Slope:
    """Error of the way that weights in 8 bits have gone after k updates of a tenth of a step each, relative to its length."""
    _, model = minilm()
    layers = [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear)]
    start = layers[int(trial.rng.integers(len(layers)))][:64].contiguous()
    weight = Int8Weight.from_float(start, stochastic=stochastic)
    begin, step = weight.dequantize(), float(weight.scale.median())
    update = 0.1 * step * torch.randn(start.shape, generator=trial.generator)
    counts = trial.pick(smoke=(4, 8, 16), laptop=(16, 32, 64, 128, 256, 512))
    errors = []
    for count in range(1, counts[-1] + 1):
        weight.write_(weight.dequantize() + update, generator=trial.generator)
        if count in counts:
            errors.append(float((weight.dequantize() - begin - count * update).norm() / (count * update).norm()))
    trial.figure(
        "error",
        x=counts,
        y={"relative error": errors},
        xlabel="updates of a tenth of a step",
        ylabel="relative error",
        log="xy",
    )
    return Slope(x=counts, y=errors)

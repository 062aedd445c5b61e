"""What the low-rank optimizers' papers share: pre-training a small LLaMA from scratch, and an oracle of one projected step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize
from torch.optim import AdamW, Optimizer

from corollary.claims import Trial
from corollary.data import TokenStream, stdlib_text
from corollary.linalg import dct_columns
from corollary.models import GPT
from corollary.optim import (
    BAdam,
    DCTAdamW,
    Fira,
    Frugal,
    GaLore,
    ProjectedAdamW,
    QGaLore,
    low_rank_groups,
    quantize_weights_,
    state_bytes,
    weight_bytes,
)
from corollary.optim.projectors import DCT, Site
from corollary.optim.residuals import NormScaled, SignSGD, Step
from corollary.optim.subspaces import Basis, Subspace
from corollary.testing.optimizer import Problem

Array = NDArray[np.float64]
Options = tuple[tuple[str, Any], ...]

RATES = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032)
"""learning rates that every method is tuned over; ``scale`` and the like stay at their defaults unless a method's entry says so"""
RANK = 6
GAP = 50


# ------------------------------------------------------------------------------------------------------------ pre-training


class _LoRA(nn.Module):
    """W₀ + B A with W₀ frozen at its start and B zero, as the GaLore paper pre-trains by LoRA."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        m, n = weight.shape
        self.a = nn.Parameter(torch.randn(rank, n) / math.sqrt(n))
        self.b = nn.Parameter(torch.zeros(m, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def _lora(model: nn.Module, lr: float, rank: int) -> Optimizer:
    """AdamW on LoRA factors whose state takes no fewer bytes than that of a projected optimizer of this rank."""
    for module in list(model.modules()):
        if isinstance(module, nn.Linear) and min(module.weight.shape) > rank:
            long, short = max(module.weight.shape), min(module.weight.shape)
            equal = math.ceil(rank * (2 * long + short) / (2 * (long + short)))
            module.weight.requires_grad_(False)
            parametrize.register_parametrization(module, "weight", _LoRA(module.weight, equal))
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def _adamw(model: nn.Module, lr: float, rank: int) -> Optimizer:
    return AdamW(model.parameters(), lr=lr, weight_decay=0.0)


@dataclass(frozen=True)
class Subtracted(NormScaled):
    """A control: Fira's scaled residual with the wrong sign."""

    def apply_(self, param: Tensor, step: Step) -> None:
        kept = param.clone()
        step.subspace.add_(kept, step.update, -step.step_size)
        super().apply_(param, step)
        param.copy_(2 * kept - param)  # what the parent took off beyond `kept` is put on


@dataclass(frozen=True)
class MisplacedSigns(SignSGD):
    """A control: FRUGAL's sign step with the signs of the columns beside."""

    def apply_(self, param: Tensor, step: Step) -> None:
        rest = step.gradient.clone()
        step.subspace.add_(rest, step.low, -1.0)
        param.add_(rest.roll(1, dims=1).sign_(), alpha=-step.lr * self.lr_scale)
        step.subspace.add_(param, step.update, -step.step_size)


class _Misplaced(Basis):
    """Projects onto some cosine waves and comes back by their neighbours."""

    def __init__(self, waves: Basis, back: Tensor) -> None:
        super().__init__(waves.basis, waves.dim)
        self._back = Basis(back, waves.dim)

    def add_(self, out: Tensor, low: Tensor, alpha: float) -> None:
        self._back.add_(out, low, alpha)


@dataclass(frozen=True)
class MisplacedWaves(DCT):
    """A control: the waves with the largest norms are chosen, and their coordinates are given to the waves beside them."""

    def subspace(self, state: dict[str, Any], site: Site) -> Subspace:
        waves = super().subspace(state, site)
        assert isinstance(waves, Basis)
        n = site.shape[site.dim]
        return _Misplaced(waves, dct_columns(n, (state["indices"] + 1) % n, dtype=site.dtype))


def preset(kind: Callable[..., ProjectedAdamW], **defaults: Any) -> Callable[..., Optimizer]:
    """A method of `METHODS`: the preset on every linear layer, AdamW on embedding and norms."""

    def make(model: nn.Module, lr: float, rank: float, **options: Any) -> Optimizer:
        chosen = {"seed": 0, "update_proj_gap": GAP, **defaults, **options}
        return kind(low_rank_groups(model, rank=rank), lr=lr, **chosen)

    return make


def _q_galore(
    model: nn.Module, lr: float, rank: float, *, int8: bool = True, stochastic: bool = True, **options: Any
) -> Optimizer:
    """Q-GaLore with the weights of linear layers in 8 bits."""
    if int8:
        quantize_weights_(model, stochastic=stochastic)
    return preset(QGaLore, scale=1.0)(model, lr, rank, **options)


METHODS: dict[str, Callable[..., Optimizer]] = {
    "AdamW": _adamw,
    "LoRA": _lora,
    "GaLore": preset(GaLore, scale=1.0),
    "Fira": preset(Fira),
    "Fira, residual subtracted": preset(ProjectedAdamW, projector="randomized", residual=Subtracted()),
    "Frugal": preset(Frugal, projector="columns"),
    "Frugal, signs misplaced": preset(Frugal, projector="columns", residual=MisplacedSigns()),
    "BAdam": preset(BAdam),
    "BAdam, drawn otherwise": preset(BAdam, seed=1),
    "DCTAdamW": preset(DCTAdamW, update_proj_gap=1),
    "GaLore, exact": preset(GaLore, scale=1.0, projector="svd"),
    "DCTAdamW, misplaced": preset(ProjectedAdamW, projector=MisplacedWaves(), moments="rotate", update_proj_gap=1),
    "QGaLore": _q_galore,
}
"""``make(model, lr, rank, **options)`` by name; presets that other papers bring are added by them"""


@dataclass(frozen=True)
class Run:
    """What one pre-training run gives.

    Args:
        loss: validation loss at the end, in nats a byte, at most twice that of guessing.
        state_bytes: optimizer state at the end.
        weight_bytes: the model's parameters and buffers.
        refreshes: how often a subspace was chosen, over all parameters.
        step_seconds: mean time of the optimizer's step alone, its refreshes included.
        curve: training loss of each step.
    """

    loss: float
    state_bytes: int
    weight_bytes: int
    refreshes: int
    step_seconds: float
    curve: tuple[float, ...]


@lru_cache(maxsize=512)
def pretrain(method: str, lr: float, seed: int, steps: int, rank: float = RANK, options: Options = ()) -> Run:
    """Train a LLaMA of 133,000 parameters from scratch on the standard library's source, one byte a token.

    Every method has the same start, batches and schedule (warm-up over a tenth, then cosine to a tenth of the rate).
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    stream = TokenStream(stdlib_text(1_000_000), context=32, seed=seed)
    net = GPT(stream.vocab_size, dim=64, depth=2, heads=4, context=32)
    optimizer = METHODS[method](net, lr, rank, **dict(options))
    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    curve, seconds = [], 0.0
    for _ in range(steps):
        x, y = stream.batch(16, generator)
        optimizer.zero_grad()
        loss = cross_entropy(net(x).flatten(0, 1), y.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        begin = time.perf_counter()
        optimizer.step()
        seconds += time.perf_counter() - begin
        scheduler.step()
        curve.append(float(loss.detach()))
    x, y = stream.batch(512, torch.Generator().manual_seed(seed), split="val")
    with torch.no_grad():
        value = cross_entropy(net(x).flatten(0, 1), y.flatten())
    capped = float(value.nan_to_num(nan=math.inf).clamp(max=2 * math.log(stream.vocab_size)))
    refreshes = sum(state.get("refreshes", 0) for state in optimizer.state.values())
    return Run(capped, state_bytes(optimizer), weight_bytes(net), refreshes, seconds / steps, tuple(curve))


def steps_of(trial: Trial) -> int:
    """How long each run is at the trial's scale."""
    return trial.pick(smoke=6, laptop=300, full=3000)


def best_rate(trial: Trial, method: str, rank: float = RANK, rates: tuple[float, ...] = RATES) -> float:
    """The learning rate with the lowest mean validation loss on two tuning seeds: one alone may miss that a rate diverges."""
    steps, seeds = steps_of(trial), (trial.seed, trial.seed + 1)
    return min(rates, key=lambda lr: sum(pretrain(method, lr, seed, steps, rank).loss for seed in seeds))


def tune(*methods: str, rank: float = RANK) -> Callable[..., dict[str, float]]:
    """A ``tune=`` hook: the best rate of each method, found alike."""

    def hook(trial: Trial, **_: Any) -> dict[str, float]:
        return {method: best_rate(trial, method, rank) for method in methods}

    return hook


# ------------------------------------------------------------------------------------------------------------------ oracle


def draw(seed: int, refreshes: int, index: int) -> torch.Generator:
    """The documented source of a projector's randomness."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, refreshes, index)).generate_state(1)[0]))


def svd_basis(matrix: Array, rank: int, index: int, refreshes: int, seed: int) -> tuple[Array, int]:
    """Leading singular vectors of the shorter side, largest entry positive, and the dimension that they act on."""
    u, _, vh = np.linalg.svd(matrix, full_matrices=False)
    basis, dim = (vh[:rank].T, 1) if matrix.shape[0] >= matrix.shape[1] else (u[:, :rank], 0)
    return np.stack([column * np.sign(column[np.argmax(np.abs(column))]) for column in basis.T], axis=1), dim


def round_trip(x: Array, bits: int, group_size: int = 256, noise: Array | None = None) -> Array:
    """What codes of ``bits`` bits keep of ``x``, group by group and entry by entry; to nearest, or down after adding ``noise``.

    ``noise`` has shape (groups, group_size), the last row as long as the others.
    """
    top = 2**bits - 1
    flat, kept = x.reshape(-1), np.empty(x.size)
    for number, begin in enumerate(range(0, x.size, group_size)):
        group = flat[begin : begin + group_size]
        low, high = min(0.0, float(group.min())), max(0.0, float(group.max()))
        step = ((high - low) / (top if noise is None else top - 1)) or 1.0
        zero = round(-low / step) if noise is None else math.ceil(-low / step)
        for i, value in enumerate(group):
            level = round(value / step) if noise is None else math.floor(value / step + noise[number, i])
            kept[begin + i] = (min(max(level + zero, 0), top) - zero) * step
    return kept.reshape(x.shape)


def int4_basis(matrix: Array, rank: int, index: int, refreshes: int, seed: int) -> tuple[Array, int]:
    """Leading singular vectors in 4 bits."""
    basis, dim = svd_basis(matrix, rank, index, refreshes, seed)
    return round_trip(basis, 4), dim


def column_basis(matrix: Array, rank: int, index: int, refreshes: int, seed: int) -> tuple[Array, int]:
    """Columns of the identity at the drawn places."""
    order = torch.randperm(matrix.shape[1], generator=draw(seed, refreshes, index))
    return np.eye(matrix.shape[1])[:, np.sort(order[:rank].numpy())], 1


def projected_oracle(
    problem: Problem,
    steps: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    rank: int = 1,
    update_proj_gap: int = 200,
    scale: float = 1.0,
    seed: int = 0,
    choose: Callable[[Array, int, int, int, int], tuple[Array, int]] = svd_basis,
    rest: Callable[..., Array] | None = None,
    reset: bool = False,
    rotate: bool = False,
    lazy: tuple[float, int, int] | None = None,
    write: Callable[[Array, int, dict[str, Any]], Array] | None = None,
) -> list[list[Array]]:
    """A projected AdamW in numpy, with the basis as a matrix and the residual formed in full.

    ``rest(residual, low, direction, memory, dim, correction)`` gives what is subtracted, times lr, beside the projected update;
    ``direction`` is Adam's before bias correction, ``correction`` that factor, ``memory`` a dict of the parameter's.
    ``lazy`` is (threshold, window, factor) of the similarity rule; ``write(p, index, memory)`` gives what storing a projected
    parameter keeps of it.
    """
    params = [p.copy() for p in problem.start]
    memories: list[dict[str, Any]] = [{"t": 0, "age": 0, "refreshes": 0} for _ in params]
    path = []
    for _ in range(steps):
        gradients = problem.gradient(params)
        index = 0
        for p, g, memory in zip(params, gradients, memories, strict=True):
            p *= 1 - lr * weight_decay
            if p.ndim < 2:
                basis, dim, matrix = None, 1, g
            else:
                matrix = g.reshape(g.shape[0], -1)
                if memory["age"] % memory.setdefault("gap", update_proj_gap) == 0:
                    old = memory.get("basis")
                    memory["basis"] = choose(matrix, rank, index, memory["refreshes"], seed)
                    if rotate and old is not None:
                        for key in ("m", "v"):
                            full = _back(memory[key], *old)
                            memory[key] = full @ memory["basis"][0] if old[1] else memory["basis"][0].T @ full
                        memory["v"] = np.abs(memory["v"])
                    if lazy is not None and old is not None:
                        a, b = old[0][:, 0], memory["basis"][0][:, 0]
                        memory.setdefault("cosines", []).append(abs(a @ b) / (np.linalg.norm(a) * np.linalg.norm(b)))
                        recent = memory["cosines"][-lazy[1] :]
                        if len(recent) == lazy[1] and sum(recent) / lazy[1] >= lazy[0]:
                            memory["gap"] *= lazy[2]
                    memory["refreshes"] += 1
                    if reset:
                        memory["t"] = 0
                        memory.pop("m", None)
                basis, dim = memory["basis"]
                index += 1
            memory["age"] += 1
            memory["t"] += 1
            low = matrix if basis is None else matrix @ basis if dim else basis.T @ matrix
            if "m" not in memory:
                memory["m"], memory["v"] = np.zeros_like(low), np.zeros_like(low)
            memory["m"] = betas[0] * memory["m"] + (1 - betas[0]) * low
            memory["v"] = betas[1] * memory["v"] + (1 - betas[1]) * low**2
            first, second = 1 - betas[0] ** memory["t"], 1 - betas[1] ** memory["t"]
            direction = memory["m"] / first / (np.sqrt(memory["v"] / second) + eps)
            if basis is None:
                p -= lr * direction
                continue
            change = _back(direction, basis, dim)
            if rest is not None:
                correction = math.sqrt(second) / first
                change = change + rest(matrix - _back(low, basis, dim), low, direction / correction, memory, dim, correction)
            p -= lr * scale * change.reshape(p.shape)
            if write is not None:
                p[...] = write(p, index - 1, memory)
        path.append([p.copy() for p in params])
    return path


def _back(low: Array, basis: Array, dim: int) -> Array:
    return low @ basis.T if dim else basis @ low


def norm_scaled(limit: float | None) -> Callable[..., Array]:
    """Fira's residual as its authors' code computes it: scaled slice by slice, then limited in growth."""

    def rest(residual: Array, low: Array, direction: Array, memory: dict[str, Any], dim: int, correction: float) -> Array:
        scaled = np.empty_like(residual)
        for i in range(residual.shape[1 - dim]):
            place = (i, slice(None)) if dim else (slice(None), i)
            scaled[place] = residual[place] * (np.linalg.norm(direction[place]) / (np.linalg.norm(low[place]) + 1e-8))
        if limit is not None:
            norm = np.linalg.norm(scaled)
            if "last" in memory:
                shrink = max(norm / (memory["last"] + 1e-8), limit) / limit
                scaled, norm = scaled / shrink, norm / shrink
            memory["last"] = norm
        return scaled * correction

    return rest


def signed(lr_scale: float = 1.0) -> Callable[..., Array]:
    """FRUGAL's residual: its sign, without bias correction."""

    def rest(residual: Array, low: Array, direction: Array, memory: dict[str, Any], dim: int, correction: float) -> Array:
        return lr_scale * np.sign(residual)

    return rest

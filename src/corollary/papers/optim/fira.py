"""How Fira's claims are measured."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer

from corollary.claims import Exact, Paired, Ratio, Trial, claim
from corollary.claims.timing import interleave, keep_freed_memory
from corollary.data import TokenStream, stdlib_text
from corollary.models import GPT
from corollary.optim import Fira, GaLore, ProjectedAdamW, low_rank_groups, state_bytes
from corollary.papers.optim._low_rank import GAP, RANK, Array, Options, norm_scaled, pretrain, projected_oracle, steps_of, tune
from corollary.testing import Case
from corollary.testing.optimizer import Problem

# ------------------------------------------------------------------------------------------------------------ conformance


def make_fira(params: Any, rank: int = 1, lr: float = 0.05, **options: Any) -> Fira:
    """Fira at a rank that fits the checks' small matrices, with the decomposition that the oracle has."""
    return Fira(params, lr, rank=rank, **{"projector": "svd", "seed": 0, **options})


def make_galore(params: Any, rank: int = 1, lr: float = 0.05, scale: float = 1.0, **options: Any) -> GaLore:
    """GaLore, likewise."""
    return GaLore(params, lr, rank=rank, scale=scale, **{"projector": "svd", "seed": 0, **options})


def make_projected(params: Any, rank: float = 1, lr: float = 0.05, **options: Any) -> ProjectedAdamW:
    """The common form with a pair that no paper has: cosine waves and the scaled residual."""
    return ProjectedAdamW(params, lr, rank=rank, **{"projector": "dct", "residual": "norm", "seed": 0, **options})


def fira_oracle(
    problem: Problem, steps: int, lr: float = 0.05, growth_limit: float | None = 1.01, **options: Any
) -> list[list[Array]]:
    """The authors' update, in numpy."""
    return projected_oracle(problem, steps, lr, rest=norm_scaled(growth_limit), **options)


def galore_oracle(problem: Problem, steps: int, lr: float = 0.05, **options: Any) -> list[list[Array]]:
    """GaLore's, in numpy."""
    return projected_oracle(problem, steps, lr, **options)


def waves(matrix: Array, rank: int, index: int, refreshes: int, seed: int) -> tuple[Array, int]:
    """The strongest cosine waves on the shorter side, from a matrix of cosines."""
    dim = 1 if matrix.shape[0] >= matrix.shape[1] else 0
    n = matrix.shape[dim]
    basis = cosines(n)
    strength = ((matrix @ basis if dim else matrix.T @ basis) ** 2).sum(0)
    return basis[:, sorted(strength.argsort()[-rank:])], dim


def cosines(n: int) -> Array:
    """The orthonormal cosine basis, entry by entry."""
    basis = np.empty((n, n))
    for j in range(n):
        for k in range(n):
            basis[j, k] = math.sqrt((1 if k == 0 else 2) / n) * math.cos(math.pi * (2 * j + 1) * k / (2 * n))
    return basis


def projected_dct_oracle(problem: Problem, steps: int, lr: float = 0.05, **options: Any) -> list[list[Array]]:
    """Cosine waves with Fira's residual, in numpy."""
    return projected_oracle(problem, steps, lr, choose=waves, rest=norm_scaled(1.01), **options)


_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-2, "weight_decay": 0.1, "update_proj_gap": 3},
    {"rank": 2, "update_proj_gap": 4, "scale": 0.5},
)
_TAGS = {"fsdp2": "refused", "tolerance": 1e-8}

CONFORMANCE = {
    "corollary.optim.Fira": Case(
        make_fira,
        tags={**_TAGS, "oracle": fira_oracle, "options": (*_OPTIONS, {"growth_limit": None}, {"growth_limit": 1.5})},
    ),
    "corollary.optim.GaLore": Case(make_galore, tags={**_TAGS, "oracle": galore_oracle, "options": _OPTIONS}),
    "corollary.optim.ProjectedAdamW": Case(make_projected, tags={**_TAGS, "oracle": projected_dct_oracle, "options": _OPTIONS}),
}


# ----------------------------------------------------------------------------------------------------------- pre-training


def _versus(trial: Trial, baseline: str, options: Options, method: str, factor: float = 1.0) -> Paired:
    steps = steps_of(trial)
    ours = pretrain(method, trial.tuned[method], trial.seed, steps, RANK, options)
    other = pretrain(baseline, trial.tuned[baseline], trial.seed, steps)
    trial.log(state_bytes=ours.state_bytes, baseline_state_bytes=other.state_bytes, rate=trial.tuned[method])
    trial.figure(
        "loss",
        x=list(range(1, steps + 1)),
        y={method: list(ours.curve), baseline: list(other.curve)},
        xlabel="step",
        ylabel="training loss, nats a byte",
    )
    return Paired(ours=ours.loss, baseline=factor * other.loss)


def _hook(baseline: str) -> Callable[..., dict[str, float]]:
    def hook(trial: Trial, method: str = "Fira", **_: Any) -> dict[str, float]:
        return tune(method, baseline)(trial)

    return hook


@claim(control={"method": "Fira, residual subtracted"}, tune=_hook("GaLore"))
def beats_galore(trial: Trial, method: str = "Fira") -> Paired:
    """Validation loss of Fira against GaLore's."""
    return _versus(trial, "GaLore", (), method)


@claim(control={"method": "Fira, residual subtracted"}, tune=_hook("LoRA"))
def beats_lora(trial: Trial, method: str = "Fira") -> Paired:
    """Validation loss of Fira against LoRA's."""
    return _versus(trial, "LoRA", (), method)


@claim(control={"method": "Fira, residual subtracted"}, tune=_hook("AdamW"))
def within_one_percent_of_adamw(trial: Trial, method: str = "Fira") -> Paired:
    """Validation loss of Fira against 1.01 times AdamW's."""
    return _versus(trial, "AdamW", (), method, factor=1.01)


# ------------------------------------------------------------------------------------------------------------------ bytes


def _stepped(optimizer: Optimizer) -> Optimizer:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.randn_like(param)
    optimizer.step()
    return optimizer


@claim(control={"rank": 24})
def quarter_of_the_state(trial: Trial, rank: int = RANK) -> Ratio:
    """Bytes of Fira's state for a whole model against AdamW's."""
    depth = int(trial.rng.integers(2, 6))
    net = GPT(256, dim=64, depth=depth, heads=4, context=32)
    ours = state_bytes(_stepped(Fira(low_rank_groups(net, rank=rank), seed=0)))
    full = state_bytes(_stepped(AdamW(net.parameters())))
    trial.log(depth=depth, ours=ours, adamw=full)
    return Ratio(ours=ours, baseline=full)


@claim(control={"low": False})
def state_bytes_equal_formula(trial: Trial, low: bool = True) -> Exact:
    """Bytes counted against the formula, for random shapes, ranks and dtypes."""
    worst = 0.0
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        m, n = (int(trial.rng.integers(4, 200)) for _ in range(2))
        rank = int(trial.rng.integers(1, min(m, n)))
        weight = nn.Parameter(torch.randn(m, n).to(dtype))
        counted = state_bytes(_stepped(Fira([weight], rank=rank if low else None, seed=0)))
        number = weight.element_size()
        # The limiter's last norm is one number, in float32 where the weight is in half precision.
        formula = number * (2 * max(m, n) * rank + min(m, n) * rank) + max(4, number)
        worst = max(worst, abs(counted - formula) / formula)
    return Exact(worst)


# ---------------------------------------------------------------------------------------------------------------- limiter


@lru_cache(maxsize=64)
def _rise(seed: int, growth_limit: float | None, steps: int) -> tuple[float, tuple[float, ...]]:
    """How far the loss rises after surges of gradient noise, a hundred times the gradient's norm, at two steps of a run."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    stream = TokenStream(stdlib_text(1_000_000), context=32, seed=seed)
    net = GPT(stream.vocab_size, dim=64, depth=2, heads=4, context=32)
    groups = low_rank_groups(net, rank=RANK)
    optimizer = Fira(groups, lr=0.016, update_proj_gap=GAP, seed=0, growth_limit=growth_limit)
    surges = (steps // 2, 3 * steps // 4)
    losses = []
    for step in range(steps):
        x, y = stream.batch(16, generator)
        optimizer.zero_grad()
        loss = cross_entropy(net(x).flatten(0, 1), y.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        if step in surges:
            for param in net.parameters():
                assert param.grad is not None
                noise = torch.randn(param.shape, generator=generator)
                param.grad.add_(noise, alpha=100 * float(param.grad.norm()) / math.sqrt(param.numel()))
        optimizer.step()
        losses.append(float(loss.detach()))
    after = max(1, steps // 8)
    rises = [max(losses[s + 1 : s + 1 + after]) - sum(losses[s - 3 : s]) / 3 for s in surges]
    return sum(rises) / len(rises), tuple(losses)


@claim(control={"growth_limit": 1e9})
def limiter_removes_spikes(trial: Trial, growth_limit: float = 1.01) -> Paired:
    """Rise of the loss after injected surges, with and without the limiter."""
    steps = trial.pick(smoke=16, laptop=80, full=400)
    with_it, limited = _rise(trial.seed, growth_limit, steps)
    without, free = _rise(trial.seed, None, steps)
    trial.figure(
        "loss",
        x=list(range(steps)),
        y={"with the limiter": list(limited), "without": list(free)},
        xlabel="step",
        ylabel="training loss, nats a byte",
    )
    return Paired(ours=with_it, baseline=without)


# ------------------------------------------------------------------------------------------------------------------ speed


def _stepping(width: int, make: Callable[[list[nn.Parameter]], Optimizer]) -> Callable[[], Any]:
    """Steps on one square matrix with a fixed gradient."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(width, width) / math.sqrt(width))
    weight.grad = torch.randn(width, width)
    return make([weight]).step


def _ours(kind: Callable[..., Optimizer], projector: str, gap: int, params: list[nn.Parameter]) -> Optimizer:
    return kind(params, rank=min(64, params[0].shape[0] // 2), update_proj_gap=gap, projector=projector, seed=0)


def galore_torch_adamw(gap: int, params: Iterable[Tensor]) -> Optimizer:
    """The peer, with the options that ours has here."""
    from galore_torch import GaLoreAdamW

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        group = {"params": list(params), "rank": 64, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std"}
        peer: Optimizer = GaLoreAdamW([group], lr=1e-3)
    return peer


@claim(control={"projector": "svd"})
def faster_than_galore_torch(trial: Trial, projector: str = "randomized") -> Ratio:
    """Mean step of GaLore and Fira against galore_torch's, refreshes included."""
    keep_freed_memory()
    widths = trial.pick(smoke=(64, 96), laptop=(512, 1024, 2048))
    logs: list[float] = []
    peers: list[float] = []
    for width in widths:
        # With a gap of 1 every step refreshes; with a huge one, once warm, none does.
        calls: dict[str, Callable[[], None]] = {}
        for when, gap in (("refresh", 1), ("plain", 10**6)):
            for name, kind in (("galore", GaLore), ("fira", Fira)):
                calls[f"{name} {when}"] = _stepping(width, partial(_ours, kind, projector, gap))
            calls[f"peer {when}"] = _stepping(width, partial(galore_torch_adamw, gap))
        rounds = 3 if width < 2048 else 1
        plain = interleave({k: v for k, v in calls.items() if "plain" in k}, rounds=5, warmup=1)
        refresh = interleave({k: v for k, v in calls.items() if "refresh" in k}, rounds=rounds, warmup=1 if width < 1024 else 0)
        mean = {
            name: (refresh[f"{name} refresh"] + (50 - 1) * plain[f"{name} plain"]) / 50 for name in ("galore", "fira", "peer")
        }
        trial.log(**{f"ratio_{name}_{width}": mean[name] / mean["peer"] for name in ("galore", "fira")})
        logs += [math.log(mean["galore"]), math.log(mean["fira"])]
        peers += [math.log(mean["peer"])] * 2
    return Ratio(ours=math.exp(sum(logs) / len(logs)), baseline=math.exp(sum(peers) / len(peers)))

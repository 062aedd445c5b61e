"""How the claims of DCT-AdamW are measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from corollary.claims import Exact, Paired, Ratio, Slope, Trial, claim
from corollary.claims.timing import interleave, keep_freed_memory
from corollary.data import TokenStream, stdlib_text
from corollary.linalg import dct, leading_right_vectors
from corollary.models import GPT
from corollary.optim import DCTAdamW, ProjectedAdamW, state_bytes
from corollary.optim.projectors import DCT, Site
from corollary.papers.optim._low_rank import RANK, Array, pretrain, projected_oracle, steps_of, tune
from corollary.testing import Case
from corollary.testing.optimizer import Problem

# ------------------------------------------------------------------------------------------------------------ conformance


def make_dct_adamw(params: Any, lr: float = 0.05, rank: int = 1, **options: Any) -> DCTAdamW:
    """DCT-AdamW at a rank that fits the checks' small matrices."""
    return DCTAdamW(params, lr, rank=rank, **{"seed": 0, **options})


def cosines(n: int) -> Array:
    """The orthonormal cosine basis, entry by entry."""
    basis = np.empty((n, n))
    for j in range(n):
        for k in range(n):
            basis[j, k] = math.sqrt((1 if k == 0 else 2) / n) * math.cos(math.pi * (2 * j + 1) * k / (2 * n))
    return basis


def strongest_waves(norm: int) -> Callable[..., tuple[Array, int]]:
    """The oracle's choice: norms of all products with the matrix of cosines."""

    def choose(matrix: Array, rank: int, index: int, refreshes: int, seed: int) -> tuple[Array, int]:
        dim = 1 if matrix.shape[0] >= matrix.shape[1] else 0
        basis = cosines(matrix.shape[dim])
        strength = (np.abs(matrix @ basis if dim else matrix.T @ basis) ** norm).sum(0)
        return basis[:, sorted(strength.argsort()[-rank:])], dim

    return choose


def dct_oracle(
    problem: Problem,
    steps: int,
    lr: float = 0.05,
    norm: int = 2,
    update_proj_gap: int = 1,
    moments: str = "rotate",
    **options: Any,
) -> list[list[Array]]:
    """In numpy, with the basis as a matrix and the moments turned by the product of the two bases."""
    return projected_oracle(
        problem,
        steps,
        lr,
        choose=strongest_waves(norm),
        rotate=moments == "rotate",
        update_proj_gap=update_proj_gap,
        **options,
    )


CONFORMANCE = {
    "corollary.optim.DCTAdamW": Case(
        make_dct_adamw,
        tags={
            "oracle": dct_oracle,
            "options": (
                {},
                {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-2, "weight_decay": 0.1, "norm": 1, "rank": 2},
                {"update_proj_gap": 4, "moments": "keep", "scale": 0.5, "rank": 2},
            ),
            "nan": "raises",  # a subspace is chosen at every step, and none can be chosen from NaN
            "fsdp2": "refused",
            "tolerance": 1e-8,
        },
    ),
}


# ----------------------------------------------------------------------------------------------------------------- energy


@lru_cache(maxsize=16)
def _gradients(seed: int, steps: int) -> list[Tensor]:
    """Gradients of the matrices of a small LLaMA after some steps of AdamW."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    stream = TokenStream(stdlib_text(1_000_000), context=32, seed=seed)
    net = GPT(stream.vocab_size, dim=64, depth=2, heads=4, context=32)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.002)
    for _ in range(steps):
        x, y = stream.batch(16, generator)
        optimizer.zero_grad()
        cross_entropy(net(x).flatten(0, 1), y.flatten()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return [p.grad.clone() for p in net.parameters() if p.dim() == 2 and p.grad is not None]


def _waves(gradient: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Indices that the projector chooses."""
    state: dict[str, Any] = {}
    shape = (gradient.shape[0], gradient.shape[1])
    site = Site(shape=shape, dtype=gradient.dtype, rank=rank, index=0, place=0, members=1, refreshes=0, seed=0)
    DCT().refresh(gradient, state, site)
    chosen: Tensor = state["indices"]
    return chosen.long()


def _random_waves(gradient: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """The control: as many, drawn."""
    return torch.randperm(min(gradient.shape), generator=generator)[:rank]


@claim(control={"choose": _random_waves})
def energy_within_five_percent_of_svd(trial: Trial, choose: Callable[..., Tensor] = _waves) -> Ratio:
    """Share of the energy of real gradients that the waves keep, against singular vectors."""
    gradients = _gradients(trial.seed, trial.pick(smoke=3, laptop=60, full=1000))
    shares = (0.125, 0.25, 0.5)
    curve = []
    for share in shares:
        kept = best = 0.0
        for gradient in gradients:
            rank, total = int(share * min(gradient.shape)), float(gradient.square().sum())
            dim = 1 if gradient.shape[0] >= gradient.shape[1] else 0
            waves = dct(gradient, dim).index_select(dim, choose(gradient, rank, trial.generator))
            kept += float(waves.square().sum()) / total / len(gradients)
            best += float(torch.linalg.svdvals(gradient)[:rank].square().sum()) / total / len(gradients)
        curve.append((kept, best))
        trial.log(**{f"waves_{share}": kept, f"singular_vectors_{share}": best})
    trial.figure(
        "energy",
        x=list(shares),
        y={"cosine waves": [kept for kept, _ in curve], "singular vectors": [best for _, best in curve]},
        xlabel="rank, as a share of the shorter side",
        ylabel="energy kept",
    )
    return Ratio(ours=curve[-1][0], baseline=curve[-1][1])


# ------------------------------------------------------------------------------------------------------------------- time


def _transform(gradient: Tensor, rank: int) -> Tensor:
    return _waves(gradient, rank, torch.Generator())


def _gram(gradient: Tensor, rank: int) -> Tensor:
    """The control: leading eigenvectors of GᵀG, all of them computed."""
    vectors: Tensor = torch.linalg.eigh(gradient.T @ gradient).eigenvectors
    return vectors[:, -rank:]


def _seconds(trial: Trial, width: int, rank: int, rounds: int, **methods: Callable[[Tensor, int], Any]) -> dict[str, float]:
    keep_freed_memory()
    gradient = torch.randn(width, width, generator=trial.generator)
    calls = {name: (lambda m=method: m(gradient, rank)) for name, method in methods.items()}
    return interleave(calls, rounds=rounds, warmup=1 if width < 1024 else 0)


def _lowrank(gradient: Tensor, rank: int) -> Any:
    return torch.svd_lowrank(gradient, q=rank)


@claim(control={"method": _gram})
def refresh_at_most_a_fifth_of_svd(trial: Trial, method: Callable[[Tensor, int], Any] = _transform) -> Ratio:
    """One refresh at width 2048 against one full decomposition."""
    width = trial.pick(smoke=128, laptop=2048)
    seconds = _seconds(trial, width, min(64, width // 2), 1, ours=method, svd=leading_right_vectors)
    return Ratio(ours=seconds["ours"], baseline=seconds["svd"])


@claim(control={"method": leading_right_vectors})
def refresh_faster_than_svd_lowrank(trial: Trial, method: Callable[[Tensor, int], Any] = _transform) -> Ratio:
    """One refresh at width 1024 against torch.svd_lowrank."""
    width = trial.pick(smoke=128, laptop=1024, full=4096)
    seconds = _seconds(trial, width, min(64, width // 2), trial.pick(smoke=2, laptop=3), ours=method, peer=_lowrank)
    return Ratio(ours=seconds["ours"], baseline=seconds["peer"])


@claim(control={"method": leading_right_vectors})
def gap_to_svd_widens(trial: Trial, method: Callable[[Tensor, int], Any] = _transform) -> Slope:
    """Time of the decomposition over that of the transform, for growing widths."""
    widths = trial.pick(smoke=(32, 64), laptop=(256, 512, 1024), full=(512, 1024, 2048, 4096))
    gains = []
    for width in widths:
        seconds = _seconds(trial, width, width // 16, 3, ours=method, svd=leading_right_vectors)
        gains.append(seconds["svd"] / seconds["ours"])
    trial.figure("speed-up", x=list(widths), y={"decomposition / transform": gains}, xlabel="width", ylabel="times", log="xy")
    return Slope(x=widths, y=gains)


# ------------------------------------------------------------------------------------------------------- loss and memory


def _tuned(trial: Trial, method: str = "DCTAdamW", **_: Any) -> dict[str, float]:
    return tune(method, "GaLore, exact")(trial)


@claim(control={"method": "DCTAdamW, misplaced"}, tune=_tuned)
def matches_svd_loss(trial: Trial, method: str = "DCTAdamW") -> Paired:
    """Validation loss against 1.01 times that of the same optimizer with singular vectors."""
    steps = steps_of(trial)
    ours = pretrain(method, trial.tuned[method], trial.seed, steps)
    svd = pretrain("GaLore, exact", trial.tuned["GaLore, exact"], trial.seed, steps)
    trial.log(state_bytes=ours.state_bytes, svd_state_bytes=svd.state_bytes)
    trial.log(step_seconds=ours.step_seconds, svd_step_seconds=svd.step_seconds, rank=RANK)
    return Paired(ours=ours.loss, baseline=1.01 * svd.loss)


@claim(control={"projector": "svd"})
def stores_only_indices(trial: Trial, projector: Any = None) -> Exact:
    """Bytes of state against two moments and one index for each rank."""
    m, n = (int(trial.rng.integers(4, 300)) for _ in range(2))
    rank = int(trial.rng.integers(1, min(m, n)))
    weight = nn.Parameter(torch.randn(m, n))
    optimizer = DCTAdamW([weight], rank=rank) if projector is None else ProjectedAdamW([weight], rank=rank, projector=projector)
    weight.grad = torch.randn(m, n, generator=trial.generator)
    optimizer.step()
    formula = 2 * 4 * max(m, n) * rank + 4 * rank
    return Exact(abs(state_bytes(optimizer) - formula) / formula)

"""How EoRA's claims are measured."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from corollary.claims import Exact, Paired, Ratio, Trial, claim
from corollary.compress import Calibration, EoRA, PackedLinear, Quantize, calibrate, compress, two_four
from corollary.linalg import weighted_low_rank
from corollary.papers.compress import _minilm as minilm
from corollary.papers.compress._language import LINEAR, STEPS, Language, language
from corollary.testing import Case

RANKS = (2, 4, 8, 16)
MINILM_RANKS = (4, 16, 64)
PRUNED: Mapping[str, Any] = {"bits": 4, "group_size": 32, "sparsity": "2:4"}
RATES = (0.001, 0.003, 0.01)

# ------------------------------------------------------------------------------------------------------------ conformance


def nearest_oracle(weight: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Rounding to nearest, group by group and entry by entry."""
    top, out = 2**bits - 1, np.empty_like(weight)
    for i, row in enumerate(weight):
        for begin in range(0, len(row), group):
            part = row[begin : begin + group]
            low, high = min(0.0, part.min()), max(0.0, part.max())
            step = (high - low) / top or 1.0
            zero = round(-low / step)
            for k, value in enumerate(part):
                out[i, begin + k] = step * (min(max(round(value / step) + zero, 0), top) - zero)
    return out


def quantize_oracle(
    weight: np.ndarray, bias: np.ndarray | None, x: np.ndarray, settings: Quantize, rank: int | None
) -> np.ndarray:
    """Outputs of a layer whose weight is rounded."""
    assert settings.bits is not None
    rounded = nearest_oracle(weight, settings.bits, min(settings.group_size, weight.shape[1]))
    return cast(np.ndarray, x @ rounded.T + (0 if bias is None else bias))


def eora_oracle(weight: np.ndarray, bias: np.ndarray | None, x: np.ndarray, settings: EoRA, rank: int | None) -> np.ndarray:
    """The authors' steps with their inverse, in numpy."""
    assert settings.bits is not None
    rounded = nearest_oracle(weight, settings.bits, min(settings.group_size, weight.shape[1]))
    delta = (weight - rounded) @ (q := eigenspace(x.T @ x / len(x)))
    u, s, vh = np.linalg.svd(delta, full_matrices=False)
    path = (u[:, :rank] * s[:rank]) @ (vh[:rank] @ np.linalg.inv(q))
    return cast(np.ndarray, x @ (rounded + path).T + (0 if bias is None else bias))


def eigenspace(moment: np.ndarray) -> np.ndarray:
    """Q Λ^(1/2) of a second moment."""
    values, vectors = np.linalg.eigh(moment)
    return cast(np.ndarray, vectors * np.sqrt(np.maximum(values, 0)))


CONFORMANCE = {
    "corollary.compress.EoRA": Case(
        lambda: EoRA(bits=4, group_size=4, rank=2, damping=0.0),
        tags={"oracle": eora_oracle, "kinds": ("linear", "transformers")},
    ),
    "corollary.compress.Quantize": Case(
        lambda: Quantize(bits=4, group_size=4), tags={"oracle": quantize_oracle, "kinds": ("linear", "transformers")}
    ),
}


# ------------------------------------------------------------------------------------------------------------------- loss


def _trained(trial: Trial) -> Language:
    return language(trial.seed, trial.pick(smoke=20, laptop=STEPS, full=10 * STEPS))


@claim(control={"aligned": False})
def beats_svd_at_every_rank(trial: Trial, aligned: bool = True) -> Paired:
    """Loss behind compensation of 2:4 and 4 bits, at the rank where EoRA leads plain SVD by the least."""
    trained = _trained(trial)
    seen = calibrate(trained.model, trained.calibration(), LINEAR)
    used = seen if aligned else minilm.misplaced(seen, trial.seed)
    ours: list[float] = []
    plain: list[float] = []
    for rank in RANKS:
        for metric, moments, found in (("inputs", used, ours), ("none", seen, plain)):
            small = compress(trained.model, EoRA(**PRUNED, rank=rank, metric=metric), LINEAR, calibration=moments)
            found.append(trained.loss(small))
    bare = trained.loss(compress(trained.model, Quantize(**PRUNED), LINEAR))
    whole = trained.loss(trained.model)
    trial.figure(
        "against rank",
        x=list(RANKS),
        y={"EoRA": ours, "SVD": plain, "no compensation": [bare] * len(RANKS), "uncompressed": [whole] * len(RANKS)},
        xlabel="rank of the compensation",
        ylabel="loss on held-out source, nats a byte",
        log="x",
    )
    worst = max(range(len(RANKS)), key=lambda i: ours[i] - plain[i])
    trial.log(worst_rank=RANKS[worst], uncompressed=whole, no_compensation=bare, **(_apart(trained, seen) if aligned else {}))
    return Paired(ours=ours[worst], baseline=plain[worst])


def _apart(trained: Language, seen: Calibration) -> dict[str, float]:
    """Losses on top of 4 bits alone and of 2:4 alone, at rank 8."""
    found = {}
    for name, settings in (("int4", {"bits": 4, "group_size": 64}), ("two_four", {"bits": None, "sparsity": "2:4"})):
        found[f"{name}_bare"] = trained.loss(compress(trained.model, Quantize(**settings), LINEAR))
        for label, metric in (("eora", "inputs"), ("svd", "none")):
            config = EoRA(**settings, rank=8, metric=metric)
            found[f"{name}_{label}"] = trained.loss(compress(trained.model, config, LINEAR, calibration=seen))
    return found


@lru_cache(maxsize=8)
def _errors_of_svd(rank: int) -> Tensor:
    """Plain SVD of the error looks at no data: its errors on all texts, once for all trials."""
    data = minilm.docstrings()
    small = compress(data.model, EoRA(**PRUNED, rank=rank, metric="none"), minilm.LINEAR)
    return data.errors(small, torch.arange(minilm.TEXTS))


@claim(control={"aligned": False})
def beats_svd_on_minilm(trial: Trial, aligned: bool = True) -> Paired:
    """Error of MiniLM's last states behind compensation of its last layer, likewise."""
    data = minilm.docstrings()
    chosen, test = minilm.split(trial.seed)
    seen = calibrate(data.model, data.batches(chosen), minilm.LINEAR)
    if not aligned:
        seen = minilm.misplaced(seen, trial.seed)
    ranks = trial.pick(smoke=MINILM_RANKS[:1], laptop=MINILM_RANKS)
    ours = [data.error(compress(data.model, EoRA(**PRUNED, rank=r), minilm.LINEAR, calibration=seen), test) for r in ranks]
    plain = [data.relative(_errors_of_svd(r)[test], test) for r in ranks]
    trial.figure(
        "against rank", x=list(ranks), y={"EoRA": ours, "SVD": plain}, xlabel="rank", ylabel="relative error of last states"
    )
    worst = max(range(len(ranks)), key=lambda i: ours[i] / plain[i])
    trial.log(worst_rank=ranks[worst], **{f"quotient_at_{r}": a / b for r, a, b in zip(ranks, ours, plain, strict=True)})
    return Paired(ours=ours[worst], baseline=plain[worst])


# --------------------------------------------------------------------------------------------------------------- exactness


@claim(control={"eigen": False})
def closed_form_is_optimal(trial: Trial, eigen: bool = True) -> Exact:
    """The compensation against the paper's own formula with an inverse, and its error against the least possible."""
    worst = 0.0
    for _ in range(trial.pick(smoke=3, laptop=20)):
        m, n = (int(v) for v in trial.rng.integers(4, 40, 2))
        n += -n % 4
        rank = int(trial.rng.integers(1, min(m, n)))
        weight = trial.rng.normal(size=(m, n))
        x = trial.rng.normal(size=(4 * n, n)) * np.logspace(0, -1.5, n)
        moment = x.T @ x / len(x)
        delta = weight - two_four(torch.from_numpy(weight)).numpy()
        q = eigenspace(moment)
        u, s, vh = np.linalg.svd(delta @ q, full_matrices=False)
        true = (u[:, :rank] * s[:rank]) @ (vh[:rank] @ np.linalg.inv(q))
        up, down = weighted_low_rank(torch.from_numpy(delta), torch.from_numpy(moment) if eigen else None).factors(rank)
        ours = (up @ down).numpy()
        left, least = np.sum(((delta - ours) @ q) ** 2), np.sum(s[rank:] ** 2)
        worst = max(
            worst, float(abs(left - least) / np.sum(s**2)), float(np.abs((ours - true) @ q).max() / np.abs(delta @ q).max())
        )
    return Exact(worst)


# ------------------------------------------------------------------------------------------------------------------- time


def _gradient_training(trained: Language, target: float, rate: float, steps: int) -> tuple[float, bool]:
    """Seconds of gradient training of the same path until held-out loss is the target's, evaluations not counted.

    The path starts as LoRA does, with nothing to add. Where the target is not reached in ``steps``, their whole time is given, which
    is less than it would take.
    """
    start = EoRA(**PRUNED, rank=8, metric="none")
    small = compress(trained.model, start, LINEAR)
    small.requires_grad_(False)
    generator = torch.Generator().manual_seed(trained.seed)
    for layer in small.modules():
        if isinstance(layer, PackedLinear):
            nn.init.kaiming_uniform_(layer.down.weight, generator=generator)
            nn.init.zeros_(layer.up.weight)
            layer.down.requires_grad_(True)
            layer.up.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in small.parameters() if p.requires_grad], lr=rate)
    seconds = 0.0
    for step in range(steps):
        begin = time.perf_counter()
        x, y = trained.stream.batch(16, generator)
        loss = cross_entropy(small(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        seconds += time.perf_counter() - begin
        if step % 20 == 19 and trained.loss(small, 256) <= target:
            return seconds, True
    return seconds, False


def _by_descent(model: nn.Module, calibration: Calibration, steps: int) -> nn.Module:
    """A control: the same layer-wise problem of every layer solved by gradient steps instead of in closed form."""
    small = compress(model, EoRA(**PRUNED, rank=8, metric="none"), LINEAR)
    for name, layer in small.named_modules():
        if isinstance(layer, PackedLinear):
            dense = cast(Tensor, model.get_submodule(name).weight).detach()
            delta, moment = dense - layer.dense(), calibration[name].second.float()
            path = [layer.up.weight, layer.down.weight]
            optimizer = torch.optim.Adam(path, lr=0.003)
            for _ in range(steps):
                gap = delta - path[0] @ path[1]
                loss = ((gap @ moment) * gap).sum()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    return small


def _tune(trial: Trial, **_: Any) -> dict[str, float]:
    """The rate of gradient training that takes the least time to EoRA's loss."""
    trained = _trained(trial)
    small = compress(trained.model, EoRA(**PRUNED, rank=8), LINEAR, calibration=trained.calibration())
    target, steps = trained.loss(small, 256), trial.pick(smoke=20, laptop=300)
    return {"rate": min(RATES, key=lambda rate: _gradient_training(trained, target, rate, steps)[0])}


@claim(control={"closed_form": False}, tune=_tune)
def faster_than_gradients(trial: Trial, closed_form: bool = True) -> Ratio:
    """Time of calibration and compensation against gradient training of the same path to the same loss."""
    trained = _trained(trial)
    begin = time.perf_counter()
    seen = calibrate(trained.model, trained.calibration(), LINEAR)
    if closed_form:
        small = compress(trained.model, EoRA(**PRUNED, rank=8), LINEAR, calibration=seen)
    else:
        small = _by_descent(trained.model, seen, trial.pick(smoke=20, laptop=300))
    ours = time.perf_counter() - begin
    target = trained.loss(compress(trained.model, EoRA(**PRUNED, rank=8), LINEAR, calibration=seen), 256)
    theirs, reached = _gradient_training(trained, target, trial.tuned["rate"], trial.pick(smoke=20, laptop=300))
    trial.log(seconds=ours, gradient_seconds=theirs, gradients_reached_it=reached, loss=trained.loss(small, 256), target=target)
    return Ratio(ours=ours, baseline=theirs)

"""How LoRD's claims are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from corollary.claims import Paired, Ratio, Trial, claim
from corollary.claims.timing import interleave, keep_freed_memory
from corollary.compress import SVD, Calibration, Factored, LoRD, Quantize, calibrate, compress, compression_report
from corollary.models import GPT
from corollary.papers.compress import _minilm as minilm
from corollary.papers.compress._language import LINEAR, STEPS, Language, language
from corollary.testing import Case

RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5)
CUT = 0.6042
"""share of a rank that a cut of 39.58% leaves"""

# ------------------------------------------------------------------------------------------------------------ conformance


def lord_oracle(weight: np.ndarray, bias: np.ndarray | None, x: np.ndarray, settings: LoRD, rank: int) -> np.ndarray:
    """Outputs of a layer whose own outputs are cut to their leading principal components, by numpy's covariance of the data."""
    y = x @ weight.T + (0 if bias is None else bias)
    mean = y.mean(0)
    values, vectors = np.linalg.eigh(np.cov(y.T, bias=True))
    leading = vectors[:, np.argsort(values)[::-1][:rank]]
    return cast(np.ndarray, (y - mean) @ leading @ leading.T + mean)


def svd_oracle(weight: np.ndarray, bias: np.ndarray | None, x: np.ndarray, settings: SVD, rank: int) -> np.ndarray:
    """Outputs of a layer whose weight keeps its largest singular values."""
    u, s, vh = np.linalg.svd(weight, full_matrices=False)
    return cast(np.ndarray, x @ (u[:, :rank] * s[:rank] @ vh[:rank]).T + (0 if bias is None else bias))


KINDS = ("linear", "transformers", "conv1d", "conv2d", "embedding")

CONFORMANCE = {
    "corollary.compress.LoRD": Case(lambda: LoRD(ratio=0.6, damping=0.0), tags={"oracle": lord_oracle, "kinds": KINDS}),
    "corollary.compress.SVD": Case(lambda: SVD(ratio=0.6), tags={"oracle": svd_oracle, "kinds": KINDS}),
}


# ------------------------------------------------------------------------------------------------------------- perplexity


def _trained(trial: Trial) -> Language:
    return language(trial.seed, trial.pick(smoke=20, laptop=STEPS, full=10 * STEPS))


@torch.no_grad()
def random_subspace(model: nn.Module, seed: int) -> nn.Module:
    """A control: every factored layer projects its outputs onto as many random directions instead of the leading ones."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, Factored):
            up = cast(Tensor, layer.up.weight)
            basis = torch.linalg.qr(torch.randn(up.shape, generator=generator)).Q
            full = layer.matrix()
            up.copy_(basis)
            cast(Tensor, layer.down.weight).copy_(basis.T @ full)
    return model


@claim(control={"leading": False})
def rank_cut_under_one_percent(trial: Trial, leading: bool = True) -> Paired:
    """Perplexity behind a cut of every block matrix's rank against 1.01 times the original's."""
    trained = _trained(trial)
    small = compress(trained.model, LoRD(rank=CUT), LINEAR, calibration=trained.calibration())
    if not leading:
        small = random_subspace(small, trial.seed)
    ours, whole = trained.perplexity(small), trained.perplexity(trained.model)
    trial.log(rise_percent=100 * (ours / whole - 1), perplexity=whole)
    return Paired(ours=ours, baseline=1.01 * whole)


ALLOCATIONS = ("global", "uniform")


def ours_by_calibration(
    model: nn.Module, ratio: float, targets: Any, seen: Calibration, look: Callable[[nn.Module], float]
) -> nn.Module:
    """LoRD with ranks chosen globally or uniformly, whichever is better on the calibration data themselves."""
    small = [compress(model, LoRD(ratio=ratio, allocation=how), targets, calibration=seen) for how in ALLOCATIONS]
    return min(small, key=look)


@claim(control={"aligned": False})
def beats_weight_svd(trial: Trial, aligned: bool = True) -> Paired:
    """Perplexity of LoRD against plain decomposition, at the ratio where it leads by the least."""
    trained, model = _trained(trial), _trained(trial).model
    seen = calibrate(model, trained.calibration(), LINEAR)
    if not aligned:
        seen = minilm.misplaced(seen, trial.seed, means=False)
    ours, svd = [], []
    for ratio in RATIOS:
        ours.append(trained.perplexity(ours_by_calibration(model, ratio, LINEAR, seen, trained.calibration_loss)))
        plain = [compress(model, SVD(ratio=ratio, allocation=how), LINEAR) for how in ALLOCATIONS]
        svd.append(min(trained.perplexity(small) for small in plain))
    whole = trained.perplexity(model)
    trial.figure(
        "against ratio",
        x=list(RATIOS),
        y={"LoRD": ours, "SVD": svd, "uncompressed": [whole] * len(RATIOS)},
        xlabel="share of block weights kept",
        ylabel="perplexity of held-out source",
    )
    worst = max(range(len(RATIOS)), key=lambda i: ours[i] - svd[i])
    rises = {f"rise_percent_at_{ratio}": 100 * (p / whole - 1) for ratio, p in zip(RATIOS, ours, strict=True)}
    trial.log(worst_ratio=RATIOS[worst], perplexity=whole, **rises)
    return Paired(ours=ours[worst], baseline=svd[worst])


@claim(control={"aligned": False})
def beats_weight_svd_on_minilm(trial: Trial, aligned: bool = True) -> Paired:
    """Error of MiniLM's last states, likewise."""
    data = minilm.docstrings()
    chosen, test = minilm.split(trial.seed)
    seen = calibrate(data.model, data.batches(chosen), minilm.LINEAR)
    if not aligned:
        seen = minilm.misplaced(seen, trial.seed, means=False)
    ratios = trial.pick(smoke=(0.5,), laptop=(0.9, 0.7, 0.5))

    def ours_at(ratio: float) -> float:
        config = LoRD(ratio=ratio, allocation="global")
        return data.error(compress(data.model, config, minilm.LINEAR, calibration=seen), test)

    ours = [ours_at(ratio) for ratio in ratios]
    svd = [min(data.relative(errors[test], test) for errors in _errors_of_svd(r)) for r in ratios]
    trial.figure(
        "against ratio", x=list(ratios), y={"LoRD": ours, "SVD": svd}, xlabel="share of weights kept", ylabel="relative error"
    )
    # Errors differ by orders of magnitude between ratios, so the least lead is that of the largest quotient.
    worst = max(range(len(ratios)), key=lambda i: ours[i] / svd[i])
    trial.log(worst_ratio=ratios[worst], **{f"quotient_at_{r}": a / b for r, a, b in zip(ratios, ours, svd, strict=True)})
    return Paired(ours=ours[worst], baseline=svd[worst])


@lru_cache(maxsize=8)
def _errors_of_svd(ratio: float) -> tuple[Tensor, ...]:
    """Plain decomposition looks at no data: its errors on all texts, once for all trials."""
    data = minilm.docstrings()
    everything = torch.arange(minilm.TEXTS)
    plain = (compress(data.model, SVD(ratio=ratio, allocation=how), minilm.LINEAR) for how in ALLOCATIONS)
    return tuple(data.errors(small, everything) for small in plain)


# ----------------------------------------------------------------------------------------------------------- quantization


@torch.no_grad()
def unbalanced(model: nn.Module, seed: int) -> nn.Module:
    """A control: the same products with a column of one factor long where the row of the other is short, over three decades."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, Factored):
            scale = 10.0 ** (3 * torch.rand(layer.rank, generator=generator) - 1.5)
            cast(Tensor, layer.up.weight).mul_(scale)
            cast(Tensor, layer.down.weight).div_(scale[:, None])
    return model


@claim(control={"balanced": False})
def fits_with_quantization(trial: Trial, balanced: bool = True) -> Paired:
    """Perplexity of LoRD's factors in 8 bits against 1.01 times the original's."""
    trained = _trained(trial)
    small = compress(trained.model, LoRD(ratio=0.7, allocation="global"), LINEAR, calibration=trained.calibration())
    if not balanced:
        small = unbalanced(small, trial.seed)
    factors = [name for name, module in small.named_modules() if isinstance(module, nn.Linear) and "_proj" in name]
    packed = compress(small, Quantize(bits=8, group_size=32), factors)
    before, after = compression_report(small), compression_report(packed)
    ours, whole = trained.perplexity(packed), trained.perplexity(trained.model)
    kept = sum(row.bytes for row in after.layers) / sum(row.bytes_before for row in before.layers)
    trial.log(rise_percent=100 * (ours / whole - 1), lord_alone=trained.perplexity(small), share_of_bytes=kept)
    return Paired(ours=ours, baseline=1.01 * whole)


# ------------------------------------------------------------------------------------------------------------------ speed


@lru_cache(maxsize=4)
def _sized(dim: int, config: LoRD) -> Mapping[str, nn.Module]:
    """A model whose weights do not matter, and its factored version: times hang on shapes alone."""
    torch.manual_seed(0)
    net = GPT(256, dim=dim, depth=2, heads=8, context=32).eval()
    return {"dense": net, "factored": compress(net, config, LINEAR, calibration=[torch.randint(256, (32, 32))])}


def _speed(trial: Trial, batch: int, config: LoRD) -> Ratio:
    keep_freed_memory()
    models = _sized(trial.pick(smoke=64, laptop=512), config)
    x = torch.randint(256, (batch, 32), generator=trial.generator)
    with torch.inference_mode():
        calls = {name: partial(model, x) for name, model in models.items()}
        seconds = interleave(calls, rounds=trial.pick(smoke=3, laptop=25 if batch == 1 else 5), min_seconds=0.005)
    trial.log(dense_ms=1e3 * seconds["dense"], factored_ms=1e3 * seconds["factored"])
    return Ratio(ours=seconds["factored"], baseline=seconds["dense"])


KEPT = LoRD(ratio=0.5, multiple_of=8)


@claim(control={"config": LoRD(rank=2 / 3)})
def faster_at_batch_1(trial: Trial, config: LoRD = KEPT) -> Ratio:
    """Time of a forward pass of 32 tokens."""
    return _speed(trial, 1, config)


@claim(control={"config": LoRD(rank=2 / 3)})
def faster_at_batch_32(trial: Trial, config: LoRD = KEPT) -> Ratio:
    """Time of a forward pass of 32 rows of 32 tokens."""
    return _speed(trial, 32, config)

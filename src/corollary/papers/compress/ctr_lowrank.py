"""How the claims of low-rank click models are measured."""

from __future__ import annotations

import dataclasses
import tempfile
from functools import lru_cache, partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from corollary.claims import Paired, Ratio, Trial, claim
from corollary.claims.timing import interleave, keep_freed_memory
from corollary.compress import Calibration, CTRLowRank, Factored, FactoredFields, compress, compression_report, save
from corollary.models import FieldEmbedding
from corollary.papers.compress._clicks import DIM, EPOCHS, FIELD_SIZES, HIDDEN, KINDS, TARGETS, log_odds, logs, trained
from corollary.testing import Case

DEEP = tuple(f"deep.{2 * layer}" for layer in range(len(HIDDEN)))


def ranks(embedding: int, deep: int) -> dict[str, int]:
    """Ranks by hand, as the authors give them: one for the tables, one for every layer of the perceptron."""
    return {"embedding": embedding, **dict.fromkeys(DEEP, deep)}


RANKS = ranks(5, 12)
OURS = CTRLowRank(rank=RANKS)
SVD = CTRLowRank(rank=RANKS, metric="none", centered=False)
WHOLE = CTRLowRank(rank=ranks(DIM, HIDDEN[0]))
"""a control: every layer factored at its full rank"""

# ------------------------------------------------------------------------------------------------------------ conformance


def oracle(weight: np.ndarray, bias: np.ndarray | None, x: np.ndarray, settings: CTRLowRank, rank: int) -> np.ndarray:
    """Outputs of a layer, sample by sample the mean output and the scores on singular vectors of the centred outputs."""
    y = x @ weight.T + (0 if bias is None else bias)
    mean = y.mean(0)
    leading = np.linalg.svd(y - mean, full_matrices=False)[2][:rank]
    return cast(np.ndarray, mean + (y - mean) @ leading.T @ leading)


CONFORMANCE = {
    "corollary.compress.CTRLowRank": Case(
        lambda: CTRLowRank(ratio=0.6, damping=0.0),
        tags={"oracle": oracle, "kinds": ("linear", "transformers", "conv1d", "conv2d", "embedding")},
    ),
}

# -------------------------------------------------------------------------------------------------------------------- AUC


def _setting(trial: Trial) -> tuple[int, int, int]:
    """Seed, rows to train on, epochs."""
    return trial.seed, trial.pick(smoke=4_000, laptop=200_000, full=5_000_000), trial.pick(smoke=1, laptop=EPOCHS)


@torch.no_grad()
def random_directions(small: nn.Module, whole: nn.Module, seen: Calibration, seed: int) -> nn.Module:
    """A control: projections onto as many random directions in place of the leading ones; means are kept."""
    generator = torch.Generator().manual_seed(seed)
    for name, layer in small.named_modules():
        if isinstance(layer, FactoredFields):
            table = cast(FieldEmbedding, whole.get_submodule(name))
            for f, (start, size) in enumerate(zip(table.starts, table.field_sizes, strict=True)):
                rows = table.weight[start : start + size]
                shown = seen[name].mean[start : start + size].to(rows)
                mean = shown @ rows / shown.sum()
                basis = torch.linalg.qr(torch.randn(rows.shape[1], layer.rank, generator=generator)).Q
                layer.up[f].copy_(basis.T)
                layer.down.weight[start : start + size] = (rows - mean) @ basis
                cast(Tensor, layer.bias)[f].copy_(mean)
        if isinstance(layer, Factored):
            dense = cast(nn.Linear, whole.get_submodule(name))
            mean = dense.weight @ seen[name].mean.to(dense.weight)
            basis = torch.linalg.qr(torch.randn(dense.out_features, layer.rank, generator=generator)).Q
            cast(Tensor, layer.up.weight).copy_(basis)
            cast(Tensor, layer.down.weight).copy_(basis.T @ dense.weight)
            cast(Tensor, layer.bias).copy_(dense.bias + mean - basis @ (basis.T @ mean))
    return small


def _auc_not_below(trial: Trial, kind: str, leading: bool) -> Paired:
    held = trained(kind, *_setting(trial))
    seen = held.calibration()
    small = compress(held.model, OURS, TARGETS, calibration=seen)
    report = compression_report(small)
    if not leading:
        small = random_directions(small, held.model, seen, trial.seed)
    at_once = held.auc(small)
    ours, whole = held.auc(held.tuned_further(small)), _original(kind, *_setting(trial))
    trial.log(
        times_smaller=report.parameters_before / report.parameters,
        before_fine_tuning=at_once,
        original_before_fine_tuning=held.auc(held.model),
        of_the_truth=held.bayes(),
    )
    return Paired(ours=ours, baseline=whole)


@lru_cache(maxsize=8)
def _original(kind: str, seed: int, train: int, epochs: int) -> float:
    """AUC of the original trained further, once for a claim and its control."""
    held = trained(kind, seed, train, epochs)
    return held.auc(held.tuned_further(held.model))


@claim(control={"leading": False})
def deepfm_auc_not_below(trial: Trial, leading: bool = True) -> Paired:
    """AUC of a compressed DeepFM against the original's, both trained for an epoch more where that helps."""
    return _auc_not_below(trial, "DeepFM", leading)


@claim(control={"leading": False})
def dcn_auc_not_below(trial: Trial, leading: bool = True) -> Paired:
    """AUC of a compressed Deep & Cross Network, likewise."""
    return _auc_not_below(trial, "DCN", leading)


# ------------------------------------------------------------------------------------------------------------- weight SVD


def misplaced(seen: Calibration, seed: int) -> Calibration:
    """A control: how often ids are shown dealt out anew within their field, and moments of inputs with their coordinates shuffled."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, moments in seen.items():
        if moments.second.ndim == 1:
            order = torch.cat([part[torch.randperm(len(part), generator=generator)] for part in _parts()])
            found[name] = dataclasses.replace(moments, second=moments.second[order], mean=moments.mean[order])
        else:
            order = torch.randperm(len(moments.mean), generator=generator)
            found[name] = dataclasses.replace(moments, second=moments.second[order][:, order], mean=moments.mean[order])
    return Calibration(found)


def _parts() -> tuple[Tensor, ...]:
    return torch.split(torch.arange(sum(FIELD_SIZES)), list(FIELD_SIZES))


SHARES = (0.4, 0.27, 0.2)


@claim(control={"aligned": False})
def nearer_than_weight_svd(trial: Trial, aligned: bool = True) -> Paired:
    """Squared change of the log-odds, at the share of tables and perceptron where the lead over weight decomposition is least."""
    held = trained("DeepFM", *_setting(trial))
    seen = held.calibration()
    if not aligned:
        seen = misplaced(seen, trial.seed)
    true = log_odds(held.model, held.test)
    ours, svd = [], []

    def change(config: CTRLowRank) -> float:
        small = compress(held.model, config, TARGETS, calibration=seen)
        return float((log_odds(small, held.test) - true).square().mean())

    for ratio in SHARES:
        ours.append(change(CTRLowRank(ratio=ratio, allocation="uniform")))
        plain = [CTRLowRank(ratio=ratio, allocation=how, metric="none", centered=False) for how in ("global", "uniform")]
        svd.append(min(map(change, plain)))
    trial.figure(
        "against share",
        x=list(SHARES),
        y={"by features": ours, "by weights": svd},
        xlabel="share of table and perceptron kept",
        ylabel="squared change of the log-odds",
    )
    worst = max(range(len(SHARES)), key=lambda i: ours[i] / svd[i])
    trial.log(worst_share=SHARES[worst], **{f"quotient_at_{r}": a / b for r, a, b in zip(SHARES, ours, svd, strict=True)})
    return Paired(ours=ours[worst], baseline=svd[worst])


@claim(control={"leading": False})
def auc_above_weight_svd(trial: Trial, leading: bool = True) -> Paired:
    """AUC after fine-tuning of both, at equal size."""
    held = trained("DeepFM", *_setting(trial))
    seen = held.calibration()
    small = compress(held.model, OURS, TARGETS, calibration=seen)
    if not leading:
        small = random_directions(small, held.model, seen, trial.seed)
    before, plain = _plain(*_setting(trial))
    trial.log(before_fine_tuning=held.auc(small), svd_before_fine_tuning=before, original=held.auc(held.model))
    return Paired(ours=held.auc(held.tuned_further(small)), baseline=plain)


@lru_cache(maxsize=8)
def _plain(seed: int, train: int, epochs: int) -> tuple[float, float]:
    """AUC by weight decomposition, before fine-tuning and after, once for the claim and its control."""
    held = trained("DeepFM", seed, train, epochs)
    plain = compress(held.model, SVD, TARGETS)
    return held.auc(plain), held.auc(held.tuned_further(plain))


# --------------------------------------------------------------------------------------------------------- size and speed


@claim(control={"config": WHOLE})
def a_third_of_the_size(trial: Trial, config: CTRLowRank = OURS) -> Ratio:
    """Bytes of the saved file over the original's, for whichever of both models shrinks less."""
    log = logs(trial.seed, 4_000)[0]
    sizes = {}
    for name, kind in KINDS.items():
        torch.manual_seed(trial.seed)
        model = kind(FIELD_SIZES, DIM, HIDDEN)
        small = compress(model, config, TARGETS, calibration=[log.ids])
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "whole.safetensors"
            save_file(model.state_dict(), whole)
            new = save(small, Path(folder) / "small") / "model.safetensors"
            sizes[name] = (new.stat().st_size, whole.stat().st_size)
    worst = max(sizes.values(), key=lambda size: size[0] / size[1])
    trial.log(**{f"times_smaller_{name}": whole / new for name, (new, whole) in sizes.items()})
    return Ratio(ours=worst[0], baseline=worst[1])


FIELDS = 26
WIDE = (400, 400, 400)


@lru_cache(maxsize=2)
def _sized(full: bool, tiny: bool) -> dict[str, nn.Module]:
    """A DeepFM as wide as the paper's, its weights not trained, and its factored version: times hang on shapes alone."""
    torch.manual_seed(0)
    sizes, hidden = [20 if tiny else 4_000] * FIELDS, (32, 32, 32) if tiny else WIDE
    model = KINDS["DeepFM"](sizes, DIM, hidden).eval()
    ids = torch.randint(sizes[0], (2_000, FIELDS))
    config = CTRLowRank(rank=ranks(DIM, hidden[0]) if full else ranks(5, 12 if tiny else 64))
    return {"dense": model, "factored": compress(model, config, TARGETS, calibration=[ids])}


def _speed(trial: Trial, batch: int, full: bool) -> Ratio:
    keep_freed_memory()
    tiny = trial.pick(smoke=True, laptop=False)
    models = _sized(full, tiny)
    ids = torch.randint(20 if tiny else 4_000, (batch, FIELDS), generator=trial.generator)
    with torch.inference_mode():
        calls = {name: partial(model, ids) for name, model in models.items()}
        seconds = interleave(calls, rounds=trial.pick(smoke=3, laptop=21), min_seconds=0.01)
    trial.log(dense_ms=1e3 * seconds["dense"], factored_ms=1e3 * seconds["factored"])
    return Ratio(ours=seconds["factored"], baseline=seconds["dense"])


@claim(control={"full": True})
def faster_at_batch_1(trial: Trial, full: bool = False) -> Ratio:
    """Time to score one row."""
    return _speed(trial, 1, full)


@claim(control={"full": True})
def faster_at_batch_512(trial: Trial, full: bool = False) -> Ratio:
    """Time to score 512 rows."""
    return _speed(trial, 512, full)

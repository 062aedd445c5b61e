"""How MatryoshkaKV's claims are measured: a small LLaMA's cache, by share of its bytes, beside principal components."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from corollary.claims import Exact, Paired, Trial, claim
from corollary.compress import (
    MatryoshkaAttention,
    MatryoshkaCache,
    cayley,
    decode,
    drawn_kv_ranks,
    inverse_cayley,
    kv_distillation_loss,
    kv_ranks,
    matryoshka_kv,
    search_kv_ranks,
    set_kv_ranks,
)
from corollary.models import GPT
from corollary.models.gpt import CausalSelfAttention
from corollary.papers.compress._language import STEPS, Language, language
from corollary.testing import Case

# ------------------------------------------------------------------------------------------------------------ conformance


def cut_attention() -> MatryoshkaAttention:
    """An attention layer of two heads of width 4, cut to 3 and 2 coordinates."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean, root = torch.randn(2, 4), torch.randn(2, 4, 4)
        layer = MatryoshkaAttention(CausalSelfAttention(8, 2, 6), (mean, root @ root.mT), (mean, root @ root.mT))
    layer.ranks.copy_(torch.tensor([[3, 2], [2, 3]]))
    return layer


CONFORMANCE = {
    "corollary.compress.MatryoshkaAttention": Case(
        cut_attention, tags={"inputs": ((5, 8),), "output": (5, 8), "leading": ((4,), (2,)), "free": ((0, 0),)}
    )
}

# --------------------------------------------------------------------------------------------------------------- training

RATE, BATCH, STEP = 0.01, 16, 2
WIDTH = 16
"""of the heads of the model that all claims share"""


def _lengths(trial: Trial) -> tuple[int, int]:
    """Steps of the model's training, and of the bases'."""
    return trial.pick(smoke=(20, 3), laptop=(STEPS, 200))


@lru_cache(maxsize=32)
def _bases(seed: int, pretraining: int, steps: int, matched: bool = True) -> GPT:
    """Bases trained from principal components; 0 steps leave the components. Without ``matched`` each window learns what the next one says."""
    trained = language(seed, pretraining)
    model = matryoshka_kv(trained.model, trained.calibration())
    generator = torch.Generator().manual_seed(seed + 3)
    if not steps:
        return model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=max(steps, 2), pct_start=0.1 if steps > 20 else 0.5
    )
    for _ in range(steps):
        x, y = trained.stream.batch(BATCH, generator)
        with torch.no_grad():
            teacher = trained.model(x)
        if not matched:
            teacher, y = teacher.roll(1, 0), y.roll(1, 0)
        with drawn_kv_ranks(model, generator):
            loss = kv_distillation_loss(model(x), teacher, y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return model


def _divergence(trained: Language, model: nn.Module) -> Callable[[], float]:
    """KL from the original's on windows of training text: what ranks are searched by."""
    x = trained.stream.batch(32, torch.Generator().manual_seed(trained.seed + 4))[0]
    with torch.no_grad():
        teacher = trained.model(x).log_softmax(-1)

    @torch.no_grad()
    def error() -> float:
        return float((teacher.exp() * (teacher - model(x).log_softmax(-1))).sum(-1).mean())

    return error


@torch.no_grad()
def _accuracy(trained: Language, model: nn.Module) -> float:
    """Share of held-out bytes that the model puts first."""
    x, y = trained.stream.batch(512, torch.Generator().manual_seed(trained.seed + 2), split="val")
    return float((model(x).argmax(-1) == y).double().mean())


@dataclass(frozen=True)
class Cut:
    """What a model does with a share of its cache."""

    loss: float
    accuracy: float
    uniform_loss: float
    ranks: tuple[int, ...]


@torch.no_grad()
def _turned_round(model: GPT) -> GPT:
    """A control: the same bases, whose last coordinates come first."""
    turned = copy.deepcopy(model)
    for layer in turned.modules():
        if isinstance(layer, MatryoshkaAttention):
            for skew in (layer.key_skew, layer.value_skew):
                skew.copy_(inverse_cayley(cayley(skew).flip(-1)))
    return turned


@lru_cache(maxsize=128)
def cut(seed: int, pretraining: int, steps: int, budget: float, matched: bool = True, leading: bool = True) -> Cut:
    """Search ranks for a share of the cache, and measure; without ``leading`` each head keeps as many of its last coordinates."""
    trained = language(seed, pretraining)
    model = copy.deepcopy(_bases(seed, pretraining, steps, matched))
    if not leading:
        model = _turned_round(model)
    set_kv_ranks(model, int(budget * WIDTH))
    uniform = trained.loss(model)
    ranks = search_kv_ranks(model, _divergence(trained, model), budget, step=STEP) if leading else kv_ranks(model)
    return Cut(trained.loss(model), _accuracy(trained, model), uniform, tuple(ranks.flatten().tolist()))


def _ours(trial: Trial, budget: float, matched: bool = True, leading: bool = True) -> Cut:
    return cut(trial.seed, *_lengths(trial), budget, matched, leading)


def _pca(trial: Trial, budget: float) -> Cut:
    return cut(trial.seed, _lengths(trial)[0], 0, budget)


# ----------------------------------------------------------------------------------------------------------------- claims

SHARES = (0.6, 0.4, 0.25)


@claim(control={"leading": False})
def keeps_nine_tenths(trial: Trial, leading: bool = True) -> Paired:
    """Accuracy with 40% of the cache against nine tenths of the whole cache's."""
    ours = _ours(trial, 0.4, leading=leading)
    trained = language(trial.seed, _lengths(trial)[0])
    whole = _accuracy(trained, trained.model)
    trial.log(kept=ours.accuracy / whole, **{f"rank_{i}": r for i, r in enumerate(ours.ranks)})
    return Paired(ours=ours.accuracy, baseline=0.9 * whole)


@claim(control={"budget": 1.0})
def principal_components_do_not(trial: Trial, budget: float = 0.4) -> Paired:
    """Accuracy of principal components with 40% of the cache against nine tenths of the whole cache's."""
    trained = language(trial.seed, _lengths(trial)[0])
    found, whole = _pca(trial, budget), _accuracy(trained, trained.model)
    trial.log(kept=found.accuracy / whole)
    return Paired(ours=found.accuracy, baseline=0.9 * whole)


def _versus(trial: Trial, budget: float, matched: bool) -> Paired:
    ours, pca = _ours(trial, budget, matched), _pca(trial, budget)
    trial.log(
        ours_accuracy=ours.accuracy, pca_accuracy=pca.accuracy, ours_uniform=ours.uniform_loss, pca_uniform=pca.uniform_loss
    )
    return Paired(ours=ours.loss, baseline=pca.loss)


@claim(control={"matched": False})
def beats_pca(trial: Trial, matched: bool = True) -> Paired:
    """Loss with 40% of the cache, of trained bases and of principal components, ranks searched alike."""
    return _versus(trial, 0.4, matched)


@claim(control={"matched": False})
def beats_pca_at_a_quarter(trial: Trial, matched: bool = True) -> Paired:
    """The same with a quarter of the cache."""
    found = [_versus(trial, share, matched) for share in SHARES]
    trained = language(trial.seed, _lengths(trial)[0])
    trial.figure(
        "against bytes",
        x=list(SHARES),
        y={
            "trained": [p.ours for p in found],
            "principal components": [p.baseline for p in found],
            "whole": [trained.loss(trained.model)] * 3,
        },
        xlabel="share of the cache's bytes",
        ylabel="loss of held-out source, nats a byte",
    )
    return found[-1]


class Padded(MatryoshkaCache):
    """A control: each head is stored as wide as the widest."""

    def __init__(self, ranks: Tensor, **options: int) -> None:
        super().__init__(ranks.amax(-1, keepdim=True).expand_as(ranks).contiguous(), **options)  # type: ignore[arg-type]


@claim(control={"kind": Padded})
def cache_bytes_equal_the_formula(trial: Trial, kind: type[MatryoshkaCache] = MatryoshkaCache) -> Exact:
    """Bytes that a cache of drawn ranks allocates against the formula; and what is decoded with it against the whole row at once."""
    trained = language(0, trial.pick(smoke=5, laptop=60))
    model = copy.deepcopy(_bases(0, trial.pick(smoke=5, laptop=60), 0))
    x = trained.stream.batch(3, trial.generator, split="val")[0]
    errors = []
    for _ in range(trial.pick(smoke=1, laptop=4)):
        ranks = torch.randint(1, WIDTH + 1, kv_ranks(model).shape, generator=trial.generator)
        set_kv_ranks(model, ranks)
        cache = kind(ranks, max_batch_size=len(x), max_cache_len=x.shape[1])
        with torch.no_grad():
            parts = [decode(model, x[:, :5], cache), *(decode(model, x[:, i : i + 1], cache) for i in range(5, x.shape[1]))]
            whole = model(x)
        formula = len(x) * x.shape[1] * sum(int(r) for r in ranks.flatten()) * 4
        errors.append(abs(cache.nbytes / formula - 1))
        errors.append(float((torch.cat(parts, 1) - whole).norm() / whole.norm()))
    return Exact(errors)

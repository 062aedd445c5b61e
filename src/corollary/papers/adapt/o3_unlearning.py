"""How O3's claims are measured: a small language model learns characters' names, and unlearns five scripts one after the other."""

from __future__ import annotations

import copy
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from corollary.adapt import (
    LoRA,
    OODDetector,
    OrthogonalLoRA,
    SoftLoading,
    adapt,
    adapter_penalty,
    add_request,
    contrastive_entropy,
)
from corollary.claims import Paired, Trial, claim
from corollary.models import GPT
from corollary.testing import Case

Array = NDArray[np.float64]

# ------------------------------------------------------------------------------------------------------------ conformance


def lora_oracle(weight: Array, state: dict[str, Array], config: OrthogonalLoRA) -> Array:
    """The product of the factors, entry by entry."""
    b, a = state["lora_B"], state["lora_A"]
    scale = config.alpha / config.rank if config.alpha is not None else 1.0
    return np.array([[scale * sum(b[i, k] * a[k, j] for k in range(len(a))) for j in range(a.shape[1])] for i in range(len(b))])


class Stream(nn.Module):
    """Blocks of a residual stream on floating inputs (batch, tokens, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, 8) to the same."""
        if not x.is_floating_point() or x.shape[-1] != 8:
            raise ValueError(f"x must be floating of shape (batch, tokens, 8), not {x.dtype} {tuple(x.shape)}")
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x


def fitted(**options: Any) -> OODDetector:
    """A detector of standard normal inputs."""
    x = torch.randn(60, 5, 8, generator=torch.Generator().manual_seed(0))
    return OODDetector(Stream(), ["blocks.*"], gamma=20.0, **options).fit(x)


def loading() -> SoftLoading:
    """A stream with two requests, and detectors that do not train."""
    model = Stream()
    for name in ("first", "second"):
        add_request(model, OrthogonalLoRA(rank=2), name=name)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.3)
    return SoftLoading(model, {name: fitted(floor=0.0).requires_grad_(False) for name in ("first", "second")})


_STREAMS = {"inputs": ((5, 8),), "leading": ((4,), (2,)), "free": ((0, 0),)}
_HOOKS = {"compiled": "a detector puts hooks on its backbone for each call, which torch.compile does not take"}
CONFORMANCE = {
    "corollary.adapt.OrthogonalLoRA": Case(
        lambda: OrthogonalLoRA(rank=2, alpha=3),
        tags={"oracle": lora_oracle, "parameters": lambda site: 2 * (site.in_features + site.out_features)},
    ),
    "corollary.adapt.contrastive_entropy": Case(
        lambda: contrastive_entropy,
        tags={
            "inputs": lambda g, dtype: tuple(torch.randn(n, 4, generator=g, dtype=torch.float64).to(dtype) for n in (3, 5)),
            "bad": {"other widths": (torch.ones(2, 3), torch.ones(2, 4)), "a vector": (torch.ones(3), torch.ones(2, 3))},
        },
    ),
    "corollary.adapt.OODDetector": Case(lambda: fitted(floor=0.0), tags={**_STREAMS, "output": ()}, xfail=_HOOKS),
    "corollary.adapt.SoftLoading": Case(loading, tags={**_STREAMS, "output": (5, 8)}, xfail=_HOOKS),
}

# -------------------------------------------------------------------------------------------------------------- the facts

BLOCKS = {
    "Greek": (0x370, 0x400), "Cyrillic": (0x400, 0x500), "Armenian": (0x530, 0x590), "Hebrew": (0x590, 0x600),
    "Arabic": (0x600, 0x700), "Devanagari": (0x900, 0x980), "Thai": (0xE00, 0xE80), "Georgian": (0x10A0, 0x1100),
    "Cherokee": (0x13A0, 0x1400), "Arrows": (0x2190, 0x2200), "Mathematical": (0x2200, 0x2300), "Katakana": (0x30A0, 0x3100),
}  # fmt: skip
"""blocks of Unicode: what one request unlearns"""
PAD, END, ASK, MASK, FIRST_WORD = 16, 17, 18, 19, 20
"""tokens; 0 to 15 are hexadecimal digits, and words of names begin at FIRST_WORD"""
QUESTION, ANSWER = 5, 7
"""tokens of a question (a code point and ASK), and the most words of a name"""
KNOWN, UNSEEN = 32, 32
"""facts of each block that the model learns, and that it never sees"""
REQUESTS = 5
MODELS = 2
TARGETS = (r".*\.attn\..*_proj", r".*\.mlp\..*_proj")


@lru_cache(maxsize=1)
def facts() -> tuple[tuple[Tensor, ...], int]:
    """Each block's facts (characters, QUESTION + ANSWER + 1), a code point and its name, and the number of tokens."""
    words: dict[str, int] = {}
    blocks = []
    for begin, end in BLOCKS.values():
        rows = []
        for code in range(begin, end):
            name = unicodedata.name(chr(code), "").split()
            if 0 < len(name) <= ANSWER:
                answer = [*(words.setdefault(word, FIRST_WORD + len(words)) for word in name), END]
                rows.append([*(int(digit, 16) for digit in f"{code:04X}"), ASK, *answer, *[PAD] * (ANSWER + 1 - len(answer))])
        blocks.append(torch.tensor(rows))
    return tuple(blocks), FIRST_WORD + len(words)


def losses(model: nn.Module, rows: Tensor, labels: Tensor | None = None) -> Tensor:
    """The mean loss of every answer's tokens: (facts,)."""
    wanted = (rows if labels is None else labels)[:, QUESTION:]
    logits = model(rows[:, :-1])[:, QUESTION - 1 :]
    each = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=PAD, reduction="none").view(wanted.shape)
    return each.sum(1) / (wanted != PAD).sum(1)


def known(model: nn.Module, rows: Tensor) -> Tensor:
    """Whether every word of a name is the likeliest after the words before it: (facts,)."""
    wanted = rows[:, QUESTION:]
    guessed = model(rows[:, :-1])[:, QUESTION - 1 :].argmax(-1)
    return ((guessed == wanted) | (wanted == PAD)).all(1).double()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class World:
    """A model that knows some facts of every block, those facts, and others that it never saw."""

    model: GPT
    known: tuple[Tensor, ...]
    unseen: tuple[Tensor, ...]
    words: int

    def random_names(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """The same facts, each word of a name replaced by a random one of all."""
        drawn = torch.randint(FIRST_WORD, self.words, rows.shape, generator=generator)
        return torch.where(rows >= FIRST_WORD, drawn, rows)


@lru_cache(maxsize=MODELS)
def world(number: int, steps: int) -> World:
    """Train model ``number`` until it knows its facts by heart."""
    generator = torch.Generator().manual_seed(number)
    blocks, words = facts()
    shuffled = [rows[torch.randperm(len(rows), generator=generator)] for rows in blocks]
    learnt = torch.cat([rows[:KNOWN] for rows in shuffled])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(number)
        model = GPT(words, dim=48, depth=2, heads=4, context=QUESTION + ANSWER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        loss = losses(model, learnt[torch.randint(len(learnt), (64,), generator=generator)]).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return World(
        model.eval().requires_grad_(False),
        tuple(rows[:KNOWN] for rows in shuffled),
        tuple(rows[KNOWN : KNOWN + UNSEEN] for rows in shuffled),
        words,
    )


# ------------------------------------------------------------------------------------------------------------- unlearning


@dataclass(frozen=True)
class Seen:
    """What is left after the last request: shares of facts known, by request and of the rest, and the test's area under the curve."""

    forgotten: tuple[float, ...]
    rest: float
    membership: float

    @property
    def gap(self) -> float:
        """Facts known of the rest, less facts known of what was to be forgotten."""
        return self.rest - float(np.mean(self.forgotten))


def _order(seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The blocks of the requests, in order, and the rest."""
    drawn = torch.randperm(len(BLOCKS), generator=torch.Generator().manual_seed(seed)).tolist()
    return tuple(drawn[:REQUESTS]), tuple(drawn[REQUESTS:])


def _seen(place: World, seed: int, look: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Seen:
    """Measured by ``look``, which gives whether facts are known, and their losses."""
    asked, rest = _order(seed)
    forgotten = [look(place.known[i]) for i in asked]
    never = torch.cat([look(place.unseen[i])[1] for i in asked])
    member = torch.cat([loss for _, loss in forgotten])
    return Seen(
        tuple(float(right.mean()) for right, _ in forgotten),
        float(torch.cat([look(place.known[i])[0] for i in rest]).mean()),
        float(roc_auc_score([1] * len(member) + [0] * len(never), -torch.cat([member, never]).double().numpy())),
    )


@torch.no_grad()
def _plainly(place: World, seed: int, model: nn.Module) -> Seen:
    return _seen(place, seed, lambda rows: (known(model, rows), losses(model, rows)))


def _descend(model: nn.Module, loss: Callable[[], Tensor], lr: float, steps: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _detector(place: World, rows: Tensor, seed: int, generator: torch.Generator, steps: int) -> OODDetector:
    """A detector of the request's questions on a copy of the model, a LoRA of which learns first."""
    questions = rows[:, :QUESTION]
    backbone = adapt(copy.deepcopy(place.model), LoRA(rank=8, alpha=32), r".*\.[qkv]_proj")
    detector = OODDetector(backbone, ["blocks.*"], seed=seed % 2**31)

    def masked(tokens: Tensor) -> Tensor:
        return torch.where(torch.rand(tokens.shape, generator=generator) < 0.15, MASK, tokens)

    def token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    detector.learn([questions] * steps, masked, token_loss=token_loss)
    return detector.eval().fit(questions)


@lru_cache(maxsize=64)
def _unlearnt(seed: int, number: int, steps: int, pretraining: int, lr: float, true_names: bool = False) -> SoftLoading:
    """Five requests by O3, none of which sees data of another or of the rest."""
    place = world(number, pretraining)
    generator = torch.Generator().manual_seed(seed)
    model, detectors = copy.deepcopy(place.model), {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for i in _order(seed)[0]:
            name = f"request_{i}"
            rows = place.known[i]
            names = rows if true_names else place.random_names(rows, generator)
            add_request(model, OrthogonalLoRA(rank=8, alpha=16), TARGETS, name=name)
            _descend(model, lambda r=rows, n=names: losses(model, r, n).mean() + adapter_penalty(model), lr, steps)  # type: ignore[misc]
            detectors[name] = _detector(place, rows, seed, generator, steps)
    return SoftLoading(model, detectors).eval()


def o3(trial: Trial, lr: float, *, shuffled: bool = False, true_names: bool = False, log: bool = True) -> Seen:
    """O3 after five requests; ``shuffled`` gives each fact the weight of another."""
    number, (steps, pretraining) = trial.seed % MODELS, _steps(trial)
    place = world(number, pretraining)
    loaded = _unlearnt(trial.seed, number, steps, pretraining, lr, true_names)
    asked, rest = _order(trial.seed)
    groups = [place.known[i] for i in (*asked, *rest)] + [place.unseen[i] for i in asked]
    with torch.no_grad():
        weights = torch.cat([loaded.weights(rows[:, :QUESTION]) for rows in groups])
    if log:
        sizes = [KNOWN * len(asked), KNOWN * len(rest), sum(len(place.unseen[i]) for i in asked)]
        parts = zip(("forgotten", "rest", "unseen"), weights.split(sizes), strict=True)  # type: ignore[no-untyped-call]
        trial.log(**{f"loaded_{name}": float((part > 0).double().mean()) for name, part in parts}, overlap=_overlap(loaded))
    if shuffled:
        weights = weights[torch.randperm(len(weights), generator=torch.Generator().manual_seed(trial.seed))]
    held = {id(rows): w for rows, w in zip(groups, weights.split([len(rows) for rows in groups]), strict=True)}  # type: ignore[no-untyped-call]

    def look(rows: Tensor) -> tuple[Tensor, Tensor]:
        with loaded.hold(held[id(rows)]) as model, torch.no_grad():
            return known(model, rows), losses(model, rows)

    return _seen(place, trial.seed, look)


def _overlap(loaded: SoftLoading) -> float:
    """The greatest overlap of two requests' A on any layer: 0 where orthogonal, 1 where both are the same single direction."""
    by_request = [
        [p.detach() for n, p in loaded.model.named_parameters() if n.endswith(f".{name}.lora_A")] for name in loaded.detectors
    ]
    return max(
        float((a @ b.mT).norm() / (a.norm() * b.norm()))
        for i, first in enumerate(by_request)
        for second in by_request[:i]
        for a, b in zip(first, second, strict=True)
    )


def ascent(trial: Trial, lr: float) -> Seen:
    """Gradient ascent on each request's facts, all parameters free."""
    steps, pretraining = _steps(trial)
    place = world(trial.seed % MODELS, pretraining)
    model = copy.deepcopy(place.model).requires_grad_(True)
    for i in _order(trial.seed)[0]:
        _descend(model, lambda rows=place.known[i]: -losses(model, rows).mean(), lr, steps)  # type: ignore[misc]
    return _plainly(place, trial.seed, model)


def lora(trial: Trial, lr: float) -> Seen:
    """One LoRA that goes on learning random names, request after request: O3 without detectors, penalty or new adapters."""
    steps, pretraining = _steps(trial)
    place = world(trial.seed % MODELS, pretraining)
    generator = torch.Generator().manual_seed(trial.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trial.seed)
        model = adapt(copy.deepcopy(place.model), LoRA(rank=8, alpha=16), TARGETS)
    for i in _order(trial.seed)[0]:
        names = place.random_names(place.known[i], generator)
        _descend(model, lambda rows=place.known[i], n=names: losses(model, rows, n).mean(), lr, steps)  # type: ignore[misc]
    return _plainly(place, trial.seed, model)


# ----------------------------------------------------------------------------------------------------------------- claims

RATE = 0.01
RATES = (0.003, 0.01, 0.03)
ASCENT_RATES = (0.00004, 0.00006, 0.00008, 0.00012, 0.0002)
LORA_RATES = (0.00015, 0.0002, 0.0003, 0.0005, 0.001)


def _steps(trial: Trial) -> tuple[int, int]:
    """Steps of a request, and of the model's own training."""
    return trial.pick(smoke=(2, 20), laptop=(16, 300))


def _before(trial: Trial) -> tuple[World, Seen]:
    place = world(trial.seed % MODELS, _steps(trial)[1])
    return place, _plainly(place, trial.seed, place.model)


@claim(control={"shuffled": True})
def forgets_each_request(trial: Trial, shuffled: bool = False) -> Paired:
    """The best-known request after all five, against facts of the same blocks that the model never saw."""
    place, before = _before(trial)
    after = o3(trial, RATE, shuffled=shuffled)
    with torch.no_grad():
        unseen = torch.cat([known(place.model, place.unseen[i]) for i in _order(trial.seed)[0]])
    trial.log(before=float(np.mean(before.forgotten)), **{f"request_{t}": share for t, share in enumerate(after.forgotten)})
    return Paired(ours=max(after.forgotten), baseline=float(unseen.mean()))


@claim(control={"shuffled": True})
def utility_within_a_point(trial: Trial, shuffled: bool = False) -> Paired:
    """Facts known of the rest, after five requests and before."""
    after = o3(trial, RATE, shuffled=shuffled)
    return Paired(ours=after.rest, baseline=_before(trial)[1].rest)


@claim(control={"true_names": True})
def membership_near_chance(trial: Trial, true_names: bool = False) -> Paired:
    """How far the membership test on what was forgotten is from chance, after five requests and before."""
    after, before = o3(trial, RATE, true_names=true_names).membership, _before(trial)[1].membership
    trial.log(auc=after, auc_before=before)
    return Paired(ours=abs(after - 0.5), baseline=abs(before - 0.5))


def _tune(baseline: Callable[[Trial, float], Seen], rates: tuple[float, ...]) -> Callable[..., dict[str, float]]:
    def hook(trial: Trial, shuffled: bool = False) -> dict[str, float]:
        trials = [Trial(trial.seed + i, trial.scale) for i in range(1 if trial.scale == "smoke" else 2)]

        def best(grid: tuple[float, ...], measure: Callable[[Trial, float], Seen]) -> float:
            scores = {lr: sum(measure(t, lr).gap for t in trials) for lr in grid[: 1 if trial.scale == "smoke" else None]}
            return max(scores, key=scores.__getitem__)

        ours = best(RATES, lambda t, lr: o3(t, lr, shuffled=shuffled, log=False))
        return {"ours": ours, "baseline": best(rates, baseline)}

    return hook


def _beats(trial: Trial, baseline: Callable[[Trial, float], Seen], shuffled: bool) -> Paired:
    ours, other = o3(trial, trial.tuned["ours"], shuffled=shuffled), baseline(trial, trial.tuned["baseline"])
    found: Mapping[str, Seen] = {"ours": ours, "baseline": other}
    for name, seen in found.items():
        trial.log(
            **{
                f"{name}_rate": trial.tuned[name],
                f"{name}_rest": seen.rest,
                f"{name}_forgotten": float(np.mean(seen.forgotten)),
                f"{name}_auc": seen.membership,
            }
        )
    return Paired(ours=ours.gap, baseline=other.gap)


@claim(control={"shuffled": True}, tune=_tune(ascent, ASCENT_RATES))
def beats_gradient_ascent(trial: Trial, shuffled: bool = False) -> Paired:
    """Rest known less forgotten known, against gradient ascent's."""
    return _beats(trial, ascent, shuffled)


@claim(control={"shuffled": True}, tune=_tune(lora, LORA_RATES))
def beats_lora(trial: Trial, shuffled: bool = False) -> Paired:
    """The same against one LoRA's."""
    return _beats(trial, lora, shuffled)

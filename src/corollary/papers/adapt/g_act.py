"""How G-ACT's claims are measured: a byte-level code model of two languages, trained in the run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from torch import Tensor
from torch.nn import functional as F

from corollary.adapt import GACT
from corollary.claims import Paired, Ratio, Trial, claim
from corollary.claims.timing import interleave, keep_freed_memory
from corollary.data import TokenStream, stdlib_text
from corollary.models import GPT
from corollary.testing import Case

CONFORMANCE = {
    "corollary.adapt.GACT": Case(GACT, tags={"options": ({}, {"clusters": 1}, {"pool": "mean", "lr": 0.03, "epochs": 20})})
}

LANGUAGES = ("Python", "C++")
LAYERS = ("blocks.*",)
CONTEXT = 48
PROMPT = 24
WRITTEN = 32
MODELS = 3
STRENGTH = 0.5
PAIRS = 200
"""pairs that steering is fitted on"""
SIZES = {"small": (48, 4), "large": (64, 8)}
"""width, and training windows of each language in a batch; probes are compared in the small model, text is written by the large one"""

# ------------------------------------------------------------------------------------------------------ the code model


@lru_cache(maxsize=2)
def torch_headers(max_bytes: int = 1_000_000) -> str:
    """C++ headers that torch ships, as one text; files in the order of a hash of their names."""
    root = Path(torch.__file__).parent / "include"
    files = [path for folder in ("c10", "torch") for path in (root / folder).rglob("*.h")]
    if not files:
        raise FileNotFoundError(f"no C++ headers under {root}; this build of torch ships without them")
    parts, length = [], 0
    for path in sorted(files, key=lambda p: hashlib.sha256(p.relative_to(root).as_posix().encode()).digest()):
        parts.append(path.read_bytes().replace(b"\r\n", b"\n"))
        length += len(parts[-1])
        if length >= max_bytes:
            break
    return b"".join(parts)[:max_bytes].decode("utf-8", errors="ignore")


@dataclass(frozen=True)
class World:
    """A trained model, the text of both languages, who tells them apart, and prompts that belong to neither."""

    net: GPT
    streams: tuple[TokenStream, TokenStream]
    judge: Any
    judge_accuracy: float
    prompts: Tensor

    def windows(self, language: int, count: int, generator: torch.Generator, split: str = "train") -> Tensor:
        """Random prompts in one language: (count, PROMPT)."""
        return self.streams[language].batch(count, generator, split)[0][:, :PROMPT]

    def share(self, text: Tensor, language: int) -> float:
        """The judge's mean probability that rows of bytes are of this language."""
        return float(self.judge.predict_proba(_strings(text))[:, language].mean())


def _strings(rows: Tensor) -> list[str]:
    return [bytes(row.tolist()).decode("latin-1") for row in rows]


def _prose(*texts: str) -> Tensor:
    """Comment lines of letters alone, without their marks, a line break at the end: what may stand before code of either kind."""
    lines = []
    for mark, text in zip(("#", "//"), texts, strict=True):
        lines += re.findall(rf"^[ \t]*{mark} ([A-Za-z ,.'-]{{16,40}})$", text, re.MULTILINE)
    return torch.tensor([list((line.strip() + "\n").encode()[-PROMPT:].rjust(PROMPT)) for line in lines])


@lru_cache(maxsize=2 * MODELS)
def world(number: int, steps: int, size: str) -> World:
    """Train model ``number`` on half Python, half C++, and the judge on windows of the same training text."""
    generator = torch.Generator().manual_seed(number)
    dim, rows = SIZES[size]
    texts = (stdlib_text(1_000_000), torch_headers(1_000_000))
    streams = tuple(TokenStream(text, context=CONTEXT, seed=number) for text in texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(number)
        net = GPT(256, dim=dim, depth=3, heads=4, context=CONTEXT)
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        batches = [stream.batch(rows, generator) for stream in streams]
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        optimizer.zero_grad()
        F.cross_entropy(net(x).flatten(0, 1), y.flatten()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    judge = make_pipeline(
        CountVectorizer(analyzer="char", ngram_range=(1, 2), lowercase=False, max_features=2000, binary=True),
        LogisticRegression(max_iter=300),
    )
    seen = [_strings(s.batch(1000, generator)[0][:, :WRITTEN]) for s in streams]
    unseen = [_strings(s.batch(300, generator, "val")[0][:, :WRITTEN]) for s in streams]
    judge.fit(seen[0] + seen[1], np.repeat([0, 1], 1000))
    accuracy = float(judge.score(unseen[0] + unseen[1], np.repeat([0, 1], 300)))
    return World(net.eval(), (streams[0], streams[1]), judge, accuracy, _prose(*texts))


def _steps(trial: Trial) -> int:
    return trial.pick(smoke=20, laptop=400, full=4000)


def _world(trial: Trial) -> World:
    return world(trial.seed % MODELS, _steps(trial), "large")


@torch.no_grad()
def write(net: GPT, prompts: Tensor, generator: torch.Generator, temperature: float = 0.8) -> Tensor:
    """Sampled continuations: (prompts, WRITTEN)."""
    rows = prompts
    for _ in range(WRITTEN):
        chances = (net(rows[:, -CONTEXT:])[:, -1] / temperature).softmax(-1)
        rows = torch.cat([rows, torch.multinomial(chances, 1, generator=generator)], 1)
    return rows[:, prompts.shape[1] :]


# ------------------------------------------------------------------------------------------------------------- controls


class RandomDirections(GACT):
    """A control: directions of the same length that no activation difference has."""

    def fit(self, source: Any, target: Any) -> RandomDirections:
        super().fit(source, target)
        vectors = self._state["vectors"]
        drawn = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(self.seed))
        self._state["vectors"] = F.normalize(drawn, dim=-1) * vectors.norm(dim=-1, keepdim=True)
        return self


METHODS: dict[str, Callable[..., GACT]] = {"G-ACT": GACT, "random directions": RandomDirections}

# --------------------------------------------------------------------------------------------------------------- probes


@lru_cache(maxsize=64)
def _probes(seed: int, number: int, steps: int, torn: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Held-out accuracy of each layer's probe, as `fit` leaves it and after refining on a stream of pairs.

    ``torn`` pairs each prompt of the stream with the difference of another: the clusters that the probes are taught are then
    real ones, but not the prompts' own.
    """
    place = world(number, steps, "small")
    generator = torch.Generator().manual_seed(seed)
    pair = [place.windows(language, 24, generator) for language in (0, 1)]
    steerer = GACT(place.net, LAYERS, clusters=3, lr=0.03, seed=seed % 2**31).fit(*pair)
    held_out = [place.windows(language, 300, generator, "val") for language in (0, 1)]
    fixed = steerer.score(*held_out)
    for _ in range(40):
        source, target = (place.windows(language, 16, generator) for language in (0, 1))
        if torn:
            h = steerer._activations(source)
            steerer._learn(h, steerer._labels(steerer._differences(h, target)).roll(1))
        else:
            steerer.refine(source, target)
    return tuple(fixed.tolist()), tuple(steerer.score(*held_out).tolist())


def _accuracy(trial: Trial, torn: bool, layers: slice) -> Paired:
    fixed, refined = _probes(trial.seed, trial.seed % MODELS, _steps(trial), torn)
    trial.log(**{f"fixed_{i}": a for i, a in enumerate(fixed)}, **{f"refined_{i}": a for i, a in enumerate(refined)})
    trial.figure(
        "accuracy", x=[0, 1, 2], y={"G-ACT": refined, "ACT": fixed}, xlabel="layer", ylabel="probe's held-out accuracy"
    )
    return Paired(ours=float(np.mean(refined[layers])), baseline=float(np.mean(fixed[layers])))


@claim(control={"torn": True})
def probe_accuracy_above_fixed(trial: Trial, torn: bool = False) -> Paired:
    """Accuracy of refined probes against fixed ones, over all layers."""
    return _accuracy(trial, torn, slice(None))


@claim(control={"torn": True})
def first_layer_above_fixed(trial: Trial, torn: bool = False) -> Paired:
    """The same in the first layer alone."""
    return _accuracy(trial, torn, slice(0, 1))


# ------------------------------------------------------------------------------------------------------------- steering


def _steerer(trial: Trial, place: World, target: int, method: str = "G-ACT") -> GACT:
    """Fitted on pairs and refined on 10 batches of 16."""
    generator = torch.Generator().manual_seed(trial.seed)

    def pair(count: int) -> tuple[Tensor, Tensor]:
        return place.windows(1 - target, count, generator), place.windows(target, count, generator)

    steerer = METHODS[method](place.net, LAYERS, clusters=3, lr=0.03, seed=trial.seed % 2**31).fit(*pair(PAIRS))
    for _ in range(10):
        steerer.refine(*pair(16))
    return steerer


def _success(trial: Trial, target: int, method: str) -> Paired:
    place = _world(trial)
    steerer = _steerer(trial, place, target, method)
    generator = torch.Generator().manual_seed(trial.seed + 1)
    prompts = place.prompts[torch.randperm(len(place.prompts), generator=generator)[: trial.pick(smoke=8, laptop=48)]]
    plain = write(place.net, prompts, torch.Generator().manual_seed(trial.seed))
    with steerer.steer(STRENGTH):
        steered = write(place.net, prompts, torch.Generator().manual_seed(trial.seed))
    told = float((place.judge.predict(_strings(steered)) == target).mean())
    trial.log(written_in_target=told, judge_accuracy=place.judge_accuracy, example=_strings(steered)[0])
    return Paired(ours=place.share(steered, target), baseline=place.share(plain, target))


@claim(control={"method": "random directions"})
def steers_to_cpp(trial: Trial, method: str = "G-ACT") -> Paired:
    """Share of C++ in what is written after neutral prompts, with steering and without."""
    return _success(trial, 1, method)


@claim(control={"method": "random directions"})
def steers_to_python(trial: Trial, method: str = "G-ACT") -> Paired:
    """Share of Python, likewise."""
    return _success(trial, 0, method)


@torch.no_grad()
def _loss(place: World, language: int) -> float:
    x, y = place.streams[language].windows(limit=32)
    return float(F.cross_entropy(place.net(x).flatten(0, 1), y.flatten()))


@claim(control={"strength": 3 * STRENGTH})
def perplexity_cost(trial: Trial, strength: float = STRENGTH) -> Ratio:
    """Perplexity on real text of the target language with steering and without; the geometric mean over both languages."""
    place = _world(trial)
    plain, steered = 0.0, 0.0
    for target in (0, 1):
        steerer = _steerer(trial, place, target)
        before = _loss(place, target)
        with steerer.steer(strength):
            after = _loss(place, target)
        plain, steered = plain + before / 2, steered + after / 2
        trial.log(**{f"plain_{LANGUAGES[target]}": before, f"steered_{LANGUAGES[target]}": after})
    return Ratio(ours=float(np.exp(steered)), baseline=float(np.exp(plain)))


# ------------------------------------------------------------------------------------------------------------- overhead


@claim(control={"asks_first": True})
def steering_overhead(trial: Trial, asks_first: bool = False) -> Ratio:
    """Time of a forward pass with every layer steered and without; the control runs the model once more to ask the probes."""
    keep_freed_memory()
    net = GPT(256, dim=128, depth=6, heads=4, context=64).eval()
    tokens = torch.randint(256, (8, 64), generator=trial.generator)
    steerer = GACT(net, LAYERS).fit(tokens, tokens.flip(1))

    @torch.no_grad()
    def plain() -> None:
        net(tokens)

    def steered(layers: tuple[str, ...]) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad(), steerer.steer(STRENGTH, layers):
                if asks_first:
                    net(tokens)
                net(tokens)

        return run

    cases = {"plain": plain, "all": steered(LAYERS), "two": steered(("blocks.2", "blocks.3"))}
    seconds = interleave(cases, rounds=trial.pick(smoke=3, laptop=15), warmup=2)
    trial.log(two_of_six_layers=seconds["two"] / seconds["plain"])
    return Ratio(ours=seconds["all"], baseline=seconds["plain"])

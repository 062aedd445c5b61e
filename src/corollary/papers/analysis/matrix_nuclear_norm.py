"""How the claims of "Large Language Model Evaluation via Matrix Nuclear-Norm" (arXiv:2410.10672) are measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache, lru_cache, partial
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F

from corollary.analysis import evaluate_compression, matrix_entropy, matrix_nuclear_norm, nuclear_norm
from corollary.claims import Exact, Paired, Ratio, Slope, Trial, claim
from corollary.claims.timing import interleave
from corollary.data import TokenStream, minilm, stdlib_docstrings, stdlib_text
from corollary.models import GPT
from corollary.testing import Case

Measure = Callable[[Tensor], Tensor]
Array = np.ndarray[Any, np.dtype[np.float64]]


def paper_entropy(hidden_states: Tensor) -> Tensor:
    """Matrix entropy of one text step by step as the paper times it: a full singular value decomposition of the covariance."""
    rows = hidden_states - hidden_states.mean(0)
    rows = rows / rows.norm(dim=1, keepdim=True)
    covariance = rows.T @ rows / len(rows)
    spectrum = torch.svd(covariance / covariance.trace())[1]
    return -(spectrum * spectrum.log()).nansum() / math.log(hidden_states.shape[1])


def _seconds(rounds: int = 2, **cases: Callable[[], Tensor]) -> dict[str, float]:
    # No warm-up: a decomposition of these sizes hides it, and the column norms are called until 0.01 s have passed.
    return interleave(cases, rounds=rounds, warmup=0, min_seconds=0.01)


def _square(trial: Trial, n: int) -> Tensor:
    return torch.randn(n, n, generator=trial.generator).to(trial.device)


@claim(control={"method": nuclear_norm})
def faster_than_matrix_entropy(trial: Trial, method: Measure = matrix_nuclear_norm) -> Ratio:
    x = _square(trial, trial.pick(smoke=128, laptop=1024, full=4096))
    seconds = _seconds(ours=lambda: method(x), entropy=lambda: paper_entropy(x))
    trial.log(speed_up=seconds["entropy"] / seconds["ours"])
    return Ratio(seconds["ours"], seconds["entropy"])


@claim(control={"method": nuclear_norm})
def faster_than_tuned_entropy(trial: Trial, method: Measure = matrix_nuclear_norm) -> Ratio:
    x = _square(trial, trial.pick(smoke=128, laptop=2048, full=4096))
    seconds = _seconds(1, ours=lambda: method(x), entropy=lambda: matrix_entropy(x))
    trial.log(speed_up=seconds["entropy"] / seconds["ours"])
    return Ratio(seconds["ours"], seconds["entropy"])


@claim(control={"method": nuclear_norm})
def faster_with_the_forward_pass(trial: Trial, method: Measure = matrix_nuclear_norm) -> Ratio:
    _, model = _transformer()
    tokens = _windows(trial.seed, 1)[:, : trial.pick(smoke=32, laptop=256)]

    def evaluate(measure: Measure) -> Tensor:
        with torch.no_grad():
            return measure(model(tokens).last_hidden_state[0])

    cases = {"ours": lambda: evaluate(method), "entropy": lambda: evaluate(paper_entropy)}
    seconds = interleave(cases, rounds=trial.pick(smoke=2, laptop=7))
    return Ratio(seconds["ours"], seconds["entropy"])


@claim(control={"method": nuclear_norm})
def speedup_grows_with_size(trial: Trial, method: Measure = matrix_nuclear_norm) -> Slope:
    sizes = trial.pick(smoke=(32, 64, 128), laptop=(128, 256, 512, 1024), full=(512, 1024, 2048, 4096))
    speed_up: dict[str, list[float]] = {"svd": [], "eigvalsh": []}
    for n in sizes:
        x = _square(trial, n)
        seconds = _seconds(ours=partial(method, x), svd=partial(paper_entropy, x), eigvalsh=partial(matrix_entropy, x))
        for peer, factors in speed_up.items():
            factors.append(seconds[peer] / seconds["ours"])
    trial.log(speed_up=speed_up)
    trial.figure("speed-up over matrix entropy", x=sizes, y=speed_up, xlabel="n", ylabel="times faster", log="xy")
    return Slope(sizes, speed_up["svd"])


LENGTHS = (8, 16, 32, 64, 128, 256, 512)


@cache
def _transformer() -> tuple[Any, Any]:
    return minilm()


@cache
def _documents() -> tuple[list[int], ...]:
    texts, _, _ = stdlib_docstrings(classes=12, per_class=60)
    tokenizer, _ = _transformer()
    return tuple(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])


def _windows(seed: int, count: int) -> Tensor:
    """Texts of 512 tokens, (count, 512): docstrings of the standard library in random order, end to end."""
    documents = _documents()
    order = np.random.default_rng(seed).permutation(len(documents))
    stream = [token for i in order for token in documents[i]]
    return torch.tensor(stream[: count * LENGTHS[-1]]).view(count, -1)


def _token_norm(states: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(states - states.mean(-2, keepdim=True), dim=-1)
    return norms.mean(-1)


# Everything that a ranking claim, its baseline, its control and its log compare, of (texts, L, d) hidden states.
MEASURES: dict[str, Measure] = {
    "Matrix Nuclear-Norm": matrix_nuclear_norm,
    "matrix entropy": matrix_entropy,
    "exact nuclear norm": nuclear_norm,
    "token norm": _token_norm,
    "largest column": lambda states: matrix_nuclear_norm(states, top=1),
    "length": lambda states: torch.full(states.shape[:-2], float(states.shape[-2])),
}


@lru_cache(maxsize=32)
def _transformer_scores(seed: int, texts: int, longest: int) -> Mapping[str, Array]:
    """Each measure's scores (lengths, layers, texts) of the first tokens of random texts; shared by claims and controls."""
    _, model = _transformer()
    tokens = _windows(seed, texts)
    scores: dict[str, list[list[list[float]]]] = {name: [] for name in MEASURES}
    for length in (n for n in LENGTHS if n <= longest):
        with torch.no_grad():
            layers = model(tokens[:, :length], output_hidden_states=True).hidden_states
        for name, measure in MEASURES.items():
            scores[name].append([measure(states).tolist() for states in layers])
    return {name: np.array(values) for name, values in scores.items()}


def _scores(trial: Trial) -> Mapping[str, Array]:
    return _transformer_scores(trial.seed, trial.pick(smoke=1, laptop=2, full=8), trial.pick(smoke=64, laptop=512))


def _agreement(ours: Array, entropy: Array) -> float:
    return float(spearmanr(ours.ravel(), entropy.ravel()).statistic)


def _agreement_over_layers(ours: Array, entropy: Array) -> float:
    """At each length by itself, texts averaged: the correlation over layers; then the mean over lengths."""
    return float(np.mean([_agreement(a, b) for a, b in zip(ours.mean(-1), entropy.mean(-1), strict=True)]))


def _sign(agreement: Callable[[Array, Array], float]) -> Callable[..., Mapping[str, float]]:
    def tune(trial: Trial, measure: str = "") -> Mapping[str, float]:
        scores = _scores(trial)
        return {"sign": math.copysign(1.0, agreement(scores["token norm"], scores["matrix entropy"]))}

    return tune


def _compared(trial: Trial, measure: str, agreement: Callable[[Array, Array], float], *others: str) -> Paired:
    scores = _scores(trial)
    entropy = scores["matrix entropy"]
    trial.log(**{name.replace(" ", "_"): agreement(scores[name], entropy) for name in others})
    ours = agreement(scores[measure], entropy)
    return Paired(ours, trial.tuned.get("sign", 1.0) * agreement(scores["token norm"], entropy))


@claim(control={"measure": "largest column"}, tune=_sign(_agreement))
def ranks_text_lengths(trial: Trial, measure: str = "Matrix Nuclear-Norm") -> Paired:
    result = _compared(trial, measure, _agreement, "length", "exact nuclear norm")
    curves = {name: scores[:, -1].mean(-1).tolist() for name, scores in _scores(trial).items()}
    drawn = {name: curves[name] for name in (measure, "matrix entropy")}
    trial.figure("last layer", x=LENGTHS[: len(curves[measure])], y=drawn, xlabel="tokens", ylabel="score", log="x")
    return result


@claim(control={"measure": "largest column"}, tune=_sign(_agreement_over_layers))
def ranks_layers_of_one_model(trial: Trial, measure: str = "Matrix Nuclear-Norm") -> Paired:
    result = _compared(trial, measure, _agreement_over_layers, "exact nuclear norm")
    at = -1 if trial.scale == "smoke" else LENGTHS.index(64)
    curves = {name: scores[at].mean(-1).tolist() for name, scores in _scores(trial).items()}
    drawn = {name: curves[name] for name in (measure, "matrix entropy")}
    trial.figure("64 tokens", x=range(len(curves[measure])), y=drawn, xlabel="layer", ylabel="score")
    return result


def _unnormalized(states: Tensor) -> Tensor:
    """Matrix Nuclear-Norm without line 2 of Algorithm 1's division by each row's length."""
    columns: Tensor = torch.linalg.vector_norm(states - states.mean(-2, keepdim=True), dim=-2)
    return columns.topk(min(states.shape[-2:]), dim=-1).values.sum(-1) / states.shape[-2]


@lru_cache(maxsize=32)
def _family(seed: int, widths: tuple[int, ...], steps: int) -> Mapping[str, tuple[float, ...]]:
    """Models of each width, trained alike, and each measure's mean over the same held-out texts."""
    context = 32
    stream = TokenStream(stdlib_text(1_000_000), context=context, seed=seed)
    held_out, _ = stream.batch(64, torch.Generator().manual_seed(seed), split="val")
    measures = {**{n: m for n, m in MEASURES.items() if n != "length"}, "unnormalized": _unnormalized}
    means: dict[str, list[float]] = {name: [] for name in (*measures, "loss")}
    for width in widths:
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = GPT(stream.vocab_size, dim=width, depth=2, context=context)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(steps):
            x, y = stream.batch(8, generator)
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            states = model.features(held_out)
        for name, measure in measures.items():
            means[name].append(float(measure(states).mean()))
        means["loss"].append(float(loss.detach()))
    return {name: tuple(values) for name, values in means.items()}


@claim(control={"measure": "unnormalized"})
def ranks_models_by_width(trial: Trial, measure: str = "Matrix Nuclear-Norm") -> Exact:
    widths = trial.pick(smoke=(32, 48, 64), laptop=(32, 48, 64, 96, 128), full=(32, 48, 64, 96, 128, 192, 256))
    family = _family(trial.seed, widths, trial.pick(smoke=2, laptop=40, full=400))
    entropy = np.array(family["matrix entropy"])
    agreement = _agreement(np.array(family[measure]), entropy)
    others = ("token norm", "exact nuclear norm")
    trial.log(spearman=agreement, **{n.replace(" ", "_"): _agreement(np.array(family[n]), entropy) for n in others})
    trial.log(width=_agreement(np.array(widths), entropy))
    drawn = {name: family[name] for name in (measure, "matrix entropy")}
    trial.figure("models of growing width", x=widths, y=drawn, xlabel="width", ylabel="score", log="x")
    return Exact(max(0.0, 0.5 - agreement))


@claim(control={"top": 1})
def bounds_nuclear_norm(trial: Trial, top: int | None = None) -> Exact:
    errors = []
    for _ in range(trial.pick(smoke=5, laptop=40)):
        tokens, features = (int(n) for n in trial.rng.integers(4, 48, size=2))
        # Columns of very unequal size, as hidden states have them: the spectrum decays by a factor drawn anew.
        scale = torch.logspace(0, -float(trial.rng.uniform(0, 3)), features, dtype=torch.float64)
        x = torch.randn(tokens, features, generator=trial.generator, dtype=torch.float64) * scale
        if trial.rng.random() < 0.5:  # the same spectrum in another basis
            x = x @ torch.linalg.qr(torch.randn(features, features, generator=trial.generator, dtype=torch.float64)).Q
        rank = min(tokens, features)
        score, exact = float(matrix_nuclear_norm(x, top=top)), float(nuclear_norm(x))
        errors += [rank / features * exact - score, score - math.sqrt(rank / tokens)]
        corners = torch.eye(features, dtype=torch.float64).repeat(int(trial.rng.integers(1, 4)), 1)
        corners = torch.cat([corners, -corners])
        errors.append(abs(float(matrix_nuclear_norm(corners, top=top)) - float(nuclear_norm(corners))))
    return Exact([max(0.0, error) for error in errors])


def _draw(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor]:
    """Hidden states of one text, longer than wide so that no singular value is zero and every measure is smooth."""
    return (torch.randn(9, 5, generator=generator, dtype=torch.float64).to(dtype) + 1,)


def _function(function: Measure, **tags: Any) -> Case:
    x = torch.randn(3, 4)
    bad = {
        "a vector": (x[0],),
        "a list": (x.tolist(),),
        "no features": (x[:, :0],),
        "a mask of another shape": (x, torch.ones(4, dtype=torch.bool)),
        "a floating mask": (x, torch.ones(3)),
        "a mask without tokens": (x, torch.zeros(3, dtype=torch.bool)),
        "infinity": (x / 0.0,),
    }
    return Case(lambda: function, {"inputs": _draw, "bad": bad, **tags})


def _problem(batches: int, dtype: torch.dtype) -> tuple[GPT, Iterator[Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT(64, dim=32, depth=2, context=48).to(dtype)
    return model, (torch.randint(64, (48,), generator=torch.Generator().manual_seed(i)) for i in range(8 * batches))


def _wrong_rows() -> tuple[GPT, list[Tensor]]:
    return _problem(1, torch.float32)[0], [torch.zeros(2, 3, dtype=torch.int64)]


CONFORMANCE = {
    "corollary.analysis.matrix_nuclear_norm": _function(matrix_nuclear_norm),
    # Its derivative is infinite at an eigenvalue of zero, which every text no longer than the width has.
    "corollary.analysis.matrix_entropy": _function(matrix_entropy, differentiable=False),
    "corollary.analysis.nuclear_norm": _function(nuclear_norm),
    "corollary.analysis.evaluate_compression": Case(
        lambda model, data, seed: evaluate_compression(model, data, layers=["embed", "blocks.0", "norm"], batch_size=8),
        {"problem": _problem, "bad": {"tokens of two dimensions": _wrong_rows}},
    ),
}

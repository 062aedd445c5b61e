"""How the claims of "LoRA vs Full Fine-tuning: An Illusion of Equivalence" (arXiv:2410.21228) are measured."""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from corollary.adapt import LoRA, adapt, merge_and_unload
from corollary.analysis import IntruderReport, intruder_dimensions
from corollary.claims import Exact, Paired, Trial, claim
from corollary.data import TokenStream, minilm
from corollary.data.text import read_source, stdlib_files
from corollary.models import GPT, MLP
from corollary.testing import Case

CONTEXT = 32
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

METHODS: Mapping[str, LoRA | None] = {
    "full": None,
    "rank 4": LoRA(rank=4, alpha=8),
    "rank 16": LoRA(rank=16, alpha=32),
    "rank 64": LoRA(rank=64, alpha=128),
    "rank 64, alpha 8": LoRA(rank=64, alpha=8),
    "rank 64, alpha 8, stabilized": LoRA(rank=64, alpha=8, use_rslora=True),
}
RATES: Mapping[str, tuple[float, ...]] = {
    "full": (5e-4, 1e-3, 2e-3, 4e-3),
    "rank 4": (5e-3, 1e-2, 2e-2, 4e-2),
    "rank 16": (2e-3, 4e-3, 8e-3, 1.6e-2),
    "rank 64": (5e-4, 1e-3, 2e-3, 4e-3),
    "rank 64, alpha 8": (4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "rank 64, alpha 8, stabilized": (1e-3, 2e-3, 4e-3, 8e-3),
}
"""four rates for each method, a factor of 2 apart, around those that reach one target loss"""


# ------------------------------------------------------------------------------------------------------------ tuned models


@cache
def _stream(target: bool) -> TokenStream:
    """The tables of character encodings, or the rest of the standard library without them."""
    parts, length = [], 0
    for name, path in sorted(stdlib_files(), key=lambda item: hashlib.sha256(item[0].encode()).digest()):
        if name.startswith("encodings/") != target or name.startswith("pydoc_data/"):
            continue
        text = read_source(path)
        if text is not None and length < (400_000 if target else 1_500_000):
            parts.append(text)
            length += len(text)
    return TokenStream("".join(parts), context=CONTEXT, seed=0)


def _loss(net: nn.Module, target: bool) -> float:
    x, y = _stream(target).batch(128, torch.Generator().manual_seed(9), split="val")
    with torch.no_grad():
        return float(cross_entropy(net(x).flatten(0, 1), y.flatten()))


def _train(net: nn.Module, target: bool, lr: float, steps: int, seed: int) -> None:
    """AdamW with the authors' schedule: 6% warm-up, then linear to zero."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    warmup = max(1, int(0.06 * steps))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: (t + 1) / warmup if t < warmup else (steps - t) / max(1, steps - warmup)
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, y = _stream(target).batch(16, generator)
        loss = cross_entropy(net(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()


@lru_cache(maxsize=4)
def _base(seed: int, smoke: bool) -> tuple[GPT, float]:
    """A pre-trained model, and its loss on the text that it has learnt."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = GPT(256, dim=96, depth=2, heads=4, context=CONTEXT)
    _train(net, False, 3e-3, 10 if smoke else 1000, seed)
    return net, _loss(net, False)


def _weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in net.named_parameters() if name.split(".")[-2] in LAYERS}


@dataclass(frozen=True)
class Tuned:
    """A tuned model: its loss on the target, how far its loss on the pre-training text has risen, and its layers' weights."""

    loss: float
    forgetting: float
    base: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]

    def intruders(self, seed: int, reference: str = "base") -> IntruderReport:
        """Its intruder dimensions; with reference 'random', against a random basis in place of the base's singular vectors."""
        if reference == "base":
            return intruder_dimensions(self.base, self.weights)
        generator = torch.Generator().manual_seed(seed)
        turned = {}
        for name, weight in self.base.items():
            turn = torch.linalg.qr(torch.randn(len(weight), len(weight), generator=generator)).Q
            turned[name] = turn @ weight
        return intruder_dimensions(turned, self.weights)

    @property
    def change(self) -> float:
        """Frobenius norm of the change."""
        return math.sqrt(sum(float((self.weights[n] - w).square().sum()) for n, w in self.base.items()))


@lru_cache(maxsize=64)
def _tuned(method: str, lr: float, seed: int, smoke: bool) -> Tuned:
    base, before = _base(seed % 2, smoke)
    net = copy.deepcopy(base)
    config = METHODS[method]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config is not None:
            adapt(net, config, targets=LAYERS)
        else:
            for name, parameter in net.named_parameters():
                parameter.requires_grad_(name.split(".")[-2] in LAYERS)
    _train(net, True, lr, 6 if smoke else 120, seed)
    if config is not None:
        merge_and_unload(net)
    return Tuned(_loss(net, True), _loss(net, False) - before, _weights(base), _weights(net))


def _smoke(trial: Trial) -> bool:
    return trial.scale == "smoke"


def _rates(*methods: str) -> Callable[..., dict[str, float]]:
    """A ``tune=`` hook: the rate of each method at which it reaches the best loss of LoRA of rank 4."""

    def hook(trial: Trial, method: str | None = None, **_: Any) -> dict[str, float]:
        chosen = ["rank 4", *methods, *([method] if method else [])]
        curves = {
            name: [(lr, _tuned(name, lr, trial.seed, _smoke(trial)).loss) for lr in RATES[name]]
            for name in dict.fromkeys(chosen)
        }
        best, goal = min(curves.pop("rank 4"), key=lambda point: point[1])
        return {"rank 4": best} | {name: _reaching(points, goal) for name, points in curves.items()}

    return hook


def _reaching(points: Sequence[tuple[float, float]], goal: float) -> float:
    """The lowest rate at which a loss is reached, between rates as logarithms; the nearest one where no pair straddles it."""
    for (lr, loss), (lr_2, loss_2) in itertools.pairwise(points):
        if loss >= goal >= loss_2 and loss > loss_2:
            return float(lr * (lr_2 / lr) ** ((loss - goal) / (loss - loss_2)))
    return min(points, key=lambda point: abs(point[1] - goal))[0]


def _models(trial: Trial, *methods: str) -> list[Tuned]:
    rates = trial.tuned or {name: RATES[name][1] for name in methods}
    found = [_tuned(name, rates[name], trial.seed, _smoke(trial)) for name in methods]
    for name, model in zip(methods, found, strict=True):
        trial.log(
            **{f"{name}: target loss": model.loss, f"{name}: forgetting": model.forgetting, f"{name}: change": model.change}
        )
    return found


def _counts(trial: Trial, reference: str, *methods: str) -> list[float]:
    reports = [model.intruders(trial.seed, reference) for model in _models(trial, *methods)]
    profiles = {
        name: np.mean([m.similarity for m in report.matrices], axis=0).tolist()
        for name, report in zip(methods, reports, strict=True)
    }
    places = range(1, 1 + len(next(iter(profiles.values()))))
    trial.figure(
        "similarity to the base", x=places, y=profiles, xlabel="place of the tuned singular vector", ylabel="largest cosine"
    )
    return [report.mean for report in reports]


@claim(control={"reference": "random"}, tune=_rates("full"))
def lora_intrudes(trial: Trial, reference: str = "base") -> Paired:
    return Paired(*_counts(trial, reference, "rank 4", "full"))


@claim(control={"method": "rank 4"}, tune=_rates("full"))
def full_has_none(trial: Trial, method: str = "full") -> Exact:
    return Exact(_counts(trial, "base", method)[0])


@claim(control={"reference": "random"}, tune=_rates("rank 64"))
def falls_with_rank(trial: Trial, reference: str = "base") -> Paired:
    return Paired(*_counts(trial, reference, "rank 64", "rank 4"))


@claim(control={"reference": "random"}, tune=_rates("rank 64, alpha 8", "rank 64, alpha 8, stabilized"))
def falls_with_stabilization(trial: Trial, reference: str = "base") -> Paired:
    return Paired(*_counts(trial, reference, "rank 64, alpha 8, stabilized", "rank 64, alpha 8"))


@claim(control={"method": "rank 64"}, tune=_rates("full"))
def forgets_more(trial: Trial, method: str = "rank 4") -> Paired:
    ours, full = _models(trial, method, "full")
    return Paired(ours.forgetting, full.forgetting)


# Rates at which the six reach about one target loss, found before registration.
LEVEL = {
    "full": 1e-3,
    "rank 4": 2e-2,
    "rank 16": 3.7e-3,
    "rank 64": 1.15e-3,
    "rank 64, alpha 8": 7.5e-3,
    "rank 64, alpha 8, stabilized": 1.9e-3,
}


@claim(control={"reference": "random"})
def forgetting_follows_intruders(trial: Trial, reference: str = "base") -> Exact:
    models = [_tuned(name, lr, trial.seed, _smoke(trial)) for name, lr in LEVEL.items()]
    counts = [model.intruders(trial.seed, reference).mean for model in models]
    forgetting = [model.forgetting for model in models]
    order = np.argsort(counts)
    # One basis against which all are strangers tells no model from another: no correlation.
    agreement = float(spearmanr(counts, forgetting).statistic) if len(set(counts)) > 1 else 0.0
    trial.log(
        correlation=agreement,
        correlation_of_the_size_of_the_change=float(spearmanr([m.change for m in models], forgetting).statistic),
        **{f"{n}: target loss": m.loss for n, m in zip(LEVEL, models, strict=True)},
        **{f"{n}: intruders": c for n, c in zip(LEVEL, counts, strict=True)},
    )
    trial.figure(
        "forgetting at equal target loss",
        x=[counts[i] for i in order],
        y={"full fine-tuning and five LoRAs": [forgetting[i] for i in order]},
        xlabel="intruder dimensions a matrix",
        ylabel="forgetting, nats a byte",
    )
    return Exact(max(0.0, 0.5 - agreement))


# ----------------------------------------------------------------------------------------------------- planted directions


@cache
def _transformer() -> Mapping[str, Tensor]:
    """The linear layers of the first and the last block."""
    _, model = minilm()
    ends = ("encoder.layer.0.", "encoder.layer.5.")
    return {name: p.detach() for name, p in model.named_parameters() if p.dim() == 2 and name.startswith(ends)}


def _same_place(base: Tensor, tuned: Tensor) -> int:
    """A broken count: each leading vector against the base's of the same place alone."""
    left, left_0 = (torch.linalg.svd(w.double(), full_matrices=False).U[:, :10] for w in (tuned, base))
    return int(((left * left_0).sum(0).abs() < 0.5).sum())


def _count(base: Tensor, tuned: Tensor) -> int:
    return intruder_dimensions(base, tuned).total


@claim(control={"count": _same_place})
def finds_planted(trial: Trial, count: Callable[[Tensor, Tensor], int] = _count) -> Exact:
    errors = []
    for weight in list(_transformer().values())[: trial.pick(smoke=2, laptop=12)]:
        u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
        planted = int(trial.rng.integers(0, 6))
        # Singular values change without their vectors, by up to a fifth each, so that places are swapped.
        scale = 1 + 0.2 * torch.from_numpy(trial.rng.uniform(-1, 1, len(s)))
        tuned = (u * (s * scale)) @ vh
        new = [torch.randn(n, planted, generator=trial.generator, dtype=torch.float64) for n in weight.shape]
        if planted:
            left, right = (torch.linalg.qr(x).Q for x in new)
            tuned = tuned + 1.5 * s[0] * left @ right.T
        errors.append(float(abs(count(weight, tuned.to(weight.dtype)) - planted)))
    trial.log(matrices=len(errors))
    return Exact(errors)


# ------------------------------------------------------------------------------------------------------------- conformance


def _problem(batches: int, dtype: torch.dtype) -> tuple[nn.Module, Iterator[tuple[str, Tensor]]]:
    """A network of as many square layers, and each one's weight with one direction put in, drawn as it is asked for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = MLP(40, (40,) * max(1, batches), 40)
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Linear)]
    for layer in layers:  # a spectrum with gaps: half precision must not turn its vectors
        u, _, vh = torch.linalg.svd(layer.weight.detach())
        layer.weight.data = u @ torch.linspace(3, 1, 40).square().diag() @ vh
    names = [name for name, p in net.named_parameters() if p.dim() == 2]
    net = net.to(dtype)

    def tuned() -> Iterator[tuple[str, Tensor]]:
        for i, name in enumerate(names[:batches]):
            new = torch.randn(2, 40, generator=torch.Generator().manual_seed(i))
            left, right = new / new.norm(dim=1, keepdim=True)
            yield name, (net.get_parameter(name).detach().double() + 20 * torch.outer(left, right).double()).to(dtype)

    return net, tuned()


def _shapes() -> tuple[nn.Module, list[tuple[str, Tensor]]]:
    net, _ = _problem(1, torch.float32)
    return net, [(next(n for n, p in net.named_parameters() if p.dim() == 2), torch.ones(3, 3))]


CONFORMANCE = {
    "corollary.analysis.intruder_dimensions": Case(
        lambda model, data, seed: intruder_dimensions(model, data, k=4),
        {"problem": _problem, "bad": {"a weight of another shape": _shapes}},
    ),
}

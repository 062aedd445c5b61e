"""How SaRA's claims are measured."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from corollary.adapt import AdapterConfig, LoRA, ProgressiveAdjustment, SaRA, Site, adapt
from corollary.adapt.base import Adapter
from corollary.claims import Exact, Paired, Ratio, Trial, claim
from corollary.data import minilm, stdlib_docstrings, stdlib_text
from corollary.memory import peak_bytes
from corollary.papers.adapt import _minilm as task
from corollary.testing import Case

Array = NDArray[np.float64]

# ------------------------------------------------------------------------------------------------------------ conformance


def sara_oracle(weight: Array, state: dict[str, Array], config: SaRA) -> Array:
    """The values put one by one where the weight is among its smallest, in the order of rows."""
    count = int(config.fraction * weight.size)
    cut = sorted(abs(w) for w in weight.flat)[count - 1]
    values = iter(state["values"])
    total = np.zeros_like(weight)
    for i, row in enumerate(weight):
        for j, w in enumerate(row):
            if abs(w) <= cut:
                total[i, j] = next(values)
    return total


CONFORMANCE = {
    "corollary.adapt.SaRA": Case(
        lambda: SaRA(fraction=0.3, scope="layer"),
        tags={"oracle": sara_oracle, "parameters": lambda site: int(0.3 * site.in_features * site.out_features)},
    ),
}

# ---------------------------------------------------------------------------------------------- what small weights are for

FRACTION = 0.1


@torch.no_grad()
def embed(model: nn.Module, texts: Sequence[str]) -> Tensor:
    """The whole encoder's mean over tokens, (texts, 384)."""
    batch = minilm()[0](list(texts), truncation=True, max_length=32, padding=True, return_tensors="pt")
    hidden = model(**batch).last_hidden_state
    weight = batch["attention_mask"][..., None].to(hidden.dtype)
    return cast(Tensor, (hidden * weight).sum(1) / weight.sum(1))


@torch.no_grad()
def zeroed(model: nn.Module, which: str, generator: torch.Generator) -> nn.Module:
    """A copy whose encoder has a tenth of its linear layers' weights set to zero: the smallest of all, or any."""
    model = copy.deepcopy(model)
    weights = [m.weight for m in cast(nn.Module, model.encoder).modules() if isinstance(m, nn.Linear)]
    sizes = [w.abs() if which == "smallest" else torch.rand(w.shape, generator=generator) for w in weights]
    every = torch.cat([size.flatten() for size in sizes])
    cut = every.kthvalue(int(FRACTION * len(every))).values
    for weight, size in zip(weights, sizes, strict=True):
        weight.masked_fill_(size <= cut, 0)
    return model


@claim(control={"which": "random"})
def smallest_tenth_is_idle(trial: Trial, which: str = "smallest") -> Exact:
    """The largest 1 - cosine between a text's embedding before and after zeroing, on real texts and a real encoder."""
    texts, _, _ = stdlib_docstrings(classes=10, per_class=trial.pick(smoke=2, laptop=6), seed=trial.seed)
    model = minilm()[1].eval()
    before, after = embed(model, texts), embed(zeroed(model, which, trial.generator), texts)
    away = (1 - cosine_similarity(before, after)).clamp(min=0)
    trial.log(mean=float(away.mean()), relative_change=float((after - before).norm() / before.norm()))
    return Exact(away)


# -------------------------------------------------------------------------------------------------------------- forgetting

EVERY = 8
LORA_RANK = 25
"""trains 172,800 numbers on the layers of which SaRA trains 177,000"""
RATE = 0.004
LORA_RATES = (0.00125, 0.0025, 0.005)


@cache
def code_lines() -> tuple[Tensor, Tensor]:
    """Statements of Python source, another kind of text than docstrings, as hidden states below the top layer and their mask."""
    lines = []
    for line in stdlib_text(1_000_000).splitlines():
        line = line.strip()
        if len(line) < 40 or line.startswith("#"):
            continue
        try:
            ast.parse(line)
        except SyntaxError:
            continue
        lines.append(line)
    lines = lines[:: len(lines) // 128][:128]
    task.docstrings()  # which takes dropout out of the shared encoder
    tokenizer, model = minilm()
    batch = tokenizer(lines, truncation=True, max_length=task.TOKENS, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states[-1 - task.TOP]
    return hidden, batch["attention_mask"].bool()


@torch.no_grad()
def similarities(model: nn.Module) -> Tensor:
    """Cosines between the embeddings of every two code lines: what the encoder was pretrained to give."""
    head, model.head = model.head, nn.Identity()
    rows = nn.functional.normalize(model(*code_lines()), dim=1)
    model.head = head
    upper = torch.triu_indices(len(rows), len(rows), 1)
    return (rows @ rows.t())[upper[0], upper[1]]


@dataclass(frozen=True)
class Path:
    """What training passes through, every few steps: loss on held-out docstrings, and what is forgotten of code."""

    loss: tuple[float, ...]
    forgotten: tuple[float, ...]
    trainable: int

    def at(self, level: float) -> float:
        """What is forgotten when the loss first comes down to a level, between two looks by a straight line."""
        for i in range(1, len(self.loss)):
            if self.loss[i] <= level:
                share = (self.loss[i - 1] - level) / max(1e-12, self.loss[i - 1] - self.loss[i])
                return self.forgotten[i - 1] + min(1.0, max(0.0, share)) * (self.forgotten[i] - self.forgotten[i - 1])
        return float("inf")


@torch.no_grad()
def lose_the_largest(model: task.Encoder) -> None:
    """Set the largest tenth of each layer's weights to zero, so that they are the smallest."""
    for module in model.layers.modules():
        if isinstance(module, nn.Linear):
            size = module.weight.abs()
            module.weight[size >= size.flatten().kthvalue(int((1 - FRACTION) * size.numel())).values] = 0


@lru_cache(maxsize=256)
def train(method: str, lr: float, seed: int, steps: int, idle: bool = True) -> Path:
    """One training, looked at every few steps; without ``idle`` SaRA takes weights for the task that were in use."""
    model = task.encoder(seed)
    before = similarities(model)
    if not idle:
        lose_the_largest(model)
    config = SaRA(FRACTION) if method == "SaRA" else LoRA(rank=LORA_RANK)
    adapt(model, config, task.names())
    adjustment = ProgressiveAdjustment(model, at=max(1, steps // 2)) if method == "SaRA" else None
    data, held_out = task.docstrings(), task.split(seed)[1][::2]
    path: list[tuple[float, float]] = []

    @torch.no_grad()
    def look() -> None:
        loss = cross_entropy(model(data.hidden[held_out], data.mask[held_out]), data.labels[held_out])
        kept = torch.corrcoef(torch.stack([before, similarities(model)]))[0, 1]
        path.append((float(loss), 1 - float(kept)))

    def after(step: int) -> None:
        if adjustment is not None:
            adjustment.step()
        if (step + 1) % min(EVERY, steps) == 0:
            look()

    look()
    run = task.fit(model, lr, seed, steps, after_step=after)
    return Path(tuple(loss for loss, _ in path), tuple(forgotten for _, forgotten in path), run.trainable)


@claim(control={"idle": False})
def forgets_less_than_lora(trial: Trial, idle: bool = True) -> Paired:
    """What is forgotten of code's similarities when docstrings are learnt equally well, against LoRA's rate that forgets least."""
    steps = task.steps_of(trial)
    ours = train("SaRA", RATE, trial.seed, steps, idle)
    others = {lr: train("LoRA", lr, trial.seed, steps) for lr in trial.pick(smoke=LORA_RATES[:1], laptop=LORA_RATES)}
    # As well as both have learnt it at their best; a rate of LoRA that does not get there is none that fits equally.
    level = max(min(ours.loss), min(min(path.loss) for path in others.values()))
    best = min(others, key=lambda lr: others[lr].at(level))
    trial.log(
        trainable=ours.trainable,
        baseline_trainable=others[best].trainable,
        baseline_rate=best,
        level=level,
        lowest=min(ours.loss),
        forgotten_by_rate=" ".join(f"{lr}:{path.at(level):.4f}" for lr, path in others.items()),
    )
    trial.figure(
        "forgetting",
        x=[min(EVERY, steps) * i for i in range(len(ours.loss))],
        y={"SaRA": list(ours.forgotten), "LoRA": list(others[best].forgotten)},
        xlabel="step",
        ylabel="1 - correlation of similarities",
    )
    return Paired(ours=ours.at(level), baseline=others[best].at(level))


# ------------------------------------------------------------------------------------------------------------------ memory


class MaskedAdapter(Adapter):
    """A control: a dense matrix trains, and a mask keeps most of it at zero."""

    mask: Tensor

    def __init__(self, site: Site, weight: Tensor, config: Masked, threshold: Tensor) -> None:
        super().__init__(site)
        matrix = site.matrix(weight.detach())
        self.dense = nn.Parameter(torch.zeros_like(matrix))
        self.register_buffer("mask", matrix.abs() <= threshold)

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        return out + self.site.dense(x, self.delta())

    def delta(self) -> Tensor:
        return self.dense * self.mask


@dataclass(frozen=True)
class Masked(SaRA):
    """See `MaskedAdapter`."""

    def build(self, site: Site, weight: Tensor, extra: object = None) -> Adapter:  # type: ignore[override]
        assert isinstance(extra, tuple)
        return MaskedAdapter(site, weight, self, extra[0])


def adapted_steps(config: AdapterConfig, model: nn.Module, chosen: Tensor, steps: int) -> Callable[[], None]:
    """Adapting a model, and steps of Adam on what then trains."""

    def run() -> None:
        adapt(model, config, task.names())
        _steps(model, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3), chosen, steps)

    return run


def masked_steps(model: task.Encoder, chosen: Tensor, steps: int) -> Callable[[], None]:
    """Masked fine-tuning: a dense gradient, times a mask, and a dense state of Adam."""
    linear = [m for m in model.layers.modules() if isinstance(m, nn.Linear)]

    def run() -> None:
        weights = [m.weight.requires_grad_(True) for m in linear]
        masks = []
        for weight in weights:
            size = weight.detach().abs().flatten()
            masks.append((size <= size.kthvalue(int(FRACTION * size.numel())).values).view_as(weight))
        _steps(model, torch.optim.Adam(weights, 1e-3), chosen, steps, masks)

    return run


def _steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, chosen: Tensor, steps: int, masks: Sequence[Tensor] = ()
) -> None:
    data = task.docstrings()
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(data.hidden[chosen], data.mask[chosen]), data.labels[chosen]).backward()  # type: ignore[no-untyped-call]
        for weight, mask in zip(optimizer.param_groups[0]["params"], masks, strict=bool(masks)):
            weight.grad *= mask
        optimizer.step()


@claim(control={"kind": Masked})
def memory_below_masked(trial: Trial, kind: type[SaRA] = SaRA) -> Ratio:
    """Peak bytes of selecting and training a tenth of a real layer's weights, beyond the model, against masked fine-tuning."""
    chosen = torch.randint(task.CLASSES * task.PER_CLASS, (task.BATCH,), generator=trial.generator)
    steps = 2
    ours = peak_bytes(adapted_steps(kind(FRACTION, nuclear=0.0), task.encoder(trial.seed), chosen, steps))
    other = peak_bytes(masked_steps(task.encoder(trial.seed), chosen, steps))
    return Ratio(ours=ours, baseline=other)

"""What the adapters' papers share: fine-tuning the top of a real pretrained encoder to tell docstrings by their module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from corollary.adapt import AdapterConfig, adapt, adapter_penalty
from corollary.data import minilm, stdlib_docstrings

CLASSES = 10
PER_CLASS = 110
TOKENS = 16
TOP = 1
"""layers of the encoder's six that are adapted; those below are frozen in every method, and their output is computed once"""
STEPS = 80
BATCH = 16

LINEAR = ("query", "key", "value", "dense")
"""the linear layers of a Transformer block: attention's four and the two of the feed-forward network"""


class Encoder(nn.Module):
    """The top layers of all-MiniLM-L6-v2, the mean over tokens, and a linear head that is random and frozen.

    A trained head on pretrained features reaches all but a point or two of full fine-tuning's accuracy here, whatever the
    adapter. With a random one (orthogonal rows of norm 10) all that is learnt is learnt by the adapter.
    """

    def __init__(self, layers: Sequence[nn.Module], classes: int = CLASSES) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for layer in layers)
        self.head = nn.Linear(384, classes, bias=False).requires_grad_(False)
        nn.init.orthogonal_(self.head.weight, gain=10)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Logits (batch, classes) from hidden states (batch, tokens, 384) and a mask (batch, tokens) that is True on tokens."""
        seen = mask[:, None, None, :]
        for layer in self.layers:
            hidden = layer(hidden, seen)
        weight = mask[..., None].to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1)
        return cast(Tensor, self.head(mean))


@dataclass(frozen=True)
class Docstrings:
    """Hidden states below the adapted layers, masks and labels of every text, and the pretrained layers above them."""

    hidden: Tensor
    mask: Tensor
    labels: Tensor
    layers: tuple[nn.Module, ...]


@cache
def docstrings() -> Docstrings:
    """The texts, through the frozen part of the encoder once."""
    texts, labels, _ = stdlib_docstrings(classes=CLASSES, per_class=PER_CLASS, seed=0)
    tokenizer, model = minilm()
    batch = tokenizer(texts, truncation=True, max_length=TOKENS, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states[-1 - TOP]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # its noise would differ between methods, which draw different numbers before it
    model.requires_grad_(False)
    return Docstrings(hidden, batch["attention_mask"].bool(), labels, tuple(model.encoder.layer[-TOP:]))


@dataclass(frozen=True)
class Run:
    """What one fine-tuning gives: accuracy on the texts held out, trained numbers, training loss by step."""

    accuracy: float
    trainable: int
    curve: tuple[float, ...]


Method = Callable[[nn.Module], nn.Module] | AdapterConfig | None
"""a configuration for every linear layer; or a function that puts its own on the encoder; or None for full fine-tuning"""


def split(seed: int) -> tuple[Tensor, Tensor]:
    """Indices to train on and to test on, half of the texts each."""
    order = torch.randperm(CLASSES * PER_CLASS, generator=torch.Generator().manual_seed(seed))
    return order[: len(order) // 2], order[len(order) // 2 :]


def encoder(seed: int) -> Encoder:
    """The pretrained layers, frozen, with the head that this seed draws."""
    torch.manual_seed(seed)
    return Encoder(docstrings().layers).train()


def put_on(model: Encoder, method: Method, targets: Sequence[str] = LINEAR, **options: Any) -> nn.Module:
    """The encoder with a method on its linear layers; None trains the whole of the pretrained layers."""
    if method is None:
        model.layers.requires_grad_(True)
        return model
    if isinstance(method, AdapterConfig):
        return adapt(model, method, [rf"layers\..*\.{t}" for t in targets], **options)
    return method(model)


def fit(
    model: nn.Module,
    lr: float,
    seed: int,
    steps: int = STEPS,
    *,
    after_step: Callable[[int], None] | None = None,
    weight_decay: float = 0.0,
) -> Run:
    """Train what trains by AdamW with a linear decay of the rate, then test.

    ``after_step(step)`` is called after each step of the optimizer, for methods that act between steps.
    """
    data = docstrings()
    train, test = split(seed)
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    curve = []
    for step in range(steps):
        chosen = train[torch.randint(len(train), (BATCH,), generator=generator)]
        loss = cross_entropy(model(data.hidden[chosen], data.mask[chosen]), data.labels[chosen])
        if hasattr(model, "_corollary_adapters"):
            loss = loss + adapter_penalty(model)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        curve.append(float(loss.detach()))
        if after_step is not None:
            after_step(step)
    return Run(accuracy(model, test), sum(p.numel() for p in trained), tuple(curve))


@torch.no_grad()
def accuracy(model: nn.Module, chosen: Tensor) -> float:
    """Share of these texts whose label the model names."""
    data = docstrings()
    was, _ = model.training, model.eval()
    right = model(data.hidden[chosen], data.mask[chosen]).argmax(1) == data.labels[chosen]
    model.train(was)
    return float(right.double().mean())


@lru_cache(maxsize=1024)
def fine_tune(method: Method, lr: float, seed: int, steps: int = STEPS, targets: tuple[str, ...] = LINEAR) -> Run:
    """One method from the same start, split and batches for the same seed; kept, so that claims share their baselines."""
    return fit(put_on(encoder(seed), method, targets), lr, seed, steps)


def best_rate(
    method: Method, rates: Sequence[float], seed: int, steps: int = STEPS, targets: tuple[str, ...] = LINEAR
) -> float:
    """The learning rate of the highest accuracy over two seeds that no trial uses."""
    return max(rates, key=lambda lr: sum(fine_tune(method, lr, seed + i, steps, targets).accuracy for i in range(2)))

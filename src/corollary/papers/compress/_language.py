"""What the compression papers share: a small LLaMA trained on the standard library's source, its perplexity, its calibration."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from corollary.data import TokenStream, stdlib_text
from corollary.models import GPT

LINEAR = r"blocks\..*_proj"
"""targets: the seven matrices of each block; embedding, norms and head are left alone"""
CONTEXT = 32
STEPS = 600
RATE = 0.003


@dataclass(frozen=True)
class Language:
    """A trained model with its data.

    Args:
        model: in eval mode; shared by all who ask for the same seed, so work on a copy (`Language.copy`, or `compress`'s default).
        stream: the text; ``stream.batch(n, generator, split="val")`` draws what no training step saw.
        seed: of the whole.
    """

    model: GPT
    stream: TokenStream
    seed: int

    def copy(self) -> GPT:
        """A model of one's own."""
        return copy.deepcopy(self.model)

    def calibration(self, windows: int = 64, batch: int = 32) -> list[Tensor]:
        """Windows of training text, in batches: what a method may look at. Another draw than the training's."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return [self.stream.batch(min(batch, windows - at), generator)[0] for at in range(0, windows, batch)]

    @torch.no_grad()
    def calibration_loss(self, model: nn.Module, windows: int = 64) -> float:
        """Mean loss in nats a byte on the calibration windows: what a method may choose by."""
        total = 0.0
        generator = torch.Generator().manual_seed(self.seed + 1)
        for _ in range(0, windows, 32):
            x, y = self.stream.batch(32, generator)
            total += float(cross_entropy(model(x).flatten(0, 1), y.flatten())) * 32 / windows
        return total

    @torch.no_grad()
    def loss(self, model: nn.Module, windows: int = 512) -> float:
        """Mean loss in nats a byte on held-out windows, the same for every model of this seed."""
        total, count = 0.0, 0
        x, y = self.stream.batch(windows, torch.Generator().manual_seed(self.seed + 2), split="val")
        for a, b in zip(torch.split(x, 128), torch.split(y, 128), strict=True):
            total += float(cross_entropy(model(a).flatten(0, 1), b.flatten(), reduction="sum"))
            count += b.numel()
        return total / count

    def perplexity(self, model: nn.Module, windows: int = 512) -> float:
        """exp of the loss in nats a byte, at most that of guessing twice over."""
        return math.exp(min(self.loss(model, windows), 2 * math.log(self.stream.vocab_size)))


@lru_cache(maxsize=64)
def language(
    seed: int,
    steps: int = STEPS,
    *,
    dim: int = 64,
    depth: int = 2,
    heads: int = 4,
    context: int = CONTEXT,
    rate: float = RATE,
    batch: int = 16,
) -> Language:
    """Train a model of about 150,000 parameters by AdamW (warm-up over a tenth, then cosine to a twentieth), once a seed and process.

    Args:
        seed: of start, batches and the place of the validation stretch.
        steps: of training.
        dim, depth, heads, context: of the model.
        rate: peak learning rate.
        batch: windows a step.
    """
    torch.manual_seed(seed)
    stream = TokenStream(stdlib_text(2_000_000), context=context, seed=seed)
    net = GPT(stream.vocab_size, dim=dim, depth=depth, heads=heads, context=context)
    train(net, stream, seed, steps, rate, batch)
    return Language(net.eval().requires_grad_(True), stream, seed)


def train(
    net: nn.Module,
    stream: TokenStream,
    seed: int,
    steps: int,
    rate: float,
    batch: int = 16,
    *,
    after_step: Callable[[int], None] | None = None,
    penalty: Callable[[], Tensor] | None = None,
) -> tuple[float, ...]:
    """Next-byte training in place; gives the training loss of each step.

    ``after_step(step)`` is called behind each step of the optimizer, and ``penalty()`` added to each loss, for methods that train in
    a way of their own.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.1)
    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.05 + 0.475 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    curve = []
    net.train()
    for step in range(steps):
        x, y = stream.batch(batch, generator)
        loss = cross_entropy(net(x).flatten(0, 1), y.flatten())
        total = loss if penalty is None else loss + penalty()
        optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        curve.append(float(loss.detach()))
        if after_step is not None:
            after_step(step)
    net.eval()
    return tuple(curve)

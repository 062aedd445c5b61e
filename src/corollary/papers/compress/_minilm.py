"""What the compression papers share on a real checkpoint: the last layer of all-MiniLM-L6-v2 on docstrings of the standard library."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
from torch import Tensor, nn

from corollary.compress import Calibration, Moments
from corollary.data import minilm, stdlib_docstrings

TEXTS = 120
TOKENS = 24
LINEAR = ("query", "key", "value", "dense")
"""targets: attention's four matrices and the two of the feed-forward network"""


class LastLayer(nn.Module):
    """The encoder's last layer, from the states below it to the states that the model gives out."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """States (batch, tokens, 384) from states and a bool mask (batch, tokens)."""
        return cast(Tensor, self.layer(hidden, attention_mask[:, None, None, :]))


@dataclass(frozen=True)
class Docstrings:
    """States below the last layer, masks, the layer itself, and the states it gives; shared, so compress a copy."""

    hidden: Tensor
    mask: Tensor
    model: LastLayer
    states: Tensor

    def batches(self, chosen: Tensor) -> list[dict[str, Tensor]]:
        """Texts as batches for calibration; padding is left out by the mask."""
        return [{"hidden": self.hidden[part], "attention_mask": self.mask[part]} for part in torch.split(chosen, 20)]

    @torch.no_grad()
    def errors(self, model: nn.Module, chosen: Tensor) -> Tensor:
        """Squared error of the model's states, summed over each of these texts' tokens: float64 (texts,)."""
        mask = self.mask[chosen]
        gap = model(self.hidden[chosen], mask) - self.states[chosen]
        errors: Tensor = (gap.double().square().sum(-1) * mask).sum(-1)
        return errors

    def relative(self, errors: Tensor, chosen: Tensor) -> float:
        """Errors of these texts over the variance of their true states."""
        true = self.states[chosen][self.mask[chosen]].double()
        return float(errors.sum() / (true - true.mean(0)).square().sum())

    def error(self, model: nn.Module, chosen: Tensor) -> float:
        """Squared error of the model's states on these texts' tokens, relative to their variance."""
        return self.relative(self.errors(model, chosen), chosen)


@cache
def docstrings() -> Docstrings:
    """The texts, through the five layers below once a process."""
    texts, _, _ = stdlib_docstrings(classes=12, per_class=TEXTS // 12, seed=0)
    tokenizer, model = minilm()
    batch = tokenizer(texts, truncation=True, max_length=TOKENS, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        *_, hidden, states = model(**batch, output_hidden_states=True).hidden_states
    return Docstrings(hidden, batch["attention_mask"].bool(), LastLayer(model.encoder.layer[-1]).eval(), states)


def split(seed: int) -> tuple[Tensor, Tensor]:
    """Indices of texts to calibrate on, a third, and to test on."""
    order = torch.randperm(TEXTS, generator=torch.Generator().manual_seed(seed))
    return order[: TEXTS // 3], order[TEXTS // 3 :]


def misplaced(calibration: Calibration, seed: int, *, means: bool = True) -> Calibration:
    """A control: the same moments with the inputs' coordinates shuffled, so that size and spectrum stay and directions are wrong.

    With ``means=False`` the means stay where they are and only the covariances are shuffled.
    """
    generator = torch.Generator().manual_seed(seed)
    broken = {}
    for name, held in calibration.items():
        order = torch.randperm(len(held.mean), generator=generator)
        outer = torch.outer(held.mean, held.mean)
        if means:
            second, mean = held.second[order][:, order], held.mean[order]
        else:
            second, mean = (held.second - outer)[order][:, order] + outer, held.mean
        broken[name] = Moments(second, mean, held.count, held.outputs)
    return Calibration(broken)

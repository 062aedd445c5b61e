"""What the claims on click models share: the log, the training loop, AUC, fine-tuning by the rate that validation prefers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.lr_scheduler import OneCycleLR

from corollary.compress import Calibration, calibrate
from corollary.data import ClickLog, click_log
from corollary.models import DCN, DeepFM

FIELD_SIZES = (10_000, 5_000, 2_000, 1_000, 500, 200, 100, 50, 20, 10)
KINDS: dict[str, type[DeepFM] | type[DCN]] = {"DeepFM": DeepFM, "DCN": DCN}
TARGETS = ["embedding", r"deep\.\d*[02468]"]
DIM, HIDDEN = 16, (128, 128, 128)
BATCH = 2_000
EPOCHS, RATE, DECAY = 3, 1e-2, 1e-4
RATES = (3e-3, 1e-2)
"""what fine-tuning is tried at"""


@lru_cache(maxsize=2)
def logs(seed: int, train: int) -> tuple[ClickLog, ClickLog, ClickLog]:
    """A log of its own for every seed, dealt into rows to train on, to choose by, and to test on."""
    generator = torch.Generator().manual_seed(seed)
    choose, test = train // 10, train * 2 // 5
    log = click_log(
        train + choose + test, FIELD_SIZES, latent=8, decay=1.0, exponent=1.2, main=1.0, interaction=1.0, generator=generator
    )
    return log[:train], log[train : train + choose], log[train + choose :]


def fit(model: nn.Module, log: ClickLog, rate: float, epochs: int, seed: int) -> nn.Module:
    """Adam on the binary cross-entropy in place, the rate rising and falling once, tables decayed as click models are."""
    tables = [p for name, p in model.named_parameters() if name.startswith(("embedding", "first_order"))]
    others = [p for name, p in model.named_parameters() if not name.startswith(("embedding", "first_order"))]
    groups: list[dict[str, Any]] = [{"params": tables, "weight_decay": DECAY}, {"params": others}]
    optimizer = torch.optim.Adam(groups, lr=rate, fused=True)
    steps = len(log) // BATCH
    schedule = OneCycleLR(optimizer, [rate, rate], total_steps=epochs * steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(log), generator=generator)[: steps * BATCH].view(steps, BATCH):
            optimizer.zero_grad()
            binary_cross_entropy_with_logits(model(log.ids[rows]), log.clicks[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.inference_mode()
def log_odds(model: nn.Module, log: ClickLog) -> Tensor:
    """What the model says of each row."""
    return torch.cat([cast(Tensor, model(ids)) for ids in torch.split(log.ids, 8192)])


def auc(scores: Tensor, log: ClickLog) -> float:
    """Area under the receiver operating characteristic: how often a click is put above a row that was not clicked."""
    return float(roc_auc_score(log.clicks.numpy(), scores.numpy()))


@dataclass(frozen=True)
class Trained:
    """A click model, trained, with its log."""

    model: nn.Module
    train: ClickLog
    choose: ClickLog
    test: ClickLog
    seed: int

    def calibration(self) -> Calibration:
        """Moments of every table and layer over the whole training log."""
        return calibrate(self.model, batches(self.train), TARGETS)

    def auc(self, model: nn.Module) -> float:
        """On the rows to test on."""
        return auc(log_odds(model, self.test), self.test)

    def bayes(self) -> float:
        """AUC of the true log-odds."""
        return auc(self.test.logits, self.test)

    def tuned_further(self, model: nn.Module, rates: Sequence[float] = RATES) -> nn.Module:
        """The model trained for one epoch more, or left as it is: whichever of the rates, or none, validation prefers."""
        tried = [model, *(fit(copy.deepcopy(model), self.train, rate, 1, self.seed + 1) for rate in rates)]
        return max(tried, key=lambda m: auc(log_odds(m, self.choose), self.choose))


def batches(log: ClickLog) -> Iterator[Tensor]:
    """The ids, some rows at a time."""
    return iter(torch.split(log.ids, 10_000))


@lru_cache(maxsize=8)
def trained(kind: str, seed: int, train: int, epochs: int = EPOCHS) -> Trained:
    """A click model of a kind, trained on the seed's log."""
    parts = logs(seed, train)
    torch.manual_seed(seed)
    model = KINDS[kind](FIELD_SIZES, DIM, HIDDEN)
    return Trained(fit(model, parts[0], RATE, epochs, seed), *parts, seed)

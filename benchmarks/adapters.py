"""Accuracy against trained numbers of every adapter on one task, ten seeds each: the table and the plot of the docs' page "Adapters".

Usage: python -m benchmarks.adapters   (about half an hour on one core; finished methods are kept and not run again)
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from corollary.adapt import PEGO, LoLDU, LoRA, LoRAXS, ProgressiveAdjustment, RandLoRA, SaRA, SVFit, VeRA, adapt
from corollary.claims.environment import commit, machine, packages
from corollary.papers.adapt import _minilm as task
from corollary.papers.adapt import snnk, triadaptlora
from corollary.papers.adapt.lora_sb import lora_sb

RESULTS = Path(__file__).with_name("adapters.json")
SEEDS, TUNING = 10, 2
Train = Callable[[float, int], task.Run]


def _of(method: task.Method, targets: tuple[str, ...] = task.LINEAR) -> Train:
    return lambda lr, seed: task.fine_tune(method, lr, seed, task.STEPS, targets)


def sara(lr: float, seed: int) -> task.Run:
    """SaRA with its selection made anew half-way."""
    model = adapt(task.encoder(seed), SaRA(fraction=0.1), task.names())
    adjustment = ProgressiveAdjustment(model, at=task.STEPS // 2)
    return task.fit(model, lr, seed, after_step=lambda _: adjustment.step())


METHODS: dict[str, tuple[Train, tuple[float, ...]]] = {
    "full fine-tuning": (_of(None), task.RATES["full"]),
    **{f"LoRA, rank {r}": (_of(LoRA(rank=r)), task.RATES["LoRA"]) for r in (1, 2, 6, 16)},
    **{f"RandLoRA, rank {r}": (_of(RandLoRA(rank=r)), (0.0005, 0.001, 0.002, 0.004)) for r in (128, 48, 16)},
    **{f"VeRA, rank {r}": (_of(VeRA(rank=r)), task.RATES["VeRA"]) for r in (64, 256)},
    **{f"LoRA-XS, rank {r}": (_of(LoRAXS(rank=r)), task.RATES["LoRAXS"]) for r in (8, 16)},
    "LoRA-SB, rank 16": (_of(lora_sb), (0.005, 0.01, 0.02, 0.04)),
    "PEGO, 2 of rank 3": (_of(PEGO(rank=3, group_size=2)), task.RATES["LoRA"]),
    "SaRA, a tenth": (sara, (0.004, 0.008, 0.016, 0.032)),
    "bottleneck, rank 48": (_of(snnk.BASELINE, snnk.TARGETS), snnk.RATES["baseline"]),
    "bottleneck, rank 9": (_of(snnk.Bottleneck(rank=9), snnk.TARGETS), snnk.RATES["baseline"]),
    "SNNK, 192 features": (_of(snnk.SNNK, snnk.TARGETS), snnk.RATES["ours"]),
    "SVFit": (_of(SVFit()), (0.05, 0.1, 0.2, 0.4)),
    "LoLDU": (_of(LoLDU()), (0.0025, 0.005, 0.01, 0.02)),
    "TriAdaptLoRA, rank 1 to 6": (lambda lr, seed: triadaptlora.grown(lr, seed, task.STEPS), triadaptlora.RATES),
    "AdaLoRA, rank 9 to 6": (lambda lr, seed: triadaptlora.adalora(lr, seed, task.STEPS), triadaptlora.ADALORA_RATES),
}


def measure(train: Train, rates: tuple[float, ...]) -> dict[str, Any]:
    """The best rate over two seeds, and accuracies at it over ten others."""
    scores = {lr: sum(train(lr, 1000 + i).accuracy for i in range(TUNING)) for lr in rates}
    rate = max(scores, key=scores.__getitem__)
    runs = [train(rate, seed) for seed in range(SEEDS)]
    return {"rate": rate, "trainable": runs[0].trainable, "accuracies": [run.accuracy for run in runs]}


def main() -> int:
    """Measure what is missing, keep each method as soon as it is done, and print the table."""
    console = Console()
    rows: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))["methods"] if RESULTS.exists() else {}
    for name in track([n for n in METHODS if n not in rows], description="adapters", console=console):
        rows[name] = measure(*METHODS[name])
        data = {"methods": rows, "commit": commit(), "machine": machine(), "packages": packages()}
        temporary = RESULTS.with_suffix(".tmp")
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, RESULTS)
    for name, row in sorted(rows.items(), key=lambda item: item[1]["trainable"]):
        console.print(f"{row['trainable']:>9,}  {statistics.mean(row['accuracies']):.4f}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

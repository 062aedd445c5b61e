"""Compress a real pretrained encoder by every method at every ratio, and keep the table for the docs.

Usage: python -m benchmarks.compression [--texts N] [--ratios R ...]

all-MiniLM-L6-v2 reads docstrings of the standard library. Its 36 matrices are compressed to 0.9 ... 0.5 of their bytes by every
method that `corollary.compress` has, calibrated on some of the texts. On the others it is measured what becomes of

- classification of docstrings by their module: a logistic regression on the original's sentence vectors, held fixed, reads the
  compressed model's (its loss and accuracy), so that what is lost is the encoder's;
- its own hidden states with a share of the tokens masked: the squared error of all layers' states, over their variance, against the
  original's on the same masked texts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from corollary.claims.environment import commit, machine, packages
from corollary.compress import SVD, CompressConfig, EoRA, LoRD, LowRank, calibrate, compress, compression_report
from corollary.data import minilm, stdlib_docstrings

RESULTS = Path(__file__).parent / "compression.json"
RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5)
TARGETS = r"encoder\..*(query|key|value|dense)"
TOKENS = 24
MASKED = 0.15

METHODS: dict[str, Callable[[float], CompressConfig]] = {
    "SVD": lambda r: SVD(ratio=r),
    "SVD, global ranks": lambda r: SVD(ratio=r, allocation="global"),
    "LoRD": lambda r: LoRD(ratio=r),
    "LoRD, global ranks": lambda r: LoRD(ratio=r, allocation="global"),
    "both metrics, global ranks": lambda r: LowRank(ratio=r, metric="both", centered=True, damping=1e-4),
    "4 bits + SVD": lambda r: EoRA(ratio=r, metric="none"),
    "4 bits + EoRA": lambda r: EoRA(ratio=r),
    "2:4, 4 bits + SVD": lambda r: EoRA(ratio=r, metric="none", sparsity="2:4"),
    "2:4, 4 bits + EoRA": lambda r: EoRA(ratio=r, sparsity="2:4"),
}
PAIRS = (
    ("LoRD", "SVD"),
    ("both metrics, global ranks", "SVD"),
    ("4 bits + EoRA", "4 bits + SVD"),
    ("2:4, 4 bits + EoRA", "2:4, 4 bits + SVD"),
)


def vectors(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Sentence vectors (texts, 384), means over tokens, and all layers' states (layers, tokens of all texts, 384)."""
    sentences, states = [], []
    with torch.no_grad():
        for ids, mask in zip(batch["input_ids"].split(64), batch["attention_mask"].split(64), strict=True):
            hidden = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
            weight = mask[..., None].float()
            sentences.append((hidden[-1] * weight).sum(1) / weight.sum(1))
            states.append(torch.stack(hidden[1:])[:, mask.bool()])
    return torch.cat(sentences), torch.cat(states, dim=1)


def masked(batch: dict[str, Tensor], token: int, special: set[int]) -> dict[str, Tensor]:
    """The batch with a share of its ordinary tokens replaced by the mask."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(batch["input_ids"].shape, generator=generator) < MASKED
    for number in special:
        drawn &= batch["input_ids"] != number
    return {**batch, "input_ids": batch["input_ids"].masked_fill(drawn, token)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compression", description=__doc__.partition("\n")[0])
    parser.add_argument("--texts", type=int, default=624, help="docstrings of 12 modules, all but 144 of them to calibrate on")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS), help="shares of the matrices' bytes to keep")
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts, labels, _ = stdlib_docstrings(classes=12, per_class=max(4, options.texts // 12), seed=0)
    tokenizer, model = minilm()
    batch = dict(tokenizer(texts, truncation=True, max_length=TOKENS, padding="max_length", return_tensors="pt"))
    half = max(len(texts) // 2, len(texts) - 144)
    seen_batch, test_batch = ({k: v[s] for k, v in batch.items()} for s in (slice(0, half), slice(half, None)))
    hidden_batch = masked(test_batch, tokenizer.mask_token_id, set(tokenizer.all_special_ids))

    train, _ = vectors(model, seen_batch)
    reader = LogisticRegression(C=10.0, max_iter=2000).fit(train.numpy(), labels[:half].numpy())
    _, whole = vectors(model, hidden_batch)
    variance = (whole - whole.mean(1, keepdim=True)).square().sum((1, 2))

    def measured(small: nn.Module) -> dict[str, float]:
        sentences, _ = vectors(small, test_batch)
        chances = reader.predict_log_proba(sentences.numpy())
        truth = labels[half:].numpy()
        _, states = vectors(small, hidden_batch)
        return {
            "classification_loss": float(-np.mean(chances[np.arange(len(truth)), truth])),
            "accuracy": float((chances.argmax(1) == truth).mean()),
            "reconstruction": float(((states - whole).square().sum((1, 2)) / variance).mean()),
        }

    parts = [{k: v[i : i + 60] for k, v in seen_batch.items()} for i in range(0, half, 60)]
    begin = time.perf_counter()
    generator = torch.Generator().manual_seed(0)

    def sensitivity(net: nn.Module, part: dict[str, Tensor]) -> Tensor:
        """Random sums of the last states: their gradients' second moment is how much an output of a layer moves those states."""
        states = net(**part).last_hidden_state[part["attention_mask"].bool()]
        return (states * torch.randn(states.shape, generator=generator)).sum()

    seen = calibrate(model, parts, TARGETS, loss=sensitivity)
    calibration_seconds = time.perf_counter() - begin
    original = measured(model)
    console = Console(stderr=True)
    rows: list[dict[str, Any]] = []
    calls = [(name, ratio) for name in METHODS for ratio in options.ratios]
    for name, ratio in track(calls, description="compressing", console=console):
        try:
            small = compress(model, METHODS[name](ratio), TARGETS, calibration=seen)
        except ValueError:
            continue  # packed weights alone take more than this
        found = compression_report(small)
        rows.append(
            {"method": name, "ratio": ratio, "share_of_bytes": found.ratio, "seconds": found.seconds, **measured(small)}
        )
    at = {(row["method"], row["ratio"]): row for row in rows}
    beaten = {
        f"{ours} against {plain}": {
            metric: {
                str(ratio): at[ours, ratio][metric] / at[plain, ratio][metric]
                for ratio in options.ratios
                if (ours, ratio) in at and (plain, ratio) in at
            }
            for metric in ("reconstruction", "classification_loss")
        }
        for ours, plain in PAIRS
    }
    report = {
        "calibrated": half,
        "tested": len(texts) - half,
        "tokens": TOKENS,
        "masked": MASKED,
        "matrices": len(seen),
        "original": original,
        "calibration_seconds": calibration_seconds,
        "rows": rows,
        "quotients": beaten,
        "commit": commit(),
        "machine": machine(),
        "packages": packages(),
    }
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, RESULTS)
    table = Table("method", "ratio", "bytes", "reconstruction", "loss", "accuracy", "s", title="all-MiniLM-L6-v2")
    for row in rows:
        table.add_row(
            row["method"], f"{row['ratio']}", f"{row['share_of_bytes']:.2f}", f"{row['reconstruction']:.2e}",
            f"{row['classification_loss']:.3f}", f"{row['accuracy']:.3f}", f"{row['seconds']:.1f}",
        )  # fmt: skip
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())

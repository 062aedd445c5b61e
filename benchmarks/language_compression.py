"""Perplexity of a small LLaMA against the share of its blocks' bytes that is kept, and what the smaller models' inference takes.

Usage: python -m benchmarks.language_compression   (some ten minutes on one core)

A model of two blocks learns the standard library's source. It is then compressed by what needs no training (SVD, LoRD, EoRA on 4 bits
and on 2:4 sparsity), and beside it stand models that were trained to be cut: by TRP and with Maestro's layers, over as many steps.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.optim import AdamW

from corollary.claims.environment import commit, machine, packages
from corollary.claims.timing import interleave, keep_freed_memory
from corollary.compress import SVD, CompressConfig, EoRA, LoRD, calibrate, compress, compression_report
from corollary.data import TokenStream
from corollary.models import GPT
from corollary.papers.compress import _small_gpt as small
from corollary.papers.compress import maestro, trp

RESULTS = Path(__file__).with_name("language_compression.json")
TARGETS = r"blocks\..*_proj"
STEPS, SEEDS = 600, 3
RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.25, 0.1)
METHODS: dict[str, Callable[[float], CompressConfig]] = {
    "SVD": lambda r: SVD(ratio=r, allocation="global"),
    "LoRD": lambda r: LoRD(ratio=r, allocation="global"),
    "4 bits + SVD": lambda r: EoRA(ratio=r, metric="none", group_size=32),
    "4 bits + EoRA": lambda r: EoRA(ratio=r, group_size=32),
    "2:4, 4 bits + SVD": lambda r: EoRA(ratio=r, metric="none", sparsity="2:4", group_size=32),
    "2:4, 4 bits + EoRA": lambda r: EoRA(ratio=r, sparsity="2:4", group_size=32),
}
WIDTH, ROWS = 512, 32
"""of the models whose inference is timed, and tokens in a row"""


def trained(seed: int) -> tuple[GPT, TokenStream]:
    """A model by AdamW, at the rate that the claims on it were tuned to."""
    stream, net = small.stream_of(seed), small.fresh_gpt(seed)
    small.pretrain(net, AdamW(net.parameters(), lr=trp.GPT_RATE), stream, STEPS, seed)
    return net.eval(), stream


def quality(seed: int) -> list[dict[str, Any]]:
    """Loss in nats a byte of every method at every ratio, for one seed."""
    net, stream = trained(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    batches: list[Tensor] = [stream.batch(32, generator)[0] for _ in range(2)]
    seen = calibrate(net, batches, TARGETS)
    rows = [{"method": "original", "ratio": 1.0, "share": 1.0, "loss": small.validation_loss(net, stream)}]
    for name, config in METHODS.items():
        for ratio in RATIOS:
            try:
                made = compress(net, config(ratio), TARGETS, calibration=seen)
            except ValueError:
                continue  # packed weights alone take more than this
            layers = compression_report(made).layers
            share = sum(row.bytes for row in layers) / sum(row.bytes_before for row in layers)
            rows.append({"method": name, "ratio": ratio, "share": share, "loss": small.validation_loss(made, stream)})
    learnt: Mapping[str, Mapping[float, float]] = {
        "TRP": trp._language(seed, STEPS, trp.GPT_ENERGY),
        "Maestro": maestro._maestro_gpt(seed, STEPS, **maestro.GPT_OURS, ordered=True),
    }
    rows += [
        {"method": name, "ratio": ratio, "share": ratio, "loss": loss}
        for name, found in learnt.items()
        for ratio, loss in found.items()
    ]
    return rows


def speed() -> list[dict[str, Any]]:
    """Time of a forward pass over the dense model's, interleaved, at batch 1 and 32; times hang on shapes alone."""
    keep_freed_memory()
    torch.manual_seed(0)
    net = GPT(256, dim=WIDTH, depth=2, heads=8, context=ROWS).eval()
    data = [torch.randint(256, (32, ROWS))]
    kinds: dict[str, CompressConfig] = {f"LoRD, {r:g}": LoRD(ratio=r, multiple_of=8) for r in (0.9, 0.7, 0.5, 0.25, 0.1)}
    kinds["4 bits + EoRA, 0.25"] = EoRA(ratio=0.25, group_size=32)
    models: dict[str, nn.Module] = {"dense": net}
    models |= {name: compress(net, config, TARGETS, calibration=data) for name, config in kinds.items()}
    rows: list[dict[str, Any]] = []
    for batch, rounds in ((1, 25), (32, 7)):
        x = torch.randint(256, (batch, ROWS))
        with torch.inference_mode():
            seconds = interleave({name: partial(model, x) for name, model in models.items()}, rounds=rounds, min_seconds=0.005)
        rows += [
            {"model": name, "batch": batch, "milliseconds": 1e3 * taken, "quotient": taken / seconds["dense"]}
            for name, taken in seconds.items()
        ]
    return rows


def main() -> int:
    torch.set_num_threads(1)
    console = Console()
    timed = speed()
    runs = [quality(seed) for seed in track(range(SEEDS), description="seeds", console=Console(stderr=True))]
    rows = []
    for same in zip(*runs, strict=True):
        losses = [row["loss"] for row in same]
        rows.append({**same[0], "share": sum(r["share"] for r in same) / len(same), "losses": losses})
        del rows[-1]["loss"]
        rows[-1]["perplexity"] = math.exp(sum(losses) / len(losses))
    report = {
        "steps": STEPS, "seeds": SEEDS, "rows": rows, "width": WIDTH, "tokens": ROWS, "speed": timed,
        "commit": commit(), "machine": machine(), "packages": packages(),
    }  # fmt: skip
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, RESULTS)
    table = Table("method", "ratio", "share of bytes", "perplexity", title="a small LLaMA")
    for row in rows:
        table.add_row(row["method"], f"{row['ratio']:g}", f"{row['share']:.3f}", f"{row['perplexity']:.3f}")
    console.print(table)
    table = Table("model", "batch", "ms", "of the dense one's", title="inference")
    for row in timed:
        table.add_row(row["model"], f"{row['batch']}", f"{row['milliseconds']:.2f}", f"{row['quotient']:.2f}")
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())

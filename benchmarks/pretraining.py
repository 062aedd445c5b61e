"""Pre-train a small LLaMA by AdamW and by every low-rank method at one memory budget, and keep the table for the docs.

Usage: python -m benchmarks.pretraining [--seeds N] [--steps N] [--jobs N]

Each method gets the largest rank (or density) whose optimizer state takes no more bytes than Fira's at rank 6, and the best of
`RATES` on a tuning seed. Then it runs on seeds that were not looked at, the same for all. Besides the methods of papers, pairs of
a projector and a residual rule that no paper has are tried on the tuning seed, and the best of them joins the table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.optim import Optimizer

from corollary.claims.environment import commit, machine, packages
from corollary.claims.stats import bca_interval
from corollary.models import GPT
from corollary.optim import ProjectedAdamW, state_bytes
from corollary.papers.optim import _low_rank as low_rank

RESULTS = Path(__file__).parent / "pretraining.json"
TUNING_SEED = 7_000_001
FIRST_SEED = 8_000_001
PAPERS = ("AdamW", "LoRA", "GaLore", "Fira", "Frugal", "QGaLore", "DCTAdamW")
PROJECTORS = ("randomized", "dct", "random", "columns")
PAIR_RATES = (0.008, 0.016, 0.032)
KNOWN = {"randomized + norm", "randomized + drop", "dct + drop"}


def _two_rates(model: torch.nn.Module, lr: float, rank: float, **_: Any) -> Optimizer:
    """AdamW with the matrices at a quarter of the rate of embedding and norms: how much one rate for all costs it."""
    projected, rest = low_rank.low_rank_groups(model, rank=low_rank.RANK)
    groups = [{"params": projected["params"], "lr": lr / 4}, {"params": rest["params"]}]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)


EXTRA: dict[str, Callable[..., Optimizer]] = {"AdamW, matrices at a quarter of the rate": _two_rates}


def _pairs() -> dict[str, Callable[..., Optimizer]]:
    """Projectors with the residual dropped or scaled by its norm, but the pairs that a paper has."""
    return {
        name: low_rank.preset(ProjectedAdamW, projector=kind, residual=residual)
        for kind in PROJECTORS
        for residual in ("drop", "norm")
        if (name := f"{kind} + {residual}") not in KNOWN
    }


def _bytes(method: str, rank: float) -> int:
    """State after one step."""
    torch.manual_seed(0)
    net = GPT(256, dim=64, depth=2, heads=4, context=32)
    optimizer = low_rank.METHODS[method](net, 1e-3, rank)
    x = torch.randint(256, (2, 33))
    torch.nn.functional.cross_entropy(net(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).backward()
    optimizer.step()
    return state_bytes(optimizer)


def _largest(method: str, budget: int) -> float:
    """The largest rank, or density where that is what the method takes, within the budget."""
    if method in ("AdamW", "LoRA", *EXTRA):
        return low_rank.RANK  # AdamW has none; LoRA's factors are sized by the harness to no fewer bytes than Fira's
    sizes: list[float] = [i / 64 for i in range(1, 64)] if method == "Frugal" else list(range(1, 64))
    best = sizes[0]
    for size in sizes:
        if _bytes(method, size) > budget:
            break
        best = size
    return best


def _run(method: str, rate: float, seed: int, steps: int, rank: float) -> dict[str, Any]:
    """One run, in a worker: `METHODS` is filled anew there."""
    torch.set_num_threads(1)
    low_rank.METHODS.update({**EXTRA, **_pairs()})
    run = low_rank.pretrain(method, rate, seed, steps, rank)
    return {"loss": run.loss, "state_bytes": run.state_bytes, "step_seconds": run.step_seconds}


def _all(calls: list[tuple[Any, ...]], jobs: int, words: str) -> list[dict[str, Any]]:
    console = Console(stderr=True)
    results = Parallel(n_jobs=jobs, return_as="generator")(delayed(_run)(*call) for call in calls)
    return list(track(results, description=words, total=len(calls), console=console))


def _tuned(
    methods: dict[str, float], rates: tuple[float, ...], steps: int, jobs: int, words: str
) -> dict[str, tuple[float, float]]:
    """The best rate of each method on the tuning seed, and its loss there."""
    calls = [(name, rate, TUNING_SEED, steps, rank) for name, rank in methods.items() for rate in rates]
    losses = iter(_all(calls, jobs, words))
    best = {name: min((next(losses)["loss"], rate) for rate in rates) for name in methods}
    return {name: (rate, loss) for name, (loss, rate) in best.items()}


def _row(
    name: str, label: str, rank: float, rate: float, runs: list[dict[str, Any]], full: np.ndarray[Any, Any]
) -> dict[str, Any]:
    losses = np.array([run["loss"] for run in runs])
    low, high = bca_interval(losses)
    row = {
        "method": label,
        "rank": None if name.startswith("AdamW") else rank,
        "rate": rate,
        "loss": float(losses.mean()),
        "loss_low": low,
        "loss_high": high,
        "state_bytes": runs[0]["state_bytes"],
        "step_seconds": float(np.median([run["step_seconds"] for run in runs])),
        "losses": losses.tolist(),
    }
    if name != "AdamW":
        gap = losses / full - 1
        row["gap"], (row["gap_low"], row["gap_high"]) = float(gap.mean()), bca_interval(gap)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pretraining", description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=10, help="runs of each method (at least 2)")
    parser.add_argument("--steps", type=int, default=300, help="steps of a run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args()
    if options.seeds < 2 or options.steps < 1 or options.jobs < 1:
        parser.error("--seeds must be at least 2, --steps and --jobs at least 1")

    low_rank.METHODS.update({**EXTRA, **_pairs()})
    budget = _bytes("Fira", low_rank.RANK)
    sizes = {name: _largest(name, budget) for name in (*PAPERS, *EXTRA)}
    pairs = {name: _largest(name, budget) for name in _pairs()}
    found = _tuned(pairs, PAIR_RATES, options.steps, options.jobs, "pairs that no paper has")
    best = min(found, key=lambda name: found[name][1])
    rates = _tuned(sizes, low_rank.RATES, options.steps, options.jobs, "learning rates")
    chosen = {**{name: (sizes[name], rates[name][0]) for name in sizes}, best: (pairs[best], found[best][0])}

    seeds = [FIRST_SEED + i for i in range(options.seeds)]
    # Seed by seed, so that a drift of the machine falls on all methods alike.
    calls = [(name, rate, seed, options.steps, rank) for seed in seeds for name, (rank, rate) in chosen.items()]
    results = iter(_all(calls, options.jobs, "runs"))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    for name, *_ in calls:
        runs[name].append(next(results))
    full = np.array([run["loss"] for run in runs["AdamW"]])
    rows = [
        _row(name, f"best pair found: {name}" if name == best else name, *chosen[name], runs[name], full) for name in chosen
    ]
    report = {
        "steps": options.steps,
        "seeds": options.seeds,
        "budget_bytes": budget,
        "rows": sorted(rows, key=lambda row: row["loss"]),
        "pairs_tried": {name: {"rate": rate, "tuning_loss": loss} for name, (rate, loss) in found.items()},
        "commit": commit(),
        "machine": machine(),
        "packages": packages(),
    }
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, RESULTS)
    table = Table("method", "rank", "rate", "loss", "against AdamW", "state bytes", "step ms", title="pre-training")
    for row in report["rows"]:
        gap = f"{100 * row['gap']:+.1f}%" if "gap" in row else ""
        table.add_row(
            row["method"],
            f"{row['rank'] or '':.3}" if isinstance(row["rank"], float) else str(row["rank"] or ""),
            str(row["rate"]),
            f"{row['loss']:.3f} [{row['loss_low']:.3f}, {row['loss_high']:.3f}]",
            gap,
            f"{row['state_bytes']:,}",
            f"{1e3 * row['step_seconds']:.2f}",
        )
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())

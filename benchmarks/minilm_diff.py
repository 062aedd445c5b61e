"""Tune all-MiniLM-L6-v2 by LoRA and as a whole, write the three checkpoints, and compare them by the commands; kept for the docs.

Usage: python -m benchmarks.minilm_diff [--steps 200] [--keep DIR]

The task is to tell docstrings by their module, from 24 tokens, through a mean over tokens and a linear head that is trained too. The
same linear layers are tuned in every case. Forgetting is how much of the geometry of the original's sentence embeddings is lost:
one minus the correlation of all cosines between held-out texts, before and after.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from corollary.adapt import LoRA, adapt, merge_and_unload
from corollary.analysis import diff_checkpoints, inspect_checkpoint
from corollary.claims.environment import commit, machine, packages
from corollary.data import minilm, stdlib_docstrings

RESULTS = Path(__file__).parent / "minilm_diff.json"
LINEAR = ("query", "key", "value", "dense")
TOKENS, BATCH = 24, 16
CASES: dict[str, tuple[LoRA | None, tuple[float, ...]]] = {
    "full fine-tuning": (None, (5e-5, 1e-4, 2e-4)),
    "LoRA, rank 1": (LoRA(rank=1, alpha=2), (1e-3, 2e-3, 5e-3)),
    "LoRA, rank 8": (LoRA(rank=8, alpha=16), (1e-3, 2e-3, 5e-3)),
    "LoRA, rank 64": (LoRA(rank=64, alpha=128), (2e-4, 5e-4, 1e-3)),
    # Far too high a rate, for what a damaged checkpoint looks like.
    "LoRA, rank 8, rate too high": (LoRA(rank=8, alpha=16), (2e-2,)),
}


def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The mean over tokens, (texts, 384)."""
    hidden: Tensor = model(**batch).last_hidden_state
    weight = batch["attention_mask"][..., None].to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--keep", type=Path, default=None, help="folder in which the checkpoints stay")
    arguments = parser.parse_args()
    tokenizer, base = minilm()
    texts, labels, names = stdlib_docstrings(classes=10, per_class=110)
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
    held = torch.arange(len(texts)) >= len(texts) * 3 // 4

    def batch(index: Tensor) -> dict[str, Tensor]:
        return {key: value[index] for key, value in encoded.items()}

    test = held.nonzero().squeeze(1)
    train = (~held).nonzero().squeeze(1)

    def cosines(model: nn.Module) -> Tensor:
        with torch.no_grad():
            sentences = normalize(torch.cat([embed(model, batch(part)) for part in test.split(64)]))
        first, second = torch.triu_indices(len(sentences), len(sentences), 1)
        return (sentences @ sentences.T)[first, second]

    before = cosines(base)

    def tune(config: LoRA | None, lr: float) -> tuple[nn.Module, dict[str, float]]:
        torch.manual_seed(0)
        model = copy.deepcopy(base)
        head = nn.Linear(384, len(names))
        if config is not None:
            adapt(model, config, targets=LINEAR)
        else:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.endswith("weight") and name.split(".")[-2] in LINEAR)
        tuned = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            [{"params": tuned, "lr": lr}, {"params": head.parameters(), "lr": 5e-3}], weight_decay=0.0
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / arguments.steps)
        generator = torch.Generator().manual_seed(0)
        for _ in range(arguments.steps):
            index = train[torch.randint(len(train), (BATCH,), generator=generator)]
            loss = cross_entropy(head(embed(model, batch(index))), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        if config is not None:
            merge_and_unload(model)
        with torch.no_grad():
            logits = torch.cat([head(embed(model, batch(part))) for part in test.split(64)])
        correlation = float(np.corrcoef(before.numpy(), cosines(model).numpy())[0, 1])
        return model, {
            "lr": lr,
            "loss": float(cross_entropy(logits, labels[test])),
            "accuracy": float((logits.argmax(1) == labels[test]).float().mean()),
            "forgetting": 1 - correlation,
        }

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        save: Callable[[nn.Module, str], Path] = lambda model, name: _save(model, folder / f"{name}.safetensors")  # noqa: E731
        start = save(base, "base")
        report = inspect_checkpoint(start)
        rows = []
        for name, (config, rates) in CASES.items():
            runs = [tune(config, lr) for lr in rates]
            model, facts = min(runs, key=lambda run: run[1]["loss"])
            diff = diff_checkpoints(start, save(model, name.replace(" ", "-").replace(",", "")))
            matrices = [t for t in diff.tensors if t.similarity]
            rows.append(
                {
                    "name": name,
                    **facts,
                    "relative": diff.relative,
                    "rank": float(np.median([t.rank for t in matrices])),
                    "effective_rank": float(np.median([t.effective_rank for t in matrices])),
                    "intruders": diff.intruders,
                    "vectors": sum(len(t.similarity) for t in matrices),
                    "similarity": np.mean([t.similarity for t in matrices], axis=0).tolist(),
                    "overlap": float(np.mean([t.overlap for t in matrices])),
                }
            )
            print({key: value for key, value in rows[-1].items() if key != "similarity"})
    kinds: dict[str, list[Any]] = {}
    for tensor in report.tensors:
        if tensor.effective_rank is not None:
            kinds.setdefault(_kind(tensor.name), []).append(tensor)
    kept = {
        "steps": arguments.steps,
        "texts": len(train),
        "tokens": TOKENS,
        "rows": rows,
        "parameters": report.parameters,
        "inspect": [
            {
                "name": name,
                "count": len(group),
                "shape": list(group[0].shape),
                **{
                    key: float(np.median([getattr(t, key) for t in group if getattr(t, key) is not None] or [np.nan]))
                    for key in ("spectral", "stable_rank", "effective_rank", "tail_exponent")
                },
            }
            for name, group in kinds.items()
            if all(t.tail_exponent is not None for t in group)
        ],
        "commit": commit(),
        "machine": machine(),
        "packages": packages(),
    }
    RESULTS.write_text(json.dumps(kept, indent=1, allow_nan=False) + "\n")


def _save(model: nn.Module, path: Path) -> Path:
    safetensors.torch.save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, path)
    return path


def _kind(name: str) -> str:
    return ".".join("*" if piece.isdigit() else piece for piece in name.split("."))


if __name__ == "__main__":
    main()

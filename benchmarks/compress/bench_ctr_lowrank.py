"""Factoring a table field by field against torch.linalg.svd, and scoring rows by the factored model against the dense one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness import Bench
from corollary.claims.timing import keep_freed_memory
from corollary.compress import CTRLowRank, calibrate, compress
from corollary.models import DeepFM, FieldEmbedding

SIZES = (10_000, 5_000, 2_000, 1_000, 500, 200, 100, 50, 20, 20)


def plain_svd(table: FieldEmbedding, rank: int) -> list[tuple[Tensor, Tensor]]:
    """Each field's rows by torch.linalg.svd in their own float32, cut."""
    factors = []
    for part in table.weight.detach().split(list(table.field_sizes)):
        u, s, vh = torch.linalg.svd(part, full_matrices=False)
        factors.append((u[:, :rank] * s[:rank], vh[:rank]))
    return factors


def cases() -> list[Bench]:
    """A table of 18,890 ids, and a model as wide as the paper's at batches of 1 and 512."""
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Sequential(FieldEmbedding(SIZES, 16)).eval()
    rows = torch.stack([torch.randint(size, (20_000,)) for size in SIZES], 1) + torch.tensor(net[0].starts)
    seen = calibrate(net, [rows], nn.Embedding)
    benches = [
        Bench(
            component="corollary.compress.CTRLowRank",
            setting="a table of 18,890 ids in ten fields cut from 16 to 4, moments given",
            ours=lambda: compress(net, CTRLowRank(rank=4), nn.Embedding, calibration=seen, inplace=False),
            peers={"torch.linalg.svd of each field, float32": lambda: plain_svd(net[0], 4)},  # type: ignore[arg-type]
            rounds=5,
            warmup=1,
        )
    ]
    return [*benches, *(_scoring(batch) for batch in (1, 512))]


def _scoring(batch: int) -> Bench:
    sizes, targets = [4_000] * 26, ["embedding", r"deep\.[024]"]
    model = DeepFM(sizes, 16, (400, 400, 400)).eval()
    ranks = {"embedding": 5, "deep.0": 64, "deep.2": 64, "deep.4": 64}
    small = compress(model, CTRLowRank(rank=ranks), targets, calibration=[torch.randint(4_000, (2_000, 26))])
    plain = compress(model, CTRLowRank(rank=ranks, metric="none", centered=False), targets)
    ids = torch.randint(4_000, (batch, 26))

    def call(net: nn.Module) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.inference_mode():
                return net(ids)

        return run

    return Bench(
        component="corollary.compress.CTRLowRank",
        setting=f"scoring {batch} rows, DeepFM of 26 fields and 400, 400, 400, tables of 16 cut to 5, layers to 64",
        ours=call(small),
        peers={"DeepFM, dense": call(model), "weight SVD of the same ranks": call(plain)},
    )

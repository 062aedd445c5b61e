"""Factoring a table field by field against torch.linalg.svd, and scoring rows by the factored model against the dense one."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from benchmarks.harness import Bench
from corollary.claims.timing import keep_freed_memory
from corollary.compress import CTRLowRank, calibrate, compress
from corollary.linalg import weighted_low_rank
from corollary.models import DeepFM, FieldEmbedding

SIZES = (10_000, 5_000, 2_000, 1_000, 500, 200, 100, 50, 20, 20)


Factors = list[tuple[Tensor, Tensor]]


def by_features(table: FieldEmbedding, shown: Tensor, rank: int) -> Factors:
    """Each field's rows decomposed in the metric of how often they are shown."""
    parts = list(table.field_sizes)
    weights = [part / part.sum() for part in shown.split(parts)]
    matrices = table.weight.detach().T.split(parts, 1)
    return [weighted_low_rank(m, p, mean=p).factors(rank) for m, p in zip(matrices, weights, strict=True)]


def by_svd(table: FieldEmbedding, shown: Tensor, rank: int) -> Factors:
    """The usual way, to the same factors: singular vectors of the centred rows, each as long as it is shown often."""
    found, parts = [], list(table.field_sizes)
    for rows, part in zip(table.weight.detach().double().split(parts), shown.split(parts), strict=True):
        p = part / part.sum()
        vh = torch.linalg.svd((rows - p @ rows) * p.sqrt()[:, None], full_matrices=False).Vh[:rank]
        found.append((vh.T, vh @ rows.T))
    return found


def cases() -> list[Bench]:
    """A table of 18,890 ids, and a model as wide as the paper's at batches of 1 and 512."""
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Sequential(FieldEmbedding(SIZES, 16)).eval()
    rows = torch.stack([torch.randint(size, (20_000,)) for size in SIZES], 1) + torch.tensor(net[0].starts)
    shown = calibrate(net, [rows], nn.Embedding)["0"].mean
    table = cast(FieldEmbedding, net[0])
    benches = [
        Bench(
            component="corollary.compress.CTRLowRank",
            setting="a table of 18,890 ids in ten fields cut from 16 to 4, moments given",
            ours=lambda: by_features(table, shown, 4),
            peers={"torch.linalg.svd of each field's weighted rows, float64": lambda: by_svd(table, shown, 4)},
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

"""A step of decoding with a cut cache against the whole one, and the step that trains the bases against one of the model."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.harness import Bench
from corollary.claims.timing import keep_freed_memory
from corollary.compress import MatryoshkaCache, decode, kv_ranks, matryoshka_kv, set_kv_ranks
from corollary.models import GPT

DIM, HEADS, CONTEXT, BATCH, HELD = 512, 8, 1025, 8, 1024


def _step(rank: int | None) -> Callable[[], None]:
    """Decode one token behind a full row, again and again at the same place."""
    torch.manual_seed(0)
    model = matryoshka_kv(GPT(256, dim=DIM, depth=2, heads=HEADS, context=CONTEXT), [torch.randint(256, (2, 64))])
    if rank is not None:
        set_kv_ranks(model, rank)
    cache = MatryoshkaCache(kv_ranks(model), max_batch_size=BATCH, max_cache_len=CONTEXT)
    tokens = torch.randint(256, (BATCH, 1))
    with torch.no_grad():
        decode(model, torch.randint(256, (BATCH, HELD)), cache)

    def run() -> None:
        cache.crop(HELD)
        with torch.no_grad():
            decode(model, tokens, cache)

    return run


def cases() -> list[Bench]:
    """A quarter of the coordinates, against all of them in the same code and against the model without a cache."""
    keep_freed_memory()
    torch.manual_seed(0)
    plain, row = GPT(256, dim=DIM, depth=2, heads=HEADS, context=CONTEXT), torch.randint(256, (1, CONTEXT))

    def without() -> None:
        with torch.no_grad():
            plain(row)

    return [
        Bench(
            component="corollary.compress.MatryoshkaAttention",
            setting=f"one more token behind {HELD}, {BATCH} rows, width {DIM}, {HEADS} heads, a quarter of the coordinates",
            ours=_step(DIM // HEADS // 4),
            peers={"all coordinates": _step(None)},
            rounds=15,
            warmup=3,
        ),
        Bench(
            component="corollary.compress.MatryoshkaAttention",
            setting=f"one more token behind {HELD}, 8 rows, against running one row again without a cache",
            ours=_step(DIM // HEADS // 4),
            peers={"no cache": without},
            rounds=7,
            warmup=2,
        ),
    ]

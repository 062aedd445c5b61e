"""The standard library's text, and the windows of a token stream."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corollary.data import TokenStream, stdlib_text


def test_text_is_deterministic_and_cut_to_size() -> None:
    text = stdlib_text(300_000)
    assert 299_997 <= len(text.encode()) <= 300_000
    stdlib_text.cache_clear()
    assert stdlib_text(300_000) == text
    assert stdlib_text(1_000_000).startswith(text[:-1])
    assert "import " in text
    assert "\r\n" not in text


def test_text_refuses_a_size_below_one() -> None:
    with pytest.raises(ValueError, match="'max_bytes' must be at least 1, not 0"):
        stdlib_text(0)


def test_y_is_x_moved_on_by_one_and_windows_are_pieces_of_the_text() -> None:
    text = stdlib_text(20_000)
    stream = TokenStream(text, context=16, seed=0)
    x, y = stream.batch(64, torch.Generator().manual_seed(1))
    assert x.dtype == y.dtype == torch.int64
    assert x.shape == y.shape == (64, 16)
    assert torch.equal(x[:, 1:], y[:, :-1])
    raw = text.encode()
    assert all(bytes(row) in raw for row in torch.cat([x, y[:, -1:]], 1).tolist())


@settings(max_examples=60, deadline=None)
@given(n=st.integers(40, 200), context=st.integers(1, 12), fraction=st.floats(0.1, 0.9), seed=st.integers(0, 1000))
def test_every_window_lies_in_its_part_and_every_start_is_drawn(n: int, context: int, fraction: float, seed: int) -> None:
    n_val = round(n * fraction)
    if n_val <= context or n - n_val <= context:
        with pytest.raises(ValueError, match="each part needs more"):
            TokenStream(torch.arange(n), context=context, seed=seed, val_fraction=fraction)
        return
    stream = TokenStream(torch.arange(n), context=context, seed=seed, val_fraction=fraction)
    generator = torch.Generator().manual_seed(seed)
    seen = {}
    for split in ("train", "val"):
        x, y = stream.batch(60 * n, generator, split)
        assert torch.equal(y, x + 1)  # tokens are positions, so a window that jumped would show
        assert torch.equal(x - x[:, :1], torch.arange(context).expand_as(x))
        seen[split] = set(torch.cat([x, y], 1).flatten().tolist())
    # Disjoint, contiguous validation, and nothing is left out.
    assert not seen["train"] & seen["val"]
    assert seen["train"] | seen["val"] == set(range(n))
    assert seen["val"] == set(range(min(seen["val"]), min(seen["val"]) + n_val))


def test_generator_decides_the_batch_and_the_stream_has_its_own() -> None:
    text = stdlib_text(20_000)
    one, two = (TokenStream(text, context=8, seed=4) for _ in range(2))
    assert torch.equal(one.batch(5)[0], two.batch(5)[0])
    assert not torch.equal(one.batch(5)[0], one.batch(5)[0])
    first = one.batch(5, torch.Generator().manual_seed(0))[0]
    assert torch.equal(first, two.batch(5, torch.Generator().manual_seed(0))[0])


def test_windows_cover_validation_once() -> None:
    stream = TokenStream(torch.arange(1000), context=9, seed=0)
    x, y = stream.windows("val")
    assert x.shape == (11, 9)
    assert len(set(x.flatten().tolist())) == 99
    assert torch.equal(y, x + 1)
    assert stream.windows("val", limit=3)[0].shape == (3, 9)


def test_vocabulary() -> None:
    assert TokenStream("ab" * 100, context=4, seed=0).vocab_size == 256
    assert TokenStream([0, 1, 6] * 100, context=4, seed=0).vocab_size == 7
    assert TokenStream([0, 1, 6] * 100, context=4, seed=0, vocab_size=10).vocab_size == 10
    with pytest.raises(ValueError, match="'vocab_size' is 6, but token 6 occurs"):
        TokenStream([0, 1, 6] * 100, context=4, seed=0, vocab_size=6)


@pytest.mark.parametrize(("data", "error", "match"), [
    ("", ValueError, "each part needs more than 'context' = 4"),
    (torch.zeros(9, 9, dtype=torch.int64), ValueError, "one dimension"),
    (torch.zeros(99), TypeError, "must hold integers, not torch.float32"),
    ([-1, 2] * 99, ValueError, "tokens start at 0"),
])  # fmt: skip
def test_bad_tokens(data: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        TokenStream(data, context=4, seed=0)  # type: ignore[arg-type]


def test_bad_split_name() -> None:
    with pytest.raises(ValueError, match="'split' is 'test'; allowed: train, val"):
        TokenStream("ab" * 100, context=4, seed=0).batch(1, split="test")

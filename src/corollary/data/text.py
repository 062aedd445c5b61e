"""Text that is on every machine: the running Python's standard library, and a stream of bytes to train a language model on."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from corollary.data._checks import need_choice, need_count, need_fraction

# Not the library itself: other packages, test suites (partly broken on purpose), and code that Python only carries along.
_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__", "ensurepip"})


@cache
def stdlib_files() -> tuple[tuple[str, Path], ...]:
    """Every source file of the running Python's standard library but its tests: (relative posix name, path), by name."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not _SKIPPED.intersection(relative.parts[:-1]):
            found.append((relative.as_posix(), path))
    if not found:
        raise FileNotFoundError(f"no source of the standard library under {root}; this Python ships without it")
    return tuple(sorted(found))


def read_source(path: Path) -> str | None:
    """A source file's text, or None where it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None


@lru_cache(maxsize=4)
def stdlib_text(max_bytes: int = 2_000_000) -> str:
    """Source code of the running Python's standard library, as one text: over 10 MB of real code that is on every machine.

    Files come in the order of a hash of their names, so that a prefix mixes packages instead of ending at the letter ``a``;
    the order is the same everywhere, the text differs between versions of Python. Test suites are left out.

    Args:
        max_bytes: the text is cut at this many UTF-8 bytes (or up to three before, so as not to cut a character in two).

    Raises:
        FileNotFoundError: where this Python ships without its source.

    Example:
        >>> from corollary.data import stdlib_text
        >>> text = stdlib_text(10_000)
        >>> len(text.encode()), "def " in text
        (10000, True)
    """
    need_count("max_bytes", max_bytes)
    parts, length = [], 0
    for _, path in sorted(stdlib_files(), key=lambda item: hashlib.sha256(item[0].encode()).digest()):
        text = read_source(path)
        if text is None:
            continue
        parts.append(text.replace("\r\n", "\n").encode())
        length += len(parts[-1])
        if length >= max_bytes:
            break
    return b"".join(parts)[:max_bytes].decode("utf-8", errors="ignore")


class TokenStream:
    """Random windows out of one long row of tokens, for next-token prediction.

    A window starts anywhere in its part with equal probability; ``y`` is ``x`` moved on by one. The validation part is one
    contiguous stretch whose place ``seed`` decides, and no training window reaches into it.

    Args:
        text_or_tokens: a text or bytes (byte-level: 256 tokens), or token numbers as a one-dimensional integer tensor or
            sequence.
        context: tokens in a window.
        seed: decides which stretch is validation, and seeds the generator used where ``batch`` gets none.
        val_fraction: share of the validation part, in (0, 1).
        vocab_size: number of tokens; found from the data where it is not given (256 for text).

    Attributes:
        vocab_size: number of tokens.
        context: tokens in a window.

    Raises:
        TypeError: where the tokens are not integers.
        ValueError: where a part is too short for one window, or a token is out of range.

    Example:
        >>> import torch
        >>> from corollary.data import TokenStream
        >>> stream = TokenStream("to be or not to be, " * 20, context=8, seed=0)
        >>> x, y = stream.batch(4, torch.Generator().manual_seed(0))
        >>> x.shape, bool((x[:, 1:] == y[:, :-1]).all()), stream.vocab_size
        (torch.Size([4, 8]), True, 256)
    """

    def __init__(
        self,
        text_or_tokens: str | bytes | Tensor | Sequence[int],
        *,
        context: int,
        seed: int,
        val_fraction: float = 0.1,
        vocab_size: int | None = None,
    ) -> None:
        need_count("context", context)
        need_fraction("val_fraction", val_fraction)
        tokens, found = _as_tokens(text_or_tokens)
        if vocab_size is not None:
            need_count("vocab_size", vocab_size)
            if tokens.numel() and int(tokens.max()) >= vocab_size:
                raise ValueError(f"'vocab_size' is {vocab_size}, but token {int(tokens.max())} occurs")
        self.vocab_size = found if vocab_size is None else vocab_size
        self.context = context
        self.seed = seed
        n = tokens.numel()
        n_val = round(n * val_fraction)
        if n_val <= context or n - n_val <= context:
            raise ValueError(
                f"{n} tokens with val_fraction={val_fraction} leave {n - n_val} to train and {n_val} to validate; "
                f"each part needs more than 'context' = {context}"
            )
        self._generator = torch.Generator().manual_seed(seed)
        # The stretch may stand anywhere where what is left and right of it is empty or long enough for a window: otherwise
        # a short rest would belong to neither part.
        places = torch.arange(n - n_val + 1)
        left, right = places, n - n_val - places
        places = places[((left == 0) | (left > context)) & ((right == 0) | (right > context))]
        begin = int(places[int(torch.randint(len(places), (), generator=self._generator))])
        spans = {"train": [(0, begin), (begin + n_val, n)], "val": [(begin, begin + n_val)]}
        self._spans = {split: [(a, b) for a, b in parts if b - a > context] for split, parts in spans.items()}
        self.tokens = tokens

    def _parts(self, split: str) -> list[tuple[int, int]]:
        need_choice("split", split, tuple(self._spans))
        return self._spans[split]

    def batch(self, batch_size: int, generator: torch.Generator | None = None, split: str = "train") -> tuple[Tensor, Tensor]:
        """Random windows: inputs and next tokens, both (batch_size, context) int64.

        Args:
            batch_size: how many windows.
            generator: a CPU generator; without one the stream's own goes on from where it stood.
            split: ``train`` or ``val``.
        """
        need_count("batch_size", batch_size)
        parts = self._parts(split)
        drawn = torch.randint(
            sum(b - a - self.context for a, b in parts), (batch_size,), generator=generator or self._generator
        )
        starts = drawn + parts[0][0]
        for (_, end), (begin, _) in pairwise(parts):
            # Windows that would cross the gap belong behind it.
            starts = torch.where(starts >= end - self.context, starts - (end - self.context) + begin, starts)
        return self._windows(starts)

    def windows(self, split: str = "val", limit: int | None = None) -> tuple[Tensor, Tensor]:
        """The part cut into windows that do not overlap, in order, at most ``limit`` of them: for an exact evaluation."""
        step = self.context
        starts = torch.cat([torch.arange(a, b - step, step) for a, b in self._parts(split)])
        if limit is not None:
            need_count("limit", limit)
            starts = starts[:limit]
        return self._windows(starts)

    def _windows(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        window = self.tokens[starts[:, None] + torch.arange(self.context + 1)].to(torch.int64)
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def _as_tokens(data: str | bytes | Tensor | Sequence[int]) -> tuple[Tensor, int]:
    """Token numbers as a one-dimensional tensor, and how many different ones there may be."""
    if isinstance(data, str):
        data = data.encode()
    if isinstance(data, bytes):
        # A byte is kept as a byte; windows are widened when they are drawn.
        return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8), 256
    tokens = torch.as_tensor(data)
    if tokens.dim() != 1:
        raise ValueError(f"'text_or_tokens' must have one dimension, not shape {tuple(tokens.shape)}")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"'text_or_tokens' must hold integers, not {tokens.dtype}")
    if tokens.numel() and int(tokens.min()) < 0:
        raise ValueError(f"'text_or_tokens' holds {int(tokens.min())}; tokens start at 0")
    return tokens.cpu(), int(tokens.max()) + 1 if tokens.numel() else 0

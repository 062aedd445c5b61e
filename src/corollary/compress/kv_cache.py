"""A cache of keys and values that holds as many coordinates of each head as its rank, and not one more."""

from __future__ import annotations

import torch
from torch import Tensor


class MatryoshkaCache:
    r"""Coordinates of keys and values, of all heads side by side: layer l takes

    .. math:: \text{batch} \cdot \text{length} \cdot \Bigl(\sum_h r_{lh} + \sum_h s_{lh}\Bigr) \cdot \text{bytes of a number}

    and nothing is padded in it, whatever the ranks. Memory for ``max_cache_len`` tokens is taken once, so that a step writes one row.

    Args:
        ranks: int64 (layers, 2, heads), of keys and values; `kv_ranks` of the model.
        max_batch_size: rows at once.
        max_cache_len: tokens that it has room for.
        dtype, device: of the numbers.

    Raises:
        ValueError: ranks of another shape or below 0, no room, or more tokens than there is room for.

    When not to use it: for rows of very different lengths in one batch: room is that of the longest. While a layer is at work its
    coordinates are spread to the widest head's, (batch, heads, tokens, largest rank) for keys and for values.

    Example:
        >>> import torch
        >>> from corollary.compress import MatryoshkaCache
        >>> cache = MatryoshkaCache(torch.tensor([[[3, 1], [2, 2]]]), max_batch_size=1, max_cache_len=10)
        >>> cache.nbytes  # 10 tokens, 8 numbers of 4 bytes
        320
        >>> keys, values = cache.update(torch.ones(1, 2, 4, 8), torch.ones(1, 2, 4, 8), 0)
        >>> keys.shape, keys[0, :, 0].sum(-1), cache.get_seq_length()
        (torch.Size([1, 2, 4, 3]), tensor([3., 1.]), 4)

    Source: Lin et al., arXiv 2410.14731. The authors' cache is a list with a tensor for each head.
    """

    def __init__(
        self, ranks: Tensor, *, max_batch_size: int, max_cache_len: int, dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        if ranks.ndim != 3 or ranks.shape[1] != 2 or ranks.is_floating_point() or bool((ranks < 0).any()):
            raise ValueError(
                f"'ranks' must be whole numbers of at least 0 (layers, 2, heads), not {ranks.dtype} {tuple(ranks.shape)}"
            )
        if max_batch_size < 1 or max_cache_len < 1:
            raise ValueError(
                f"'max_batch_size' and 'max_cache_len' must be at least 1, not {max_batch_size} and {max_cache_len}"
            )
        self.ranks, self.max_cache_len = ranks.clone(), max_cache_len
        self._lengths = [0] * len(ranks)
        self._stores: list[list[Tensor]] = []
        self._places: list[list[tuple[Tensor, Tensor]]] = []
        for layer in ranks:
            self._stores.append(
                [torch.zeros(max_batch_size, max_cache_len, int(own.sum()), dtype=dtype, device=device) for own in layer]
            )
            self._places.append([_places(own, device) for own in layer])

    @property
    def nbytes(self) -> int:
        """Bytes that the cache has allocated."""
        return sum(store.untyped_storage().nbytes() for layer in self._stores for store in layer)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that a layer holds."""
        return self._lengths[layer_idx]

    def crop(self, max_length: int) -> None:
        """Forget the tokens behind the first ``max_length`` of every layer; the memory stays."""
        if max_length < 0:
            raise ValueError(f"'max_length' must be at least 0, not {max_length}")
        self._lengths = [min(length, max_length) for length in self._lengths]

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        self.crop(0)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Take in the coordinates of new tokens, and give those of all.

        Args:
            key_states, value_states: (batch, heads, tokens, d); of each head the coordinates up to its rank are kept.
            layer_idx: of the layer.

        Returns:
            Both for all tokens so far, (batch, heads, all tokens, largest rank), zero beyond a head's rank.
        """
        begin = self._lengths[layer_idx]
        end = begin + key_states.shape[2]
        store = self._stores[layer_idx][0]
        if end > self.max_cache_len or len(key_states) > len(store):
            raise ValueError(
                f"{len(key_states)} rows of {end} tokens do not fit: there is room for {len(store)} rows of {self.max_cache_len}"
            )
        found = []
        for new, packed, (heads, places) in zip(
            (key_states, value_states), self._stores[layer_idx], self._places[layer_idx], strict=True
        ):
            rows = packed[: len(new)]
            rows[:, begin:end] = new[:, heads, :, places].permute(1, 2, 0)
            # Spread: as wide as the widest head, zero beyond each head's own.
            widest = int(places.max()) + 1 if len(places) else 0
            wide = new.new_zeros(len(new), new.shape[1], end, widest)
            wide[:, heads, :, places] = rows[:, :end].permute(2, 0, 1)
            found.append(wide)
        self._lengths[layer_idx] = end
        keys, values = found
        return keys, values


def _places(ranks: Tensor, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    """Head and coordinate of each number of a row."""
    heads = torch.repeat_interleave(torch.arange(len(ranks)), ranks.cpu())
    starts = torch.cumsum(ranks.cpu(), 0) - ranks.cpu()
    places = torch.arange(len(heads)) - starts[heads]
    return heads.to(device), places.to(device)

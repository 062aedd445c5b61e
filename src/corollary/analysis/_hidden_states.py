"""What the measures of hidden states share: the check of their input, the normalization, the mean over a data set."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def check_hidden_states(
    hidden_states: Tensor, mask: Tensor | None, *, name: str = "hidden_states", allow_empty: bool = False
) -> Tensor | None:
    """Raise on what is no (..., L, d) floating tensor or no mask of it; gives the mask as bool."""
    if not isinstance(hidden_states, Tensor):
        raise TypeError(f"'{name}' is {type(hidden_states).__name__}; allowed: a torch.Tensor")
    if not hidden_states.is_floating_point():
        raise TypeError(f"'{name}' has dtype {hidden_states.dtype}; allowed: a floating dtype")
    shape = tuple(hidden_states.shape)
    if hidden_states.ndim < 2 or shape[-1] == 0 or (0 in shape and not allow_empty):
        raise ValueError(f"'{name}' has shape {shape}; allowed: (..., tokens, features) with at least one of each")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"'mask' is {kind}; allowed: a bool or integer torch.Tensor")
    if tuple(mask.shape) != shape[:-1]:
        raise ValueError(f"'mask' has shape {tuple(mask.shape)}; allowed: {shape[:-1]}, that of '{name}' without features")
    mask = mask.to(device=hidden_states.device, dtype=torch.bool)
    if not allow_empty and not bool(mask.any(-1).all()):
        raise ValueError("'mask' leaves a text without tokens; drop such texts first")
    return mask


def token_counts(hidden_states: Tensor, mask: Tensor | None) -> Tensor | int:
    """Tokens of each text, shape (...); one number where no mask says otherwise."""
    return hidden_states.shape[-2] if mask is None else mask.sum(-1)


def _means(states: Tensor, mask: Tensor | None) -> Tensor:
    return states.mean(-2) if mask is None else states.sum(-2) / mask.sum(-1, keepdim=True)


def center(hidden_states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Subtract each text's mean and divide each row by its length; padding and rows that equal the mean become zero.

    Returns:
        The normalized rows (..., L, d), float16 and bfloat16 as float32, and how many of them are not zero (...).
    """
    states = _clean(hidden_states, mask)
    mean = _means(states, mask)
    centered = states - mean.unsqueeze(-2)
    weights = _weights(centered.square().sum(-1), mean)
    if mask is not None:
        weights = weights * mask
    return centered * weights.sqrt().unsqueeze(-1), (weights != 0).sum(-1)


def column_squares(hidden_states: Tensor, mask: Tensor | None = None, mean: Tensor | None = None) -> Tensor:
    """Sums over rows of the squares of what `center` gives, (..., d), without ever holding the normalized rows."""
    states = _clean(hidden_states, mask)
    if mean is None:
        mean = _means(states, mask)
    length = states.shape[-2]
    step = length
    if states.device.type == "cpu":  # rows that stay in the cache between the passes over them: twice to four times as fast
        step = max(64, _CACHED * length // max(1, states.numel()))
    total: Tensor | None = None
    for start in range(0, length, step):
        centered = states[..., start : start + step, :] - mean.unsqueeze(-2)
        squares = centered.square() if centered.requires_grad else centered.square_()
        weights = _weights(squares.sum(-1), mean)
        if mask is not None:
            weights = weights * mask[..., start : start + step]
        part = (squares.mT @ weights.unsqueeze(-1)).squeeze(-1)
        total = part if total is None else total + part
    assert total is not None
    return total


_CACHED = 2**18  # elements


def _clean(hidden_states: Tensor, mask: Tensor | None) -> Tensor:
    states = hidden_states if hidden_states.dtype in (torch.float32, torch.float64) else hidden_states.float()
    return states if mask is None else states.masked_fill(~mask.unsqueeze(-1), 0)


def _weights(squared_lengths: Tensor, mean: Tensor) -> Tensor:
    # Equal rows differ from their own mean by rounding alone; blown up to unit length that rounding would look like content.
    # A NaN is not below the threshold, so it stays and reaches the result, where it is reported.
    rounding = (8 * torch.finfo(mean.dtype).eps) ** 2 * torch.linalg.vecdot(mean, mean).unsqueeze(-1)
    return torch.where(squared_lengths <= rounding, torch.inf, squared_lengths).reciprocal()


def check_result(result: Tensor, *, name: str = "hidden_states") -> Tensor:
    """The result itself; raises where it is not finite, which only NaN, infinity or overflow in the input can bring about."""
    if not math.isfinite(float(result.detach().sum())):
        raise ValueError(f"'{name}' holds NaN, infinity or values that overflow {result.dtype}; allowed: finite values")
    return result


class MeanOverTexts(nn.Module):
    """Mean and standard error of a score of each text, in memory that does not grow with the texts."""

    texts: Tensor
    tokens: Tensor
    skipped: Tensor
    mean: Tensor
    scatter: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("texts", "tokens", "skipped"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        for name in ("mean", "scatter"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    def score(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def update(self, hidden_states: Tensor, mask: Tensor | None = None) -> None:
        """Add one text (L, d) or a batch (..., L, d) with its mask (..., L); texts of fewer than two tokens are skipped."""
        mask = check_hidden_states(hidden_states, mask, allow_empty=True)
        if mask is None:
            mask = torch.ones(hidden_states.shape[:-1], dtype=torch.bool, device=hidden_states.device)
        mask = mask.flatten(end_dim=-2) if mask.ndim > 1 else mask.unsqueeze(0)
        counts = mask.sum(-1)
        kept = counts > 1
        self.skipped += (~kept).sum().to(self.skipped.device)
        if not bool(kept.any()):
            return
        states = hidden_states.reshape(-1, *hidden_states.shape[-2:])
        if not bool(kept.all()):
            states, mask, counts = states[kept], mask[kept], counts[kept]
        scores = self.score(states, mask).to(self.mean)
        number = torch.full_like(self.texts, scores.numel())
        mean = scores.mean()
        self._add(number, counts.sum().to(self.tokens), mean, (scores - mean).square().sum())

    def _add(self, texts: Tensor, tokens: Tensor, mean: Tensor, scatter: Tensor) -> None:
        # Chan's pairwise update: exact for any split of the texts, and free of the cancellation of a sum of squares.
        total = self.texts + texts
        shift = mean - self.mean
        self.mean += shift * texts / total
        self.scatter += scatter + shift.square() * self.texts * texts / total
        self.texts.copy_(total)
        self.tokens += tokens

    def compute(self) -> Tensor:
        """The mean score over the texts so far, a float64 scalar; raises ``ValueError`` before the first text."""
        if not int(self.texts):
            raise ValueError(f"no text of two or more tokens was given yet ({int(self.skipped)} shorter ones were skipped)")
        return self.mean.clone()

    def standard_error(self) -> Tensor:
        """Standard error of the mean over texts; NaN for a single text."""
        return (self.scatter / (self.texts - 1) / self.texts).sqrt()

    def reset(self) -> None:
        """Forget every text."""
        for buffer in self.buffers():
            buffer.zero_()

    @torch.no_grad()
    def merge(self, other: MeanOverTexts) -> None:
        """Add the texts that another metric of this class has seen, on another process or shard for example."""
        if type(other) is not type(self):
            raise TypeError(f"'other' is {type(other).__name__}; allowed: {type(self).__name__}")
        self.skipped += other.skipped.to(self.skipped)
        if int(other.texts):
            self._add(*(getattr(other, n).to(getattr(self, n)) for n in ("texts", "tokens", "mean", "scatter")))

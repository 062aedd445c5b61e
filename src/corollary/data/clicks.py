"""A log of clicks with known effects and power-law ids: what a click-through model should find, and what it cannot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from corollary.data._checks import need_count, need_fraction

FIELD_SIZES = (20_000, 10_000, 5_000, 2_000, 1_000, 500, 200, 100, 50, 20)


@dataclass(frozen=True)
class ClickLog:
    """Rows of a log; made by `click_log`.

    Args:
        ids: (rows, fields), int64; column f counts from 0 to ``field_sizes[f] - 1``, frequent ids first.
        clicks: (rows,), float32, 0 or 1.
        logits: (rows,), float32: the true log-odds, whose AUC no model can beat except by luck.
        main: each field's effects of its ids alone, (size,).
        factors: each field's latent factors, (size, latent).
        intercept: added to every row's effects.
    """

    ids: Tensor
    clicks: Tensor
    logits: Tensor
    main: tuple[Tensor, ...]
    factors: tuple[Tensor, ...]
    intercept: float

    @property
    def field_sizes(self) -> tuple[int, ...]:
        """How many ids each field has."""
        return tuple(len(effects) for effects in self.main)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> ClickLog:
        """The log of these rows; they come in random order, so that the first and the last are alike."""
        return replace(self, ids=self.ids[rows], clicks=self.clicks[rows], logits=self.logits[rows])


def click_log(
    rows: int = 240_000,
    field_sizes: Sequence[int] = FIELD_SIZES,
    *,
    latent: int = 4,
    decay: float = 0.0,
    exponent: float = 1.0,
    rate: float = 0.2,
    main: float = 0.7,
    interaction: float = 1.0,
    generator: torch.Generator | None = None,
) -> ClickLog:
    r"""Draw a log of clicks from a factorization machine with known parameters.

    Field f shows id i with probability :math:`\propto (i+1)^{-s}`, and a row with ids :math:`i_1, \dots, i_F` is clicked with log-odds

    .. math:: b + \frac{\sigma_1}{\sqrt F} \sum_f w_{f,i_f}
        + \frac{\sigma_2}{\sqrt{c F (F-1) / 2}} \sum_{f<g} \langle u_{f,i_f}, u_{g,i_g} \rangle,
        \qquad c = \sum_{k=1}^r k^{-2d},

    all w being standard normal and the r coordinates of u normal with variances :math:`k^{-d}`: the two sums have standard deviations
    of about :math:`\sigma_1` and :math:`\sigma_2`.

    Args:
        rows: how many.
        field_sizes: ids in each field.
        latent: r.
        decay: d; 0 makes all coordinates alike, and 1 gives a spectrum that falls as those of trained embeddings do.
        exponent: s of the power law; 0 shows all ids alike.
        rate: share of rows that are clicked, in (0, 1), which b is chosen for.
        main: :math:`\sigma_1`.
        interaction: :math:`\sigma_2`.
        generator: a CPU generator; without one torch's global one is used.

    Raises:
        TypeError, ValueError: a count below 1, fewer than two fields, a rate outside (0, 1), a negative size of effects.

    Example:
        >>> log = click_log(1000, (50, 20, 5), generator=torch.Generator().manual_seed(0))
        >>> log.ids.shape, bool(log.clicks.mean() < 0.3), int(log.ids[:, 0].mode().values)
        (torch.Size([1000, 3]), True, 0)
    """
    need_count("rows", rows)
    need_count("latent", latent)
    for i, size in enumerate(field_sizes):
        need_count(f"field_sizes[{i}]", size)
    fields = len(field_sizes)
    if fields < 2:
        raise ValueError(f"'field_sizes' has {fields} fields; allowed: at least 2, since effects are between fields")
    need_fraction("rate", rate)
    for name, value in {"decay": decay, "main": main, "interaction": interaction, "exponent": exponent}.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"'{name}' must be at least 0 and finite, not {value!r}")

    alone = [torch.randn(size, generator=generator) * (main / math.sqrt(fields)) for size in field_sizes]
    sizes = torch.arange(1.0, latent + 1).pow(-decay / 2)
    sizes *= math.sqrt(interaction) / (float(sizes.pow(4).sum()) * fields * (fields - 1) / 2) ** 0.25
    factors = [torch.randn(size, latent, generator=generator) * sizes for size in field_sizes]
    columns = []
    logits = torch.zeros(rows)
    total, squares = torch.zeros(rows, latent), torch.zeros(rows, latent)
    for effects, factor in zip(alone, factors, strict=True):
        shares = torch.arange(1, len(effects) + 1, dtype=torch.float64).pow(-exponent).cumsum(0)
        drawn = torch.rand(rows, generator=generator, dtype=torch.float64) * shares[-1]
        column = torch.searchsorted(shares, drawn, right=True).clamp_max(len(effects) - 1)
        logits += effects[column]
        chosen = factor[column]
        total += chosen
        squares += chosen.square()
        columns.append(column)
    logits += (total.square() - squares).sum(1) / 2  # the sum over pairs, in time linear in the fields
    low, high = -50.0, 50.0
    for _ in range(60):  # the rate rises with b
        b = (low + high) / 2
        low, high = (b, high) if float(torch.sigmoid(logits.double() + b).mean()) < rate else (low, b)
    logits += b
    clicks = (torch.rand(rows, generator=generator) < torch.sigmoid(logits)).float()
    return ClickLog(torch.stack(columns, 1), clicks, logits, tuple(alone), tuple(factors), b)

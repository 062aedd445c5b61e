"""Which rank each layer gets: one budget for all, spent where it takes off the most error."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Allocation:
    """What `allocate_ranks` chose.

    Attributes:
        ranks: one a layer; None keeps the layer dense.
        cost: what they cost together, in the units of the costs.
        error: what they leave together, in the units of the errors.
    """

    ranks: tuple[int | None, ...]
    cost: float
    error: float


def allocate_ranks(
    errors: Sequence[Tensor],
    costs: Sequence[float],
    dense: Sequence[float],
    budget: float,
    *,
    minimum: int = 1,
    multiple_of: int = 1,
) -> Allocation:
    r"""Ranks of the least total error within a budget.

    Layer l of rank r costs :math:`c_l r` and errs by :math:`e_l(r)`, which is convex in r where it sums left-out eigenvalues; left
    dense it costs :math:`d_l` and errs by nothing, so a rank at or above :math:`d_l / c_l` is never taken. For every price μ of a unit
    of budget the choice

    .. math:: \min_r\; e_l(r) + \mu\, c_l r

    is that of the least total error among all that cost no more (Lagrangian duality). Those choices are the corners of each layer's
    lower convex hull of (cost, error), and are walked here from cheap to dear by the largest fall of error a unit of cost. Where the
    next corner does not fit any more, what is left is spent by single steps of rank, again by the largest fall for its cost.

    Args:
        errors: of each layer, the errors of rank 0, 1, ..., shape (k + 1,), falling.
        costs: of each layer, what a rank costs.
        dense: of each layer, what it costs unfactored.
        budget: what may be spent; less than the least ranks cost gives the least ranks' ``ValueError``.
        minimum: least rank; layers with fewer ranks get what they have.
        multiple_of: ranks are multiples of this, or k; kernels like multiples of 8 or more.

    Returns:
        An `Allocation`. Its error is the least possible for its own cost wherever the single steps were not needed, and never more
        than one layer's step away from it.

    Raises:
        ValueError: for lists of different length, or a budget too small.

    Example:
        >>> import torch
        >>> allocate_ranks([torch.tensor([9.0, 1.0, 0.0]), torch.tensor([3.0, 2.0, 0.0])], [4, 4], [10, 10], 14).ranks
        (1, None)
    """
    if not len(errors) == len(costs) == len(dense):
        raise ValueError(f"'errors', 'costs' and 'dense' must be of one length, not {len(errors)}, {len(costs)}, {len(dense)}")
    if minimum < 1 or multiple_of < 1:
        raise ValueError(f"'minimum' and 'multiple_of' must be at least 1, not {minimum} and {multiple_of}")
    menus = [_menu(e, c, d, minimum, multiple_of) for e, c, d in zip(errors, costs, dense, strict=True)]
    least = sum(menu[0][0] for menu in menus)
    if least > budget * (1 + 1e-12):
        raise ValueError(f"'budget' is {budget:g}, and the least ranks cost {least:g}")
    hulls = [_hull(menu) for menu in menus]
    place = [0] * len(menus)
    left = budget - least
    queue = [(-_fall(menus[i], hull[0], hull[1]), i, 1) for i, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(queue)
    while queue:
        _, i, corner = heapq.heappop(queue)
        step = menus[i][hulls[i][corner]][0] - menus[i][place[i]][0]
        if step > left * (1 + 1e-12):
            break
        place[i], left = hulls[i][corner], left - step
        if corner + 1 < len(hulls[i]):
            heapq.heappush(queue, (-_fall(menus[i], hulls[i][corner], hulls[i][corner + 1]), i, corner + 1))
    _spend(menus, place, left)
    chosen = [menu[at] for menu, at in zip(menus, place, strict=True)]
    return Allocation(tuple(r for _, _, r in chosen), sum(c for c, _, _ in chosen), sum(e for _, e, _ in chosen))


Menu = list[tuple[float, float, int | None]]
"""(cost, error, rank) of each choice of a layer, cost rising and error falling; rank None is the layer left dense"""


def _menu(errors: Tensor, cost: float, dense: float, minimum: int, multiple_of: int) -> Menu:
    values = errors.tolist()
    most = len(values) - 1
    ranks = sorted({r for r in range(multiple_of, most + 1, multiple_of) if r >= minimum} | {most})
    menu: Menu = [(cost * r, values[r], r) for r in ranks if cost * r < dense]
    return [*menu, (dense, 0.0, None)]


def _fall(menu: Menu, start: int, end: int) -> float:
    return (menu[start][1] - menu[end][1]) / (menu[end][0] - menu[start][0])


def _hull(menu: Menu) -> list[int]:
    """Places of the lower convex hull: falls of error for cost that only get smaller."""
    hull: list[int] = []
    for place in range(len(menu)):
        while len(hull) > 1 and _fall(menu, hull[-2], hull[-1]) <= _fall(menu, hull[-1], place):
            hull.pop()
        hull.append(place)
    return hull


def _spend(menus: list[Menu], place: list[int], left: float) -> None:
    """Single steps while one fits: what the hull's next corner was too dear for."""
    queue: list[tuple[float, int]] = []

    def offer(i: int) -> None:
        at = place[i]
        if at + 1 < len(menus[i]) and menus[i][at + 1][0] - menus[i][at][0] <= left * (1 + 1e-12):
            heapq.heappush(queue, (-_fall(menus[i], at, at + 1), i))

    for i in range(len(menus)):
        offer(i)
    while queue:
        _, i = heapq.heappop(queue)
        step = menus[i][place[i] + 1][0] - menus[i][place[i]][0]
        if step <= left * (1 + 1e-12):
            place[i], left = place[i] + 1, left - step
            offer(i)


def uniform_ranks(costs: Sequence[float], dense: Sequence[float], ratio: float, *, multiple_of: int = 1) -> Allocation:
    """Ranks that keep the same share of every layer's cost: what papers do that choose no ranks.

    Args:
        costs, dense: as in `allocate_ranks`.
        ratio: the share of each layer's dense cost to keep, in (0, 1]; 1 leaves a layer dense.
        multiple_of: ranks are rounded down to a multiple of this.

    Raises:
        ValueError: where the least rank costs more than its layer may.

    Example:
        >>> uniform_ranks([20, 20], [100, 100], 0.5).ranks
        (2, 2)
    """
    for c, d in zip(costs, dense, strict=True):
        if ratio < 1 and c * multiple_of > ratio * d * (1 + 1e-12):
            raise ValueError(
                f"'ratio' {ratio} of a layer's {d:g} is {ratio * d:g}, and rank {multiple_of} costs {c * multiple_of:g}"
            )
    ranks = [
        None if ratio >= 1 else int(ratio * d / c * (1 + 1e-12)) // multiple_of * multiple_of
        for c, d in zip(costs, dense, strict=True)
    ]
    cost = sum(d if r is None else c * r for r, c, d in zip(ranks, costs, dense, strict=True))
    return Allocation(tuple(ranks), cost, float("nan"))

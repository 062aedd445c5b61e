"""Ranks under a budget against brute force over every combination."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from corollary.compress import allocate_ranks, uniform_ranks

ENERGIES = st.lists(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=4), min_size=1, max_size=3)


def tails(energy: list[float]) -> Tensor:
    falling = sorted(energy, reverse=True)
    return torch.tensor([sum(falling[r:]) for r in range(len(falling) + 1)], dtype=torch.float64)


def brute(errors: list[Tensor], costs: list[float], dense: list[float], budget: float) -> float:
    """The least total error of any combination within the budget."""
    menus = [
        [(c * r, float(e[r])) for r in range(1, len(e)) if c * r < d] + [(d, 0.0)]
        for e, c, d in zip(errors, costs, dense, strict=True)
    ]
    return min(sum(e for _, e in pick) for pick in product(*menus) if sum(c for c, _ in pick) <= budget * (1 + 1e-9))


@settings(max_examples=150, deadline=None)
@given(ENERGIES, st.integers(0, 1000), st.floats(0.2, 1.0))
def test_no_combination_of_that_cost_is_better(energies: list[list[float]], seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    errors = [tails(e) for e in energies]
    costs = torch.randint(2, 6, (len(errors),), generator=generator).tolist()
    dense = torch.randint(3, 14, (len(errors),), generator=generator).tolist()
    budget = share * sum(dense)
    least = sum(min(c, d) for c, d in zip(costs, dense, strict=True))
    if least > budget:
        with pytest.raises(ValueError, match="least ranks"):
            allocate_ranks(errors, costs, dense, budget)
        return
    found = allocate_ranks(errors, costs, dense, budget)
    assert found.cost <= budget * (1 + 1e-9)
    # Within one step of the optimum for the whole budget: no layer's largest single fall of error is more than the gap.
    step = max(float(e[0]) for e in errors)
    assert brute(errors, costs, dense, budget) - 1e-9 <= found.error <= brute(errors, costs, dense, budget) + step + 1e-9


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4), min_size=2, max_size=3), st.integers(2, 11))
def test_exact_where_a_step_costs_the_same_everywhere(energies: list[list[float]], budget: int) -> None:
    errors = [tails(e) for e in energies]
    costs, dense = [1.0] * len(errors), [100.0] * len(errors)
    if budget < len(errors):
        return
    found = allocate_ranks(errors, costs, dense, budget)
    assert found.error == pytest.approx(brute(errors, costs, dense, budget), abs=1e-9)
    assert found.cost == sum(r or 0 for r in found.ranks)


def test_a_layer_that_must_not_lose_stays_dense() -> None:
    flat, steep = torch.linspace(10, 0, 11), torch.tensor([10.0, 0.1, 0.0])
    found = allocate_ranks([flat, steep], [4.0, 4.0], [20.0, 20.0], 24.0)
    assert found.ranks == (None, 1)


def test_multiples_and_minimum() -> None:
    errors = torch.linspace(10, 0, 11)
    assert allocate_ranks([errors], [1.0], [100.0], 7.0, multiple_of=4).ranks == (4,)
    assert allocate_ranks([errors], [1.0], [100.0], 7.0, minimum=5).ranks == (7,)
    assert allocate_ranks([errors], [1.0], [100.0], 100.0, multiple_of=4).ranks in ((10,), (None,))
    with pytest.raises(ValueError, match="at least 1"):
        allocate_ranks([errors], [1.0], [100.0], 7.0, multiple_of=0)
    with pytest.raises(ValueError, match="one length"):
        allocate_ranks([errors], [1.0], [], 7.0)


def test_uniform() -> None:
    found = uniform_ranks([20, 10], [100, 200], 0.5, multiple_of=2)
    assert found.ranks == (2, 10)
    assert found.cost == 140
    assert uniform_ranks([20], [100], 1.0).ranks == (None,)

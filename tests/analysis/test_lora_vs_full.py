"""Intruder dimensions against a naive loop over full decompositions, planted truths, and the authors' steps."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from corollary.analysis import IntruderReport, intruder_dimensions
from corollary.analysis._streamed import Blocks
from corollary.analysis.lora_vs_full import leading_similarity, similarity
from corollary.models import GPT


def naive(base: Tensor, tuned: Tensor, k: int, epsilon: float) -> tuple[int, list[float]]:
    """The definition, one product at a time, on numpy's full decompositions."""
    left_0 = np.linalg.svd(base.double().numpy().reshape(base.shape[0], -1), full_matrices=False)[0]
    left = np.linalg.svd(tuned.double().numpy().reshape(base.shape[0], -1), full_matrices=False)[0]
    largest = []
    for j in range(min(k, left.shape[1])):
        cosines = []
        for i in range(left_0.shape[1]):
            product = sum(float(a) * float(b) for a, b in zip(left[:, j], left_0[:, i], strict=True))
            norms = math.sqrt(float((left[:, j] ** 2).sum())) * math.sqrt(float((left_0[:, i] ** 2).sum()))
            cosines.append(abs(product / norms))
        largest.append(max(cosines))
    return sum(c < epsilon for c in largest), largest


@given(
    rows=st.integers(2, 24),
    columns=st.integers(2, 24),
    size=st.floats(0.05, 3.0),
    k=st.integers(1, 12),
    epsilon=st.floats(0.2, 0.95),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_definition(rows: int, columns: int, size: float, k: int, epsilon: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    tuned = base + size * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    count, largest = naive(base, tuned, k, epsilon)
    report = intruder_dimensions(base, tuned, k=k, epsilon=epsilon)
    assert report.matrices[0].similarity == pytest.approx(largest, abs=1e-5)
    if all(abs(c - epsilon) > 1e-4 for c in largest):
        assert report.total == count


def test_equals_the_authors_steps_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(96, 160, generator=generator)
    tuned = base + torch.randn(96, 5, generator=generator) @ torch.randn(5, 160, generator=generator)
    u_base, u_tuned = (torch.linalg.svd(w, full_matrices=False)[0] for w in (base, tuned))
    products = (u_tuned.T @ u_base).abs().max(dim=1)[0][:10]
    report = intruder_dimensions(base, tuned)
    assert report.total == int((products < 0.5).sum())
    assert report.matrices[0].similarity == pytest.approx(products.tolist(), abs=1e-3)


@pytest.mark.parametrize("shape", [(64, 64), (64, 200), (200, 64), (2000, 64)])
def test_planted_directions(shape: tuple[int, int]) -> None:
    """Singular values that change bring none; r strong new directions bring r, and weak ones none."""
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        u, s, vh = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
        base = (u * torch.linspace(3, 1, len(s))) @ vh
        scaled = (u * torch.linspace(1, 3, len(s))) @ vh  # in reversed order
        assert intruder_dimensions(base, scaled).total == 0
        assert intruder_dimensions(base, -base).total == 0
        for r in (1, 3):
            new = [torch.linalg.qr(torch.randn(n, r, generator=generator, dtype=torch.float64)).Q for n in shape]
            assert intruder_dimensions(base, scaled + 10 * new[0] @ new[1].T).total == r
            assert intruder_dimensions(base, base + 1e-3 * new[0] @ new[1].T).total == 0


def test_scale_and_rotation_of_inputs_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40, 60, generator=generator, dtype=torch.float64)
    tuned = base + 0.5 * torch.randn(40, 60, generator=generator, dtype=torch.float64)
    true = intruder_dimensions(base, tuned).matrices[0].similarity
    turn = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64)).Q
    turn_out = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64)).Q
    for ours in ((base * 7, tuned * 1e-6), (base @ turn, tuned @ turn), (turn_out @ base, turn_out @ tuned)):
        assert intruder_dimensions(*ours).matrices[0].similarity == pytest.approx(true, abs=1e-6)


def test_base_of_low_rank() -> None:
    """Vectors of singular value zero are no reference: they could be any."""
    base = torch.diag(torch.tensor([3.0, 2.0, 0.0, 0.0]))
    tuned = torch.diag(torch.tensor([3.0, 2.0, 5.0, 0.0]))
    report = intruder_dimensions(base, tuned)
    assert report.total == 1
    assert len(report.matrices[0].similarity) == 3
    assert intruder_dimensions(torch.zeros(4, 4), tuned).total == 3
    assert intruder_dimensions(tuned, torch.zeros(4, 4)).total == 0


def test_leading_reference_bounds_the_count_from_above() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((80, 120), (120, 80)):
        base = torch.randn(shape, generator=generator)
        tuned = base + 0.6 * torch.randn(shape, generator=generator)
        whole = similarity(Blocks(base), Blocks(tuned), 10)
        part = leading_similarity(Blocks(base), Blocks(tuned), 10, 60, generator)
        assert part.singular_values == pytest.approx(whole.singular_values, rel=1e-3)
        assert sum(c < 0.5 for c in part.similarity) >= sum(c < 0.5 for c in whole.similarity)


def test_modules_mappings_and_pairs() -> None:
    torch.manual_seed(0)
    base, tuned = GPT(32, dim=32, depth=1, heads=2, context=8), GPT(32, dim=32, depth=1, heads=2, context=8)
    report = intruder_dimensions(base, tuned, k=3)
    names = [name for name, p in base.named_parameters() if p.dim() == 2]
    assert [m.name for m in report.matrices] == names
    assert report.total == sum(m.count for m in report.matrices)
    assert report.mean == report.total / len(names)
    again = intruder_dimensions(base.state_dict(), iter(tuned.state_dict().items()), k=3)
    assert again == report
    kernels = intruder_dimensions(nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3))
    assert kernels.matrices[0].shape == (8, 27)
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["total"] == report.total
    assert isinstance(report, IntruderReport)


def test_bad_input() -> None:
    w = torch.randn(4, 4)
    for bad in ({"k": 0}, {"k": 2.5}, {"k": True}, {"epsilon": 0}, {"epsilon": 1.1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            intruder_dimensions(w, w, **bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shape"):
        intruder_dimensions(w, torch.randn(4, 5))
    with pytest.raises(ValueError, match="NaN"):
        intruder_dimensions(w, w * torch.nan)
    with pytest.raises(ValueError, match="no matrices"):
        intruder_dimensions({"a": w}, {"b": w})
    with pytest.raises(ValueError, match="no matrices"):
        intruder_dimensions(torch.ones(3), torch.ones(3))
    with pytest.raises(TypeError, match="floating"):
        intruder_dimensions(torch.ones(3, 3).int(), torch.ones(3, 3).int())
    with pytest.raises(TypeError, match="'base'"):
        intruder_dimensions(3, w)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="'tuned'"):
        intruder_dimensions(w, 3)  # type: ignore[arg-type]

"""Quantizers and packed layers against loops over entries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from corollary.compress import PackedLinear, gptq, round_to_nearest, two_four, two_four_mask


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grid(part: list[float], bits: int) -> tuple[float, int]:
    top = 2**bits - 1
    low, high = min(0.0, *part), max(0.0, *part)
    step = (high - low) / top or 1.0
    return step, min(max(round(-low / step), 0), top)


def level(value: float, step: float, zero: int, bits: int) -> float:
    return step * (min(max(round(value / step) + zero, 0), 2**bits - 1) - zero)


def naive_nearest(weight: Tensor, bits: int, group: int) -> Tensor:
    out = []
    for row in weight.tolist():
        found: list[float] = []
        for begin in range(0, len(row), group):
            part = row[begin : begin + group]
            step, zero = grid(part, bits)
            found += [level(v, step, zero, bits) for v in part]
        out.append(found)
    return torch.tensor(out, dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 11), st.sampled_from([4, 8]), st.integers(1, 6), st.integers(0, 999))
def test_nearest(m: int, n: int, bits: int, group: int, seed: int) -> None:
    weight = draw(m, n, seed=seed)
    torch.testing.assert_close(round_to_nearest(weight, bits, group), naive_nearest(weight, bits, group), atol=1e-12, rtol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.booleans(), st.integers(0, 999))
def test_two_of_four(m: int, quads: int, scaled: bool, seed: int) -> None:
    weight = draw(m, 4 * quads, seed=seed)
    scale = draw(4 * quads, seed=seed + 1).abs() if scaled else None
    mask = two_four_mask(weight, scale)
    for i, row in enumerate(weight.tolist()):
        for q in range(quads):
            sizes = [abs(row[4 * q + k]) * (1 if scale is None else float(scale[4 * q + k])) for k in range(4)]
            kept = sorted(range(4), key=lambda k: (-sizes[k], k))[:2]
            assert [k for k in range(4) if mask[i, 4 * q + k]] == sorted(kept)
    assert torch.equal(two_four(weight, scale), weight * mask)


def naive_gptq(weight: Tensor, moment: Tensor, bits: int, group: int, damping: float) -> np.ndarray:
    """Every row by itself, the inverse Hessian shrunk by elimination after each column: the optimal-brain-surgeon form."""
    w, h = weight.numpy().copy(), moment.numpy().copy()
    n = w.shape[1]
    h += damping * np.mean(np.diag(h)) * np.eye(n)
    out = np.empty_like(w)
    for i in range(len(w)):
        inverse = np.linalg.inv(h)
        row = w[i].copy()
        for j in range(n):
            if j % group == 0:
                step, zero = grid(row[j : j + group].tolist(), bits)
            out[i, j] = level(row[j], step, zero, bits)
            row = row - (row[j] - out[i, j]) / inverse[j, j] * inverse[j]
            inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
            inverse[j, j] = 1.0
    return out


@pytest.mark.parametrize(("n", "group", "bits"), [(8, 8, 4), (8, 3, 4), (6, 4, 8), (5, 2, 4)])
def test_gptq(n: int, group: int, bits: int) -> None:
    weight, x = draw(4, n), draw(40, n, seed=1) @ draw(n, n, seed=2)
    moment = x.T @ x / 40
    ours = gptq(weight, moment, bits, group)
    np.testing.assert_allclose(ours.numpy(), naive_gptq(weight, moment, bits, group, 0.01), atol=1e-9)


def test_gptq_with_uncorrelated_inputs_is_rounding() -> None:
    weight = draw(4, 8)
    torch.testing.assert_close(gptq(weight, torch.eye(8, dtype=torch.float64), 4, 4), round_to_nearest(weight, 4, 4))


@pytest.mark.parametrize("bits", [4, 8, None])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("n", [12, 20])
def test_packed(bits: int | None, sparse: bool, n: int) -> None:
    if bits is None and not sparse:
        return
    weight = draw(5, n)
    layer = PackedLinear(n, 5, bits=bits, group_size=4, sparse=sparse, bias=True, dtype=torch.float64).pack(weight)
    true = two_four(weight) if sparse else weight
    if bits is not None:
        if sparse:  # the groups are of what is kept
            mask = two_four_mask(weight)
            kept = naive_nearest(weight[mask].view(5, -1), bits, 4)
            true = torch.zeros_like(weight).masked_scatter(mask, kept)
        else:
            true = naive_nearest(weight, bits, 4)
    torch.testing.assert_close(layer.dense(), true, atol=1e-12, rtol=0)
    x = draw(3, n, seed=1)
    torch.testing.assert_close(layer(x), x @ true.T + layer.bias)
    kept_columns = n // 2 if sparse else n
    groups = -(-kept_columns // 4)
    bytes_ = 5 * 8  # the bias
    bytes_ += 5 * kept_columns * 8 if bits is None else -(-5 * groups * 4 * bits // 8) + 5 * groups * 9
    bytes_ += -(-5 * n // 4 // 2) if sparse else 0
    assert sum(t.nbytes for t in (*layer.parameters(), *layer.buffers())) == bytes_


def test_packed_with_gptq_keeps_its_values() -> None:
    weight, x = draw(6, 8), draw(50, 8, seed=1) @ draw(8, 8, seed=2)
    moment = x.T @ x / 50
    layer = PackedLinear(8, 6, bits=4, group_size=4, dtype=torch.float64).pack(weight, inputs=moment)
    torch.testing.assert_close(layer.dense(), gptq(weight, moment, 4, 4))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: round_to_nearest(torch.ones(2, 2, dtype=torch.int64)), TypeError, "int64"),
        (lambda: round_to_nearest(torch.ones(2)), ValueError, r"\(2,\)"),
        (lambda: round_to_nearest(torch.ones(2, 2), bits=3), ValueError, "3"),
        (lambda: round_to_nearest(torch.full((2, 2), torch.nan)), ValueError, "finite"),
        (lambda: two_four(torch.ones(2, 6)), ValueError, "6"),
        (lambda: two_four(torch.ones(2, 4), torch.ones(2)), ValueError, r"\(4,\)"),
        (lambda: gptq(torch.ones(2, 4), torch.eye(3)), ValueError, r"\(4, 4\)"),
        (lambda: gptq(torch.ones(2, 4), -torch.eye(4)), ValueError, "positive definite"),
        (lambda: gptq(torch.ones(2, 4), torch.eye(4), bits=5), ValueError, "5"),
        (lambda: PackedLinear(6, 2, sparse=True), ValueError, "6"),
    ],
)
def test_bad_input(call, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()

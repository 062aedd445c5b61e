import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corollary.linalg import Quantized, dequantize, quantize


def naive(values, bits, group):
    """Group by group and entry by entry, in Python's own numbers."""
    top, out = 2**bits - 1, []
    for begin in range(0, len(values), group):
        part = values[begin : begin + group]
        low, high = min(0.0, *part), max(0.0, *part)
        step = (high - low) / top or 1.0
        zero = min(max(round(-low / step), 0), top)
        out += [step * (min(max(round(v / step) + zero, 0), top) - zero) for v in part]
    return out


@given(n=st.integers(1, 40), bits=st.sampled_from([4, 8]), group=st.integers(1, 16), seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_equals_the_loop(n, bits, group, seed):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    back = dequantize(quantize(x, bits, group_size=group), (n,), bits, group_size=group)
    assert (back - torch.tensor(naive(x.tolist(), bits, group), dtype=torch.float64)).abs().max() < 1e-12


@given(rows=st.integers(1, 9), cols=st.integers(1, 9), bits=st.sampled_from([4, 8]), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_error_is_at_most_a_step(rows, cols, bits, seed):
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    stored = quantize(x, bits, group_size=7)
    back = dequantize(stored, x.shape, bits, group_size=7)
    assert back.shape == x.shape
    # Half a step of rounding, and half a step more at the ends, where the rounded zero point clips.
    steps = stored.scale.repeat_interleave(7)[: x.numel()].view_as(x)
    assert ((back - x).abs() <= 1.001 * steps).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_are_what_is_promised(bits):
    x = torch.randn(33, 31)
    stored = quantize(x, bits, group_size=256)
    groups = math.ceil(x.numel() / 256)
    assert stored.codes.dtype == stored.zero.dtype == torch.uint8
    assert stored.codes.nbytes == math.ceil(x.numel() * bits / 8)
    assert stored.scale.nbytes == 4 * groups
    assert stored.zero.nbytes == groups


def test_stochastic_rounding_is_unbiased_inside_the_range():
    """Each entry's mean over draws is the entry: within 5 standard errors of a rounding step's, for 200 entries."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(200, generator=generator) - 0.5
    x[0], x[1] = -1.0, 1.0  # the ends, where a group clips, are not among those looked at
    stored = [quantize(x, 4, stochastic=True, generator=generator) for _ in range(4000)]
    mean = torch.stack([dequantize(s, x.shape, 4) for s in stored]).double().mean(0)
    step = float(stored[0].scale)
    assert (mean - x)[2:].abs().max() < 5 * step / 2 / 4000**0.5


def test_nearest_rounding_loses_what_stochastic_keeps():
    generator = torch.Generator().manual_seed(0)
    weight = torch.tensor([-1.0, 0.5, 1.0])
    ends = []
    for stochastic in (False, True):
        value = weight.clone()
        for _ in range(200):
            value[1] += 0.001  # far below a step of 2/255
            value = dequantize(quantize(value, 8, stochastic=stochastic, generator=generator), (3,))
        ends.append(float(value[1]))
    assert abs(ends[0] - 0.5) < 0.01, "nearest moved"
    assert abs(ends[1] - 0.7) < 0.1, "stochastic did not move as it should"


def test_zeros_and_constants_come_back():
    for value in (0.0, 3.0, -2.0):
        x = torch.full((5,), value)
        assert torch.allclose(dequantize(quantize(x), (5,)), x, rtol=1e-3)


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="'x' must be a floating"):
        quantize(torch.arange(3))
    with pytest.raises(ValueError, match="'bits' must be 4 or 8, not 3"):
        quantize(torch.ones(3), 3)
    with pytest.raises(ValueError, match="'group_size'"):
        quantize(torch.ones(3), group_size=0)
    with pytest.raises(ValueError, match="needs 4 codes"):
        dequantize(Quantized(*quantize(torch.ones(3))), (4,))

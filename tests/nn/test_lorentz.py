"""Layers and means on the hyperboloid against formulas by hand."""

import math

import pytest
import torch
from torch import nn

from corollary.nn import LorentzLinear, lorentz_inner, lorentz_lift, lorentz_mean
from corollary.testing import check_layer


def test_product_by_hand():
    x, y = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([2.0, -1.0, 4.0])
    assert lorentz_inner(x, y).item() == -6 - 1 + 8


def test_lift_keeps_distances_from_the_origin():
    torch.manual_seed(0)
    x = torch.randn(20, 3, dtype=torch.float64) * torch.logspace(-9, 0.5, 20, dtype=torch.float64)[:, None]
    x.requires_grad_()
    y = lorentz_lift(x)
    torch.testing.assert_close(lorentz_inner(y, y), -torch.ones(20, 1, dtype=torch.float64))
    torch.testing.assert_close(torch.asinh(y[:, 1:].norm(dim=1)), x.norm(dim=1))
    torch.testing.assert_close(y[:, 1:] / y[:, 1:].norm(dim=1, keepdim=True), x / x.norm(dim=1, keepdim=True))
    origin = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(lorentz_lift(origin).detach(), torch.tensor([[1.0, 0, 0, 0]] * 2, dtype=torch.float64))
    (grad,) = torch.autograd.grad(lorentz_lift(origin)[:, 1:].sum(), origin)
    torch.testing.assert_close(grad, torch.ones_like(grad))


def test_mean_of_two_is_the_middle_of_the_geodesic():
    a, b = (lorentz_lift(torch.tensor([[t]], dtype=torch.float64)) for t in (0.3, 1.9))
    middle = lorentz_mean(torch.ones(1, 2, dtype=torch.float64), torch.cat([a, b]))
    torch.testing.assert_close(middle, lorentz_lift(torch.tensor([[1.1]], dtype=torch.float64)))
    sparse = lorentz_mean(torch.ones(1, 2, dtype=torch.float64).to_sparse(), torch.cat([a, b]))
    torch.testing.assert_close(sparse, middle)


def test_layer_by_hand():
    torch.manual_seed(0)
    layer = LorentzLinear(4, 3, activation=nn.ReLU(), scale=2.0).double()
    x = lorentz_lift(torch.randn(5, 3, dtype=torch.float64))
    layer.requires_grad_(False)
    for row, out in zip(x, layer(x), strict=True):
        z = [
            sum(float(w) * max(0.0, float(v)) for w, v in zip(weights, row, strict=True)) + float(b)
            for weights, b in zip(layer.linear.weight, layer.linear.bias, strict=True)
        ]
        time = 2 / (1 + math.exp(-z[0])) + 1.1
        length = math.sqrt(time**2 - 1) / math.hypot(*z[1:])
        assert out.tolist() == pytest.approx([time, *(length * v for v in z[1:])], rel=1e-7)  # the scale is kept in float32


def test_is_a_layer():
    check_layer(
        lambda: LorentzLinear(5, 4), inputs=((5,),), output=(4,),
        draw=lambda shape, generator, dtype: lorentz_lift(
            torch.randn((*shape[:-1], shape[-1] - 1), generator=generator, dtype=torch.float64)
        ).to(dtype),
    )  # fmt: skip


def test_bad_arguments():
    with pytest.raises(ValueError, match="out_features"):
        LorentzLinear(3, 1)
    with pytest.raises(ValueError, match="scale"):
        LorentzLinear(3, 3, scale=0.0)

"""LoRA-SB: the theorems as properties, against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from corollary.adapt import LoRASB, adapt, load_adapter, mean_gradients, save_adapter


def started(m=7, n=9, rank=3, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(n, m, bias=False).double()
    gradient = torch.randn(m, n, generator=generator, dtype=torch.float64)
    return adapt(layer, LoRASB(rank=rank, **options), calibration={"": gradient}), gradient.numpy()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 30), rank=st.integers(1, 6))
def test_no_other_matrix_of_its_rank_is_nearer_to_the_first_step(seed, rank):
    """Eckart-Young: the distance is the tail of the singular values, which no random competitor undercuts."""
    model, gradient = started(rank=rank, seed=seed, lr=0.01)
    step = -0.01 * np.sign(gradient)
    distance = np.linalg.norm(model.adapters["default"].delta().detach().numpy() - step)
    tail = np.linalg.svd(step, compute_uv=False)[rank:]
    assert abs(distance - np.sqrt((tail**2).sum())) < 1e-10
    rng = np.random.default_rng(seed)
    for _ in range(5):
        a = rng.normal(size=(rank, 9))
        best_for_a = step @ np.linalg.pinv(a) @ a
        assert distance <= np.linalg.norm(best_for_a - step) + 1e-12


def test_core_step_is_the_projected_full_step_at_any_point():
    """For orthonormal bases the weight moves by the projection of the full gradient, wherever R is: no scaling is missing."""
    model, _ = started(lr=0.1)
    adapter = model.adapters["default"]
    x, y = torch.randn(5, 9, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    with torch.no_grad():
        adapter.lora_R.add_(torch.randn(3, 3, dtype=torch.float64))
    (model(x) - y).square().sum().backward()
    weight = (model.weight + adapter.delta()).detach().numpy()
    full = 2 * (x.numpy() @ weight.T - y.numpy()).T @ x.numpy()
    b, a = adapter.lora_B.numpy(), adapter.lora_A.numpy()
    assert np.abs(b @ adapter.lora_R.grad.numpy() @ a - b @ b.T @ full @ a.T @ a).max() < 1e-10


def test_gradient_step_uses_the_gradient_itself():
    model, gradient = started(lr=0.5, step="gradient", rank=2)
    u, s, vt = np.linalg.svd(-0.5 * gradient)
    assert np.abs(model.adapters["default"].delta().detach().numpy() - (u[:, :2] * s[:2]) @ vt[:2]).max() < 1e-12


def test_bases_travel_with_the_file(tmp_path):
    """They come from data, so the file must hold them: a fresh model has no gradient to make them from."""
    model, _ = started(lr=0.1)
    other = nn.Linear(9, 7, bias=False).double()
    other.load_state_dict({"weight": model.weight})
    load_adapter(other, save_adapter(model, tmp_path / "a.safetensors"))
    x = torch.randn(2, 9, dtype=torch.float64)
    assert torch.equal(other(x), model(x))


def test_mean_gradients_leave_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model[0].weight.requires_grad_(False)
    model[2].weight.grad = torch.ones(2, 3)
    mean_gradients(model, lambda x: model(x).square().mean(), [torch.randn(5, 4)])
    assert not model[0].weight.requires_grad
    assert model[0].weight.grad is None
    assert torch.equal(model[2].weight.grad, torch.ones(2, 3))
    with pytest.raises(ValueError, match="'2' takes no part in the loss"):
        mean_gradients(model, lambda x: model[0](x).sum(), [torch.randn(5, 4)])


@pytest.mark.parametrize(
    ("options", "calibration", "message"),
    [
        ({"step": "adam"}, {}, "'step' must be 'sign' or 'gradient', not 'adam'"),
        ({"rank": 8}, {"": torch.ones(7, 9)}, "'rank' is 8, but the layer's matrix is 7 x 9"),
        ({}, {"": torch.ones(9, 7)}, r"is \(9, 7\), its weight is \(7, 9\)"),
        ({}, [torch.ones(7, 9)], "must map layers' names to gradients, not list"),
    ],
)
def test_bad_input_is_named(options, calibration, message):
    with pytest.raises((ValueError, TypeError), match=message):
        adapt(nn.Linear(9, 7), LoRASB(**{"rank": 2, **options}), calibration=calibration)

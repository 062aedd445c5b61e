"""Features, layers, bundles and adapters against complex loops, quadrature, the arc-cosine kernel and numpy's least squares."""

import cmath
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from corollary.adapt import (
    BundledSNNK,
    SNNKAdapter,
    SNNKLinear,
    adapt,
    load_adapter,
    merge_adapters,
    save_adapter,
    urf_input,
    urf_weight,
)


def double(*shape, seed=0, size=1.0):
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_lambda(g, z, damping):
    """Λ_g(z) for a complex vector, entry by entry."""
    d = len(g)
    dot = sum(a * b for a, b in zip(g, z, strict=True))
    square = sum(b * b for b in z)
    norm = sum(a * a for a in g)
    return (1 + 4 * damping) ** (d / 4) * cmath.exp(-damping * norm + math.sqrt(1 + 4 * damping) * dot - square / 2)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    d=st.integers(1, 5),
    m=st.integers(1, 4),
    damping=st.floats(0, 0.4),
    balance=st.floats(0.5, 2.0),
    phase=st.floats(-3, 3),
)
def test_features_are_the_real_part_of_the_complex_product(seed, d, m, damping, balance, phase):
    x, w, b = double(d, seed=seed), double(d, seed=seed + 1), float(double(1, seed=seed + 2))
    directions, frequencies = double(m, d, seed=seed + 3), double(m, seed=seed + 4)
    true = 0
    for g, omega in zip(directions.tolist(), frequencies.tolist(), strict=True):
        half = math.sqrt(abs(omega))
        left = naive_lambda(g, [1j * omega / half * v / balance for v in x.tolist()], damping)
        right = naive_lambda(g, [half * balance * v for v in w.tolist()], damping)
        true += (cmath.exp(1j * (omega * b + phase)) * left * right).real / m
    options = {"damping": damping, "balance": balance}
    phi = urf_input(x, directions, frequencies, **options)
    psi = urf_weight(w, directions, frequencies, torch.tensor(b, dtype=torch.float64), phase=phase, **options)
    assert float(phi @ psi) == pytest.approx(true, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("activation", "f"),
    [("cos", torch.cos), ("sin", torch.sin), ("gaussian", lambda z: torch.exp(-z.square() / 2))],
)
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_a_layer_starts_within_a_few_standard_errors_of_the_layer_it_stands_for(activation, f, damping):
    torch.manual_seed(3)
    dense = nn.Linear(6, 4).double()
    x = double(20, 6, size=0.3)
    layers = [SNNKLinear.from_linear(dense, 2000, activation=activation, damping=damping, balance=1.2) for _ in range(100)]
    estimates = torch.stack([layer(x) for layer in layers]).detach()
    error = estimates.mean(0) - f(dense(x)).detach()
    assert (error.abs() / (estimates.std(0) / 10)).max() < 5
    assert error.abs().max() < 0.05


def test_relu_features_have_the_mean_of_the_arc_cosine_kernel():
    torch.manual_seed(1)
    dense = nn.Linear(5, 3).double()
    x = double(6, 5)
    estimate = SNNKLinear.from_linear(dense, 200_000, activation="relu")(x).detach()
    for i in range(6):
        for j in range(3):
            left = np.append(x[i].numpy(), 1.0)
            right = np.append(dense.weight[j].detach().numpy(), dense.bias[j].item())
            size = np.linalg.norm(left) * np.linalg.norm(right)
            angle = np.arccos(left @ right / size)
            true = size * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / (2 * np.pi)
            assert float(estimate[i, j]) == pytest.approx(true, abs=0.02 * size)


def test_damping_bounds_the_second_moment_as_the_gaussian_integral_says():
    """E |Λ_g(iωx) Λ_g(w)|² = ((1 + 4M)² / (1 + 8M))^(d/2) exp(ω²|x|² + |w|² / (1 + 8M)), here for ω = 1."""
    m = 400_000
    for damping in (0.0, 0.1):
        x, w = double(3, size=0.4), double(3, seed=1, size=0.6)
        options = {"damping": damping}
        directions, ones = double(m, 3, seed=2), torch.ones(m, dtype=torch.float64)
        phi = urf_input(x, directions, ones, **options).view(2, m)
        psi = urf_weight(w, directions, ones, **options)[:m]
        found = float((phi.square().sum(0) * psi.square()).sum() * m)
        factor = ((1 + 4 * damping) ** 2 / (1 + 8 * damping)) ** 1.5
        true = factor * math.exp(float(x @ x) + float(w @ w) / (1 + 8 * damping))
        assert found == pytest.approx(true, rel=0.02)


@pytest.mark.parametrize("activation", ["cos", "sin"])
def test_a_bundle_of_two_hidden_layers_nears_the_network(activation):
    f = getattr(torch, activation)
    torch.manual_seed(0)
    linears = [nn.Linear(3, 4).double(), nn.Linear(4, 3).double(), nn.Linear(3, 2).double()]
    for linear in linears:
        linear.weight.data /= 2
    x = double(16, 3, size=0.5)
    true = linears[2](f(linears[1](f(linears[0](x))))).detach()
    errors = []
    for m in (200, 6000):
        bundles = [BundledSNNK.from_linears(linears, (m, m), activation=activation) for _ in range(3)]
        errors.append(np.mean([float((bundle(x).detach() - true).square().mean().sqrt()) for bundle in bundles]))
    assert errors[1] < 0.1
    assert errors[1] < 0.5 * errors[0]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 40), ridge=st.sampled_from([0.0, 1e-3, 1.0]))
def test_the_closed_form_is_numpys_least_squares(seed, n, ridge):
    torch.manual_seed(seed)
    bundle = BundledSNNK(3, 2, (10,), activation="sin").double()
    x, y = double(n, 3, seed=seed), double(n, 2, seed=seed + 1)
    bundle.fit(x, y, ridge=ridge)
    phi = bundle.features(x).numpy()
    centred, target = phi - phi.mean(0), y.numpy() - y.numpy().mean(0)
    if ridge:
        theta = np.linalg.inv(centred.T @ centred + ridge * np.eye(10)) @ centred.T @ target
    else:
        theta = np.linalg.pinv(centred, rcond=1e-10) @ target
    fitted = centred @ theta + y.numpy().mean(0)
    assert np.abs(bundle(x).detach().numpy() - fitted).max() < 1e-6
    assert np.abs(bundle.weight.detach().numpy().T - theta).max() < 1e-5 * max(1, np.abs(theta).max())


@pytest.mark.parametrize("activation", ["relu", "cos"])
@pytest.mark.parametrize("rank", [None, 3])
def test_an_adapter_is_the_sum_over_features_by_hand(activation, rank):
    model = adapt(nn.Linear(7, 5).double(), SNNKAdapter(num_features=4, rank=rank, activation=activation))
    adapter = model.adapters["default"]
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(double(*p.shape, seed=5))
    x = double(2, 7, seed=6)
    y = (x @ model.weight.T + model.bias).detach().numpy()
    g, last = adapter.features.directions.numpy(), adapter.features.frequencies.numpy()
    out = np.empty_like(y)
    for i, row in enumerate(y):
        if activation == "relu":
            phi = [max(float(g[j] @ row + last[j]), 0) / 2 for j in range(4)]
        else:
            row = row / np.linalg.norm(row)
            waves = [cmath.exp(1j * float(g[j] @ row) + 0.5) / math.sqrt(2) for j in range(2)]
            phi = [w.real for w in waves] + [-w.imag for w in waves]
        h = np.array(phi) if rank is None else adapter.snnk_down.detach().numpy() @ np.array(phi)
        out[i] = y[i] + adapter.snnk_up.detach().numpy() @ h + adapter.snnk_bias.detach().numpy()
    assert np.abs(model(x).detach().numpy() - out).max() < 1e-12


def test_every_layer_has_features_of_its_own_and_a_file_brings_them_back(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))

    model = adapt(base(), SNNKAdapter(num_features=4, seed=3))
    first, second = (m.adapters["default"] for m in model)
    assert not torch.equal(first.features.directions, second.features.directions)
    nn.init.normal_(second.snnk_up)
    path = save_adapter(model, tmp_path / "a.safetensors")
    x = torch.randn(3, 6)
    assert torch.equal(load_adapter(base(), path)(x), model(x))
    with pytest.raises(ValueError, match="cannot be merged"):
        merge_adapters(model)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SNNKLinear(4, 3, 5), "even unless"),
        (lambda: SNNKLinear(4, 3, 6, activation="gelu"), "'gelu'; allowed: cos, sin"),
        (lambda: SNNKLinear(4, 3, 6, damping=-1), "'damping'"),
        (lambda: SNNKLinear(4, 3, 6, balance=0), "'balance'"),
        (lambda: SNNKLinear(0, 3, 6), "'in_features'"),
        (lambda: SNNKAdapter(num_features=0), "'num_features'"),
        (lambda: SNNKAdapter(rank=0), "'rank'"),
        (lambda: BundledSNNK(3, 2, ()), "'num_features'"),
        (lambda: BundledSNNK.from_linears([nn.Linear(3, 2), nn.Linear(3, 2)], (4,)), "2 outputs meet 3 inputs"),
        (lambda: BundledSNNK(3, 2, (4,)).fit(torch.ones(4, 3), torch.ones(4, 1)), r"\(4, 1\)"),
        (lambda: BundledSNNK(3, 2, (4,)).fit(torch.ones(4, 3), torch.ones(4, 2), ridge=-1), "'ridge'"),
        (lambda: BundledSNNK(3, 2, (4,)).fit(100 * torch.ones(4, 3), torch.ones(4, 2)), "overflow"),
        (lambda: urf_input(torch.ones(3), torch.ones(2, 3), torch.ones(3)), "'directions'"),
        (lambda: urf_weight(torch.ones(4, 3), torch.ones(2, 3), torch.ones(2), torch.ones(3)), "'bias'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(call, words):
    with pytest.raises(ValueError, match=words):
        call()

"""LSQ's gradients against loops and against torch.ao, the disorder against its definition, GAQAT against loops and known cases."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from corollary.compress import (
    GAQAT,
    LSQConfig,
    LSQConv2d,
    LSQLinear,
    LSQQuantizer,
    gaqat_groups,
    gradient_disorder,
    lsq_layers,
    lsq_quantize,
    quantize_aware,
)
from corollary.optim import SAM


def naive_lsq(x, scale, low, high, upstream):
    """Output and both gradients, one number after the other, as the paper's three equations say."""
    out, slope_x, slope_s = [], [], 0.0
    for value, up in zip(x, upstream, strict=True):
        t = value / scale
        if t <= low:
            level, straight, own = low, 0.0, low
        elif t >= high:
            level, straight, own = high, 0.0, high
        else:
            level = round(t)
            straight, own = 1.0, level - t
        out.append(level * scale)
        slope_x.append(straight * up)
        slope_s += own * up
    return np.array(out), np.array(slope_x), slope_s


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.integers(2, 8), st.booleans(), st.integers(1, 128).map(lambda k: k / 64))
def test_quantizer_and_its_gradients_equal_the_loop(seed, bits, signed, scale):
    rng = np.random.default_rng(seed)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    # Exact levels, the bounds and 0 among them: where the three cases of the gradient meet.
    x = np.concatenate([rng.normal(size=20) * scale * high, scale * np.array([low, low - 1, 0, high, high + 1])])
    upstream = rng.normal(size=len(x))
    leaf = torch.tensor(x, requires_grad=True)
    step = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    out = lsq_quantize(leaf, step, low, high, 0.25)
    out.backward(torch.tensor(upstream))
    expected, slope_x, slope_s = naive_lsq(x, scale, low, high, upstream)
    assert np.abs(out.detach().numpy() - expected).max() < 1e-12
    assert np.abs(leaf.grad.numpy() - slope_x).max() == 0
    assert abs(float(step.grad) - 0.25 * slope_s) < 1e-9 * max(1, abs(slope_s))


@pytest.mark.parametrize(("low", "high"), [(-8, 7), (0, 15), (-4, 3)])
def test_torch_ao_agrees_off_the_half_step_beyond_the_bounds(low, high):
    """torch.ao takes the range to reach half a step further than the paper does; elsewhere outputs and gradients are equal."""
    generator = torch.Generator().manual_seed(0)
    scale = 0.25
    x = torch.randn(4000, generator=generator) * 2
    t = x / scale
    x = x[((t > low + 0.01) & (t < high - 0.01)) | (t < low - 0.51) | (t > high + 0.51)]
    assert len(x) > 3000
    upstream = torch.randn(x.shape, generator=generator)
    results = []
    for peer in (False, True):
        leaf, step = x.clone().requires_grad_(), torch.tensor([scale], requires_grad=True)
        if peer:
            zero = torch.zeros(1, requires_grad=True)
            out = torch._fake_quantize_learnable_per_tensor_affine(leaf, step, zero, low, high, 0.5)
        else:
            out = lsq_quantize(leaf, step.squeeze(), low, high, 0.5)
        out.backward(upstream)
        results.append((out.detach(), leaf.grad, step.grad))
    for ours, true in zip(*results, strict=True):
        assert (ours - true).abs().max() <= 1e-5 * true.abs().max()


def test_step_is_scaled_by_the_size_of_weight_and_sample():
    quantizer, weight = LSQQuantizer(4), LSQQuantizer(4)
    inputs = LSQQuantizer(4, signed=False, sample_dims=3)
    x = torch.rand(5, 2, 3, 4) * 40
    for module, size in ((weight, 5 * 2 * 3 * 4 * 7), (inputs, 2 * 3 * 4 * 15)):
        module(x).sum().backward()
        leaf = torch.ones((), requires_grad=True)
        lsq_quantize(x, leaf, module.low, module.high).sum().backward()
        assert float(module.scale.grad) == pytest.approx(float(leaf.grad) / math.sqrt(size), rel=1e-5)
    quantizer.start(x)
    assert float(quantizer.scale.detach()) == pytest.approx(2 * float(x.abs().mean()) / math.sqrt(7), rel=1e-6)
    assert torch.equal(quantizer.codes(x) * quantizer.scale, quantizer(x))


def test_a_negative_step_is_the_same_step_and_its_gradient_points_the_other_way():
    x, upstream, results = torch.randn(50), torch.randn(50), []
    for value in (0.3, -0.3):
        step, leaf = torch.tensor(value, requires_grad=True), x.clone().requires_grad_()
        out = lsq_quantize(leaf, step, -4, 3)
        out.backward(upstream)
        results.append((out.detach(), leaf.grad, step.grad * value))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    nothing = torch.zeros((), requires_grad=True)
    out = lsq_quantize(x, nothing, -4, 3)
    out.backward(upstream)
    assert out.isfinite().all()
    assert nothing.grad.isfinite()


def test_layers_are_the_ordinary_ones_on_rounded_numbers():
    torch.manual_seed(0)
    linear, conv = LSQLinear(6, 4, bits=3), LSQConv2d(4, 6, 3, stride=2, padding=1, groups=2, bits=3)
    for layer, plain, x in (
        (linear, nn.Linear(6, 4), torch.randn(5, 6)),
        (conv, nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), torch.randn(2, 4, 7, 5)),
    ):
        rounded = {}
        for name, values, quantizer in (("w", layer.weight, layer.weight_quantizer), ("x", x, layer.input_quantizer)):
            s = float(quantizer.scale.detach())
            levels = s * torch.arange(quantizer.low, quantizer.high + 1)
            nearest = (values.detach()[..., None] - levels).abs().argmin(-1)
            rounded[name] = levels[nearest]
        with torch.no_grad():
            plain.weight.copy_(rounded["w"])
            plain.bias.copy_(layer.bias)
        assert (plain(rounded["x"]) - layer(x)).abs().max() < 1e-6


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def test_quantize_aware_takes_over_weights_and_starts_steps_from_what_it_sees():
    net, x = small_net(), torch.randn(10, 1, 4, 4)
    net.train()
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    inputs = {}
    with torch.no_grad():
        current = x
        for name, layer in net.eval().named_children():
            inputs[name], current = current, layer(current)
    net.train()
    norm = net[1].running_mean.clone()
    quantize_aware(net, LSQConfig(bits=3), [x[:6], x[6:]])
    assert net.training
    assert torch.equal(net[1].running_mean, norm)
    for name, p in net.named_parameters():
        if name in weights:
            assert torch.equal(p, weights[name])
    layers = lsq_layers(net)
    assert [(m.weight_quantizer.bits, m.input_quantizer.bits, m.input_quantizer.signed) for m in layers.values()] == [
        (8, 8, True),
        (3, 3, False),
        (8, 8, False),
    ]
    for name, layer in layers.items():
        for values, quantizer in ((layer.weight, layer.weight_quantizer), (inputs[name], layer.input_quantizer)):
            expected = 2 * float(values.detach().abs().mean()) / math.sqrt(quantizer.high)
            assert float(quantizer.scale.detach()) == pytest.approx(expected, rel=1e-5)


def test_quantize_aware_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="no linear layer"):
        quantize_aware(nn.ReLU(), LSQConfig(), torch.ones(1))
    with pytest.raises(ValueError, match="holds no batch"):
        quantize_aware(nn.Sequential(nn.Linear(2, 2)), LSQConfig(), [])
    with pytest.raises(ValueError, match="matches no module"):
        quantize_aware(nn.Sequential(nn.Linear(2, 2)), LSQConfig(skip=["head"]), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"'bits' must be an integer from 2 to 8, not 1"):
        LSQConfig(bits=1)

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(ValueError, match="reaches no input of unused"):
        quantize_aware(Half(), LSQConfig(), torch.ones(1, 2))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.integers(2, 30))
def test_disorder_equals_its_definition(seed, steps):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, 3, steps)).round()
    both = gradient_disorder(torch.tensor(a), torch.tensor(b))
    alone = gradient_disorder(torch.tensor(a))
    for row in range(3):
        count = sum(1 for i in range(steps) if a[row, i] * b[row, i] < 0)
        turns = sum(1 for i in range(steps - 1) if a[row, i] * a[row, i + 1] < 0)
        assert float(both[row]) == pytest.approx(count / steps)
        assert float(alone[row]) == pytest.approx(turns / (steps - 1))
    assert torch.equal(gradient_disorder(torch.tensor(a), torch.tensor(-a)) == 1, torch.tensor((a != 0).all(1)))


def scripted(signs, threshold, period, lr=0.1, foreach=None):
    """One step per row of ``signs``: a loss that is linear, so that both gradients are the row itself; gives the moves made."""
    scales = [nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in signs[0]]
    weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
    groups = [{"params": [weight]}, {"params": scales, "scales": True}]
    optimizer = GAQAT(groups, torch.optim.SGD, lr=lr, threshold=threshold, period=period, foreach=foreach)
    moves, shares = [], []
    for row in signs:
        before = [float(s.detach()) for s in scales]

        def closure(row=row):
            loss = weight + sum(g * s for g, s in zip(row, scales, strict=True))
            loss.backward()
            return loss

        optimizer.step(closure)
        moves.append([(b - float(s.detach())) / lr for b, s in zip(before, scales, strict=True)])
        shares.append(optimizer.frozen())
    assert float(weight.detach()) == pytest.approx(-lr * len(signs))  # what is no step is never frozen
    return np.array(moves), shares


@pytest.mark.parametrize("foreach", [None, True, False])
def test_settled_steps_lose_their_task_gradient_and_get_it_back(foreach):
    period = 5
    steady, turning = [1.0] * period, [1.0, -1.0, 1.0, -1.0, 1.0]
    first = np.array([steady + turning + steady, turning + steady + turning]).T
    moves, shares = scripted(first.tolist(), 0.3, period, foreach=foreach)
    factor = np.abs(moves).round(12)
    # A frozen step moves by half its gradient: that of the point nearby alone.
    assert factor[:, 0].tolist() == [1.0] * 5 + [0.5] * 5 + [1.0] * 5
    assert factor[:, 1].tolist() == [1.0] * 5 + [1.0] * 5 + [0.5] * 5
    assert shares == [0.0] * 4 + [0.5] * 10 + [0.5]


def test_the_window_decides_by_the_disorder_of_its_gradients():
    rng = np.random.default_rng(0)
    period, threshold = 8, 0.45
    signs = rng.normal(size=(4 * period, 40))
    moves, _ = scripted(signs.tolist(), threshold, period)
    frozen = np.abs(moves / signs).round(9) == 0.5
    assert not frozen[:period].any()
    for window in range(3):
        rows = torch.tensor(signs[window * period : (window + 1) * period].T)
        expected = (gradient_disorder(rows) < threshold).numpy()
        assert expected.any()
        assert not expected.all()
        assert (frozen[(window + 1) * period : (window + 2) * period] == expected).all()


def quadratic(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(LSQLinear(5, 7, bits=4), nn.Tanh(), LSQLinear(7, 2, bits=3)).double()
    x, y = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)
    return model, lambda: nn.functional.mse_loss(model(x), y)


def test_without_freezing_it_is_gradient_matching_on_a_quantized_model():
    """The two gradients taken by hand with autograd, on a model whose loss is a staircase."""
    (ours, loss), (theirs, other) = quadratic(), quadratic()
    rho, alpha, lr = 0.3, 0.05, 0.1
    optimizer = GAQAT(gaqat_groups(ours), torch.optim.SGD, rho, alpha=alpha, threshold=0.0, period=2, lr=lr)

    def closure():
        value = loss()
        value.backward()
        return value

    for _ in range(6):
        optimizer.step(closure)
        params = list(theirs.parameters())
        task = torch.autograd.grad(other(), params)
        norm = math.sqrt(sum(float(g.square().sum()) for g in task))
        with torch.no_grad():
            start = [p.clone() for p in params]
            for p, g in zip(params, task, strict=True):
                p += (rho / norm - alpha) * g
        smooth = torch.autograd.grad(other(), params)
        with torch.no_grad():
            for p, s, a, b in zip(params, start, task, smooth, strict=True):
                p.copy_(s - lr * (a + b) / 2)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-10


def test_everything_frozen_is_half_of_sam():
    (ours, loss), (theirs, other) = quadratic(), quadratic()
    half = GAQAT([{"params": list(ours.parameters()), "scales": True}], torch.optim.SGD, 0.1, threshold=1.0, period=2, lr=0.2)
    sam = SAM(theirs.parameters(), torch.optim.SGD, 0.1, lr=0.1)

    def stepper(optimizer, value):
        def closure():
            current = value()
            current.backward()
            return current

        optimizer.step(closure)

    for p in ours.parameters():  # masks of a period in which nothing turned
        half.state[p] |= {"active": torch.zeros_like(p), "turns": torch.zeros_like(p), "last": torch.zeros_like(p)}
    stepper(half, loss)
    stepper(sam, other)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-12


def test_options_are_checked():
    for option, value in (("threshold", 1.5), ("period", 1), ("rho", -1.0), ("alpha", -0.1)):
        with pytest.raises(ValueError, match=f"'{option}' must be"):
            GAQAT([nn.Parameter(torch.ones(1))], torch.optim.SGD, lr=0.1, **{option: value})
    half = nn.Parameter(torch.ones((), dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="at most 128"):
        GAQAT([{"params": [half], "scales": True}], torch.optim.SGD, lr=0.1, period=200)
    with pytest.raises(ValueError, match="no quantizer"):
        gaqat_groups(nn.Linear(2, 2))

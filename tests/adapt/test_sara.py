"""SaRA against dense masked computations and loops by hand."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from corollary.adapt import (
    LoRA,
    ProgressiveAdjustment,
    SaRA,
    adapt,
    adapter_penalty,
    adapter_state_dict,
    load_adapter,
    load_adapter_state_dict,
    save_adapter,
)
from corollary.memory import peak_bytes


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 4)).to(dtype)


def adapters(model):
    return [m.adapters["default"] for m in model.modules() if hasattr(m, "adapters")]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 100), fraction=st.floats(0.02, 1), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_one_threshold_selects_the_smallest_of_all_layers(seed, fraction, dtype):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 4)).to(dtype)
    with torch.no_grad():
        model[1].weight.mul_(3)
    every = np.sort(np.concatenate([np.abs(m.weight.detach().float().numpy()).ravel() for m in model]))
    cut = every[max(1, int(fraction * len(every))) - 1]
    adapt(model, SaRA(fraction=fraction))
    for layer, adapter in zip(model, adapters(model), strict=True):
        wanted = [i for i, w in enumerate(layer.weight.detach().float().numpy().ravel()) if abs(w) <= cut]
        assert adapter.index.tolist() == wanted
        assert float(adapter.threshold) == cut


def test_layers_alike_take_the_same_share_of_each():
    model = net()
    with torch.no_grad():
        model[2].weight.mul_(100)
    adapt(model, SaRA(fraction=0.25, scope="layer"))
    assert [len(a.values) for a in adapters(model)] == [15, 9]


def test_training_is_masked_fine_tuning():
    """Adam on the vector follows Adam on dense weights whose gradient is masked, written out step by step."""
    model, dense = net(), net()
    adapt(model, SaRA(fraction=0.3, nuclear=0.0))
    masks = [torch.zeros(a.site.out_features, a.site.in_features, dtype=torch.bool) for a in adapters(model)]
    for mask, adapter in zip(masks, adapters(model), strict=True):
        mask.view(-1)[adapter.index.long()] = True
    optimizer = torch.optim.Adam([a.values for a in adapters(model)], 0.05)
    weights = [dense[0].weight, dense[2].weight]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 6):
        x = torch.randn(5, 7, generator=generator, dtype=torch.float64)
        y = torch.randn(5, 4, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        gradients = torch.autograd.grad(F.mse_loss(dense(x), y), weights)
        with torch.no_grad():
            for w, g, m, v, mask in zip(weights, gradients, first, second, masks, strict=True):
                g = g * mask
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g**2)
                w -= 0.05 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    for layer, adapter, w in zip((model[0], model[2]), adapters(model), weights, strict=True):
        assert torch.allclose(layer.weight + adapter.delta(), w, atol=1e-12)


CONVOLUTIONS = [
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": (2, 3), "padding": "same", "dilation": (3, 1)},
    {"kernel_size": 3, "padding": "valid", "stride": 2},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect", "groups": 2},
    {"kernel_size": 3, "padding": (1, 0), "stride": (1, 2), "groups": 4},
]


@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_a_convolution_and_its_gradients_are_the_dense_ones(options):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, **options).double()
    twin = copy.deepcopy(layer)
    model = adapt(nn.Sequential(layer), SaRA(fraction=0.4), nn.Conv2d)
    adapter = layer.adapters["default"]
    nn.init.normal_(adapter.values)
    with torch.no_grad():
        twin.weight.view(-1)[adapter.index.long()] += adapter.values
    x, z = (torch.randn(2, 4, 9, 8, dtype=torch.float64).requires_grad_() for _ in range(2))
    z.data = x.data.clone()
    out, wanted = model(x), twin(z)
    assert torch.allclose(out, wanted, atol=1e-12)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (wanted * weights).sum().backward()
    assert torch.allclose(x.grad, z.grad, atol=1e-12)
    assert torch.allclose(adapter.values.grad, twin.weight.grad.view(-1)[adapter.index.long()], atol=1e-12)


def test_the_penalty_is_the_nuclear_norm_of_what_trains():
    model = adapt(nn.Linear(9, 6).double(), SaRA(fraction=0.5, nuclear=0.7))
    adapter = model.adapters["default"]
    nn.init.normal_(adapter.values)
    adapter.active[::5] = False
    trained = np.zeros((6, 9))
    for at, value, on in zip(adapter.index.tolist(), adapter.values.tolist(), adapter.active.tolist(), strict=True):
        trained[at // 9, at % 9] = on * (model.weight[at // 9, at % 9].item() + value)
    u, s, vt = np.linalg.svd(trained, full_matrices=False)
    penalty = adapter_penalty(model)
    assert penalty.item() == pytest.approx(0.7 * s.sum(), rel=1e-12)
    penalty.backward()
    wanted = 0.7 * (u @ vt).ravel()[adapter.index.long()] * adapter.active.numpy()
    assert np.allclose(adapter.values.grad.numpy(), wanted, atol=1e-9)
    assert model.weight.grad is None


def test_one_layer_in_expectation_is_penalized():
    model = adapt(nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))), SaRA(fraction=0.5, nuclear=1.0, scope="layer"))
    terms = [a.nuclear * torch.linalg.svdvals(_masked(layer, a)).sum().item() for layer, a in zip(model, adapters(model))]  # noqa: B905
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = np.array([float(adapter_penalty(model)) for _ in range(2000)])
    assert abs(drawn.mean() - np.mean(terms)) < 4 * drawn.std() / np.sqrt(2000)


def _masked(layer, adapter):
    out = torch.zeros_like(layer.weight)
    out.view(-1)[adapter.index.long()] = layer.weight.detach().view(-1)[adapter.index.long()]
    return out


@pytest.mark.parametrize("kind", [torch.optim.Adam, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=0.1)])
def test_what_has_grown_stays_to_the_bit(kind):
    model = adapt(net(), SaRA(fraction=0.6, nuclear=1e-3))
    optimizer = kind([a.values for a in adapters(model)], 0.05)
    adjustment = ProgressiveAdjustment(model, at=3, optimizer=optimizer)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 7):
        x = torch.randn(5, 7, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        (model(x).square().mean() + adapter_penalty(model)).backward()
        if step > 3:
            assert all(not a.values.grad[~a.active].any() for a in adapters(model))
        optimizer.step()
        adjustment.step()
        if step == 3:
            assert not optimizer.state
            before = [a.values.detach().clone() for a in adapters(model)]
            for layer, adapter in zip((model[0], model[2]), adapters(model), strict=True):
                now = (layer.weight + adapter.delta()).detach().numpy().ravel()
                wanted = [abs(np.float32(now[i])) <= adapter.threshold.item() for i in adapter.index.tolist()]
                assert adapter.active.tolist() == wanted
                assert 0 < sum(wanted) < len(wanted)
    for adapter, old in zip(adapters(model), before, strict=True):
        assert torch.equal(adapter.values[~adapter.active], old[~adapter.active])
        assert not torch.equal(adapter.values[adapter.active], old[adapter.active])


def test_the_adjustment_resumes():
    def run(steps, model, optimizer, adjustment, start=0):
        for step in range(start, start + steps):
            x = torch.randn(5, 7, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            adjustment.step()

    def fresh():
        model = adapt(net(), SaRA(fraction=0.6))
        optimizer = torch.optim.Adam([a.values for a in adapters(model)], 0.05)
        return model, optimizer, ProgressiveAdjustment(model, at=2, optimizer=optimizer)

    for pause in (1, 3):
        whole, parts, rest = fresh(), fresh(), fresh()
        run(5, *whole)
        run(pause, *parts)
        load_adapter_state_dict(rest[0], adapter_state_dict(parts[0]))
        rest[1].load_state_dict(copy.deepcopy(parts[1].state_dict()))
        rest[2].load_state_dict(parts[2].state_dict())
        run(5 - pause, *rest, start=pause)
        for one, two in zip(adapters(whole[0]), adapters(rest[0]), strict=True):
            assert torch.equal(one.values, two.values)
            assert torch.equal(one.active, two.active)


def test_a_saved_adapter_says_which_weights_it_changes(tmp_path):
    model = adapt(net(), SaRA(fraction=0.3))
    nn.init.normal_(adapters(model)[0].values)
    adapters(model)[0].active[0] = False
    other = load_adapter(net(), save_adapter(model, tmp_path / "a.safetensors"))
    assert torch.equal(adapters(other)[0].delta(), adapters(model)[0].delta())
    assert not adapters(other)[0].active[0]


def test_a_backward_pass_holds_one_layers_dense_matrix():
    """The peak does not grow by a matrix with every layer, as autograd's own scatter makes it."""
    width = 128

    def peak(layers):
        torch.manual_seed(0)
        model = adapt(nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))), SaRA(fraction=0.1))
        x = torch.randn(2, width)
        return peak_bytes(lambda: model(x).sum().backward())

    few, many = peak(2), peak(10)
    assert many - few < 8 * 0.5 * 4 * width**2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, "'fraction' must be above 0 and at most 1, not 0.0"),
        ({"fraction": 1.5}, "'fraction' must be above 0"),
        ({"nuclear": -1.0}, "'nuclear' must be at least 0, not -1.0"),
        ({"nuclear": float("nan")}, "'nuclear' must be a finite number"),
        ({"scope": "all"}, "'scope' must be 'model' or 'layer', not 'all'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        SaRA(**options)


def test_the_adjustments_arguments_are_checked():
    with pytest.raises(ValueError, match="'at' must be an int of at least 1, not 0"):
        ProgressiveAdjustment(adapt(net(), SaRA()), at=0)
    with pytest.raises(ValueError, match="not of SaRA"):
        ProgressiveAdjustment(adapt(nn.Linear(3, 3), LoRA(rank=1)), at=1)
    with pytest.raises(TypeError):
        adapt(nn.Sequential(nn.Embedding(4, 4)), SaRA(), nn.Embedding)

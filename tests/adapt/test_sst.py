"""Sparse spectral training against dense float64 computations, loops by hand and a second optimizer."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn
from torch.nn import functional as F

from corollary.adapt import LoRA, ReLoRA, SparseSpectralTraining, SSTLinear, VeRA, adapt, from_sst, to_sst
from corollary.adapt.restarts import PeriodicRestart
from corollary.papers.adapt import sst as paper


def layer_of(n=9, m=6, rank=2, seed=0, **options):
    torch.manual_seed(seed)
    return SSTLinear(n, m, rank=rank, dtype=torch.float64, **options)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 12), m=st.integers(1, 12), data=st.data())
def test_decomposition_keeps_the_function(n, m, data):
    rank = data.draw(st.integers(1, min(n, m)))
    torch.manual_seed(n * 13 + m)
    dense = nn.Linear(n, m).double()
    layer = SSTLinear.from_linear(dense, rank)
    x = torch.randn(3, 2, n, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(x), atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.sigma, torch.linalg.svdvals(dense.weight))
    torch.testing.assert_close(layer.to_linear()(x), dense(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("enhanced", [True, False])
def test_gradients_by_loops_over_directions(enhanced):
    layer = layer_of(enhanced=enhanced)
    with torch.no_grad():  # so that no vector has length 1 by chance
        layer.u.mul_(1.3).add_(0.1)
        layer.v.mul_(0.7).sub_(0.2)
    x = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    target = torch.randn(5, 6, dtype=torch.float64)
    (layer(x) - target).pow(3).sum().backward()

    u, v = (t.detach().numpy() for t in layer.vectors())
    sigma, inputs = layer.sigma.detach().numpy(), x.detach().numpy()
    weight = sum(s * np.outer(u[:, i], v[:, i]) for i, s in enumerate(sigma))
    out = inputs @ weight.T + layer.bias.detach().numpy()
    slope = 3 * (out - target.numpy()) ** 2
    big = slope.T @ inputs  # dL/dW
    for i in range(6):
        assert layer.sigma.grad[i].item() == pytest.approx(u[:, i] @ big @ v[:, i], rel=1e-9)
    for i in range(2):
        scale = 1 if enhanced else sigma[i]
        np.testing.assert_allclose(layer.u.grad[:, i].numpy(), scale * big @ v[:, i], rtol=1e-9)
        np.testing.assert_allclose(layer.v.grad[:, i].numpy(), scale * big.T @ u[:, i], rtol=1e-9)
    np.testing.assert_allclose(x.grad.numpy(), slope @ weight, rtol=1e-9)
    np.testing.assert_allclose(layer.bias.grad.numpy(), slope.sum(0), rtol=1e-9)


def test_plain_gradients_are_derivatives():
    layer = layer_of(enhanced=False)
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)
    assert torch.autograd.gradcheck(
        lambda x, *values: torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,)), (x, *values)
    )


def test_second_derivatives_are_refused():
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer_of()(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_draw_moves_directions_whole():
    layer = layer_of()
    before, (u, v), sigma = layer.weight.detach(), layer.vectors(), layer.sigma.detach().clone()
    order = layer.choose(torch.tensor([4, 1]))
    assert order.tolist() == [4, 1, 0, 2, 3, 5]
    torch.testing.assert_close(layer.u, u[:, [4, 1]])
    torch.testing.assert_close(layer.v, v[:, [4, 1]])
    torch.testing.assert_close(layer.sigma, sigma[order])
    torch.testing.assert_close(layer.weight, before, atol=1e-13, rtol=0)


def test_draws_have_the_stated_probabilities():
    layer = layer_of(n=5, m=4, rank=1)
    with torch.no_grad():
        layer.sigma.copy_(torch.tensor([4.0, 3.0, 1.0, 0.0]))
    training = SparseSpectralTraining(layer, torch.optim.SGD(layer.parameters(), 0.1))
    counts, draws = np.zeros(4), 4000
    for training.count in range(draws):
        counts[training.sample(layer, 0)] += 1
    expected = np.array([0.5 * (1 / 4 + s / 8) for s in (4, 3, 1, 0)])
    np.testing.assert_allclose(counts / draws, expected, atol=4 * math.sqrt(0.25 / draws))


def test_draws_are_of_distinct_directions_in_every_layer():
    model = nn.Sequential(layer_of(rank=3), layer_of(6, 9, rank=3, seed=1))
    training = SparseSpectralTraining(model, torch.optim.SGD(model.parameters(), 0.1), seed=4)
    for training.count in range(50):
        for place, layer in enumerate(model):
            assert len(set(training.sample(layer, place).tolist())) == 3


def test_steps_by_hand():
    """Adam of torch on dense tensors that a loop moves, with draws, decompositions and forgetting written out."""
    torch.manual_seed(0)
    dense = nn.Linear(5, 4, bias=False).double()
    model = to_sst(nn.Sequential(copy.deepcopy(dense)), rank=2)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    training = SparseSpectralTraining(model, optimizer, interval=3, seed=9)

    U, s, Vh = np.linalg.svd(dense.weight.detach().numpy(), full_matrices=False)
    V, active = Vh.T.copy(), [0, 1]
    signs = np.sign((U * model[0].vectors()[0].detach().numpy()).sum(0))
    U, V = U * signs, V * signs
    memory: dict[str, list] = {}

    def adam(key, value, grad):
        m, v, t = memory.setdefault(key, [np.zeros_like(grad), np.zeros_like(grad), 0])
        m, v, t = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2, t + 1
        memory[key] = [m, v, t]
        return value - 0.05 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)

    generator = torch.Generator().manual_seed(1)
    for step in range(1, 14):
        x = torch.randn(7, 5, dtype=torch.float64, generator=generator)
        optimizer.zero_grad()
        model(x).pow(4).sum().backward()
        optimizer.step()
        training.step()

        inputs = x.numpy()
        G = (4 * (inputs @ ((U * s) @ V.T).T) ** 3).T @ inputs
        gs, gu, gv = np.array([U[:, i] @ G @ V[:, i] for i in range(4)]), G @ V[:, active], G.T @ U[:, active]
        s = np.maximum(adam("s", s, gs), 0)
        U[:, active], V[:, active] = adam("u", U[:, active], gu), adam("v", V[:, active], gv)
        for i in active:
            U[:, i] /= np.linalg.norm(U[:, i])
            V[:, i] /= np.linalg.norm(V[:, i])
        if step % 3 == 0:
            memory.pop("u"), memory.pop("v")
            layer = model[0]
            if (step // 3) % 2 == 0:  # ceil(4 / 2) draws make a round
                old = (U * s) @ V.T
                memory.pop("s")
                U, V, s = (t.detach().numpy().copy() for t in (*layer.vectors(), layer.sigma))
                np.testing.assert_allclose((U * s) @ V.T, old, atol=1e-12)
                np.testing.assert_allclose(U.T @ U, np.eye(4), atol=1e-12)
                np.testing.assert_allclose(np.sort(s)[::-1], np.linalg.svd(old)[1], atol=1e-12)
                active = [0, 1]
            else:  # which of the old directions now stand where
                now = layer.vectors()[0].detach().numpy()
                order = [int(np.argmax(np.abs(U.T @ now[:, i]))) for i in range(4)]
                U, V, s = U[:, order], V[:, order], s[order]
                memory["s"][:2] = [a[order] for a in memory["s"][:2]]
                active = [0, 1]
        np.testing.assert_allclose(model[0].weight.detach().numpy(), (U * s) @ V.T, atol=1e-9)


def test_optimizer_holds_state_of_what_trains_alone():
    model = to_sst(nn.Sequential(nn.Linear(32, 16)), rank=2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 32)).sum().backward()
    optimizer.step()
    held = sum(s["exp_avg"].numel() for s in optimizer.state.values())
    assert held == 16 + 2 * (32 + 16) + 16  # singular values, vectors, bias


def train(model, optimizer, training, steps, generator):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 9, generator=generator, dtype=torch.float64)).pow(2).sum().backward()
        optimizer.step()
        training.step()


@pytest.mark.parametrize("before", [3, 4, 9])
def test_resumes_bit_for_bit(before):
    def start():
        model = nn.Sequential(layer_of(), layer_of(6, 6, seed=2))
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        return model, optimizer, SparseSpectralTraining(model, optimizer, interval=4, seed=3)

    whole = start()
    generator = torch.Generator().manual_seed(5)
    train(*whole, before, generator)
    state = load(save({k: v.contiguous() for k, v in whole[0].state_dict().items()}))
    again = start()
    again[0].load_state_dict(state)
    again[1].load_state_dict(copy.deepcopy(whole[1].state_dict()))
    again[2].load_state_dict(whole[2].state_dict())
    other = torch.Generator()
    other.set_state(generator.get_state())
    train(*whole, 7, generator)
    train(*again, 7, other)
    for a, b in zip(whole[0].parameters(), again[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_conversion_leaves_other_layers_alone_and_comes_off():
    model = nn.Sequential(nn.Embedding(7, 9), nn.Linear(9, 6), nn.LayerNorm(6), nn.Linear(6, 7)).double()
    with torch.no_grad():
        model[3].bias.add_(1)
    tokens = torch.randint(0, 7, (2, 5))
    want, keys = model(tokens), list(model.state_dict())
    bias = model[1].bias
    to_sst(model, 3, "1")
    assert isinstance(model[1], SSTLinear)
    assert type(model[3]) is nn.Linear
    assert model[1].bias is bias
    torch.testing.assert_close(model(tokens), want)
    from_sst(model)
    torch.testing.assert_close(model(tokens), want)
    assert list(model.state_dict()) == keys


def test_layers_with_shared_weights_are_left():
    model = nn.Sequential(nn.Embedding(7, 9), nn.Linear(9, 9), nn.Linear(9, 7, bias=False))
    model[2].weight = model[0].weight
    to_sst(model, 2)
    assert isinstance(model[1], SSTLinear)
    assert type(model[2]) is nn.Linear


def test_autocast_and_bfloat16():
    torch.manual_seed(0)
    dense = nn.Linear(16, 8)
    layer = SSTLinear.from_linear(dense, 4)
    x = torch.randn(5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), dense(x), atol=0.05, rtol=0.05)
    out.float().sum().backward()
    assert layer.u.grad.dtype == torch.float32
    half = SSTLinear.from_linear(dense.bfloat16(), 4)
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_bad_arguments():
    for call, word in (
        (lambda: SSTLinear(4, 3, rank=4), "rank"),
        (lambda: SSTLinear(4, 3, rank=0), "rank"),
        (lambda: layer_of()(torch.zeros(2, 8, dtype=torch.float64)), "'x'"),
        (lambda: to_sst(nn.Sequential(nn.ReLU()), 2), "targets"),
        (lambda: from_sst(nn.Linear(2, 2)), "SSTLinear"),
        (lambda: SparseSpectralTraining(nn.Linear(2, 2), torch.optim.SGD([nn.Parameter(torch.ones(1))], 1)), "SSTLinear"),
    ):
        with pytest.raises(ValueError, match=word):
            call()
    layer = layer_of()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for options in ({"interval": 0}, {"interval": 5, "warmup": 6}, {"warmup": -1}):
        with pytest.raises(ValueError, match=next(iter(reversed(options)))):
            SparseSpectralTraining(layer, optimizer, **options)
    with pytest.raises(TypeError, match="optimizer"):
        SparseSpectralTraining(layer, "adam")


# ------------------------------------------------------------------------------------------------------------------ ReLoRA


def relora(model, **options):
    adapt(model, LoRA(rank=2))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05)
    return optimizer, ReLoRA(model, optimizer, **options)


def test_relora_keeps_the_function_and_begins_anew():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    optimizer, training = relora(model, interval=3)
    x = torch.randn(5, 9, dtype=torch.float64)
    for step in range(1, 4):
        optimizer.zero_grad()
        model(x).pow(2).sum().backward()
        optimizer.step()
        want = model(x).detach()
        first = [m.adapters["default"].lora_A.detach().clone() for m in model if isinstance(m, nn.Linear)]
        training.step()
        torch.testing.assert_close(model(x).detach(), want)
        assert (len(optimizer.state) == 0) == (step == 3)
    for m, a in zip((m for m in model if isinstance(m, nn.Linear)), first, strict=True):
        adapter = m.adapters["default"]
        assert not adapter.lora_B.any()
        assert not torch.equal(adapter.lora_A, a)
    optimizer.zero_grad()
    model(x).pow(2).sum().backward()
    # The saddle: nothing reaches A while B is zero, in ReLoRA alone.
    assert all(not m.adapters["default"].lora_A.grad.any() for m in model if isinstance(m, nn.Linear))


def test_relora_needs_lora():
    model = adapt(nn.Linear(6, 4), VeRA(rank=2))
    with pytest.raises(ValueError, match="not of LoRA"):
        ReLoRA(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1), interval=3)


def test_factor_rises_after_every_restart():
    training = PeriodicRestart(torch.optim.SGD([nn.Parameter(torch.ones(1))], 1.0), interval=5, warmup=3)
    assert [training.factor(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 0.25]


# ---------------------------------------------------------------------------------------------------- the claims' machinery


def test_baselines_train_no_fewer_numbers():
    counts = {}
    for method in ("SST", "LoRA", "ReLoRA", "full"):
        model = paper.HyperbolicGCN()
        paper.prepare(method, model, 0.01, 2, 5, r".*\.linear", 0)
        counts[method] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts["SST"] <= counts["LoRA"] == counts["ReLoRA"] < counts["full"]


def test_trees_are_trees():
    features, edges, held, none = paper.tree(3, 60)
    both = torch.cat([edges, held])
    assert features.shape == (60, paper.FEATURES)
    assert len(both) == 59
    reached = {0}
    for child, parent in sorted(both.tolist()):
        assert parent in reached
        assert child not in reached
        reached.add(child)
    pairs = {frozenset(p) for p in both.tolist()}
    assert len(none) == len(held)
    assert not any(frozenset(p) in pairs for p in none.tolist())


def test_a_layer_on_the_hyperboloid_trains_by_sst():
    from corollary.nn import LorentzLinear, lorentz_inner, lorentz_lift

    torch.manual_seed(0)
    layer = LorentzLinear(5, 4).double()
    x = lorentz_lift(torch.randn(6, 4, dtype=torch.float64))
    want = layer(x)
    to_sst(layer, 2)
    torch.testing.assert_close(layer(x), want)
    optimizer = torch.optim.Adam(layer.parameters(), 0.01)
    training = SparseSpectralTraining(layer, optimizer, interval=2)
    for _ in range(5):
        optimizer.zero_grad()
        layer(x)[:, 1].sum().backward()
        optimizer.step()
        training.step()
    y = layer(x)
    torch.testing.assert_close(lorentz_inner(y, y), -torch.ones_like(y[:, :1]))
    assert F.mse_loss(y, want) > 0

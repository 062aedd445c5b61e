"""Q-GaLore held to naive loops in numpy: its codes, its rounding, its trajectory, its schedule and its bytes."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from corollary.linalg import Quantized, dequantize, quantize
from corollary.optim import Int8Weight, ProjectedAdamW, QGaLore, low_rank_groups, quantize_weights_, state_bytes, weight_bytes
from corollary.optim.projectors import SVD
from corollary.papers.optim._low_rank import int4_basis, projected_oracle, round_trip
from corollary.testing.optimizer import separable

ROWS = st.lists(st.floats(-100, 100).filter(lambda x: x == 0 or abs(x) > 1e-6), min_size=1, max_size=12)


# ------------------------------------------------------------------------------------------------------------ quantization


@pytest.mark.parametrize("bits", [4, 8])
@settings(max_examples=40, deadline=None)
@given(row=ROWS, group_size=st.integers(1, 7))
def test_nearest_codes_equal_the_naive_loop(bits: int, row: list[float], group_size: int) -> None:
    x = torch.tensor(row, dtype=torch.float64)
    ours = dequantize(quantize(x, bits, group_size=group_size), x.shape, bits, group_size=group_size)
    np.testing.assert_allclose(ours.numpy(), round_trip(x.numpy(), bits, group_size), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bits", [4, 8])
@settings(max_examples=30, deadline=None)
@given(row=ROWS, seed=st.integers(0, 2**31 - 1))
def test_stochastic_rounding_is_unbiased_and_never_clips(bits: int, row: list[float], seed: int) -> None:
    draws, x = 4000, torch.tensor(row, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    # Each draw is a group of its own, so that all have the same step.
    stored = quantize(x.repeat(draws), bits, group_size=len(row), stochastic=True, generator=generator)
    values = dequantize(stored, (draws, len(row)), bits, group_size=len(row))
    step = float(stored.scale[0])
    assert float((values - x).abs().max()) <= step * (1 + 1e-9)  # one of the two neighbours: no extreme is pulled inwards
    assert float((values.mean(0) - x).abs().max()) <= 6 * step / 2 / draws**0.5


def test_stochastic_rounding_equals_the_naive_loop_given_its_noise() -> None:
    x = torch.randn(5, 60, dtype=torch.float64)
    stored = quantize(x, 8, group_size=64, stochastic=True, generator=torch.Generator().manual_seed(3))
    noise = torch.rand(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    np.testing.assert_allclose(
        dequantize(stored, x.shape, 8, group_size=64).numpy(), round_trip(x.numpy(), 8, 64, noise.numpy()), atol=1e-12
    )


def test_the_authors_arithmetic_agrees_where_groups_have_both_signs() -> None:
    """Their rule: z = clip(-round(min / s)), q = clip(round(w / s) + z), with the range floored at 1e-5."""
    w = torch.randn(8, 256, dtype=torch.float64)
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    s = (high - low).clamp(min=1e-5) / 15
    z = (-torch.round(low / s)).clamp(0, 15)
    theirs = (torch.clamp(torch.round(w / s) + z, 0, 15) - z) * s
    torch.testing.assert_close(dequantize(quantize(w, 4), w.shape, 4), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("x", "options", "error", "words"),
    [
        (torch.ones(3, dtype=torch.int64), {}, TypeError, "int64"),
        (torch.ones(3), {"bits": 3}, ValueError, "4 or 8"),
        (torch.ones(3), {"group_size": 0}, ValueError, "group_size"),
        (torch.ones(0), {}, ValueError, "entries"),
        (torch.tensor([1.0, float("nan")]), {}, ValueError, "finite"),
        (torch.tensor([1.0, float("inf")]), {}, ValueError, "finite"),
    ],
)
def test_what_cannot_be_quantized_is_refused(x: Tensor, options: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        quantize(x, **options)


# ------------------------------------------------------------------------------------------------------------- the weight


def _layer(dtype: torch.dtype = torch.float64, group_size: int = 16) -> tuple[nn.Linear, nn.Linear]:
    """A linear layer in 8 bits, and one with the same values in floating point."""
    held = quantize_weights_(nn.Linear(7, 5, dtype=dtype), group_size=group_size)
    plain = nn.Linear(7, 5, dtype=dtype)
    with torch.no_grad():
        plain.weight.copy_(held.weight.dequantize())
        plain.bias.copy_(held.bias)
    return held, plain


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,)])
def test_linear_and_its_gradients_equal_the_dense_ones(leading: tuple[int, ...]) -> None:
    held, plain = _layer()
    results = []
    for layer in (held, plain):
        x = torch.randn(*leading, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = layer(x)
        (out.sin() * out).sum().backward()
        results.append([out.detach(), x.grad, layer.weight.grad, layer.bias.grad])
    for ours, wanted in zip(*results, strict=True):
        assert type(ours) is Tensor
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


def test_second_derivatives_equal_the_dense_ones() -> None:
    held, plain = _layer()
    results = []
    for layer in (held, plain):
        x = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        first = torch.autograd.grad(layer(x).tanh().square().sum(), [x, layer.weight], create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), [x, layer.weight]))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)


def test_the_graph_keeps_codes_and_not_values() -> None:
    held, _ = _layer()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held(torch.randn(3, 7, dtype=torch.float64))
    assert [type(t) for t in kept if t.shape == (5, 7)] == [Int8Weight]


def test_operations_see_the_values_and_writes_are_stored() -> None:
    weight = Int8Weight.from_float(torch.randn(4, 8), group_size=8)
    values = weight.dequantize()
    assert type(weight + 1) is Tensor
    torch.testing.assert_close(weight @ torch.eye(8), values)
    torch.testing.assert_close(weight.T.sum(0), values.sum(1))
    codes = weight.codes
    assert weight.mul_(2) is weight
    step = float(weight.scale.max())
    assert float((weight - 2 * values).abs().max()) <= step * (1 + 1e-5)
    assert weight.codes is codes  # written in place
    torch._foreach_add_([weight], [torch.ones(4, 8)])
    assert float((weight - 2 * values - 1).abs().max()) <= step + float(weight.scale.max()) * (1 + 1e-5)
    assert not bool(weight.zero_().dequantize().any())


def test_writes_are_unbiased_and_nearest_ones_lose_small_updates() -> None:
    torch.manual_seed(0)
    start, writes = torch.randn(64, 256, dtype=torch.float64), 200
    weights = [Int8Weight.from_float(start, stochastic=flag) for flag in (True, False)]
    step = weights[0].scale.mean()
    update = 0.1 * step * torch.randn_like(start).sign()
    begins = [weight.dequantize() for weight in weights]
    for weight in weights:
        for _ in range(writes):
            weight.add_(update)
    moved = [float(((w - b) * update.sign()).mean() / (writes * 0.1 * step)) for w, b in zip(weights, begins, strict=True)]
    assert abs(moved[0] - 1) < 0.02
    assert abs(moved[1]) < 0.1


def test_copies_are_independent_and_keep_their_codes() -> None:
    held, _ = _layer()
    for other in (held.weight.clone(), copy.deepcopy(held).weight):
        assert isinstance(other, Int8Weight)
        assert torch.equal(other.codes, held.weight.codes)
        before = held.weight.dequantize()
        with torch.no_grad():
            other.zero_()
        assert torch.equal(held.weight.dequantize(), before)
    shared = held.weight.detach()
    with torch.no_grad():
        held.weight.zero_()
    assert not shared.requires_grad
    assert not bool(shared.dequantize().any())
    exact = Int8Weight.from_float(torch.randn(5, 7, dtype=torch.float64), group_size=16)
    with torch.no_grad():
        held.weight.copy_(exact)
    assert torch.equal(held.weight.codes, exact.codes)
    assert torch.equal(held.weight.dequantize(), exact.dequantize())


def test_a_write_between_forward_and_backward_is_noticed() -> None:
    held, _ = _layer()
    loss = held(torch.randn(2, 7, dtype=torch.float64, requires_grad=True)).sum()
    with torch.no_grad():
        held.weight.write_(torch.zeros(5, 7, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_state_dict_is_plain_and_survives_safetensors() -> None:
    held, _ = _layer(torch.float32)
    other, plain = _layer(torch.float32)
    x = torch.randn(3, 7)
    state = load(save(held.state_dict()))
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        "bias": torch.float32,
        "weight.codes": torch.uint8,
        "weight.scale": torch.float32,
        "weight.zero": torch.uint8,
    }
    assert torch.equal(state["weight.codes"], held.weight.codes.view(5, 7))
    other.load_state_dict(state)
    assert torch.equal(other(x), held(x))
    other.load_state_dict(plain.state_dict())  # of an unquantized model
    assert torch.equal(other.weight.codes, Int8Weight.from_float(plain.weight.detach(), group_size=16).codes)
    wrong = quantize_weights_(nn.Linear(7, 5), group_size=8)
    with pytest.raises(RuntimeError, match="3 groups"):
        wrong.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"saved with shape \(5, 7\)"):
        quantize_weights_(nn.Linear(8, 5), group_size=16).load_state_dict(state)


def test_moves_between_dtypes_keep_the_codes() -> None:
    held, _ = _layer(torch.float32)
    codes = held.weight.codes.clone()
    for dtype in (torch.bfloat16, torch.float64):
        held.to(dtype)
        assert held.weight.dtype == dtype
        assert isinstance(held.weight, Int8Weight)
        assert isinstance(held.weight, nn.Parameter)
        assert torch.equal(held.weight.codes, codes)
        assert held(torch.randn(2, 7, dtype=dtype)).dtype == dtype


def test_any_torch_optimizer_trains_it() -> None:
    torch.manual_seed(0)
    model = quantize_weights_(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)))
    x = torch.randn(32, 8)
    y = torch.stack([x.sum(1), x[:, 0] - x[:, 1]], 1).tanh()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 20
    assert isinstance(model[0].weight, Int8Weight)


def test_bad_weights_are_refused() -> None:
    weight = Int8Weight.from_float(torch.randn(2, 8), group_size=8)
    before = weight.dequantize()
    with pytest.raises(ValueError, match=r"shape \(2, 8\), not \(8, 2\)"):
        weight.write_(torch.zeros(8, 2))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            weight.write_(torch.full((2, 8), bad))
    assert torch.equal(weight.dequantize(), before)
    with pytest.raises(ValueError, match="needs 16 codes and 2 steps"):
        Int8Weight(
            Quantized(torch.zeros(15, dtype=torch.uint8), torch.ones(2), torch.zeros(2, dtype=torch.uint8)),
            (2, 8),
            group_size=8,
        )
    with pytest.raises(TypeError, match="int64"):
        F.linear(torch.ones(1, 8, dtype=torch.int64), weight)
    with pytest.raises(ValueError, match=r"\(1, 7\)"):
        F.linear(torch.ones(1, 7), weight)


def test_which_layers_are_converted() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mlp, self.head = nn.Embedding(10, 6), nn.Linear(6, 6), nn.Linear(6, 10, bias=False)
            self.head.weight = self.embed.weight

    model = quantize_weights_(Tied())
    assert isinstance(model.mlp.weight, Int8Weight)
    assert model.head.weight is model.embed.weight
    with pytest.raises(ValueError, match="'head', whose weight another module shares"):
        quantize_weights_(Tied(), ["head"])
    with pytest.raises(ValueError, match="no linear layer"):
        quantize_weights_(nn.Sequential(nn.LayerNorm(3)))
    with pytest.raises(ValueError, match="q_proj"):
        quantize_weights_(Tied(), ["q_proj"])
    frozen = nn.Linear(4, 4)
    frozen.weight.requires_grad_(False)
    assert not quantize_weights_(frozen).weight.requires_grad


# ---------------------------------------------------------------------------------------------------------- the optimizer


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "lazy_threshold": 0.0, "scale": 0.5}])
def test_trajectory_in_8_bits_equals_the_naive_loop(options: dict[str, Any]) -> None:
    """Every code of every step, with the rounding's noise drawn as documented."""
    problem, steps, size = separable(((9, 40), (12, 5), (6,))), 14, 256
    seed = 11

    def write(p: np.ndarray, index: int, memory: dict[str, Any]) -> np.ndarray:
        key = (seed, 1, index, memory["refreshes"], memory["age"])
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        noise = torch.rand(-(-p.size // size), size, dtype=torch.float64, generator=generator)
        return round_trip(p, 8, size, noise.numpy())

    held = [Int8Weight.from_float(torch.as_tensor(p)) if p.ndim > 1 else torch.as_tensor(p.copy()) for p in problem.start]
    params = [nn.Parameter(p) for p in held]
    start = tuple(p.detach().dequantize().numpy() if isinstance(p, Int8Weight) else p.detach().numpy().copy() for p in params)
    settings = {"lr": 0.05, "rank": 2, "update_proj_gap": 1, "scale": 1.0, "seed": seed, **options}
    lazy = (settings.pop("lazy_threshold", 0.4), 5, 2)
    path = projected_oracle(
        type(problem)(start, problem.loss, problem.gradient), steps, choose=int4_basis, write=write, lazy=lazy, **settings
    )
    optimizer = QGaLore(params, lazy_threshold=lazy[0], **settings)
    for arrays in path:
        optimizer.zero_grad()
        problem.loss([p.dequantize() if isinstance(p, Int8Weight) else p for p in params]).backward()
        optimizer.step()
        for p, wanted in zip(params, arrays, strict=True):
            ours = p.detach()
            np.testing.assert_allclose(ours.dequantize() if isinstance(ours, Int8Weight) else ours, wanted, rtol=0, atol=1e-9)
    assert optimizer.state[params[0]]["refreshes"] < steps


def test_plain_adam_on_8_bits_steps_as_on_floats_within_one_rounding() -> None:
    torch.manual_seed(0)
    held = nn.Parameter(Int8Weight.from_float(torch.randn(8, 256)))
    plain = nn.Parameter(held.detach().dequantize())
    for p in (held, plain):
        p.grad = torch.randn(8, 256, generator=torch.Generator().manual_seed(1))
        ProjectedAdamW([p], lr=0.1, weight_decay=0.1, rank=None, seed=0).step()
    assert isinstance(held, Int8Weight)
    gap = (held.detach().dequantize() - plain.detach()).abs().amax(1)
    assert bool((gap <= held.scale * (1 + 1e-5)).all())
    assert float(gap.max()) > 0


def _model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return quantize_weights_(nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6)), group_size=32)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, begin: int, steps: int) -> None:
    for number in range(begin, begin + steps):
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        (model(x) - x[:, :6].sin()).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("moments", ["keep", "reset"])
def test_resumes_bit_by_bit(moments: str) -> None:
    def make(model: nn.Module) -> ProjectedAdamW:
        groups = low_rank_groups(model, rank=2)
        return ProjectedAdamW(
            groups, lr=0.02, update_proj_gap=2, projector=SVD(bits=4), lazy_threshold=0.1, moments=moments, seed=5
        )

    whole = _model()
    optimizer = make(whole)
    _train(whole, optimizer, 0, 20)
    half = _model()
    first = make(half)
    _train(half, first, 0, 9)
    weights, state = load(save(half.state_dict())), copy.deepcopy(first.state_dict())
    json.dumps(state["param_groups"])
    torch.manual_seed(99)  # what is drawn from the global generator would show
    resumed = _model(seed=3)
    resumed.load_state_dict(weights)
    second = make(resumed)
    second.load_state_dict(state)
    _train(resumed, second, 9, 11)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.mark.parametrize("moments", ["keep", "reset"])
def test_no_two_writes_share_their_noise(moments: str) -> None:
    seeds = []

    class Watched(ProjectedAdamW):
        def _rounding(self, param: Tensor, group: Any) -> torch.Generator:
            generator = super()._rounding(param, group)
            seeds.append(generator.initial_seed())
            return generator

    model = _model()
    groups = [{"params": [model[0].weight]}, {"params": [model[2].weight], "rank": None}]
    _train(model, Watched(groups, rank=2, update_proj_gap=3, moments=moments, seed=0), 0, 20)
    assert len(seeds) == len(set(seeds)) == 40


def test_gap_grows_only_where_the_subspace_stays() -> None:
    """The rule of the paper's section 3.3, counted by hand: five similarities, then a doubling at every refresh."""
    torch.manual_seed(0)
    still, turning = nn.Parameter(torch.zeros(6, 10)), nn.Parameter(torch.zeros(40, 60))
    direction = torch.randn(6, 1) @ torch.randn(1, 10)
    optimizer = QGaLore([still, turning], lr=0.1, rank=1, update_proj_gap=2, seed=0)
    refreshed: dict[int, list[int]] = {0: [], 1: []}
    for step in range(64):
        still.grad, turning.grad = direction * (1 + step), torch.randn(40, 1) @ torch.randn(1, 60)
        before = [optimizer.state[p].get("refreshes", 0) for p in (still, turning)]
        optimizer.step()
        for i, p in enumerate((still, turning)):
            if optimizer.state[p]["refreshes"] > before[i]:
                refreshed[i].append(step)
    # gaps: 2 up to the sixth refresh at step 10, then 4, 8, 16, 32
    assert refreshed[0] == [0, 2, 4, 6, 8, 10, 12, 16, 32]
    assert refreshed[1] == list(range(0, 64, 2))
    assert float(optimizer.state[still]["similarities"].mean()) > 0.99


@settings(max_examples=25, deadline=None)
@given(m=st.integers(2, 40), n=st.integers(2, 40), rank=st.integers(1, 2), group=st.sampled_from([16, 64, 256]))
def test_bytes_equal_the_formula(m: int, n: int, rank: int, group: int) -> None:
    model = quantize_weights_(nn.Linear(n, m, bias=False), group_size=group)
    assert weight_bytes(model) == m * n + -(-m * n // group) * (4 + 1)
    optimizer = QGaLore(model.parameters(), rank=rank, projector=SVD(bits=4, group_size=group), seed=0)
    model(torch.randn(3, n)).square().sum().backward()
    optimizer.step()
    long, short = max(m, n), min(m, n)
    moments, codes, groups = 2 * 4 * long * rank, -(-short * rank // 2), -(-short * rank // group)
    assert state_bytes(optimizer) == moments + codes + groups * (4 + 1) + 5 * 4  # and five similarities


def test_weight_bytes_counts_shared_storage_once_and_refuses_others() -> None:
    embed, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight = embed.weight
    assert weight_bytes(nn.ModuleList([embed, head])) == 160
    assert weight_bytes(nn.BatchNorm1d(4)) == 4 * 4 * 4 + 8
    with pytest.raises(TypeError, match="Module"):
        weight_bytes([head])  # type: ignore[arg-type]


def test_bad_gradients_move_nothing() -> None:
    model = _model()
    optimizer = QGaLore([{"params": [model[0].weight, model[2].weight], "rank": 2}], lr=0.1, update_proj_gap=100, seed=0)
    _train(model, optimizer, 0, 2)
    before = copy.deepcopy(model.state_dict())
    steps = [optimizer.state[layer.weight]["step"] for layer in (model[0], model[2])]
    model[2].weight.grad[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"Int8Weight of shape \(6, 20\)"):
        optimizer.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert steps == [optimizer.state[layer.weight]["step"] for layer in (model[0], model[2])]
    model[2].weight.grad = None
    model[0].weight.grad = torch.zeros(20, 12).to_sparse()
    with pytest.raises(RuntimeError, match="dense"):
        optimizer.step()


def test_options_and_states_that_do_not_fit_are_refused() -> None:
    weight = _model()[0].weight
    for options, words in (
        ({"lazy_threshold": 1.5}, "lazy_threshold"),
        ({"lazy_factor": 0}, "lazy_factor"),
        ({"rank": 13}, "rank"),
        ({"projector": "svd4"}, "projector"),
    ):
        with pytest.raises(ValueError, match=words):
            QGaLore([weight], **{"rank": 2, **options})
    optimizer = QGaLore([weight], rank=2)
    weight.grad = torch.randn(20, 12)
    optimizer.step()
    other = QGaLore([nn.Parameter(torch.zeros(30, 12))], rank=2)
    with pytest.raises(ValueError, match="exp_avg"):
        other.load_state_dict(optimizer.state_dict())
    unquantized = QGaLore([nn.Parameter(torch.zeros(20, 12))], rank=2, projector=SVD())
    with pytest.raises(ValueError, match="basis"):
        unquantized.load_state_dict(optimizer.state_dict())

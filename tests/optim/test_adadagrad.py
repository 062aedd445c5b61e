"""The norm tests against sample-by-sample loops, AdaGrad-Norm against its formula, and training that resumes bit by bit."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from corollary.models import MLP
from corollary.optim import AdaGradNorm, AdaptiveBatchSampler, NormTest, norm_test


def _network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def _batch(n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator, dtype=torch.float64), torch.randint(3, (n,), generator=generator)


def _rows(model: nn.Module, x: Tensor, y: Tensor) -> np.ndarray[Any, Any]:
    """Gradients of the samples, one backward pass for each: (samples, parameters)."""
    rows = []
    for i in range(len(x)):
        model.zero_grad()
        cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()  # type: ignore[no-untyped-call]
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).numpy())
    model.zero_grad()
    return np.stack(rows)


def _required(rows: np.ndarray[Any, Any], kind: str, eta: float) -> float:
    """The smallest batch size for which the test would hold, with plain loops over entries."""
    b, d = rows.shape
    mean = [sum(rows[i, j] for i in range(b)) / b for j in range(d)]
    variance = [sum((rows[i, j] - mean[j]) ** 2 for i in range(b)) / (b - 1) for j in range(d)]
    square = sum(m * m for m in mean)
    if kind == "norm":
        return sum(variance) / (eta**2 * square)
    if kind == "coordinate":
        return max(v / (eta**2 * m * m) for v, m in zip(variance, mean, strict=True))
    inner = [sum(rows[i, j] * mean[j] for j in range(d)) for i in range(b)]
    return sum((s - sum(inner) / b) ** 2 for s in inner) / (b - 1) / (eta**2 * square**2)


@pytest.mark.parametrize("kind", ["norm", "coordinate", "inner_product"])
@pytest.mark.parametrize("cut", [(12,), (5, 7), (1, 1, 10)])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_it_equals_a_loop_over_samples(kind: str, cut: tuple[int, ...], chunk_size: int | None) -> None:
    model, (x, y) = _network(), _batch(12)
    rows = _rows(model, x, y)
    parts = list(zip(x.split(cut), y.split(cut), strict=True))
    found = norm_test(model, cross_entropy, parts, eta=0.7, kind=kind, chunk_size=chunk_size)
    wanted = _required(rows, kind, 0.7)
    assert found.required == pytest.approx(wanted, rel=1e-9)
    assert found.samples == 12
    assert found.passed == (wanted <= 12)
    assert found.batch_size == max(12, math.ceil(found.required))
    assert found.gradient_norm == pytest.approx(float(np.linalg.norm(rows.mean(0))), rel=1e-9)
    if kind == "norm":
        assert found.variance == pytest.approx(float(rows.var(0, ddof=1).sum()), rel=1e-9)


def test_each_parameter_is_what_it_would_be_alone() -> None:
    model, (x, y) = _network(), _batch(12)
    rows, at = _rows(model, x, y), 0
    for kind in ("norm", "coordinate", "inner_product"):
        found, at = norm_test(model, cross_entropy, [(x, y)], kind=kind), 0
        assert found.names == [name for name, _ in model.named_parameters()]
        for required, p in zip(found.layer_required, model.parameters(), strict=True):
            own = "norm" if kind == "inner_product" else kind
            assert required == pytest.approx(_required(rows[:, at : at + p.numel()], own, 0.5), rel=1e-9)
            at += p.numel()


@pytest.mark.parametrize("kind", ["norm", "coordinate", "inner_product"])
def test_micro_batches_stand_for_samples(kind: str) -> None:
    """With micro-batches of one sample it is the same test; of m, m times their variance takes the samples' place."""
    model, (x, y) = _network(), _batch(12)
    rows = _rows(model, x, y)
    sizes = [p.numel() for p in model.parameters()]
    for m in (1, 3):
        means = rows.reshape(-1, m, rows.shape[1]).mean(1)
        entries = [list(torch.from_numpy(row).split(sizes)) for row in means]
        found = NormTest.from_micro_batches(entries, m, eta=0.7, kind=kind)
        assert found.samples == 12
        assert found.required == pytest.approx(m * _required(means, kind, 0.7), rel=1e-9)
    by_name = [dict(zip("abcd", entry, strict=True)) for entry in entries]
    assert NormTest.from_micro_batches(by_name, 3, eta=0.7, kind=kind).required == found.required


def test_the_quantile_leaves_out_the_worst_coordinates() -> None:
    model, (x, y) = _network(), _batch(12)
    rows = _rows(model, x, y)
    alone = sorted(_required(rows[:, [j]], "coordinate", 0.5) for j in range(rows.shape[1]))
    for quantile in (0.1, 0.5, 0.9, 1.0):
        found = norm_test(model, cross_entropy, [(x, y)], kind="coordinate", quantile=quantile)
        assert found.required == pytest.approx(alone[math.ceil(quantile * len(alone)) - 1], rel=1e-9)


@given(seed=st.integers(0, 10**6), eta=st.floats(0.05, 3.0), scale=st.floats(0.01, 100.0))
@settings(max_examples=30, deadline=None)
def test_the_rule_depends_on_no_scale_and_shrinks_as_eta_squared(seed: int, eta: float, scale: float) -> None:
    model, (x, y) = _network(seed), _batch(9, seed)
    for kind in ("norm", "coordinate", "inner_product"):
        base = norm_test(model, cross_entropy, [(x, y)], eta=1.0, kind=kind)
        scaled = norm_test(model, lambda out, target: scale * cross_entropy(out, target), [(x, y)], eta=eta, kind=kind)
        assert scaled.required == pytest.approx(base.required / eta**2, rel=1e-6)
        assert scaled.batch_size >= 9


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_what_passes_the_coordinate_test_passes_the_norm_test_and_that_the_inner_product_test(seed: int) -> None:
    """Summing the coordinates' inequalities gives the norm test; Cauchy and Schwarz give the inner product from it."""
    model, (x, y) = _network(seed), _batch(9, seed)
    coordinate, norm, inner = (
        norm_test(model, cross_entropy, [(x, y)], kind=kind).required for kind in ("coordinate", "norm", "inner_product")
    )
    assert coordinate >= norm * (1 - 1e-9)
    assert norm >= inner * (1 - 1e-9)


def test_the_variance_estimates_what_the_theorem_bounds() -> None:
    """E‖g_B - ∇F‖² of batches drawn with replacement is the samples' variance over b, by the law of the mean."""
    model, (x, y) = _network(), _batch(60)
    rows = _rows(model, x, y)
    found = norm_test(model, cross_entropy, [(x, y)])
    rng, b = np.random.default_rng(0), 10
    draws = rows[rng.integers(0, 60, (4000, b))].mean(1)
    error = float(((draws - rows.mean(0)) ** 2).sum(1).mean())
    assert error == pytest.approx(found.variance * (59 / 60) / b, rel=0.05)


def test_equal_samples_need_no_larger_batch_and_no_gradient_the_largest() -> None:
    model, (x, y) = _network(), _batch(1)
    found = norm_test(model, cross_entropy, [(x.expand(4, -1), y.expand(4))])
    assert found.required <= 1e-12
    assert (found.passed, found.batch_size) == (True, 4)
    opposite = [[torch.tensor([1.0, 2.0])], [torch.tensor([-1.0, -2.0])]]
    found = NormTest.from_micro_batches(opposite, 1)
    assert (found.passed, found.required) == (False, 2.0**53)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == found.to_dict()
    still = [[torch.zeros(3)], [torch.zeros(3)]]
    assert NormTest.from_micro_batches(still, 1, kind="coordinate").passed


def test_small_and_large_gradients_neither_vanish_nor_overflow() -> None:
    for size in (1e-15, 1e15):
        entries = [[torch.tensor([1.0, 2.0]) * size], [torch.tensor([3.0, 2.0]) * size]]
        for kind in ("norm", "coordinate"):
            plain = NormTest.from_micro_batches([[e[0] / size] for e in entries], 4, kind=kind)
            assert NormTest.from_micro_batches(entries, 4, kind=kind).required == pytest.approx(plain.required, rel=1e-5)


def test_frozen_parameters_and_tied_ones_are_counted_once_or_not_at_all() -> None:
    model, (x, y) = _network(), _batch(8)
    for p in model[0].parameters():  # type: ignore[index]
        p.requires_grad_(False)
    found = norm_test(model, cross_entropy, [(x, y)])
    assert found.names == ["2.weight", "2.bias"]
    assert found.required == pytest.approx(_required(_rows(model, x, y), "norm", 0.5), rel=1e-9)


def test_the_model_may_have_dropout_and_batch_normalization_in_evaluation() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    x, y = _batch(8)
    with pytest.raises(ValueError, match=r"batch normalization in training mode \('1'\)"):
        norm_test(model, cross_entropy, [(x, y)])
    model[1].eval()
    assert norm_test(model, cross_entropy, [(x, y)]).required > 0
    with torch.no_grad():
        assert norm_test(model.eval(), cross_entropy, [(x, y)]).required > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eta": 0.0}, "'eta' must be above 0 and finite, not 0.0"),
        ({"eta": float("nan")}, "'eta' must be above 0"),
        ({"kind": "l1"}, "'kind' must be one of norm, coordinate, inner_product, not 'l1'"),
        ({"quantile": 0.0}, r"'quantile' must be in \(0, 1\], not 0.0"),
        ({"chunk_size": 0}, "'chunk_size' must be at least 1, not 0"),
    ],
)
def test_a_bad_option_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        norm_test(_network(), cross_entropy, [_batch(4)], **options)


def test_bad_data_is_named() -> None:
    model, (x, y) = _network(), _batch(4)
    for parts in ([], [(x[:1], y[:1])], [(x[:0], y[:0])]):
        with pytest.raises(ValueError, match=r"holds [01] samples"):
            norm_test(model, cross_entropy, parts)
    with pytest.raises(ValueError, match=r"inputs \(4, 4\) and targets \(3,\)"):
        norm_test(model, cross_entropy, [(x, y[:3])])
    with pytest.raises(TypeError, match="pairs of tensors"):
        norm_test(model, cross_entropy, [x])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="must be finite"):
        norm_test(model, cross_entropy, [(x * float("nan"), y)])
    with pytest.raises(ValueError, match="reads its data twice"):
        norm_test(model, cross_entropy, iter([(x, y)]), kind="inner_product")
    with pytest.raises(ValueError, match="no parameter that requires gradients"):
        norm_test(nn.Tanh(), cross_entropy, [(x, y)])
    with pytest.raises(ValueError, match="holds 1 micro-batches"):
        NormTest.from_micro_batches([[x]], 4)
    with pytest.raises(ValueError, match="other tensors or shapes"):
        NormTest.from_micro_batches([[x], [x[:2]]], 4)
    with pytest.raises(ValueError, match="'micro_batch_size' must be an integer of at least 1, not 0"):
        NormTest.from_micro_batches([[x], [x]], 0)


# ------------------------------------------------------------------------------------------------------------ the optimizer


def test_three_steps_by_hand() -> None:
    """From b₀² = 7 and gradients (3, 0), (0, 4), (4, 4): b² = 16, 32, 64."""
    theta = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = AdaGradNorm([theta], lr=2.0, initial_accumulator_value=7.0, eps=0.0)
    for gradient in ((3.0, 0.0), (0.0, 4.0), (4.0, 4.0)):
        theta.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    torch.testing.assert_close(theta.detach(), torch.tensor([-1.5 - 1.0, -8 / 32**0.5 - 1.0], dtype=torch.float64))
    assert optimizer.state[theta]["sum"].item() == pytest.approx(57)


@given(st.lists(st.floats(-50, 50), min_size=3, max_size=3), st.floats(0.01, 10))
@settings(max_examples=50, deadline=None)
def test_steps_depend_on_the_gradient_not_on_how_it_is_cut_into_parameters(gradient: list[float], lr: float) -> None:
    whole = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    parts = [nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (1, 2)]
    one, two = AdaGradNorm([whole], lr=lr), AdaGradNorm([{"params": parts[:1]}, {"params": parts[1:]}], lr=lr)
    for sign in (1, -1, 1):
        g = sign * torch.tensor(gradient, dtype=torch.float64)
        whole.grad, parts[0].grad, parts[1].grad = g, g[:1].clone(), g[1:].clone()
        before = whole.detach().clone()
        one.step()
        two.step()
        assert float((whole.detach() - before).norm()) <= lr * (1 + 1e-9)  # a step is never longer than lr
    torch.testing.assert_close(torch.cat([p.detach() for p in parts]), whole.detach(), rtol=1e-12, atol=1e-12)


def test_a_parameter_that_rests_keeps_its_share() -> None:
    a, b = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    optimizer = AdaGradNorm([a, b], lr=1.0, initial_accumulator_value=1.0, eps=0.0)
    a.grad, b.grad = torch.tensor([2.0]).double(), torch.tensor([2.0]).double()
    optimizer.step()
    a.grad = None
    b.grad = torch.tensor([4.0]).double()
    optimizer.step()
    assert b.item() == pytest.approx(-2 / 3 - 4 / 5)


def test_half_precision_keeps_its_sum_through_a_checkpoint() -> None:
    param = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = AdaGradNorm([param])
    for _ in range(300):  # in bfloat16 the sum would stop growing at 256
        param.grad = torch.ones(3, dtype=torch.bfloat16)
        optimizer.step()
    assert optimizer.state[param]["sum"].item() == pytest.approx(900, rel=1e-6)
    other = AdaGradNorm([nn.Parameter(param.detach().clone())])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    loaded = next(iter(other.state.values()))["sum"]
    assert loaded.dtype == torch.float32
    assert loaded.item() == optimizer.state[param]["sum"].item()


def test_a_bad_gradient_moves_nothing() -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = AdaGradNorm(params)
    for bad in (float("nan"), float("inf")):
        params[0].grad, params[1].grad = torch.ones(2), torch.tensor([1.0, bad])
        with pytest.raises(RuntimeError, match=r"gradient 1, .* not finite"):
            optimizer.step()
    assert all((p == 1).all() for p in params)
    assert not optimizer.state


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -0.1}, "'lr' must be at least 0, not -0.1"),
        ({"initial_accumulator_value": 0.0}, "'initial_accumulator_value' must be above 0 and finite, not 0.0"),
        ({"eps": -1.0}, "'eps' must be at least 0, not -1.0"),
        ({"weight_decay": -1.0}, "'weight_decay' must be at least 0, not -1.0"),
    ],
)
def test_a_bad_hyperparameter_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AdaGradNorm([nn.Parameter(torch.ones(2))], **options)


def test_groups_share_their_start_and_states_their_shape() -> None:
    optimizer = AdaGradNorm([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="'initial_accumulator_value' must be the same in every group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "initial_accumulator_value": 2.0})
    assert len(optimizer.param_groups) == 1
    state = optimizer.state_dict() | {"state": {0: {"sum": torch.ones(2)}}}
    with pytest.raises(ValueError, match=r"state 'sum' has shape \(2,\)"):
        optimizer.load_state_dict(state)


# --------------------------------------------------------------------------------------------------------------- together


class _Run:
    """A training run with everything that a checkpoint holds."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(200, 6, generator=generator)
        self.data = TensorDataset(x, torch.randint(3, (200,), generator=generator))
        self.model = MLP(6, [8], 3)
        self.optimizer: torch.optim.Optimizer = (
            AdaGradNorm(self.model.parameters()) if kind == "norm" else torch.optim.Adagrad(self.model.parameters(), lr=0.1)
        )
        self.sampler = AdaptiveBatchSampler(self.data, 4, seed=3)
        self.kind = kind
        self.sizes: list[int] = []

    def train(self, batches: int) -> None:
        loader = DataLoader(self.data, batch_sampler=self.sampler)
        while True:
            for x, y in loader:
                self.optimizer.zero_grad()
                cross_entropy(self.model(x), y).backward()  # type: ignore[no-untyped-call]
                if len(x) > 1:
                    found = norm_test(self.model, cross_entropy, [(x, y)], eta=0.8, kind=self.kind, quantile=0.5)
                    self.sampler.grow(min(found.batch_size, self.sampler.batch_size + 3))
                self.optimizer.step()
                self.sizes.append(len(x))
                if len(self.sizes) == batches:
                    return

    def state(self) -> dict[str, Any]:
        return {
            "model": copy.deepcopy(self.model.state_dict()),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "sampler": json.dumps(self.sampler.state_dict()),
        }


@pytest.mark.parametrize("kind", ["norm", "coordinate"])
@pytest.mark.parametrize("stop", [5, 17])
def test_training_resumes_bit_by_bit_in_the_middle_of_an_epoch(kind: str, stop: int) -> None:
    whole = _Run(kind)
    whole.train(40)
    first = _Run(kind)
    first.train(stop)
    state = first.state()
    rest = _Run(kind)
    rest.model.load_state_dict(state["model"])
    rest.optimizer.load_state_dict(state["optimizer"])
    rest.sampler.load_state_dict(json.loads(state["sampler"]))
    rest.train(40 - stop)
    assert first.sizes + rest.sizes == whole.sizes
    assert whole.sizes[-1] > 4
    for ours, wanted in zip(rest.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, wanted)


def test_the_sampler_grows_but_does_not_shrink() -> None:
    sampler = AdaptiveBatchSampler(range(100), 10, 50, seed=0)
    for wanted, size in ((5, 10), (30, 30), (20, 30), (10**9, 50)):
        sampler.grow(wanted)
        assert sampler.batch_size == size
    with pytest.raises(ValueError, match="'batch_size' must be an integer of at least 1, not 0"):
        sampler.grow(0)


def test_epochs_can_be_chosen_and_seeds_drawn() -> None:
    sampler = AdaptiveBatchSampler(range(30), 7, seed=5)
    epochs = [list(sampler) for _ in range(3)]
    assert sampler.epoch == 2
    sampler.set_epoch(1)
    assert list(sampler) == epochs[1]
    torch.manual_seed(0)
    seeds = [AdaptiveBatchSampler(range(3), 1).seed for _ in range(2)]
    torch.manual_seed(0)
    assert AdaptiveBatchSampler(range(3), 1).seed == seeds[0] != seeds[1]


def test_a_finished_epoch_resumes_empty() -> None:
    sampler = AdaptiveBatchSampler(range(10), 4, seed=0, drop_last=True)
    list(sampler)
    other = AdaptiveBatchSampler(range(10), 4, seed=1)
    other.load_state_dict(sampler.state_dict())
    other.batch_size = 1  # two samples were dropped and stay so
    assert len(other) == 0
    assert list(other) == []
    other.batch_size = sampler.batch_size = 4
    assert list(other) == list(sampler)


def test_bad_states_and_data_are_named() -> None:
    sampler = AdaptiveBatchSampler(range(10), 4, seed=0)
    with pytest.raises(ValueError, match="'state_dict' is that of 11 samples; this sampler has 10"):
        sampler.load_state_dict(AdaptiveBatchSampler(range(11), 4, seed=0).state_dict())
    with pytest.raises(TypeError, match="'data_source' must have a length; generator has none"):
        AdaptiveBatchSampler((i for i in range(3)), 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'seen' must be an integer from 0 to 0, not 1"):
        sampler.state_dict(seen=1)


def test_a_regression_needs_no_special_loss() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 1), torch.randn(16, 3), torch.randn(16, 1)
    found = norm_test(model, mse_loss, [(x, y)])
    with torch.no_grad():
        error = 2 * (model(x) - y)
        rows = torch.cat([error * x, error], 1).numpy()
    assert found.required == pytest.approx(_required(rows, "norm", 0.5), rel=1e-4)

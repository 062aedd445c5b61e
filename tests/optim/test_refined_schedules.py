"""Refined schedules against naive sums and windows, the theorem's inequality, and closed forms; the recorder against autograd."""

from __future__ import annotations

import copy
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.optim import Optimizer

from corollary.optim import GradNormRecorder, JointOptimizer, LinearDecay, RefinedSchedule, refine_schedule
from corollary.papers.optim import refined_schedules as claims

Array = NDArray[np.float64]


# ------------------------------------------------------------------------------------------------------ refine_schedule


def naive_schedule(norms: list[float], power: int, smoothing: float) -> list[float]:
    """Every median over a window gathered index by index, every sum in full: O(T²)."""
    n = len(norms)
    width = 2 * (int(smoothing * n) // 2) + 1

    def at(i: int) -> float:
        if i < 0:
            return norms[0]
        i %= 2 * (n - 1)
        return norms[i if i < n else 2 * (n - 1) - i]

    smooth = [statistics.median(at(t + k) for k in range(-(width // 2), width // 2 + 1)) for t in range(n)]
    eta = [smooth[t] ** -power * math.fsum(smooth[s] ** -power for s in range(t + 1, n)) for t in range(n)]
    return [e / max(eta) for e in eta]


norms_lists = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=60)


@given(norms=norms_lists, norm=st.sampled_from(["l1", "l2"]), smoothing=st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_it_equals_the_naive_sums(norms: list[float], norm: Any, smoothing: float) -> None:
    ours = refine_schedule(norms, norm=norm, smoothing=smoothing)
    wanted = naive_schedule(norms, {"l1": 1, "l2": 2}[norm], smoothing)
    torch.testing.assert_close(ours, torch.tensor(wanted, dtype=torch.float64), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("steps", [200, 1001])
def test_it_equals_the_authors_arithmetic_at_their_smoothing(steps: int) -> None:
    """Their padding is two windows of mirror image on the right, and repetition of the edge where a window leaves that."""
    rng = np.random.default_rng(0)
    norms = np.exp(np.cumsum(rng.normal(size=steps)) / 20) * rng.uniform(0.5, 2, size=steps)
    width = 2 * (int(0.1 * steps) // 2) + 1
    padded = np.concatenate([norms, norms[-2 : -2 - 2 * width : -1]])
    smooth = np.array([np.median(padded[np.maximum(np.arange(t - width // 2, t + width // 2 + 1), 0)]) for t in range(steps)])
    weights = 1 / (smooth * smooth)
    sums = [weights[t + 1 :].sum() / weights.sum() for t in range(steps)]
    wanted = weights * sums
    np.testing.assert_allclose(refine_schedule(torch.from_numpy(norms)).numpy(), wanted / wanted.max(), rtol=1e-10, atol=1e-15)


@given(norm=st.sampled_from(["l1", "l2"]), value=st.floats(1e-9, 1e9), steps=st.integers(2, 400), smoothing=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_equal_norms_give_linear_decay(norm: Any, value: float, steps: int, smoothing: float) -> None:
    multipliers = refine_schedule([value] * steps, norm=norm, smoothing=smoothing)
    line = torch.arange(steps - 1, -1, -1, dtype=torch.float64) / (steps - 1)
    torch.testing.assert_close(multipliers, line, rtol=1e-12, atol=1e-15)


@given(norms=norms_lists, scale=st.floats(1e-6, 1e6), norm=st.sampled_from(["l1", "l2"]))
@settings(max_examples=60, deadline=None)
def test_the_norms_scale_does_not_matter(norms: list[float], scale: float, norm: Any) -> None:
    scaled = refine_schedule([scale * g for g in norms], norm=norm)
    torch.testing.assert_close(scaled, refine_schedule(norms, norm=norm), rtol=1e-9, atol=1e-12)


@given(norms=norms_lists, norm=st.sampled_from(["l1", "l2"]), smoothing=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_multipliers_lie_between_0_and_a_peak_of_1_and_end_in_0(norms: list[float], norm: Any, smoothing: float) -> None:
    multipliers = refine_schedule(norms, norm=norm, smoothing=smoothing)
    assert multipliers.shape == (len(norms),)
    assert multipliers.min() == multipliers[-1] == 0
    assert multipliers.max() == 1


def test_growing_norms_decay_faster_than_linear_and_falling_ones_later() -> None:
    """Closed form in the limit of many steps for G = c + t, l1: w = 1/G, m ∝ log(G(T)/G(t)) / G(t)."""
    steps, offset = 20_000, 0.5
    grow = np.linspace(offset, offset + 1, steps)
    limit = np.log((offset + 1) / grow) / grow
    ours = refine_schedule(torch.from_numpy(grow), norm="l1", smoothing=0.0).numpy()
    np.testing.assert_allclose(ours, limit / limit.max(), atol=2e-4)
    line = np.linspace(1, 0, steps)
    assert (ours[1:-1] < line[1:-1]).all()
    falling = refine_schedule(torch.from_numpy(grow[::-1].copy()), smoothing=0.0).numpy()
    assert falling[0] < 0.9
    assert (falling[steps // 2 : -1] > line[steps // 2 : -1]).all()


def test_one_outlier_vanishes_in_the_median() -> None:
    norms = [1.0] * 50
    norms[20] = 1e6
    torch.testing.assert_close(refine_schedule(norms), refine_schedule([1.0] * 50))
    assert refine_schedule(norms, smoothing=0.0)[20] < 1e-11


def test_extreme_norms_neither_overflow_nor_vanish() -> None:
    for value in (1e-300, 1e300):
        torch.testing.assert_close(refine_schedule([value] * 10), refine_schedule([1.0] * 10))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_device_are_the_norms(dtype: torch.dtype) -> None:
    norms = torch.linspace(1, 3, 30).to(dtype).requires_grad_()
    multipliers = refine_schedule(norms)
    assert multipliers.dtype == dtype
    assert multipliers.device == norms.device
    assert not multipliers.requires_grad


@pytest.mark.parametrize(
    ("norms", "options", "error", "words"),
    [
        ([1.0], {}, ValueError, r"'grad_norms' has shape \(1,\); allowed: \(T,\) with T at least 2"),
        ([], {}, ValueError, r"'grad_norms' has shape \(0,\)"),
        (torch.ones(2, 2), {}, ValueError, r"'grad_norms' has shape \(2, 2\)"),
        (torch.ones(4, dtype=torch.int64), {}, TypeError, "'grad_norms' is torch.int64; allowed: floating"),
        (torch.ones(4, dtype=torch.complex64), {}, TypeError, "'grad_norms' is torch.complex64"),
        ([1.0, math.nan], {}, ValueError, r"'grad_norms' must be finite, not nan \(step 1\)"),
        ([math.inf, 1.0], {}, ValueError, r"'grad_norms' must be finite, not inf \(step 0\)"),
        ([1.0, 2.0, -0.5], {}, ValueError, r"'grad_norms' must be at least 0, not -0.5 \(step 2\)"),
        ([1.0] * 30 + [0.0] * 30, {}, ValueError, r"'grad_norms' is 0 in the median around step 30"),
        ([1e-200, 1e200, 1e-200], {"smoothing": 1.5}, ValueError, r"'smoothing' must be in \[0, 1\], not 1.5"),
        ([1e200, 1e200, 1e-200], {"smoothing": 0.0}, ValueError, "'grad_norms' span too wide a range"),
        ([1.0, 1.0], {"smoothing": math.nan}, ValueError, "'smoothing' must be in"),
        ([1.0, 1.0], {"norm": "linf"}, ValueError, "'norm' is 'linf'; allowed: l1, l2"),
    ],
)
def test_bad_norms_are_named(norms: Any, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        refine_schedule(norms, **options)


# ----------------------------------------------------------------------------------------------------- the theory behind it


def _piecewise(rng: np.random.Generator, pieces: int, dim: int) -> tuple[Callable[[Array], float], Callable[[Array], Array]]:
    """A convex function max_i a_i·x + b_i and one of its subgradients."""
    a, b = rng.normal(size=(pieces, dim)), rng.normal(size=pieces)
    return lambda x: float((a @ x + b).max()), lambda x: a[int((a @ x + b).argmax())]


@given(seed=st.integers(0, 2**31 - 1), steps=st.integers(2, 30), dim=st.integers(1, 6), pieces=st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_refined_steps_keep_the_bound_on_the_last_iterate(seed: int, steps: int, dim: int, pieces: int) -> None:
    """f(x_T) - f(u) ≤ (D² + Σ w² G²) / (2 Σ w) for any positive w, hence for the schedule's own, whatever u.

    The bound holds for η_t = w_t Σ_{s>t} w_s / Σ w. With w = c / G², η is c² · unscaled multipliers / Σ w, and G must be the norms
    that the run itself shows: the run is repeated until they are, as the paper repeats runs.
    """
    rng = np.random.default_rng(seed)
    value, subgradient = _piecewise(rng, pieces, dim)
    start, u = rng.normal(size=dim), rng.normal(size=dim)
    norms, scale = np.ones(steps), rng.uniform(0.1, 2.0)
    for _ in range(3):
        multipliers = refine_schedule(torch.from_numpy(norms), smoothing=0.0).numpy()
        weights = scale / norms**2
        # Rates from the multipliers: their scale follows from the first one, w_1 (Σ w - w_1) / Σ w.
        peak = weights[0] * (weights.sum() - weights[0]) / weights.sum() / multipliers[0]
        x, path, seen = start.copy(), [], []
        for t in range(steps):
            path.append(x.copy())
            g = subgradient(x)
            seen.append(float(np.linalg.norm(g)))
            x = x - peak * multipliers[t] * g
        bound = (float((start - u) @ (start - u)) + float((weights**2 * np.square(seen)).sum())) / (2 * weights.sum())
        assert value(path[-1]) - value(u) <= bound + 1e-9 * max(1, abs(bound))
        norms = np.array(seen)


@given(seed=st.integers(0, 2**31 - 1), steps=st.integers(2, 60), dim=st.integers(1, 6), pieces=st.integers(2, 10))
@settings(max_examples=80, deadline=None)
def test_linear_decay_ends_within_the_bound_of_its_docstring(seed: int, steps: int, dim: int, pieces: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(pieces, dim))
    a[0] = -a[1:].sum(0)  # 0 lies in the hull of the slopes, so that the minimum is there: max_i a_i·x ≥ 0 = f(0)
    start = rng.normal(size=dim)
    distance, largest = float(np.linalg.norm(start)), float(np.linalg.norm(a, axis=1).max())
    x, slopes = nn.Parameter(torch.from_numpy(start)), torch.from_numpy(a)
    optimizer = torch.optim.SGD([x], lr=distance / (largest * math.sqrt(steps)))
    schedule = LinearDecay(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (slopes @ x).max().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    assert float((slopes @ x.detach()).max()) <= distance * largest / math.sqrt(steps) * (1 + 1e-12)


# ------------------------------------------------------------------------------------------------------------- schedules


def _sgd(*rates: float) -> Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2))], "lr": rate} for rate in rates or (1.0,)])


def _run(schedule: Any, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (2, 1), (10, 0), (10, 3), (7, 6)])
def test_linear_decay_is_its_formula(total: int, warmup: int) -> None:
    wanted = [(t + 1) / warmup for t in range(warmup)] + [1 - (t - warmup) / (total - warmup) for t in range(warmup, total)]
    assert _run(LinearDecay(_sgd(), total, warmup), total + 3) == pytest.approx([*wanted, 0, 0, 0], abs=1e-15)


def test_linear_decay_equals_torchs_linear_lr() -> None:
    theirs = torch.optim.lr_scheduler.LinearLR(_sgd(0.3), start_factor=1.0, end_factor=0.0, total_iters=20)
    assert _run(LinearDecay(_sgd(0.3), 20), 25) == pytest.approx(_run(theirs, 25), abs=1e-15)


@pytest.mark.parametrize("count", [2, 7, 100])
@pytest.mark.parametrize("total", [None, 1, 30, 451])
def test_multipliers_of_equal_norms_are_linear_decay(count: int, total: int | None) -> None:
    refined = RefinedSchedule(_sgd(0.3), refine_schedule([2.0] * count), total)
    steps = count if total is None else total
    assert _run(refined, steps + 2) == pytest.approx(_run(LinearDecay(_sgd(0.3), steps), steps + 2), rel=1e-12, abs=1e-15)


def test_refined_schedule_takes_the_papers_own_points_at_one_step_less() -> None:
    points = [0.1, 1.0, 0.6, 0.2, 0.0]
    assert _run(RefinedSchedule(_sgd(2.0), points, total_steps=4), 7) == pytest.approx([0.2, 2.0, 1.2, 0.4, 0, 0, 0])


def test_refined_schedule_stretches_between_its_points() -> None:
    assert _run(RefinedSchedule(_sgd(), torch.tensor([0.0, 1.0, 0.5]), total_steps=4), 7) == [0, 0.5, 1, 0.75, 0.5, 0.5, 0.5]


def test_a_loaded_state_brings_its_own_length() -> None:
    old, new = RefinedSchedule(_sgd(), [1.0, 0.5, 0.0], 6), RefinedSchedule(_sgd(), [1.0, 0.0], 3)
    _run(old, 2)
    new.load_state_dict(json.loads(json.dumps(old.state_dict())))
    assert _run(new, 6)[1:] == _run(old, 6)[1:]


def test_a_loaded_state_is_not_shared() -> None:
    old = LinearDecay(_sgd(), 10)
    state = old.state_dict()
    new = LinearDecay(_sgd(), 10)
    new.load_state_dict(state)
    new.base_lrs[0] = 7.0
    assert old.base_lrs == [1.0]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: LinearDecay(_sgd(), 0), ValueError, "'total_steps' must be at least 1, not 0"),
        (lambda: LinearDecay(_sgd(), 5, 5), ValueError, r"'warmup_steps' must be in \[0, total_steps\), here \[0, 5\), not 5"),
        (lambda: LinearDecay(_sgd(), 5, -1), ValueError, "'warmup_steps' must be in"),
        (lambda: LinearDecay(_sgd(), 5.5), TypeError, "'total_steps' must be a whole number, not 5.5"),  # type: ignore[arg-type]
        (lambda: RefinedSchedule(_sgd(), [1, 0], 2.5), TypeError, "'total_steps' must be a whole"),  # type: ignore[arg-type]
        (lambda: RefinedSchedule(_sgd(), [1.0]), ValueError, r"'multipliers' has shape \(1,\); allowed: \(n,\)"),
        (lambda: RefinedSchedule(_sgd(), torch.ones(2, 2)), ValueError, r"'multipliers' has shape \(2, 2\)"),
        (lambda: RefinedSchedule(_sgd(), [1.0, math.nan]), ValueError, r"must be finite and at least 0, not nan \(entry 1\)"),
        (lambda: RefinedSchedule(_sgd(), [1.0, -1.0, 0.0]), ValueError, r"not -1.0 \(entry 1\)"),
        (lambda: RefinedSchedule(_sgd(), [1.0, 0.0], 0), ValueError, "'total_steps' must be at least 1, not 0"),
    ],
)
def test_bad_schedules_are_named(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


# -------------------------------------------------------------------------------------------------------------- recorder


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_recorded_norms_are_those_of_the_gradients(norm: Any, make: Any) -> None:
    net = _network().double()
    optimizer = make(net.parameters(), lr=0.1)
    wanted = []
    with GradNormRecorder(optimizer, norm) as recorder:
        for _ in range(5):
            optimizer.zero_grad()
            loss = net(torch.randn(3, 6, dtype=torch.float64)).square().sum()
            entries = [
                v for g in torch.autograd.grad(loss, list(net.parameters()), retain_graph=True) for v in g.flatten().tolist()
            ]
            wanted.append(sum(abs(v) for v in entries) if norm == "l1" else math.sqrt(sum(v * v for v in entries)))
            loss.backward()
            optimizer.step()
    assert recorder.norms.tolist() == pytest.approx(wanted, rel=1e-12)
    optimizer.step()
    assert len(recorder.norms) == 5


def test_closures_count_by_their_last_gradients() -> None:
    x = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.SGD([x], lr=0.5)
    recorder = GradNormRecorder(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = x.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    assert recorder.norms.tolist() == [10.0]


def test_sparse_mixed_and_joint_gradients_count_whole() -> None:
    table = nn.Parameter(torch.ones(4, 2))
    wide, half = nn.Parameter(torch.ones(2, dtype=torch.float64)), nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = JointOptimizer([torch.optim.SGD([table], lr=0.1), torch.optim.SGD([wide, half], lr=0.1)])
    recorder = GradNormRecorder(optimizer)
    looked_up = nn.functional.embedding(torch.tensor([1, 1, 3]), table, sparse=True)
    (looked_up.sum() + 2 * wide.sum() + 3 * half.sum()).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    # Row 1 was looked up twice: entries 2, 2, 1, 1; then 2, 2 and 3, 3, 3.
    assert recorder.norms.tolist() == pytest.approx([math.sqrt(4 + 4 + 1 + 1 + 8 + 27)], rel=1e-6)


def test_half_precision_is_added_up_in_float32() -> None:
    p = nn.Parameter(torch.zeros(100_000, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([p], lr=0.1)
    recorder = GradNormRecorder(optimizer, "l1")
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert recorder.norms.item() == pytest.approx(100_000, rel=1e-6)


def test_a_step_without_gradients_is_not_recorded() -> None:
    optimizer = _sgd()
    recorder = GradNormRecorder(optimizer)
    optimizer.step()
    assert recorder.norms.shape == (0,)


def test_a_nan_gradient_is_recorded_and_then_refused() -> None:
    optimizer = _sgd()
    recorder = GradNormRecorder(optimizer)
    for entry in (1.0, math.nan):
        optimizer.param_groups[0]["params"][0].grad = torch.full((2,), entry)
        optimizer.step()
    assert recorder.norms.isnan().tolist() == [False, True]
    with pytest.raises(ValueError, match=r"must be finite, not nan \(step 1\)"):
        refine_schedule(recorder.norms)


def test_a_recorder_goes_on_from_its_state() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=0.25)
    recorders = [GradNormRecorder(optimizer, "l1")]
    for step in range(4):
        if step == 2:
            recorders.append(GradNormRecorder(optimizer, "l1"))
            recorders[1].load_state_dict(copy.deepcopy(recorders[0].state_dict()))
        p.grad = torch.full((2,), float(step + 1))
        optimizer.step()
    assert recorders[0].norms.tolist() == recorders[1].norms.tolist() == [2, 4, 6, 8]
    with pytest.raises(ValueError, match="holds l1 norms; this recorder takes l2"):
        GradNormRecorder(optimizer).load_state_dict(recorders[0].state_dict())


def test_a_bad_recorder_is_named() -> None:
    with pytest.raises(ValueError, match="'norm' is 'max'; allowed: l1, l2"):
        GradNormRecorder(_sgd(), "max")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="'optimizer' must be a torch optimizer, not list"):
        GradNormRecorder([])  # type: ignore[arg-type]


def _sharded_worker(rank: int, store: str, results: str) -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        alone = _network()
        sharded = copy.deepcopy(alone)
        fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
        x = torch.arange(48.0).view(8, 6) / 48
        found = []
        for net, rows in ((alone, slice(0, 8)), (sharded, slice(4 * rank, 4 * rank + 4))):
            for norm in ("l1", "l2"):
                optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
                with GradNormRecorder(optimizer, norm) as recorder:  # type: ignore[arg-type]
                    net.zero_grad()
                    net(x[rows]).square().mean().backward()
                    optimizer.step()
                found.append(recorder.norms.item())
        Path(f"{results}{rank}").write_text(json.dumps(found))
    finally:
        distributed.destroy_process_group()


def test_sharded_over_two_processes_each_records_the_whole_norm(tmp_path: Path) -> None:
    spawn(_sharded_worker, (f"file://{tmp_path / 'store'}", str(tmp_path / "norms")), nprocs=2)  # type: ignore[no-untyped-call]
    for rank in range(2):
        *alone, l1, l2 = json.loads((tmp_path / f"norms{rank}").read_text())
        assert [l1, l2] == pytest.approx(alone, rel=1e-5)


# ----------------------------------------------------------------------------- the trainers that the claims' evidence is from


def test_the_logistic_runs_are_those_of_torchs_sgd() -> None:
    seeds, steps, rates = (3, 4), 20, [0.1, 0.5]
    multipliers = claims._multipliers("linear", steps, 0)
    excess, norms = claims._train_logistic("iris, logistic", multipliers.expand(2, -1), torch.tensor(rates), seeds)
    for i, rate in enumerate(rates):
        for j, seed in enumerate(seeds):
            x, y, *_ = claims.PROBLEMS["iris, logistic"].data(seed)
            net = nn.Linear(4, 3)
            for p in net.parameters():
                nn.init.zeros_(p)
            optimizer = torch.optim.SGD(net.parameters(), lr=rate, weight_decay=claims.PENALTY)
            schedule = LinearDecay(optimizer, steps)
            generator = torch.Generator().manual_seed(seed)
            for step in range(steps):
                rows = torch.randint(len(x), (4,), generator=generator)
                optimizer.zero_grad()
                penalty = claims.PENALTY / 2 * sum(p.square().sum() for p in net.parameters())
                value = nn.functional.cross_entropy(net(x[rows]), y[rows])
                whole = torch.autograd.grad(value + penalty, list(net.parameters()))
                assert norms[i, j, step].item() == pytest.approx(
                    math.sqrt(sum(g.square().sum().item() for g in whole)), rel=1e-4
                )
                nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
                schedule.step()
            with torch.no_grad():
                penalty = claims.PENALTY / 2 * sum(p.square().sum() for p in net.parameters())
                objective = float(nn.functional.cross_entropy(net(x), y) + penalty)
            assert excess[i, j].item() == pytest.approx(objective - claims._minimum("iris, logistic", seed), rel=1e-3)


def test_the_minimum_is_scikit_learns() -> None:
    from sklearn.linear_model import LogisticRegression

    x, y, *_ = claims.PROBLEMS["wine, logistic"].data(5)
    whole = torch.cat([x, torch.ones(len(x), 1)], 1).double()  # the penalty counts the bias in
    model = LogisticRegression(C=1 / (claims.PENALTY * len(x)), fit_intercept=False, tol=1e-10, max_iter=2000)
    model.fit(whole.numpy(), y.numpy())
    w = torch.from_numpy(model.coef_)
    value = nn.functional.cross_entropy(whole @ w.T, y) + claims.PENALTY / 2 * w.square().sum()
    assert claims._minimum("wine, logistic", 5) == pytest.approx(float(value), abs=1e-6)


@pytest.mark.parametrize("name", ["digits, MLP", "digits, ResNet", "Python source, LLaMA"])
def test_the_network_runs_are_those_of_torchs_optimizers(name: str) -> None:
    problem, seed, steps, warmup = claims.PROBLEMS[name], 7, 6, 2
    assert problem.net is not None
    rate = problem.rates[2]
    multipliers = claims._multipliers("cosine", steps, warmup)
    ours = claims._train_network(name, torch.stack([multipliers, multipliers]), torch.tensor([rate, rate / 2]), (6, seed))
    x, y, test_x, test_y = problem.data(seed)
    torch.manual_seed(seed)
    net = problem.net()
    optimizer: Optimizer
    if problem.adam:
        optimizer = torch.optim.Adam(net.parameters(), lr=rate, betas=(0.9, 0.99))
    else:
        optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
    schedule = claims.SCHEDULES["cosine"](optimizer, steps, warmup)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(x), (problem.batch,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[rows]).flatten(0, -2), y[rows].flatten()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        wanted = float(nn.functional.cross_entropy(net(test_x).flatten(0, -2), test_y.flatten()))
    assert ours[0, 1].item() == pytest.approx(wanted, rel=2e-3)


@pytest.mark.parametrize("warmup", [0, 3])
def test_the_schedules_compared_are_their_formulas(warmup: int) -> None:
    steps = 12 + warmup
    ramp = [(t + 1) / warmup for t in range(warmup)]
    formulas: dict[str, Callable[[int], float]] = {
        "linear": lambda t: 1 - t / 12,
        "cosine": lambda t: (1 + math.cos(math.pi * t / 12)) / 2,
        "step": lambda t: 1.0 if t < 6 else 0.1 if t < 9 else 0.01,
        "constant": lambda t: 1.0,
        "inverse root": lambda t: 1 / math.sqrt(t + 1),
        "rising": lambda t: (t + 1) / 12,
    }
    assert set(formulas) == set(claims.SCHEDULES)
    for name, formula in formulas.items():
        wanted = [*ramp, *(formula(t) for t in range(12))]
        assert claims._multipliers(name, steps, warmup).tolist() == pytest.approx(wanted, abs=1e-6)

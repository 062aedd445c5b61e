"""Averaging, task arithmetic and TIES against loops over single entries; what does not fit together is named."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from corollary.adapt import MergedCheckpoint, MergeError, average, task_arithmetic, ties
from corollary.adapt.merging.quantile import kth_magnitude
from corollary.data import CheckpointWriter, TensorSpec, load_safetensors

Checkpoint = dict[str, Tensor]


def draw(tasks: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Checkpoint, list[Checkpoint]]:
    torch.manual_seed(seed)
    shapes = {"a": (4, 5), "b": (6,), "c": (), "d": (2, 3, 2)}
    base = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    return base, [{name: (t + 0.1 * torch.randn(t.shape)).to(dtype) for name, t in base.items()} for _ in range(tasks)]


def flat(checkpoint: Mapping[str, Tensor]) -> list[float]:
    return [float(x) for name in ("a", "b", "c", "d") for x in checkpoint[name].double().flatten()]


def naive_ties(base: list[float], tuned: list[list[float]], density: float, scale: float, mean: bool) -> list[float]:
    """Entry by entry over plain lists of numbers, as the authors' code ranks and elects."""
    d = len(base)
    vectors = []
    for checkpoint in tuned:
        vector = [x - y for x, y in zip(checkpoint, base, strict=True)]
        threshold = sorted(abs(x) for x in vector)[max(1, d - int(d * density)) - 1]
        vectors.append([x if abs(x) >= threshold else 0.0 for x in vector])
    sums = [math.fsum(v[j] for v in vectors) for j in range(d)]
    majority = sum((s > 0) - (s < 0) for s in sums)
    out = []
    for j in range(d):
        positive = sums[j] > 0 or (sums[j] == 0 and majority > 0)
        agreeing = [v[j] for v in vectors if (v[j] > 0 if positive else v[j] < 0)]
        out.append(base[j] + scale * math.fsum(agreeing) / (max(1, len(agreeing)) if mean else 1))
    return out


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5], [1, 0, 0]])
def test_average_is_the_mean_of_entries(weights: list[float] | None) -> None:
    base, tuned = draw()
    w = weights or [1.0] * 3
    expected = [math.fsum(wi * x for wi, x in zip(w, xs, strict=True)) / sum(w) for xs in zip(*map(flat, tuned), strict=True)]
    assert flat(average(base, tuned, weights=weights)) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("scale", [0.3, 1.0, [0.1, 0.2, 0.7], "tensors"])
def test_task_arithmetic_adds_scaled_changes(scale: Any) -> None:
    base, tuned = draw()
    factors = {name: torch.rand(3, dtype=torch.float64) for name in base}
    given_scale = factors if scale == "tensors" else scale
    for name, merged in task_arithmetic(base, tuned, scale=given_scale).items():
        rows = factors[name].tolist() if scale == "tensors" else [scale] * 3 if isinstance(scale, float) else scale
        for j, start in enumerate(base[name].flatten().tolist()):
            entries = [float(t[name].flatten()[j]) for t in tuned]
            expected = start + math.fsum(r * (x - start) for r, x in zip(rows, entries, strict=True))
            assert float(merged.flatten()[j]) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_ties_is_the_loop_over_entries(tasks: int, density: float, mean: bool) -> None:
    base, tuned = draw(tasks)
    ours = flat(ties(base, tuned, density=density, scale=0.7, mean=mean))
    assert ours == pytest.approx(naive_ties(flat(base), list(map(flat, tuned)), density, 0.7, mean), abs=1e-13)
    for name in base:  # each tensor by itself is a checkpoint of one tensor
        one = ties(base, tuned, density=density, mean=mean, scope="tensor")[name].double().flatten().tolist()
        loop = naive_ties(base[name].flatten().tolist(), [t[name].flatten().tolist() for t in tuned], density, 1.0, mean)
        assert one == pytest.approx(loop, abs=1e-13)


@pytest.mark.parametrize("flip", [1, -1])
def test_ties_settles_exact_draws_by_the_majority(flip: int) -> None:
    base = {"w": torch.zeros(5)}
    tuned = [{"w": flip * torch.tensor([1.0, 1.0, 1.0, -1.0, 2.0])}, {"w": flip * torch.tensor([-1.0, 1.0, 1.0, -1.0, -2.0])}]
    expected = naive_ties([0.0] * 5, [t["w"].tolist() for t in tuned], 1.0, 1.0, True)
    assert ties(base, tuned, density=1.0)["w"].tolist() == expected
    assert expected[0] == flip  # the sign of most other entries


def test_ties_ranks_float32_and_float64_together() -> None:
    torch.manual_seed(0)
    base = {"a": torch.zeros(50), "b": torch.zeros(60, dtype=torch.float64)}
    tuned = [{"a": torch.randn(50), "b": torch.randn(60, dtype=torch.float64)} for _ in range(2)]
    merged = ties(base, tuned, density=0.3)
    whole = [[*t["a"].double().tolist(), *t["b"].tolist()] for t in tuned]
    expected = naive_ties([0.0] * 110, whole, 0.3, 1.0, True)
    assert [*merged["a"].double().tolist(), *merged["b"].tolist()] == pytest.approx(expected, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    numbers=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40), data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_kth_magnitude_is_the_sorted_one(numbers: list[float], data: Any, dtype: torch.dtype) -> None:
    k = data.draw(st.integers(1, len(numbers)))
    cut = data.draw(st.integers(0, len(numbers)))
    parts = [torch.tensor(part, dtype=dtype) for part in (numbers[:cut], numbers[cut:])]
    assert kth_magnitude(lambda: parts, k, dtype) == sorted(map(abs, numbers))[k - 1]


def test_one_checkpoint_comes_back_and_no_change_changes_nothing() -> None:
    base, tuned = draw(1, torch.float32)
    for merged in (average(base, tuned), task_arithmetic(base, tuned, scale=1.0), ties(base, tuned, density=1.0)):
        for name in base:
            assert torch.allclose(merged[name], tuned[0][name], atol=1e-6)
    for merged in (task_arithmetic(base, [base] * 3), ties(base, [base] * 3), ties(base, [base], scope="tensor")):
        assert all(torch.equal(merged[name], base[name]) for name in base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_merged_in_single(dtype: torch.dtype) -> None:
    base, tuned = draw(dtype=dtype)
    singles = [{name: t.float() for name, t in checkpoint.items()} for checkpoint in (base, *tuned)]
    for merge in (average, task_arithmetic, ties):
        ours, single = merge(base, tuned), merge(singles[0], singles[1:])
        for name in base:
            assert ours[name].dtype == dtype
            assert torch.equal(ours[name], single[name].to(dtype))


def test_whole_numbers_are_the_bases() -> None:
    base, tuned = draw()
    ids, flags = torch.arange(3), torch.tensor([True, False])
    extra = [{"ids": ids, "flags": flags, "num_batches_tracked": torch.tensor(n)} for n in (5, 6, 7, 8)]
    merged = average(base | extra[0], [t | e for t, e in zip(tuned, extra[1:], strict=True)])
    assert torch.equal(merged["ids"], ids)
    assert torch.equal(merged["flags"], flags)
    assert int(merged["num_batches_tracked"]) == 5
    with pytest.raises(MergeError, match=r"checkpoints\[1\]: tensor 'ids' holds whole numbers \(torch.int64\) that differ"):
        average(base | {"ids": ids}, [tuned[0] | {"ids": ids}, tuned[1] | {"ids": ids + 1}])


SIZE = 20_000


class Made(Mapping[str, Tensor]):
    """A checkpoint whose tensors are made when they are asked for."""

    def __init__(self, names: int, seed: int) -> None:
        self.names, self.seed = [f"t{i}" for i in range(names)], seed

    def __getitem__(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1000 + int(name[1:]))
        return torch.randn(SIZE, generator=generator)

    def shape(self, name: str) -> torch.Size:
        return torch.Size((SIZE,))

    def dtype(self, name: str) -> str:
        return "F32"

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@pytest.mark.parametrize("merge", [average, task_arithmetic, ties])
def test_memory_does_not_grow_with_the_checkpoint_or_the_tasks(merge: Any) -> None:
    from corollary.memory import peak_bytes

    def run(names: int, tasks: int) -> int:
        base, tuned = Made(names, 0), [Made(names, i + 1) for i in range(tasks)]

        def call() -> None:
            for tensor in merge(base, tuned).values():
                del tensor

        return peak_bytes(call)

    run(2, 2)
    small, tall, wide = run(4, 2), run(60, 2), run(4, 12)
    tensor, counts = 4 * SIZE, 8 * (1 << 16)  # a digit's counts have one size, whatever is merged
    assert tall < small + 2 * tensor, (small, tall)  # a whole checkpoint is 60 tensors
    assert wide < small + 2 * tensor, (small, wide)
    assert small < 12 * tensor + 4 * counts, small


def test_mismatches_are_named(tmp_path: Path) -> None:
    base, tuned = draw()
    good = tuned[0]
    for changed, match in [
        ({k: v for k, v in good.items() if k != "b"}, r"checkpoints\[1\]: has no tensor 'b', which base has"),
        (good | {"z": torch.zeros(1)}, r"checkpoints\[1\]: has a tensor 'z' that base has not"),
        (good | {"a": torch.zeros(5, 4)}, r"checkpoints\[1\]: tensor 'a' is \(5, 4\), in base it is \(4, 5\)"),
        (good | {"d": torch.zeros(2, 3, 2, dtype=torch.int32)}, "tensor 'd' is int32, in base it is float64"),
        (good | {"a": [1.0]}, r"checkpoints\[1\]: 'a' must be a tensor, not list"),
    ]:
        for merge in (average, task_arithmetic, ties):
            with pytest.raises((MergeError, TypeError), match=match):
                merge(base, [good, changed])
    with CheckpointWriter(tmp_path / "x.safetensors", {"a": TensorSpec("F32", (3,))}) as writer:
        writer.append("a", torch.zeros(3))
    with pytest.raises(MergeError, match=r"x\.safetensors: tensor 'a' is \(3,\), in base it is \(4, 5\)"):
        average(base, [load_safetensors(tmp_path / "x.safetensors")])
    for dtype in (torch.float8_e4m3fn, torch.complex64):
        odd = {"w": torch.zeros(2).to(dtype)}
        with pytest.raises(MergeError, match="Dequantize the checkpoint first"):
            average(odd, [odd])


def test_bad_arguments() -> None:
    base, tuned = draw()
    for call, match in [
        (lambda: average(base, []), "'checkpoints' is empty"),
        (lambda: average(base, base), "must be a list of mappings, not dict"),
        (lambda: average(base, [3]), r"'checkpoints\[0\]' must map names to tensors"),
        (lambda: average(base, tuned, weights=[1.0]), "'weights' must be 3 finite numbers"),
        (lambda: average(base, tuned, weights=[1.0, -1.0, 0.0]), "sum above 0"),
        (lambda: average(base, tuned, weights=[1.0, math.nan, 0.0]), "finite"),
        (lambda: task_arithmetic(base, tuned, scale=[1.0]), "one finite number or 3 of them"),
        (lambda: task_arithmetic(base, tuned, scale=math.inf), "one finite number"),
        (lambda: dict(task_arithmetic(base, tuned, scale={"a": torch.ones(3)})), "no factors for tensor 'b'"),
        (lambda: dict(task_arithmetic(base, tuned, scale=dict.fromkeys(base, torch.ones(2)))), "'a' must be 3 finite"),
        (lambda: ties(base, tuned, density=0.0), r"'density' must lie in \(0, 1\], not 0.0"),
        (lambda: ties(base, tuned, density=math.nan), "'density' must lie in"),
        (lambda: ties(base, tuned, scale=math.nan), "'scale' must be a finite number"),
        (lambda: ties(base, tuned, scope="layer"), "'scope' is 'layer'; allowed: checkpoint, tensor"),
        (lambda: ties(base, [*tuned, tuned[0] | {"b": torch.full((6,), math.nan)}]), r"checkpoints\[3\]: tensor 'b'.*not finite"),
    ]:  # fmt: skip
        with pytest.raises((MergeError, TypeError), match=match):
            call()
    broken = ties(base, [tuned[0] | {"b": torch.full((6,), math.nan)}], scope="tensor")
    with pytest.raises(MergeError, match=r"tensor 'b'.*not finite"):
        broken["b"]


def test_a_merge_is_a_lazy_mapping() -> None:
    base, tuned = draw()
    asked: list[str] = []

    def combine(name: str, start: Tensor, tensors: Any) -> Tensor:
        asked.append(name)
        return start

    merged = MergedCheckpoint(base, tuned, combine)
    assert list(merged) == list(base)
    assert len(merged) == 4
    assert "a" in merged
    assert "z" not in merged
    assert merged.shape("a") == (4, 5)
    assert merged.dtype("a") == "F64"
    assert asked == []
    again = average(merged, [merged, merged])  # merges of merges need nothing read beforehand
    assert asked == []
    assert torch.equal(again["a"], base["a"])
    with pytest.raises(KeyError):
        merged["z"]
    empty = {"w": torch.zeros(0, 3), "v": torch.zeros(0)}
    for merge in (average, task_arithmetic, ties):
        assert merge(empty, [empty])["w"].shape == (0, 3)
    assert ties(empty, [empty], scope="tensor")["w"].shape == (0, 3)

"""Inspection against dense float64 decompositions, closed forms and hand-made checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from corollary.analysis import CheckpointReport, TensorReport, inspect_checkpoint, inspect_tensor
from corollary.analysis._streamed import Blocks, tail_exponent


def dense(tensor: Tensor) -> dict[str, float]:
    """Everything from a float64 decomposition in numpy."""
    w = tensor.double().numpy().reshape(tensor.shape[0], -1)
    s = np.linalg.svd(w, compute_uv=False)
    p = s[s > 0] / s.sum()
    return {
        "frobenius": math.sqrt((w**2).sum()),
        "l1": np.abs(w).sum(),
        "max_abs": np.abs(w).max(),
        "mean": w.mean(),
        "std": w.std(),
        "spectral": s[0],
        "nuclear": s.sum(),
        "stable_rank": (s**2).sum() / s[0] ** 2,
        "effective_rank": math.exp(-(p * np.log(p)).sum()),
        "condition": s[0] / s[-1],
    }


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_equals_dense_decomposition(rows: int, columns: int, dtype: torch.dtype, seed: int) -> None:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    report = inspect_tensor(w)
    assert report.method == "exact"
    for key, true in dense(w).items():
        ours = getattr(report, key)
        if ours is None:
            assert key == "condition"
            assert true > 1e3
        else:
            assert ours == pytest.approx(true, rel=1e-4 if key == "condition" else 1e-5, abs=1e-3), key


@pytest.mark.parametrize("shape", [(3000, 70), (70, 3000), (8, 4, 3, 3)])
def test_blocks_and_kernels(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corollary.analysis._streamed._BLOCK", 1000)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    report = inspect_tensor(w)
    for key, true in dense(w).items():
        assert getattr(report, key) == pytest.approx(true, rel=1e-4, abs=1e-6), key
    x = torch.randn(min(w.shape[0], w.numel() // w.shape[0]), 3)
    m = w.flatten(1)
    g = m.T @ m if m.shape[0] >= m.shape[1] else m @ m.T
    torch.testing.assert_close(Blocks(m) @ x, g @ x, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(Blocks(m) @ x[:, 0], g @ x[:, 0], rtol=1e-4, atol=1e-2)


def test_rank_and_condition_of_a_known_spectrum() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    s = torch.cat([torch.linspace(3, 1, 20, dtype=torch.float64), torch.zeros(44, dtype=torch.float64)])
    report = inspect_tensor(u @ s.diag() @ v)
    assert report.rank == 20
    assert report.condition is None
    s[20:] = 0.5
    report = inspect_tensor(u @ s.diag() @ v)
    assert report.rank == 64
    assert report.condition == pytest.approx(6.0)
    assert report.spectrum[0] == pytest.approx(3.0)
    assert report.ranks[-1] == 64


def test_estimates_are_near_the_exact_ones() -> None:
    """Flat, decaying and heavy-tailed spectra, with the estimate forced."""
    generator = torch.Generator().manual_seed(0)
    cases = {
        "gaussian": torch.randn(300, 500, generator=generator),
        "power": _power(300, generator),
        "low rank": torch.randn(400, 8, generator=generator) @ torch.randn(8, 300, generator=generator),
    }
    for name, w in cases.items():
        exact = inspect_tensor(w, full=True)
        for dtype in (torch.float32, torch.bfloat16):
            ours = inspect_tensor(w.to(dtype), exact_up_to=10)
            assert ours.method == "estimated"
            assert ours.spectral is not None
            assert exact.spectral is not None
            assert ours.spectral <= exact.spectral * 1.01
            assert ours.spectral == pytest.approx(exact.spectral, rel=0.02), name
            assert ours.stable_rank == pytest.approx(exact.stable_rank, rel=0.05), name
            assert ours.nuclear == pytest.approx(exact.nuclear, rel=0.05), name
            assert ours.effective_rank == pytest.approx(exact.effective_rank, rel=0.05), name
            assert ours.condition is ours.rank is ours.tail_exponent is None


def _power(n: int, generator: torch.Generator) -> Tensor:
    u, v = (torch.linalg.qr(torch.randn(n, n, generator=generator)).Q for _ in range(2))
    return u @ torch.arange(1, n + 1).float().pow(-0.7).diag() @ v


def test_scale_does_not_matter() -> None:
    w = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    for scale in (1e-18, 1e-12, 1e12):
        for exact_up_to in (10, 1000):
            one, two = (inspect_tensor(w * c, exact_up_to=exact_up_to) for c in (1.0, scale))
            assert two.stable_rank == pytest.approx(one.stable_rank, rel=1e-3)
            assert two.effective_rank == pytest.approx(one.effective_rank, rel=1e-3)
            assert one.outliers == two.outliers


def test_top_alone() -> None:
    w = _power(200, torch.Generator().manual_seed(1))
    report = inspect_tensor(w, top=5)
    true = torch.linalg.svdvals(w.double())[:5]
    assert report.method == "top"
    assert len(report.spectrum) == 5
    torch.testing.assert_close(torch.tensor(report.spectrum).double(), true, rtol=1e-3, atol=0)
    assert report.effective_rank is None
    assert inspect_tensor(w, top=200).method == "exact"


def test_what_is_not_finite() -> None:
    w = torch.ones(4, 5)
    w[0, 0], w[1, 1], w[2, 2], w[3, 3] = torch.nan, torch.inf, -torch.inf, 0.0
    report = inspect_tensor(w)
    assert (report.nan, report.inf, report.zeros) == (1, 2, 1)
    assert report.frobenius == 4.0
    assert report.mean == pytest.approx(16 / 17)
    assert report.spectral is None
    assert "not finite" in report.note
    assert inspect_tensor(torch.full((2, 2), torch.nan)).note == "no entry is finite"
    json.dumps(report.to_dict(), allow_nan=False)


def test_odd_tensors() -> None:
    assert inspect_tensor(torch.empty(0, 7)).note == "no entries"
    assert inspect_tensor(torch.zeros(3, 3)).rank == 0
    assert inspect_tensor(torch.tensor(2.0)).frobenius == 2.0
    assert inspect_tensor(torch.tensor([True, False])).zeros == 1
    assert inspect_tensor(torch.arange(10)).l1 == 45
    assert inspect_tensor(torch.tensor([1 + 1j])).note.startswith("complex")
    assert inspect_tensor(torch.full((2, 2), 3e38)).note.startswith("entries too large")
    assert inspect_tensor(torch.ones(5, 5).to(torch.float8_e4m3fn)).rank == 1
    assert inspect_tensor(torch.ones(1, 1)).condition == 1.0
    for bad in ({"top": 0}, {"top": 2, "full": True}):
        with pytest.raises(ValueError, match="'top'"):
            inspect_tensor(torch.ones(2, 2), **bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a tensor"):
        inspect_tensor([1.0])  # type: ignore[arg-type]


def test_outliers_are_counted() -> None:
    w = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    assert inspect_tensor(w).outliers == 0
    w[3, :5] = 40.0
    assert inspect_tensor(w).outliers == 5


@pytest.mark.parametrize("alpha", [2.0, 3.0, 4.5])
def test_tail_exponent_recovers_a_power_law(alpha: float) -> None:
    draws = (1 - np.random.default_rng(0).random(4000)) ** (-1 / (alpha - 1))
    body = np.random.default_rng(1).uniform(0.05, 1.0, 4000)  # below the cut there is no power law
    found = tail_exponent(torch.tensor(np.sort(np.concatenate([draws, body]))[::-1].copy()))
    assert found == pytest.approx(alpha, rel=0.08)
    assert tail_exponent(torch.ones(5)) is None
    assert tail_exponent(torch.zeros(50)) is None


def approximately(told: Any) -> Any:
    """The same, but for the last digits of numbers, however deep they stand."""
    if isinstance(told, dict):
        return {name: approximately(value) for name, value in told.items()}
    if isinstance(told, list | tuple):
        return type(told)(approximately(value) for value in told)
    return pytest.approx(told, rel=1e-5, abs=1e-6) if isinstance(told, float) else told


def test_checkpoint(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layers.{i}.w": torch.randn(30, 20 + i, generator=generator) for i in range(12)}
    tensors |= {"bias": torch.zeros(5), "ids": torch.arange(4), "half": torch.ones(4, 4).bfloat16()}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    seen: list[str] = []
    report = inspect_checkpoint(tmp_path, progress=lambda t: seen.append(t.name))
    assert [t.name for t in report.tensors] == ["bias", "half", "ids", *(f"layers.{i}.w" for i in range(12))]
    assert sorted(seen) == sorted(tensors)
    assert report.parameters == sum(t.numel() for t in tensors.values())
    assert report.nbytes == sum(t.nbytes for t in tensors.values())
    assert report.dtypes["int64"] == 4
    for each in report.tensors:
        # Sums in float32 depend on where a tensor lies in memory.
        assert each.to_dict() == approximately(inspect_tensor(tensors[each.name], each.name).to_dict())
    again = inspect_checkpoint(tmp_path, workers=3)
    assert [t.to_dict() for t in again.tensors] == approximately([t.to_dict() for t in report.tensors])
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [TensorReport.from_dict(t) for t in plain["tensors"]] == list(report.tensors)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert isinstance(report, CheckpointReport)


def test_plots() -> None:
    from matplotlib.figure import Figure

    ax = Figure().add_subplot()
    assert inspect_tensor(torch.eye(30)).plot(ax) is ax
    inspect_tensor(torch.zeros(3)).plot(Figure().add_subplot())

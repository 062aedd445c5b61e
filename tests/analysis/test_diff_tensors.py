"""Differences of checkpoints against dense decompositions and planted changes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from corollary.analysis import TensorDiff, diff_checkpoints, diff_tensors


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 50), (12, 5, 3, 3)])
def test_equals_dense_decomposition(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator)
    tuned = base + 0.3 * torch.randn(shape, generator=generator)
    found = diff_tensors(base, tuned, k=6, epsilon=0.6)
    w0, w1 = (t.double().numpy().reshape(shape[0], -1) for t in (base, tuned))
    d = w1 - w0
    s = np.linalg.svd(d, compute_uv=False)
    p = s / s.sum()
    u0, u1 = (np.linalg.svd(w, full_matrices=False)[0] for w in (w0, w1))
    cosines = [max(abs(float(u1[:, j] @ u0[:, i])) for i in range(u0.shape[1])) for j in range(6)]
    overlap = np.mean([sum(float(u1[:, j] @ u0[:, i]) ** 2 for i in range(6)) for j in range(6)])
    assert found.status == "changed"
    assert found.changed == 1.0
    assert found.norm == pytest.approx(np.linalg.norm(d))
    assert found.relative == pytest.approx(np.linalg.norm(d) / np.linalg.norm(w0))
    assert found.max_abs == pytest.approx(np.abs(d).max())
    assert found.spectral == pytest.approx(s[0])
    assert found.stable_rank == pytest.approx((s**2).sum() / s[0] ** 2)
    assert found.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    assert found.similarity == pytest.approx(cosines, abs=1e-6)
    assert found.intruders == sum(c < 0.6 for c in cosines)
    assert found.overlap == pytest.approx(overlap, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 96), (64, 300), (300, 64)])
def test_rank_of_a_merged_adapter_is_its_own(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Rounding of base and sum brings noise of full rank into the difference; it must not count."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        base = (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.05).to(dtype)
        b, a = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((shape[0], 4), (4, shape[1])))
        tuned = (base.double() + 0.05 * b @ a).to(dtype)
        assert diff_tensors(base, tuned).rank == 4
        # A few rows of a real network are many times longer than the others, and their rounding with them.
        scale = torch.where(torch.rand(shape[0], 1, generator=generator) < 0.03, 30.0, 1.0).double()
        uneven = (base.double() * scale).to(dtype)
        assert diff_tensors(uneven, (uneven.double() + 0.5 * b @ a).to(dtype)).rank == 4


def test_estimates_are_near_the_exact_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(300, 300, generator=generator)).Q for _ in range(2))
    base = u @ torch.arange(1, 301).float().pow(-0.6).diag() @ v
    b, a = torch.randn(300, 3, generator=generator), torch.randn(3, 300, generator=generator)
    for change in (0.004 * b @ a, 0.005 * torch.randn(300, 300, generator=generator)):
        for transpose in (False, True):
            w0, w1 = (t.T.contiguous() if transpose else t for t in (base, base + change))
            exact, ours = (diff_tensors(w0, w1, "w", exact_up_to=n) for n in (1000, 10))
            assert ours.method == "estimated"
            assert ours.rank == (3 if change is not None and exact.rank == 3 else None)
            assert ours.intruders == exact.intruders
            for near, true in zip(ours.similarity, exact.similarity, strict=True):
                assert (near < 0.5) >= (true < 0.5)  # fewer to choose from
                assert true < 0.5 or near == pytest.approx(true, abs=0.01)
            assert ours.effective_rank == pytest.approx(exact.effective_rank, rel=0.05)
            assert ours.spectral == pytest.approx(exact.spectral, rel=0.02)
            assert ours.overlap == pytest.approx(exact.overlap, abs=0.03)


def test_kinds_of_tensor() -> None:
    w = torch.randn(4, 4)
    assert diff_tensors(w, w.clone()).status == "same"
    assert diff_tensors(w, w.clone()).rank is None
    ids = diff_tensors(torch.arange(4), torch.arange(4) + torch.tensor([0, 0, 2, 0]))
    assert (ids.changed, ids.norm, ids.rank) == (0.25, 2.0, None)
    assert diff_tensors(torch.zeros(3, 3), torch.ones(3, 3)).relative is None
    assert diff_tensors(torch.zeros(3, 3), torch.ones(3, 3)).intruders == 1
    assert diff_tensors(torch.ones(3, 3), torch.zeros(3, 3)).intruders == 0
    assert diff_tensors(torch.full((2, 2), torch.nan), w[:2, :2]).status == "not compared"
    assert diff_tensors(torch.empty(0, 3), torch.empty(0, 3)).status == "same"
    with pytest.raises(ValueError, match="one shape"):
        diff_tensors(w, w[:2])
    for bad in ({"k": 0}, {"k": True}, {"epsilon": 0.0}, {"epsilon": 1.5}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            diff_tensors(w, w, **bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="'tuned'"):
        diff_tensors(w, None)  # type: ignore[arg-type]


def test_checkpoints(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {f"l.{i}.w": torch.randn(24, 24, generator=generator) for i in range(11)} | {
        "b": torch.ones(4),
        "gone": torch.ones(2),
    }
    tuned = {name: t.clone() for name, t in base.items() if name != "gone"} | {"new": torch.ones(2), "l.3.w": torch.ones(2, 24)}
    tuned["l.10.w"] = tuned["l.10.w"] + torch.outer(torch.ones(24), torch.ones(24))
    for name, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        safetensors.torch.save_file(tensors, tmp_path / name / "model.safetensors")
    found = diff_checkpoints(tmp_path / "base", tmp_path / "tuned")
    by_name = {t.name: t for t in found.tensors}
    assert [t.name for t in found.tensors][-2:] == ["l.10.w", "new"]
    assert by_name["gone"].status == "only in base"
    assert by_name["new"].status == "only in tuned"
    assert by_name["l.3.w"].status == "shape differs"
    assert by_name["l.0.w"].status == by_name["b"].status == "same"
    assert by_name["l.10.w"].rank == 1
    assert (found.changed, found.matrices) == (1, 1)
    assert found.norm == pytest.approx(24.0)
    both = [name for name in base if name in tuned and name != "l.3.w"]
    assert found.relative == pytest.approx(24 / math.sqrt(sum(float(base[n].square().sum()) for n in both)))
    assert diff_checkpoints(tmp_path / "base", tmp_path / "tuned", workers=3) == found
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [TensorDiff.from_dict(t) for t in plain["tensors"]] == list(found.tensors)
    safetensors.torch.save_file({"z": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="share no tensor"):
        diff_checkpoints(tmp_path / "base", tmp_path / "other.safetensors")

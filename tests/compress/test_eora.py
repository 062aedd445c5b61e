"""EoRA against the paper's formula with its inverse, and its promise against every other path of its rank."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from corollary.compress import EoRA, PackedLinear, Quantize, compress, compression_report


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_and_data(n: int, m: int, seed: int) -> tuple[nn.Linear, Tensor]:
    layer = nn.Linear(n, m).double()
    with torch.no_grad():
        layer.weight.copy_(draw(m, n, seed=seed))
        layer.bias.copy_(draw(m, seed=seed + 1))
    return layer, draw(5 * n, n, seed=seed + 2) @ draw(n, n, seed=seed + 3) * torch.logspace(0, -1, n, dtype=torch.float64)


def paper(delta: np.ndarray, x: np.ndarray, rank: int) -> np.ndarray:
    values, q = np.linalg.eigh(x.T @ x)
    scaled = q @ np.diag(np.sqrt(values))
    u, s, vh = np.linalg.svd(delta @ scaled, full_matrices=False)
    b = u[:, :rank] @ np.diag(np.sqrt(s[:rank]))
    a = np.diag(np.sqrt(s[:rank])) @ vh[:rank] @ np.linalg.inv(scaled)
    return b @ a


@pytest.mark.parametrize(
    "settings_", [{"bits": 4}, {"bits": 8}, {"bits": None, "sparsity": "2:4"}, {"bits": 4, "sparsity": "2:4"}]
)
@pytest.mark.parametrize(("n", "m"), [(8, 6), (12, 12), (8, 14)])
def test_equals_the_papers_formula(n: int, m: int, settings_: dict) -> None:
    layer, x = layer_and_data(n, m, n + m)
    small = compress(layer, EoRA(rank=3, group_size=4, damping=0.0, **settings_), calibration=x.split(9))
    assert isinstance(small, PackedLinear)
    delta = (layer.weight - small.dense()).detach().numpy()
    path = (small.up.weight @ small.down.weight).detach().numpy()
    np.testing.assert_allclose(path, paper(delta, x.numpy(), 3), atol=1e-8)
    torch.testing.assert_close(small(x), x @ small.matrix().T + layer.bias)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 5))
def test_no_path_of_its_rank_errs_less(seed: int, rank: int) -> None:
    layer, x = layer_and_data(8, 6, seed)
    kinds = {"bits": 4, "group_size": 4, "rank": rank}
    small = compress(layer, EoRA(**kinds, damping=0.0), calibration=[x])
    plain = compress(layer, EoRA(**kinds, metric="none"))
    bare = compress(layer, Quantize(bits=4, group_size=4))

    def error(model: nn.Module) -> float:
        return float((model(x) - layer(x)).detach().square().sum())

    best = error(small)
    assert best <= error(plain) * (1 + 1e-9) + 1e-12
    assert best <= error(bare) * (1 + 1e-9) + 1e-12
    with torch.no_grad():
        for i in range(3):
            small.up.weight.add_(1e-3 * draw(*small.up.weight.shape, seed=seed + i))
            assert error(small) >= best * (1 - 1e-9)


def test_error_falls_with_rank_and_is_what_is_reported() -> None:
    layer, x = layer_and_data(12, 8, 3)
    size = float((x @ layer.weight.T).detach().square().sum())
    reported = []
    for rank in range(1, 9):
        small = compress(layer, EoRA(rank=rank, bits=None, sparsity="2:4", damping=0.0), calibration=[x])
        reported.append(compression_report(small).layers[0].error)
        measured = float((small(x) - layer(x)).detach().square().sum()) / size
        assert reported[-1] == pytest.approx(measured, rel=1e-6, abs=1e-12)
    assert all(b <= a + 1e-12 for a, b in pairwise(reported))
    assert reported[-1] < 1e-12


def test_ratio_is_a_share_of_bytes() -> None:
    layer = nn.Linear(256, 128, bias=False)
    for ratio in (0.2, 0.4):
        report = compression_report(compress(layer, EoRA(ratio=ratio, metric="none")))
        assert ratio - 0.02 < report.ratio <= ratio
    with pytest.raises(ValueError, match="leaves no rank"):
        compress(layer, EoRA(ratio=0.1, metric="none"))


def test_wanda_keeps_what_large_inputs_meet() -> None:
    layer = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    x = torch.tensor([[100.0, 1.0, 1.0, 100.0]])
    plain = compress(layer, Quantize(bits=None, sparsity="2:4"))
    wanda = compress(layer, Quantize(bits=None, sparsity="2:4", criterion="wanda"), calibration=[x])
    assert plain.dense().tolist() == [[0, 0, 3, 4]]
    assert wanda.dense().tolist() == [[1, 0, 0, 4]]


def test_gptq_errs_less_than_rounding_on_the_data() -> None:
    layer, x = layer_and_data(16, 8, 5)
    nearest = compress(layer, Quantize(bits=4, group_size=8))
    ours = compress(layer, Quantize(bits=4, group_size=8, method="gptq"), calibration=[x])
    errors = [float((small(x) - layer(x)).detach().square().sum()) for small in (ours, nearest)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Quantize(bits=3), "3"),
        (lambda: Quantize(group_size=0), "0"),
        (lambda: Quantize(sparsity="1:4"), "1:4"),
        (lambda: Quantize(bits=None), "nothing"),
        (lambda: Quantize(method="awq"), "awq"),
        (lambda: Quantize(criterion="taylor"), "taylor"),
        (lambda: Quantize(method="gptq", sparsity="2:4"), "sparsity"),
        (lambda: EoRA(rank=0), "0"),
        (lambda: EoRA(rank=4, ratio=0.5), "one of"),
        (lambda: EoRA(ratio=1.0), "1.0"),
        (lambda: EoRA(metric="outputs"), "outputs"),
        (lambda: EoRA(damping=-1.0), "-1"),
        (lambda: compress(nn.Linear(8, 8), EoRA(rank=9, metric="none")), "above 8"),
        (lambda: compress(nn.Linear(6, 8), Quantize(sparsity="2:4")), "multiple of 4"),
    ],
)
def test_bad_settings(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_convolutions_are_refused() -> None:
    with pytest.raises(TypeError, match="conv2d"):
        compress(nn.Sequential(nn.Conv2d(4, 4, 3)), Quantize(), "0")

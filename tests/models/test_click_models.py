"""DeepFM and the Deep & Cross Network, row by row in numpy; ids that are none."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from corollary.models import DCN, DeepFM, FieldEmbedding

SIZES = (7, 4, 3)


def made(kind: type[DeepFM] | type[DCN]) -> nn.Module:
    torch.manual_seed(0)
    net = kind(SIZES, dim=5, hidden=[6, 4]).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net


def ids(rows: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randint(size, (rows,), generator=generator) for size in SIZES], 1)


def arrays(net: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in net.named_parameters()}


def embedded(w: dict[str, np.ndarray], row: list[int]) -> list[np.ndarray]:
    starts = (0, 7, 11)
    return [w["embedding.weight"][start + i] for start, i in zip(starts, row, strict=True)]


def perceptron(w: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    for layer in ("deep.0", "deep.2"):
        x = np.maximum(w[f"{layer}.weight"] @ x + w[f"{layer}.bias"], 0)
    return x


def test_deepfm() -> None:
    net = made(DeepFM)
    w, starts = arrays(net), (0, 7, 11)
    for row, out in zip(ids().tolist(), net(ids()).tolist(), strict=True):
        e = embedded(w, row)
        true = sum(a @ b for a, b in combinations(e, 2))
        true += sum(w["first_order.weight"][start + i, 0] for start, i in zip(starts, row, strict=True))
        true += w["head.weight"][0] @ perceptron(w, np.concatenate(e)) + w["head.bias"][0]
        assert out == pytest.approx(true, rel=1e-9)


def test_dcn() -> None:
    net = made(DCN)
    w = arrays(net)
    for row, out in zip(ids().tolist(), net(ids()).tolist(), strict=True):
        start = np.concatenate(embedded(w, row))
        x = start
        for weight, bias in zip(w["cross_weight"], w["cross_bias"], strict=True):
            x = np.outer(start, x) @ weight + bias + x
        true = w["head.weight"][0] @ np.concatenate([x, perceptron(w, start)]) + w["head.bias"][0]
        assert out == pytest.approx(true, rel=1e-9)


@pytest.mark.parametrize("kind", [DeepFM, DCN])
def test_features_and_compilation(kind: type[DeepFM] | type[DCN]) -> None:
    net = made(kind)
    assert net.features(ids()).shape == (9, net.num_features)
    torch.testing.assert_close(torch.compile(net, backend="aot_eager", fullgraph=True)(ids()), net(ids()))
    assert set(net.state_dict()) == {name for name, _ in net.named_parameters()}


@pytest.mark.parametrize("kind", [DeepFM, DCN])
def test_ids_that_are_none(kind: type[DeepFM] | type[DCN]) -> None:
    net = made(kind)
    with pytest.raises(ValueError, match=r"7 in field 0; allowed: 0 to 6"):
        net(torch.tensor([[7, 0, 0]]))
    with pytest.raises(ValueError, match=r"-1 in field 2"):
        net(torch.tensor([[0, 0, -1]]))
    with pytest.raises(ValueError, match=r"\(batch, 3\)"):
        net(torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(TypeError, match="float32"):
        net(torch.zeros(2, 3))


@pytest.mark.parametrize(("sizes", "dim", "words"), [((), 4, "empty"), ((3, 0), 4, r"field_sizes\[1\]"), ((3,), 0, "'dim'")])
def test_bad_tables(sizes: tuple[int, ...], dim: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FieldEmbedding(sizes, dim)


def test_no_layers() -> None:
    with pytest.raises(ValueError, match="'hidden'"):
        DeepFM([3, 2], hidden=[])

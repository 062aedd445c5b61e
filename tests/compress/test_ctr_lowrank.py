"""Low-rank click models, against numpy on the looked-up rows of every field and on the layers' outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from corollary.compress import CTRLowRank, FactoredFields, calibrate, compress, compression_report, load, save
from corollary.models import DCN, DeepFM, FieldEmbedding

SIZES = (40, 12, 3)
TARGETS = ["embedding", r"deep\.[02]"]


def log(rows: int = 300, seed: int = 0) -> Tensor:
    """Ids of the fields, small ones more often."""
    u = torch.rand(rows, len(SIZES), generator=torch.Generator().manual_seed(seed))
    return (u**2 * torch.tensor(SIZES)).long()


def model(kind: type[DeepFM] | type[DCN] = DeepFM, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = kind(SIZES, dim=6, hidden=[10, 8]).double().eval()
    nn.init.normal_(net.embedding.weight, 0.5, 1.0)
    return net


def rows_of(net: nn.Module, ids: Tensor) -> Tensor:
    return ids + torch.tensor(net.embedding.starts)


def mimicked(looked_up: np.ndarray, table: np.ndarray, rank: int) -> np.ndarray:
    """A field's table cut to the leading principal components of the rows that the log looks up, one row of data a look-up."""
    mean = looked_up.mean(0)
    values, vectors = np.linalg.eigh(np.cov(looked_up.T, bias=True))
    leading = vectors[:, np.argsort(values)[::-1][:rank]]
    return mean + (table - mean) @ leading @ leading.T


@pytest.mark.parametrize("rank", [1, 2])
def test_each_field_keeps_the_principal_components_of_what_the_log_looks_up(rank: int) -> None:
    net, ids = model(), log()
    small = compress(net, CTRLowRank(rank=rank, damping=0.0), "embedding", calibration=ids.split(70))
    table = net.embedding.weight.detach().numpy()
    got = small.embedding(rows_of(net, ids)).detach().numpy()
    assert isinstance(small.embedding, FactoredFields)
    lost = whole = 0.0
    for f, (start, size) in enumerate(zip(net.embedding.starts, SIZES, strict=True)):
        own = table[start : start + size]
        seen = own[ids[:, f].numpy()]
        true = mimicked(seen, own, rank)
        np.testing.assert_allclose(got[:, f], true[ids[:, f].numpy()], atol=1e-9)
        lost += np.sum((true[ids[:, f].numpy()] - seen) ** 2)
        whole += np.sum((seen - seen.mean(0)) ** 2)
        # Ids that the log never shows are projected like the others.
        for i in range(size):
            every = torch.tensor(net.embedding.starts)
            every[f] = start + i
            np.testing.assert_allclose(small.embedding(every[None])[0, f].detach().numpy(), true[i], atol=1e-9)
    assert compression_report(small).layers[0].error == pytest.approx(lost / whole, rel=1e-6)


def test_weights_are_decomposed_field_by_field_without_a_metric() -> None:
    net, ids = model(), log()
    config = CTRLowRank(rank=2, metric="none", centered=False)
    assert not config.calibrated
    small = compress(net, config, "embedding")
    assert small.embedding.bias is None
    for f, (start, size) in enumerate(zip(net.embedding.starts, SIZES, strict=True)):
        u, s, vh = np.linalg.svd(net.embedding.weight[start : start + size].detach().numpy(), full_matrices=False)
        true = u[:, :2] * s[:2] @ vh[:2]
        got = small.embedding(rows_of(net, ids))[:, f].detach().numpy()
        np.testing.assert_allclose(got, true[ids[:, f].numpy()], atol=1e-9)


@pytest.mark.parametrize("kind", [DeepFM, DCN])
def test_full_rank_changes_nothing_though_a_field_has_fewer_ids(kind: type[DeepFM] | type[DCN]) -> None:
    net, ids = model(kind), log()
    small = compress(net, CTRLowRank(rank={"embedding": 6, "deep.0": 10, "deep.2": 8}), TARGETS, calibration=[ids])
    torch.testing.assert_close(small(ids), net(ids), atol=1e-8, rtol=0)


def test_a_field_that_is_never_shown_keeps_its_own_directions() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(FieldEmbedding([8, 5], 4)).double()
    shown = torch.tensor([[0], [1], [1], [2]])
    seen = calibrate(net, [shown], nn.Embedding)
    small = compress(net, CTRLowRank(rank=2), nn.Embedding, calibration=seen)
    u, s, vh = np.linalg.svd(net[0].weight[8:].detach().numpy(), full_matrices=False)
    both = torch.stack([torch.zeros(5, dtype=torch.long), torch.arange(8, 13)], 1)
    np.testing.assert_allclose(small(both)[:, 1].detach().numpy(), u[:, :2] * s[:2] @ vh[:2], atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_rectifier_stands_on_the_scores_of_the_outputs(bias: bool) -> None:
    """As the authors' code has it: V(Wx + b), the rectifier, then U and what the mean lacks."""
    torch.manual_seed(0)
    x = torch.randn(50, 7, dtype=torch.float64) + 0.5
    layer = nn.Linear(7, 5, bias=bias).double()
    small = compress(layer, CTRLowRank(rank=3, activation="relu", damping=0.0), calibration=[x])
    y = layer(x).detach().numpy()
    values, vectors = np.linalg.eigh(np.cov(y.T, bias=True))
    u = vectors[:, np.argsort(values)[::-1][:3]]
    u = u * np.where(u[np.abs(u).argmax(0), range(3)] < 0, -1.0, 1.0)  # the sign is open; ours makes the largest entry positive
    true = np.maximum(y @ u, 0) @ u.T + (np.eye(5) - u @ u.T) @ y.mean(0)
    np.testing.assert_allclose(small(x).detach().numpy(), true, atol=1e-8)
    assert [name for name, _ in small.named_children()] == ["down", "activation", "up"]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), rank=st.integers(1, 4))
def test_no_other_projection_of_that_rank_is_nearer(seed: int, rank: int) -> None:
    net, ids = model(seed=seed), log(100, seed)
    rows = rows_of(net, ids)
    true = net.embedding(rows).detach()

    @torch.no_grad()
    def change(small: nn.Module) -> float:
        return float((small.embedding(rows) - true).square().sum())

    ours = compress(net, CTRLowRank(rank=rank, damping=0.0), "embedding", calibration=[ids])
    others = [
        CTRLowRank(rank=rank, metric="none", centered=False),
        CTRLowRank(rank=rank, centered=False, damping=0.0),
    ]
    for other in others:
        assert change(ours) <= change(compress(net, other, "embedding", calibration=[ids])) * (1 + 1e-9) + 1e-12
    nudged = compress(net, CTRLowRank(rank=rank, damping=0.0), "embedding", calibration=[ids])
    with torch.no_grad():
        nudged.embedding.up.add_(0.01 * torch.randn(nudged.embedding.up.shape, dtype=torch.float64))
    assert change(ours) <= change(nudged) + 1e-12


@pytest.mark.parametrize("allocation", ["global", "uniform", None])
@pytest.mark.parametrize("ratio", [0.7, 0.5])
def test_one_budget_for_tables_and_layers_is_kept(ratio: float, allocation: str | None) -> None:
    net, ids = DeepFM([400, 100, 30], dim=12, hidden=[32, 32]), log()
    small = compress(net, CTRLowRank(ratio=ratio, allocation=allocation), TARGETS, calibration=[ids])
    report = compression_report(small)
    weights = sum(
        t.numel() for name, t in small.named_parameters() if name.startswith(("embedding.", "deep.")) and "bias" not in name
    )
    dense = 530 * 12 + 36 * 32 + 32 * 32
    assert weights <= ratio * dense
    assert weights > (ratio - 0.12) * dense
    assert report.parameters == sum(p.numel() for p in small.parameters())


def test_the_budget_goes_where_variance_is_lost() -> None:
    """A table whose rows lie on a plane is cut to it, and the rest of the budget goes to the perceptron."""
    net, ids = model(), log()
    with torch.no_grad():
        for start, size in zip(net.embedding.starts, SIZES, strict=True):
            net.embedding.weight[start : start + size, 2:] = 0
    small = compress(net, CTRLowRank(ratio=0.75), TARGETS, calibration=[ids])
    rows = {row.layer: row for row in compression_report(small).layers}
    assert rows["embedding"].rank == 2
    assert rows["embedding"].error < 1e-9


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("kind", [DeepFM, DCN])
def test_saved_and_loaded(kind: type[DeepFM] | type[DCN], activation: str | None, tmp_path: Path) -> None:
    net, ids = model(kind), log()
    config = CTRLowRank(rank={"embedding": 2, "deep.0": 3, "deep.2": 3}, activation=activation)
    small = compress(net, config, TARGETS, calibration=[ids])
    again = load(save(small, tmp_path / "small"), model(kind, seed=9))
    assert torch.equal(again(ids), small(ids))
    assert list(again.state_dict()) == list(small.state_dict())


def test_whatever_else_is_a_table_or_a_layer_is_taken_as_by_atomic_feature_mimicking() -> None:
    torch.manual_seed(0)
    layer, tokens = nn.Embedding(12, 5).double(), torch.tensor([0] * 20 + [1] * 10 + [2] * 5 + [3, 4, 4])
    small = compress(layer, CTRLowRank(rank=2, damping=0.0), nn.Embedding, calibration=[tokens])
    seen = layer(tokens).detach().numpy()
    np.testing.assert_allclose(small(tokens).detach().numpy(), mimicked(seen, seen, 2), atol=1e-9)


def test_trains_and_compiles() -> None:
    net, ids = model(), log()
    small = compress(net, CTRLowRank(rank=2, activation="relu"), TARGETS, calibration=[ids])
    small(ids).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())
    table = compress(net, CTRLowRank(rank=2), "embedding", calibration=[ids]).embedding
    rows = rows_of(net, ids)
    torch.testing.assert_close(torch.compile(table, backend="aot_eager", fullgraph=True)(rows), table(rows))
    assert table(rows[:, None]).shape == (300, 1, 3, 6)
    with pytest.raises(ValueError, match=r"\(\.\.\., 3\)"):
        table(rows[:, :2])


@pytest.mark.parametrize(
    ("given", "words"),
    [({"rank": 2, "activation": "tanh"}, "tanh"), ({}, "one of 'ratio' and 'rank'"), ({"rank": 9}, "above 6")],
)
def test_bad_settings(given: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        compress(model(), CTRLowRank(**given), "embedding", calibration=[log()])

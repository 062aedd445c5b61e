"""LoRD and the configurations around it, against numpy on data, and inside whole models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from corollary.compress import SVD, FeaturePCA, LoRD, LowRank, calibrate, compress, compression_report
from corollary.models import GPT


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def skewed(rows: int, n: int, seed: int = 0) -> Tensor:
    return draw(rows, n, seed=seed) @ draw(n, n, seed=seed + 1) * torch.logspace(0, -1, n, dtype=torch.float64) + 2.0


def principal_outputs(y: np.ndarray, rank: int) -> np.ndarray:
    """Data cut to its leading principal components, by a singular value decomposition of the data themselves."""
    mean = y.mean(0)
    u, s, vh = np.linalg.svd(y - mean, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank] + mean


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "m"), [(10, 6), (6, 10), (8, 8)])
@pytest.mark.parametrize("config", [LoRD, FeaturePCA])
def test_outputs_are_cut_to_their_principal_components(config: type[LowRank], n: int, m: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(n, m, bias=bias).double(), skewed(60, n)
    small = compress(layer, config(rank=2, damping=0.0), calibration=x.split(7))
    true = principal_outputs(layer(x).detach().numpy(), 2)
    np.testing.assert_allclose(small(x).detach().numpy(), true, atol=1e-8)
    lost = np.sum((layer(x).detach().numpy() - true) ** 2)
    centred = layer(x).detach().numpy()
    assert compression_report(small).layers[0].error == pytest.approx(lost / np.sum((centred - centred.mean(0)) ** 2), rel=1e-6)


def test_embedding_is_cut_by_how_often_its_rows_are_used() -> None:
    torch.manual_seed(0)
    layer = nn.Embedding(12, 5).double()
    tokens = torch.tensor([0] * 20 + [1] * 10 + [2] * 5 + [3, 4, 4])
    small = compress(layer, FeaturePCA(rank=2, damping=0.0), nn.Embedding, calibration=[tokens])
    true = principal_outputs(layer(tokens).detach().numpy(), 2)
    np.testing.assert_allclose(small(tokens).detach().numpy(), true, atol=1e-9)


def test_padding_row_stays_zero() -> None:
    layer = nn.Embedding(9, 6, padding_idx=3)
    small = compress(layer, FeaturePCA(rank=2), nn.Embedding, calibration=[torch.arange(9)])
    assert not small(torch.tensor([3])).any()


def test_both_metrics_minimize_the_loss_of_a_linear_model() -> None:
    """For outputs of a linear layer under a quadratic loss, the metric of both sides is the change of the loss itself."""
    x, head = skewed(80, 6), draw(7, 4, seed=5) * torch.logspace(0, -1, 7, dtype=torch.float64)[:, None]
    layer = nn.Linear(6, 7, bias=False).double()
    # Gradients of |head^T y - t|^2 with t far away and random span head's columns, whatever the layer.
    target = 100 * draw(80, 4, seed=8)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) @ head - batch[1]).square().sum()

    seen = calibrate(layer, [(x, target)], loss=loss)
    outputs = {
        metric: (compress(layer, LowRank(rank=2, metric=metric), calibration=seen)(x) - layer(x)) @ head
        for metric in ("none", "inputs", "both")
    }
    sizes = {metric: float(change.detach().square().sum()) for metric, change in outputs.items()}
    assert sizes["both"] < sizes["inputs"] < sizes["none"]
    with pytest.raises(ValueError, match="'loss'"):
        compress(layer, LowRank(rank=2, metric="outputs"), calibration=calibrate(layer, [x]))


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("budget", ["parameters", "macs", "bytes"])
@pytest.mark.parametrize("ratio", [0.9, 0.5, 0.2])
def test_budget_is_kept(ratio: float, budget: str, allocation: str) -> None:
    model = GPT(64, dim=32, depth=2, heads=2, context=8)
    targets = r"blocks\..*_proj"
    data = [torch.randint(64, (4, 8), generator=torch.Generator().manual_seed(0))]
    small = compress(model, LoRD(ratio=ratio, budget=budget, allocation=allocation, centered=False), targets, calibration=data)
    rows = compression_report(small).layers
    assert len(rows) == 14
    kept = sum(row.macs for row in rows) / sum(row.macs_before for row in rows)
    assert kept <= ratio + 1e-9
    assert kept > ratio - 0.05
    assert sum(p.numel() for p in small.parameters()) == compression_report(small).parameters
    assert small(data[0]).shape == (4, 8, 64)


def test_ratio_of_one_changes_nothing() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), torch.randn(3, 8)
    assert torch.equal(compress(model, SVD(ratio=1.0))(x), model(x))


def test_ranks_by_layer_and_as_a_share() -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 8), nn.Linear(8, 12))
    small = compress(model, SVD(rank={"0": 3, "2": 5}))
    assert (small[0].rank, type(small[1]), small[2].rank) == (3, nn.Linear, 5)
    assert [layer.rank for layer in compress(model, SVD(rank=0.5))] == [6, 4, 4]
    assert [layer.rank for layer in compress(model, SVD(rank=0.5, multiple_of=4))] == [4, 4, 4]
    with pytest.raises(ValueError, match="above 8"):
        compress(model, SVD(rank=10))


def test_a_layer_in_two_places_is_replaced_in_both_and_a_tied_head_is_left() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = self.a
            self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.a(self.embed(x))))

    small = compress(Twice(), SVD(rank=2))
    assert small.a is small.b
    assert small.a.rank == 2
    assert type(small.head) is nn.Linear
    assert small.head.weight is small.embed.weight
    with pytest.raises(ValueError, match="shares its weight"):
        compress(Twice(), SVD(rank=2), "head")


def test_sequential_sees_the_compressed_layers_before() -> None:
    """Behind a first layer that loses a direction, the second is fitted to what comes out of the compressed one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
    x = skewed(200, 8)
    config = LoRD(rank=2, damping=0.0)
    small = compress(model, config, calibration=[x], sequential=True)
    first = compress(model, config, "0", calibration=[x])
    true = compress(model[2], config, calibration=[first[:2](x).detach()])
    torch.testing.assert_close(small[2].matrix(), true.matrix())
    with pytest.raises(ValueError, match="'sequential'"):
        compress(model, config, calibration=iter([x]), sequential=True)


def test_compressing_twice_adds_a_step() -> None:
    x = torch.randn(5, 16)
    small = compress(compress(nn.Sequential(nn.Linear(16, 16)), SVD(rank=4)), SVD(rank=2), ["0.up", "0.down"])
    assert (small[0].up.rank, small[0].down.rank) == (2, 2)
    assert small(x).shape == (5, 16)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "one of 'ratio' and 'rank'"),
        ({"ratio": 0.5, "rank": 2}, "one of"),
        ({"ratio": 0.0}, "0.0"),
        ({"ratio": 1.5}, "1.5"),
        ({"rank": 0}, "not 0"),
        ({"rank": 1.5}, "1.5"),
        ({"ratio": 0.5, "metric": "hessian"}, "hessian"),
        ({"ratio": 0.5, "budget": "time"}, "time"),
        ({"ratio": 0.5, "allocation": "random"}, "random"),
        ({"ratio": 0.5, "multiple_of": 0}, "multiple_of"),
        ({"ratio": 0.5, "damping": -1.0}, "damping"),
        ({"ratio": 0.5, "centered": True}, "centered"),
    ],
)
def test_bad_settings(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LowRank(**settings)


def test_ratio_below_one_rank_says_so() -> None:
    with pytest.raises(ValueError, match="rank 1"):
        compress(nn.Linear(8, 8), SVD(ratio=0.01))


def test_grouped_convolution_is_refused() -> None:
    with pytest.raises(TypeError, match="groups"):
        compress(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), SVD(rank=2), "0")


def test_perplexity_is_that_of_the_original_at_full_rank() -> None:
    model = GPT(32, dim=16, depth=1, heads=2, context=8).double()
    x = torch.randint(32, (4, 8), generator=torch.Generator().manual_seed(0))
    small = compress(model, LoRD(rank=16), r"blocks\..*_proj", calibration=[x])
    assert (small(x) - model(x)).abs().max().item() < 1e-9


def test_report_counts_shared_weights_once() -> None:
    model = GPT(64, dim=16, depth=1, heads=2, context=8, tied=True)
    small = compress(model, SVD(rank=2), r"blocks\..*_proj")
    report = compression_report(small)
    assert report.parameters_before == sum(p.numel() for p in model.parameters())
    assert report.parameters == sum(p.numel() for p in small.parameters())

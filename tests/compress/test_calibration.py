"""Streamed moments against all data at once, for every kind of layer, and what hooks leave behind: nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from corollary.compress import calibrate, load_calibration
from corollary.memory import peak_bytes


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(seen, rows: Tensor) -> None:
    assert seen.count == len(rows)
    torch.testing.assert_close(seen.mean, rows.mean(0))
    torch.testing.assert_close(seen.second, torch.stack([torch.outer(r, r) for r in rows]).mean(0))


def test_linear_and_what_stands_behind_it() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = draw(7, 2, 5)
    seen = calibrate(model, x.split(3))
    check(seen["0"], x.flatten(0, 1))
    check(seen["2"], model[1](model[0](x)).detach().flatten(0, 1))


@pytest.mark.parametrize("padding", [0, 2, "same", "valid"])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("one", [True, False])
def test_convolution(padding: int | str, mode: str, one: bool) -> None:
    """The layer's own output is its matrix times the rows: so the rows' moments are those of the outputs, for any weight."""
    if one:
        layer = nn.Conv1d(3, 6, 2, padding=padding, padding_mode=mode, dilation=2, bias=False).double()
        x = draw(4, 3, 8)
    else:
        layer = nn.Conv2d(3, 6, (2, 3), padding=padding, padding_mode=mode, dilation=(1, 2), bias=False).double()
        x = draw(4, 3, 7, 8)
    seen = calibrate(layer, [x[:1], x[1:]], type(layer))[""]
    y = layer(x).movedim(1, -1).flatten(0, -2).detach()
    matrix = layer.weight.detach().flatten(1)
    assert seen.count == len(y)
    torch.testing.assert_close(matrix @ seen.mean, y.mean(0))
    torch.testing.assert_close(matrix @ seen.second @ matrix.T, y.T @ y / len(y))


def test_strided_convolution_of_one_image() -> None:
    layer = nn.Conv2d(2, 4, 3, stride=2).double()
    x = draw(2, 9, 9)
    assert calibrate(layer, [x], nn.Conv2d)[""].count == 16


def test_embedding_counts_its_tokens() -> None:
    layer = nn.Embedding(6, 3)
    seen = calibrate(layer, [torch.tensor([[0, 1, 1]]), torch.tensor([[5, 1, 0]])], nn.Embedding)[""]
    assert seen.count == 6
    assert (seen.mean * 6).tolist() == pytest.approx([2, 3, 0, 0, 0, 1])
    assert torch.equal(seen.mean, seen.second)


def test_transformers_conv1d() -> None:
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(4, 5).double()
    x = draw(6, 5)
    check(calibrate(conv, [x])[""], x)


def test_padding_is_left_out() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2).double()

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.linear(x)

    x, mask = draw(4, 5, 3), torch.arange(5) < torch.tensor([5, 2, 1, 3])[:, None]
    check(calibrate(Model(), [{"x": x, "attention_mask": mask.long()}])["linear"], x[mask])


def test_gradients_at_outputs() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = draw(6, 4), draw(6, 2, seed=1)
    seen = calibrate(model, [(x, y)], loss=lambda m, batch: (m(batch[0]) - batch[1]).square().sum())
    residual = 2 * (model(x) - y)
    torch.testing.assert_close(seen["2"].outputs, (residual.T @ residual / 6).detach())
    hidden = model[1](model[0](x))
    back = (residual @ model[2].weight) * (1 - hidden.square())
    torch.testing.assert_close(seen["0"].outputs, (back.T @ back / 6).detach())
    assert all(p.grad is None for p in model.parameters())


def test_layers_in_turns_give_the_same() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)).double()
    data = [draw(3, 5), draw(2, 5, seed=1)]
    whole, turns = calibrate(model, data), calibrate(model, data, layers_at_once=1)
    for name in whole:
        assert torch.equal(whole[name].second, turns[name].second)
    with pytest.raises(ValueError, match="iterator"):
        calibrate(model, iter(data), layers_at_once=1)


def test_memory_does_not_grow_with_the_data() -> None:
    model = nn.Linear(64, 8)

    def data(batches: int):
        return (torch.ones(16, 64) for _ in range(batches))

    few, many = peak_bytes(lambda: calibrate(model, data(5))), peak_bytes(lambda: calibrate(model, data(400)))
    assert many < 1.3 * few  # all the data together are eight times as much


def test_hooks_come_off_when_the_model_fails() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(4, 2))
    with pytest.raises(RuntimeError):
        calibrate(model, [torch.ones(2, 3)])
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        ([], {}, "empty"),
        ([torch.full((2, 3), torch.nan)], {}, "NaN"),
        ([torch.ones(2, 3)], {"layers_at_once": 0}, "layers_at_once"),
        ([torch.ones(2, 3)], {"targets": "nowhere"}, "nowhere"),
    ],
)
def test_bad_input(data: list[Tensor], options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        calibrate(nn.Sequential(nn.Linear(3, 2)), data, **options)


def test_layer_that_no_data_reaches() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises(ValueError, match="never reached layer 'unused'"):
        calibrate(Half(), [torch.ones(2, 3)])


def test_saved_and_read_back_layer_by_layer(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    seen = calibrate(model, [draw(9, 5)], loss=lambda m, x: m(x).square().sum())
    again = load_calibration(seen.save(tmp_path / "moments.safetensors"))
    assert list(again) == list(seen)
    for name in seen:
        for part in ("second", "mean", "outputs"):
            assert torch.equal(getattr(again[name], part), getattr(seen[name], part))
        assert again[name].count == seen[name].count
    assert [p.name for p in tmp_path.iterdir()] == ["moments.safetensors"]
    with pytest.raises(KeyError, match="no layer '7'"):
        again["7"]


def test_files_that_are_none(tmp_path: Path) -> None:
    import safetensors.torch

    with pytest.raises(ValueError, match="no file"):
        load_calibration(tmp_path / "missing.safetensors")
    (tmp_path / "text.safetensors").write_text("not one")
    with pytest.raises(ValueError, match="not a valid safetensors"):
        load_calibration(tmp_path / "text.safetensors")
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="no calibration"):
        load_calibration(tmp_path / "weights.safetensors")
    facts = {"format": "corollary-calibration", "counts": '{"a": 1}'}
    safetensors.torch.save_file({"b": torch.ones(1)}, tmp_path / "half.safetensors", facts)
    with pytest.raises(ValueError, match=r"no tensor 'a\.second'"):
        load_calibration(tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="safetensors"):
        calibrate(nn.Linear(2, 2), [torch.ones(1, 2)]).save(tmp_path / "moments.bin")

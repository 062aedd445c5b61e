"""Checkpoints on disk: the same tensors as in memory, resumed to the bit, in little memory, with one line for what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from corollary.compress import (
    SVD,
    CompressConfig,
    EoRA,
    LoRD,
    Quantize,
    calibrate,
    compress,
    compress_checkpoint,
    linear_layers,
    load,
    load_calibration,
)
from corollary.data import LoadError, WriteError, open_checkpoint
from corollary.memory import peak_bytes
from corollary.models import GPT

TARGETS = r"\w+_proj"


def model_on_disk(folder: Path) -> tuple[GPT, Path, Path]:
    torch.manual_seed(0)
    model = GPT(64, dim=32, depth=2, heads=2, context=8).eval()
    seen = calibrate(model, [torch.randint(64, (8, 8), generator=torch.Generator().manual_seed(1))], rf"blocks\..*{TARGETS}")
    path = folder / "model.safetensors"
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, path)
    return model, path, seen.save(folder / "moments.safetensors")


@pytest.mark.parametrize(
    "config",
    [
        SVD(ratio=0.6), LoRD(ratio=0.6, allocation="global"), LoRD(rank=5, centered=False), EoRA(rank=3, sparsity="2:4", group_size=8),
        EoRA(ratio=0.5, group_size=16), Quantize(bits=8), Quantize(method="gptq"),
    ],
    ids=lambda c: f"{type(c).__name__}-{c.rank if hasattr(c, 'rank') else c.bits}",
)  # fmt: skip
def test_same_as_in_memory(tmp_path: Path, config: CompressConfig) -> None:
    model, path, moments = model_on_disk(tmp_path)
    before = path.read_bytes()
    report = compress_checkpoint(path, config, tmp_path / "small", TARGETS, calibration=load_calibration(moments))
    assert path.read_bytes() == before
    small = compress(model, config, rf"blocks\..*{TARGETS}", calibration=load_calibration(moments))
    again = load(tmp_path / "small", model)
    for (name, ours), true in zip(again.state_dict().items(), small.state_dict().values(), strict=True):
        assert torch.equal(ours, true), name
    from corollary.compress import compression_report

    for ours, true in zip(report.layers, compression_report(small).layers, strict=False):
        if ours.layer == true.layer:
            assert (ours.bytes, ours.bytes_before, ours.rank, ours.macs) == (
                true.bytes,
                true.bytes_before,
                true.rank,
                true.macs,
            )
            assert ours.error == pytest.approx(true.error)
    manifest = json.loads((tmp_path / "small" / "compression.json").read_text())
    assert manifest["report"]["bytes"] == report.bytes
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "moments.safetensors", "small"]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("after", [1, 5, 13, 15, 20, 27])
def test_resumed_to_the_bit(tmp_path: Path, after: int) -> None:
    _, path, moments = model_on_disk(tmp_path)
    seen = load_calibration(moments)
    compress_checkpoint(path, LoRD(ratio=0.5, allocation="global"), tmp_path / "whole", TARGETS, calibration=seen)
    count = 0

    def stop(what: str, done: int, total: int) -> None:
        nonlocal count
        count += 1
        if count == after:
            raise Interrupted

    with pytest.raises(Interrupted):
        compress_checkpoint(
            path, LoRD(ratio=0.5, allocation="global"), tmp_path / "part", TARGETS, calibration=seen, progress=stop
        )
    assert not (tmp_path / "part").exists()
    steps: list[str] = []
    report = compress_checkpoint(
        path,
        LoRD(ratio=0.5, allocation="global"),
        tmp_path / "part",
        TARGETS,
        calibration=seen,
        progress=lambda what, *_: steps.append(what),
    )
    for file in ("model.safetensors",):
        assert (tmp_path / "part" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    whole, part = (json.loads((tmp_path / name / "compression.json").read_text()) for name in ("whole", "part"))
    for content in (whole, part):
        content["report"].pop("seconds")
    assert whole == part
    assert all(row.error is not None for row in report.layers)


def test_what_was_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path, _ = model_on_disk(tmp_path)
    calls = []
    solve = SVD._solve
    monkeypatch.setattr(SVD, "_solve", lambda self, place: calls.append(place.name) or solve(self, place))

    compress_checkpoint(path, SVD(ratio=0.5, allocation="global"), tmp_path / "whole")
    whole = len(calls)
    calls.clear()
    assert whole > 14, "14 spectra, and the layers that are not left whole"

    def stop(what: str, done: int, total: int) -> None:
        if what == "layers" and done > total // 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        compress_checkpoint(path, SVD(ratio=0.5, allocation="global"), tmp_path / "small", progress=stop)
    first = len(calls)
    compress_checkpoint(path, SVD(ratio=0.5, allocation="global"), tmp_path / "small")
    # At most one layer is solved twice: the one that was interrupted.
    assert first > 14
    assert whole <= len(calls) <= whole + 1


def test_a_line_cut_off_in_the_journal_loses_no_later_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path, _ = model_on_disk(tmp_path)
    config = SVD(ratio=0.5, allocation="global")

    def stop_after(count: int):
        def stop(what: str, done: int, total: int) -> None:
            nonlocal count
            count -= 1
            if not count:
                raise Interrupted

        return stop

    journal = tmp_path / ".small.spectra"
    for count in (3, 6):
        with pytest.raises(Interrupted):
            compress_checkpoint(path, config, tmp_path / "small", progress=stop_after(count))
        with journal.open("a") as file:
            file.write('{"layer": "blocks.')
    calls = []
    solve = SVD._solve
    monkeypatch.setattr(SVD, "_solve", lambda self, place: calls.append(place.name) or solve(self, place))
    with pytest.raises(Interrupted):
        compress_checkpoint(path, config, tmp_path / "small", progress=stop_after(7))
    assert len(calls) == 1
    compress_checkpoint(path, config, tmp_path / "small")
    assert not journal.exists()


def test_shards_and_other_files(tmp_path: Path) -> None:
    model, path, _ = model_on_disk(tmp_path)
    source = tmp_path / "source"
    source.mkdir()
    tensors = load_file(path)
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({n: tensors[n] for n in part}, source / f"model-0000{i + 1}-of-00002.safetensors")
    index = {n: f"model-0000{i + 1}-of-00002.safetensors" for i, part in enumerate((names[::2], names[1::2])) for n in part}
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (source / "config.json").write_text('{"a": 1}')
    (source / "pytorch_model.bin").write_bytes(b"no")
    compress_checkpoint(source, SVD(ratio=0.5), tmp_path / "small", max_shard_bytes=40_000)
    held = {p.name for p in (tmp_path / "small").iterdir()}
    assert "config.json" in held
    assert "pytorch_model.bin" not in held
    assert len([n for n in held if n.endswith(".safetensors")]) > 1
    single = tmp_path / "single"
    compress_checkpoint(path, SVD(ratio=0.5), single)
    x = torch.randint(64, (2, 8))
    assert torch.equal(load(tmp_path / "small", model)(x), load(single, model)(x))


def test_transposed_layers(tmp_path: Path) -> None:
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.c_fc, self.c_proj = conv(24, 16), conv(16, 24)

        def forward(self, x: Tensor) -> Tensor:
            return self.c_proj(self.c_fc(x).tanh())

    model, x = Model(), torch.randn(5, 16)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    seen = calibrate(model, [x])
    compress_checkpoint(
        tmp_path / "model.safetensors", LoRD(rank=3), tmp_path / "small", calibration=seen, transposed=r"c_(fc|proj)$"
    )
    true = compress(model, LoRD(rank=3), calibration=seen)
    torch.testing.assert_close(load(tmp_path / "small", model)(x), true(x))
    with pytest.raises(ValueError, match="16 inputs, the checkpoint's 24"):
        compress_checkpoint(tmp_path / "model.safetensors", LoRD(rank=3), tmp_path / "other", calibration=seen)


def test_memory_is_that_of_the_largest_matrix(tmp_path: Path) -> None:
    """Twelve matrices take no more than two do."""
    peaks = []
    for count in (2, 12):
        path = tmp_path / f"{count}.safetensors"
        save_file({f"layer.{i}.weight": torch.randn(128, 128) for i in range(count)}, path)
        call = lambda path=path, count=count: compress_checkpoint(path, SVD(ratio=0.5), tmp_path / f"small{count}")  # noqa: E731
        peaks.append(peak_bytes(call))
    assert peaks[1] < 1.2 * peaks[0] + 200_000
    assert peaks[1] < 7 * 128 * 128 * 4 + 400_000


def test_chosen_layers(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {
        "embeddings.word.weight": torch.ones(8, 4), "h.0.fc.weight": torch.ones(8, 4), "h.0.fc.bias": torch.ones(8),
        "norm.weight": torch.ones(4), "lm_head.weight": torch.ones(8, 4), "positions.weight": torch.ones(8, 4, dtype=torch.int64),
        "conv.weight": torch.ones(4, 4, 3),
    }  # fmt: skip
    save_file(tensors, path)
    checkpoint = open_checkpoint(path)
    assert linear_layers(checkpoint) == ["h.0.fc"]
    assert linear_layers(checkpoint, "fc|lm_head") == ["h.0.fc", "lm_head"]
    with pytest.raises(ValueError, match="no linear layer"):
        linear_layers(checkpoint, "attention")
    with pytest.raises(ValueError, match="valid pattern"):
        linear_layers(checkpoint, "(")


def test_refusals(tmp_path: Path) -> None:
    _, path, moments = model_on_disk(tmp_path)
    seen = load_calibration(moments)
    for call, error, words in (
        (lambda: compress_checkpoint(tmp_path / "none", SVD(rank=2), tmp_path / "small"), LoadError, "none"),
        (lambda: compress_checkpoint(path, SVD(rank=2), tmp_path), WriteError, "being compressed"),
        (lambda: compress_checkpoint(path, SVD(rank=2), tmp_path / "small.safetensors"), WriteError, "folder"),
        (lambda: compress_checkpoint(path, LoRD(rank=2), tmp_path / "small"), ValueError, "calibration"),
        (lambda: compress_checkpoint(path, LoRD(rank=2), tmp_path / "small", "head", calibration=seen), ValueError, "none of"),
        (lambda: compress_checkpoint(path, SVD(rank=99), tmp_path / "small"), ValueError, "99"),
        (lambda: compress_checkpoint(path, SVD(rank=2), tmp_path / "small", transposed="("), ValueError, "valid pattern"),
        (lambda: compress_checkpoint(path, SVD(ratio=0.001), tmp_path / "small"), ValueError, "0.001"),
        (lambda: compress_checkpoint(path, SVD(rank=2), tmp_path / "no" / "small"), WriteError, "no such folder"),
    ):
        with pytest.raises(error, match=words):
            call()
        assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", "moments.safetensors"}
    weights = load_file(path)
    weights["blocks.0.attn.q_proj.weight"][0, 0] = torch.nan
    save_file(weights, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="NaN"):
        compress_checkpoint(tmp_path / "nan.safetensors", SVD(ratio=0.5), tmp_path / "small")
    assert not (tmp_path / "small").exists()


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    code = "from corollary.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_command(tmp_path: Path) -> None:
    model, path, moments = model_on_disk(tmp_path)
    done = run(
        "compress", path, "--method", "lord", "--ratio", 0.5, "--calibration", moments, "--out", tmp_path / "small",
        "--json", tmp_path / "report.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "lord:" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["method"] == "lord"
    assert report["ratio"] < 0.55
    x = torch.randint(64, (2, 8))
    small = load(tmp_path / "small", model)
    assert small(x).shape == model(x).shape
    again = run("compress", path, "--method", "svd", "--out", tmp_path / "small")
    assert again.returncode == 2
    assert again.stderr.startswith("corollary: ")
    assert "not empty" in again.stderr
    assert again.stderr.count("\n") == 1


def test_options_of_the_command(tmp_path: Path) -> None:
    from corollary.claims.store import StoreError
    from corollary.cli.compress import CompressRequest

    def config(method: str, **options: object) -> CompressConfig:
        return CompressRequest(tmp_path, method, tmp_path / "out", options).config()

    assert config("svd") == SVD(ratio=0.7)
    assert config("svd", rank=4.0) == SVD(rank=4)
    assert config("lord", rank=0.5, multiple_of=8) == LoRD(rank=0.5, multiple_of=8)
    assert config("eora", ratio=0.4, sparsity="2:4", bits=16) == EoRA(ratio=0.4, sparsity="2:4", bits=None)
    assert config("gptq", bits=8) == Quantize(method="gptq", bits=8)
    for method, options, words in (
        ("magic", {}, "no method 'magic'"),
        ("svd", {"bits": 4}, "--bits is no option"),
        ("svd", {"ratio": 3.0}, "3.0"),
        ("svd", {"rank": 4.5}, "whole number"),
        ("svd", {"rank": 4.0, "ratio": 0.5}, "one of"),
        ("quantize", {"bits": 5}, "5"),
    ):
        with pytest.raises(StoreError, match=words):
            config(method, **options)

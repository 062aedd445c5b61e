"""The writer of checkpoints against the reference implementation's own reading, cut off at every place it can be."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from corollary.data import CheckpointWriter, TensorSpec, WriteError, load_safetensors
from corollary.data.checkpoint_layout import DTYPES


def specs_of(tensors: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(t.dtype, t.shape) for name, t in tensors.items()}


def sample() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "odd.bias": torch.randn(3).to(torch.bfloat16),
        "a.weight": torch.randn(5, 7),
        "counter": torch.tensor(7),
        "mask": torch.rand(5) > 0.5,
        "empty": torch.zeros(0, 4),
        "wide": torch.randn(4, dtype=torch.float64),
        "ünï\"\n": torch.arange(6, dtype=torch.int16).reshape(2, 3),
    }  # fmt: skip


def write(out: Path, tensors: dict[str, Tensor], **options: object) -> Path:
    with CheckpointWriter(out, specs_of(tensors), **options) as writer:  # type: ignore[arg-type]
        for name in writer.pending:
            writer.append(name, tensors[name])
    return writer.path


def tree(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_every_dtype_comes_back(dtype: str, tmp_path: Path) -> None:
    raw = torch.randint(0, 2 if dtype == "BOOL" else 120, (3 * 8 * DTYPES[dtype].itemsize,), dtype=torch.uint8)
    tensor = raw.view(DTYPES[dtype]).reshape(3, 8)
    path = write(tmp_path / "m.safetensors", {"x": tensor})
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    assert header == {"x": {"dtype": dtype, "shape": [3, 8], "data_offsets": [0, tensor.nbytes]}}
    assert path.read_bytes()[-tensor.nbytes :] == bytes(raw.tolist())
    with safetensors.safe_open(str(path), framework="pt") as file:
        assert file.get_slice("x").get_dtype() == dtype
    if dtype in safetensors.torch._TYPES:
        back = safetensors.torch.load_file(path)["x"]
        assert back.dtype == tensor.dtype
        assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))


def test_file_is_what_the_reference_reads(tmp_path: Path) -> None:
    tensors = sample()
    path = write(tmp_path / "m.safetensors", tensors, metadata={"format": "pt", "note": "é"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors"]
    back = safetensors.torch.load_file(path)
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
    with safetensors.safe_open(str(path), framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "é"}
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    for name, tensor in tensors.items():  # each one lies where its dtype can be mapped
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.dtype.itemsize == 0


def test_any_order_strides_and_gradients(tmp_path: Path) -> None:
    tensors = {"t": torch.randn(4, 6).T, "s": torch.randn(9)[::2], "p": torch.nn.Parameter(torch.randn(2)), "c": torch.randn(3, dtype=torch.complex64).conj()}  # fmt: skip
    with CheckpointWriter(tmp_path / "m.safetensors", specs_of(tensors)) as writer:
        for name in reversed(writer.pending):
            writer.append(name, tensors[name])
    back = safetensors.torch.load_file(writer.path)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_shards_as_transformers_has_them(tmp_path: Path) -> None:
    tensors = {f"layer.{i}": torch.full((10,), float(i)) for i in range(7)} | {"big": torch.zeros(100)}
    (tmp_path / "config.json").write_text("{}")
    with CheckpointWriter(tmp_path / "out", specs_of(tensors), max_shard_bytes=100) as writer:
        writer.add_file(tmp_path / "config.json")
        for name in writer:
            writer.append(name, tensors[name])
    names = [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    assert sorted(tree(tmp_path / "out")) == ["config.json", *names, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"]["layer.2"] == names[1]
    with load_safetensors(tmp_path / "out") as back:
        assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    write(tmp_path / "small", tensors)
    assert list(tree(tmp_path / "small")) == ["model.safetensors"]


@pytest.mark.parametrize("out", ["m.safetensors", "folder"])
@pytest.mark.parametrize("stop", range(8))
def test_resumes_to_the_same_bits(out: str, stop: int, tmp_path: Path) -> None:
    tensors = sample()
    (tmp_path / "whole").mkdir()
    whole = write(tmp_path / "whole" / out, tensors, max_shard_bytes=90)
    writer = CheckpointWriter(tmp_path / out, specs_of(tensors), max_shard_bytes=90)
    for name in writer.pending[:stop]:
        writer.append(name, tensors[name])
    writer.close()
    assert not (tmp_path / out).exists()
    journal = tmp_path / f".{out}.partial" / "journal"
    with journal.open("ab") as file:
        file.write(b'["a.wei')  # the process died in the middle of a line
    again = CheckpointWriter(tmp_path / out, specs_of(tensors), max_shard_bytes=90)
    assert again.resumed == min(stop, len(tensors))
    with again:
        for name in again.pending:
            again.append(name, tensors[name])
    if out == "folder":
        assert tree(tmp_path / out) == tree(whole)
    else:
        assert (tmp_path / out).read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([out, "whole"])


def test_resume_trusts_bytes_not_the_journal(tmp_path: Path) -> None:
    tensors = sample()
    writer = CheckpointWriter(tmp_path / "m.safetensors", specs_of(tensors))
    first = writer.pending[0]
    for name in writer.pending[:3]:
        writer.append(name, tensors[name])
    writer.close()
    data = tmp_path / ".m.safetensors.partial" / "checkpoint" / "m.safetensors"
    raw = bytearray(data.read_bytes())
    raw[8 + int.from_bytes(raw[:8], "little")] ^= 1  # one bit of the first tensor, as a machine that lost power leaves it
    data.write_bytes(raw)
    again = CheckpointWriter(tmp_path / "m.safetensors", specs_of(tensors))
    assert again.resumed == 2
    assert first in again.pending
    again.close()
    data.write_bytes(raw[:20])
    cut = CheckpointWriter(tmp_path / "m.safetensors", specs_of(tensors))
    assert cut.resumed <= 1  # the empty tensor has no bytes to lose
    with cut:
        for name in cut.pending:
            cut.append(name, tensors[name])
    assert all(torch.equal(safetensors.torch.load_file(cut.path)[n], t) for n, t in tensors.items())


def _endless(out: str) -> None:
    tensors = {f"t{i}": torch.full((1000,), float(i)) for i in range(200)}
    with CheckpointWriter(out, specs_of(tensors)) as writer:
        for name in writer:
            writer.append(name, tensors[name])
            time.sleep(0.005)


def test_killed_process_is_resumed(tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    process = multiprocessing.get_context("fork").Process(target=_endless, args=(str(out),))
    process.start()
    journal = tmp_path / ".m.safetensors.partial" / "journal"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 20:
        time.sleep(0.005)
    with pytest.raises(WriteError, match="is being written by another process"):
        CheckpointWriter(out, {f"t{i}": TensorSpec("F32", (1000,)) for i in range(200)})
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not out.exists()
    with CheckpointWriter(out, {f"t{i}": TensorSpec("F32", (1000,)) for i in range(200)}) as writer:
        assert 19 <= writer.resumed < 200
        for name in writer:
            writer.append(name, torch.full((1000,), float(name[1:])))
    expected = write(tmp_path / "n.safetensors", {f"t{i}": torch.full((1000,), float(i)) for i in range(200)})
    assert out.read_bytes() == expected.read_bytes()


def test_other_interrupted_work_is_left_alone(tmp_path: Path) -> None:
    tensors = sample()
    CheckpointWriter(tmp_path / "m.safetensors", specs_of(tensors), identity="average").close()
    for changed in ({"identity": "ties"}, {"identity": "average", "metadata": {"a": "b"}}):
        with pytest.raises(WriteError, match="interrupted work of other inputs or settings; repeat that work, or remove"):
            CheckpointWriter(tmp_path / "m.safetensors", specs_of(tensors), **changed)  # type: ignore[arg-type]
    writer = CheckpointWriter(tmp_path / "m.safetensors", specs_of(tensors), identity="ties", fresh=True)
    assert writer.resumed == 0
    writer.close()
    CheckpointWriter(tmp_path / "m.safetensors", specs_of(tensors), identity="ties").close()


def test_old_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", {"a": torch.zeros(3)})
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="boom"), CheckpointWriter(path, {"a": TensorSpec("F32", (3,))}):
        raise RuntimeError("boom")
    assert path.read_bytes() == before
    with pytest.raises(WriteError, match=r"tensor 'a' was not written \(1 missing\)"), CheckpointWriter(path, {"a": TensorSpec("F32", (3,))}):  # fmt: skip
        pass
    assert path.read_bytes() == before
    write(path, {"a": torch.ones(3)})
    assert torch.equal(safetensors.torch.load_file(path)["a"], torch.ones(3))


def test_bad_tensors(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "m.safetensors", {"a": TensorSpec("F32", (3,)), "b": TensorSpec("F32", ())})
    for name, tensor, match in [
        ("c", torch.zeros(3), "'c' is not among those announced"),
        ("a", torch.zeros(4), r"'a' is F32 \(4,\); announced was F32 \(3,\)"),
        ("a", torch.zeros(3, dtype=torch.float16), r"'a' is F16 \(3,\); announced was F32"),
        ("a", torch.zeros(3, dtype=torch.complex128), "dtype 'torch.complex128' cannot be written"),
    ]:
        with pytest.raises(WriteError, match=match):
            writer.append(name, tensor)
    writer.append("a", torch.zeros(3))
    with pytest.raises(WriteError, match="'a' is written already"):
        writer.append("a", torch.zeros(3))
    writer.close()
    with pytest.raises(WriteError, match="this writer is closed"):
        writer.append("b", torch.zeros(()))


def test_bad_targets(tmp_path: Path) -> None:
    spec = {"a": TensorSpec("F32", (3,))}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.md").write_text("x")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").write_text("x")
    for out, match in [
        ("gone/m.safetensors", "there is no folder"),
        ("full", r"not empty \(it holds 'notes.md'\)"),
        ("folder.safetensors", "is a folder; give a file"),
        ("file", "is a file; give a folder"),
        ("model.bin", r"has suffix '.bin'; allowed: .safetensors, or a folder"),
    ]:
        with pytest.raises(WriteError, match=match):
            CheckpointWriter(tmp_path / out, spec)
    with pytest.raises(WriteError, match=r"needs 4,000,000,000,0\d\d bytes, and the disk has"):
        CheckpointWriter(tmp_path / "huge", {"a": TensorSpec("F32", (10**12,))})
    with pytest.raises(WriteError, match="must be text"):
        CheckpointWriter(tmp_path / "m.safetensors", spec, metadata={"a": 3})  # type: ignore[dict-item]
    with pytest.raises(WriteError, match="no name for a tensor"):
        CheckpointWriter(tmp_path / "m.safetensors", {"__metadata__": spec["a"]})
    with pytest.raises(WriteError, match="'max_shard_bytes' must be at least 1"):
        CheckpointWriter(tmp_path / "m.safetensors", spec, max_shard_bytes=0)
    with pytest.raises(WriteError, match="not valid Unicode"):
        CheckpointWriter(tmp_path / "m.safetensors", {"\ud800": spec["a"]})
    with pytest.raises(WriteError, match="negative size"):
        TensorSpec("F32", (-1,))
    with pytest.raises(WriteError, match="dtype 'F31' cannot be written"):
        TensorSpec("F31", (1,))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.safetensors", "full"]
    with pytest.raises(WriteError, match="is a single file"), CheckpointWriter(tmp_path / "m.safetensors", spec) as writer:
        writer.add_file(tmp_path / "file")
    with pytest.raises(WriteError, match="own files"), CheckpointWriter(tmp_path / "out", spec) as writer:
        writer.add_file("elsewhere/model.safetensors")

"""Hostile and broken checkpoints: each is refused with one clear line, and good ones are read as safetensors itself reads them."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from corollary.data import LoadError, open_checkpoint
from corollary.data.safetensors_header import read_header
from corollary.data.tensor_stream import natural

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "I8", "shape": [4], "data_offsets": [24, 28]},
    "none": {"dtype": "F16", "shape": [0, 7], "data_offsets": [28, 28]},
}


def raw(header: Any, data: int = 28, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(range(256))[:data]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def changed(name: str = "a", **fields: Any) -> dict[str, Any]:
    return {**GOOD, name: {**GOOD[name], **fields}}


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "seven bytes": (b"1234567", "truncated"),
    "header beyond the file": (raw(GOOD, length=10**6), "header is said to take 1000000"),
    "header of 2^64 - 1": (raw(GOOD, length=2**64 - 1), "header is said to take"),
    "header cut": (raw(GOOD, length=40), "not valid JSON"),
    "data cut": (raw(GOOD, data=20), "truncated"),
    "data left over": (raw(GOOD, data=40), "12 bytes at the end belong to no tensor"),
    "overlap": (raw({"a": GOOD["a"], "b": {**GOOD["b"], "data_offsets": [20, 24]}}, data=24), "overlaps"),
    "same bytes twice": (raw({"a": GOOD["a"], "b": GOOD["a"]}, data=24), "overlaps"),
    "gap": (raw({"a": GOOD["a"], "b": {**GOOD["b"], "data_offsets": [26, 30]}}, data=30), "2 bytes after"),
    "wrong dtype": (raw(changed(dtype="F64")), "does not take"),
    "unknown dtype": (raw(changed(dtype="F33")), "dtype is 'F33'; allowed"),
    "dtype is no text": (raw(changed(dtype=["F32"])), "dtype is"),
    "negative dimension": (raw(changed(shape=[-2, -3])), "shape is"),
    "true as a dimension": (raw(changed(shape=[True, 6])), "shape is"),
    "fraction as a dimension": (raw(changed(shape=[2.0, 3])), "shape is"),
    "dimensions that overflow": (raw(changed(shape=[2**62, 2**62, 2**62])), "does not take"),
    "dimensions by the thousand": (raw(changed(shape=[2**62] * 50_000)), "does not take"),
    "offsets reversed": (raw(changed(data_offsets=[24, 0])), "data_offsets"),
    "three offsets": (raw(changed(data_offsets=[0, 12, 24])), "data_offsets"),
    "negative offset": (raw(changed(data_offsets=[-24, 0])), "data_offsets"),
    "a field too many": (raw(changed(device="cuda")), "nothing else"),
    "a field missing": (raw({"a": {"dtype": "F32", "shape": [7]}}), "nothing else"),
    "no object": (raw(b"[1, 2]"), "not with"),
    "entry is a number": (raw({"a": 3}), "nothing else"),
    "name twice": (raw(b'{"a": ' + json.dumps(GOOD["a"]).encode() + b', "a": ' + json.dumps(GOOD["a"]).encode() + b"}", 24), "stands twice"),
    "field twice": (raw(b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}', 24), "stands twice"),
    "NaN in the header": (raw(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 24]}}', 24), "not valid JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not UTF-8"),
    "lone surrogate": (raw(b'{"\\ud800": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}', 24), "not valid Unicode"),
    "nested ten thousand deep": (raw(b'{"a":' * 10_000 + b"1" + b"}" * 10_000), "not valid JSON"),
    "number of ten thousand digits": (raw(b'{"a": ' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "metadata is no text": (raw({"__metadata__": {"format": 3}, **GOOD}), "__metadata__"),
    "trailing garbage": (raw(json.dumps(GOOD).encode() + b"x"), "not valid JSON"),
    "pickle": (pickle.dumps({"a": 1}, protocol=4), "pickle"),
    "zip of a pickle": (b"PK\x03\x04" + bytes(64), "header is said"),
}  # fmt: skip


def one_line(error: pytest.ExceptionInfo[LoadError], path: Path) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 600 + len(str(path))
    assert text.isprintable(), text
    assert path.name in text
    return text


@pytest.mark.parametrize("name", BAD)
def test_broken_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    content, says = BAD[name]
    path = write(tmp_path / "m.safetensors", content)
    with pytest.raises(LoadError) as error:
        open_checkpoint(path)
    assert says in one_line(error, path)


def test_a_thousand_fuzzed_headers(tmp_path: Path) -> None:
    """Bytes flipped, cut, repeated and swapped in; JSON values replaced: a clear line, or a header that checks out."""
    draw = random.Random(0)
    values = [None, True, -1, 0, 3, 2**63, 2**70, 1.5, "", "F32", "x" * 300, [], [0], [[]], {}, [0, 24], "\x1b[2J", "\u202e"]
    refused = 0
    for i in range(1000):
        header = json.loads(json.dumps(GOOD))
        content = bytearray()
        kind = i % 4
        if kind == 0:  # a value anywhere in the header
            place = draw.choice(list(header))
            if draw.random() < 0.3:
                header[place] = draw.choice(values)
            else:
                header[place][draw.choice(["dtype", "shape", "data_offsets", "more"])] = draw.choice(values)
            content += raw(header)
        elif kind == 1:  # bytes of the header flipped
            content += raw(header)
            for _ in range(draw.randint(1, 6)):
                content[draw.randrange(8, len(content) - 28)] = draw.randrange(256)
        elif kind == 2:  # a piece cut out or doubled
            content += raw(header)
            a, b = sorted(draw.randrange(len(content)) for _ in range(2))
            content = content[:a] + content[b:] if draw.random() < 0.5 else content[:b] + content[a:]
        else:  # the length, or noise
            content += raw(header, length=draw.choice([0, 1, 7, 8, 10**9, 2**63, draw.randrange(400)]))
            if draw.random() < 0.3:
                content = bytearray(draw.randbytes(draw.randrange(200)))
        path = write(tmp_path / f"{i}.safetensors", bytes(content))
        try:
            found = open_checkpoint(path)
        except LoadError as error:
            text = str(error)
            assert text.isprintable(), text  # no line break, no escape sequence
            assert path.name in text
            assert len(text) < 1000
            refused += 1
        else:  # what is accepted can be read to its last byte
            for name, entry in found.items():
                tensor = found.tensor(name) if entry.dtype != "F4" else torch.empty(entry.shape)
                assert tuple(tensor.shape) == entry.shape
                assert entry.offset + entry.nbytes <= path.stat().st_size
        path.unlink()
    assert refused > 700


def index(folder: Path, weight_map: Any) -> Path:
    return write(folder / "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": weight_map}).encode())


@pytest.mark.parametrize(
    "file", ["../out.safetensors", "/etc/passwd", "..", "", "sub/x.safetensors", "a\\..\\x.safetensors", "C:x"]
)
def test_index_cannot_leave_its_folder(file: str, tmp_path: Path) -> None:
    inner = tmp_path / "in"
    inner.mkdir()
    write(tmp_path / "out.safetensors", raw(GOOD))
    path = index(inner, {"a": file})
    with pytest.raises(LoadError, match="beside the index") as error:
        open_checkpoint(inner)
    one_line(error, path)


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({"a": "gone.safetensors"}, "no such file"),
        ({"zzz": "one.safetensors"}, "has no tensor 'zzz'"),
        ({"a": 3}, "must hold an object"),
        (["a"], "must hold an object"),
        ({"a": "w.bin"}, "pickle"),
    ],
)
def test_bad_index(weight_map: Any, says: str, tmp_path: Path) -> None:
    write(tmp_path / "one.safetensors", raw(GOOD))
    write(tmp_path / "w.bin", raw(GOOD))
    index(tmp_path, weight_map)
    with pytest.raises(LoadError, match=says):
        open_checkpoint(tmp_path)


def test_index_with_a_name_twice(tmp_path: Path) -> None:
    write(tmp_path / "one.safetensors", raw(GOOD))
    text = b'{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}'
    write(tmp_path / "model.safetensors.index.json", text)
    with pytest.raises(LoadError, match="stands twice"):
        open_checkpoint(tmp_path)


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="it holds: nothing"):
        open_checkpoint(tmp_path)
    write(tmp_path / "one.safetensors", raw(GOOD))
    assert list(open_checkpoint(tmp_path)) == ["a", "b", "none"]
    write(tmp_path / "two.safetensors", raw(GOOD))
    with pytest.raises(LoadError, match=r"stands in one\.safetensors too"):
        open_checkpoint(tmp_path)
    with pytest.raises(LoadError, match="no such file or folder"):
        open_checkpoint(tmp_path / "nothing.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(LoadError, match="regular file"):
        read_header(tmp_path / "pipe.safetensors")


@pytest.mark.parametrize("layout", ["file", "index", "folder"])
def test_reads_what_safetensors_reads(layout: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    tensors = {f"t.{i}": torch.randn(i + 1, 3, generator=generator).to(dtype) for i, dtype in enumerate(dtypes)}
    integers = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16, torch.uint32]
    tensors |= {f"i.{i}": torch.randint(0, 2, (5,), generator=generator).to(dtype) for i, dtype in enumerate(integers)}
    tensors |= {"empty": torch.empty(0, 4), "scalar": torch.tensor(2.5), "c": torch.tensor([1 + 2j])}
    names = sorted(tensors)
    halves = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    if layout == "file":
        safetensors.torch.save_file(tensors, tmp_path / "m.safetensors")
    else:
        for file, own in halves.items():
            safetensors.torch.save_file({name: tensors[name] for name in own}, tmp_path / file)
    if layout == "index":
        index(tmp_path, {name: file for file, own in halves.items() for name in own})
    found = open_checkpoint(tmp_path)
    assert sorted(found) == names
    assert len(found.files) == (1 if layout == "file" else 2)
    assert found.nbytes == sum(t.nbytes for t in tensors.values())
    for name, tensor in tensors.items():
        ours = found.tensor(name)
        assert ours.dtype == tensor.dtype
        assert ours.shape == tensor.shape
        assert ours.flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8)), name


def test_unaligned_tensor(tmp_path: Path) -> None:
    header = {
        "pad": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "x": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    for shift in range(4):
        text = json.dumps(header).encode() + b" " * shift
        content = struct.pack("<Q", len(text)) + text + b"abc" + struct.pack("<2f", 1.5, -2.0)
        found = open_checkpoint(write(tmp_path / "u.safetensors", content))
        assert found.tensor("x").tolist() == [1.5, -2.0]


def test_file_that_shrinks_meanwhile(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", raw(GOOD))
    found = open_checkpoint(path)
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(LoadError, match="shorter"):
        found.tensor("b")
    path.unlink()
    with pytest.raises(LoadError, match="cannot be read"):
        found.tensor("a")


def test_natural_order() -> None:
    key: Callable[[str], object] = natural
    assert sorted(["l.10.w", "l.2.w", "l.2.b", "a", "l", "3"], key=key) == ["3", "a", "l", "l.2.b", "l.2.w", "l.10.w"]

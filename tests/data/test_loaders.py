"""The user's own files: small good ones, and every kind of bad one with the line that says so."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from corollary.data import ImageFolder, LoadError, load_csv, load_safetensors, load_text


def paint(path: Path, height: int = 12, width: int = 12, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((height, width, 3), value, np.uint8)
    pixels[0, 0] = 255
    Image.fromarray(pixels).save(path)


# --- images


def test_image_folder_reads_what_was_painted(tmp_path: Path) -> None:
    paint(tmp_path / "b" / "2.png", value=51)
    paint(tmp_path / "a" / "deep" / "1.PNG", value=102)
    paint(tmp_path / "a" / "0.jpg", value=0)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    images = ImageFolder(tmp_path)
    assert images.classes == ("a", "b")
    assert [(path.name, label) for path, label in images.samples] == [("0.jpg", 0), ("1.PNG", 0), ("2.png", 1)]
    pixels, label = images[2]
    assert label == 1
    expected = torch.full((3, 12, 12), 0.2)
    expected[:, 0, 0] = 1
    torch.testing.assert_close(pixels, expected)
    assert len(list(images)) == 3


def test_size_scales_the_shorter_side_and_cuts_the_middle(tmp_path: Path) -> None:
    stripes = np.zeros((20, 60, 3), np.uint8)
    stripes[:, 20:40] = 200  # the middle third, a square
    (tmp_path / "x").mkdir()
    Image.fromarray(stripes).save(tmp_path / "x" / "a.png")
    pixels, _ = ImageFolder(tmp_path, size=10)[0]
    assert pixels.shape == (3, 10, 10)
    torch.testing.assert_close(pixels[:, :, 2:8], torch.full((3, 10, 6), 200 / 255))
    assert ImageFolder(tmp_path, size=40, color=False)[0][0].shape == (1, 40, 40)


def test_split_of_images(tmp_path: Path) -> None:
    for name, value in (("dark", 10), ("light", 240)):
        for i in range(6):
            paint(tmp_path / name / f"{i}.png", value=value)
    split = ImageFolder(tmp_path).split(seed=1, test_size=0.5)
    assert split.classes == ("dark", "light")
    assert split.test_y.bincount().tolist() == [3, 3]
    assert torch.equal((split.train_x.mean((1, 2, 3)) > 0.5).long(), split.train_y)
    other_order = ImageFolder(tmp_path).split(seed=2, test_size=0.5)
    assert not torch.equal(split.train_y, other_order.train_y)


def test_hostile_image_folders(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"nowhere: no such folder; the path exists up to"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(LoadError, match="holds no folder"):
        ImageFolder(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(LoadError, match=r"cat: holds no image; allowed: \.png, \.jpg, \.jpeg"):
        ImageFolder(tmp_path)
    paint(tmp_path / "cat" / "a.png")
    with pytest.raises(LoadError, match=r"a\.png: is a file; give a folder"):
        ImageFolder(tmp_path / "cat" / "a.png")
    with pytest.raises(LoadError, match="cannot be split"):
        ImageFolder(tmp_path).split()
    paint(tmp_path / "cat" / "b.png", height=9)
    with pytest.raises(LoadError, match=r"b\.png: has shape \(3, 9, 12\), .*a\.png has \(3, 12, 12\); give 'size'"):
        ImageFolder(tmp_path).split(test_size=0.5)
    (tmp_path / "cat" / "c.png").write_bytes(b"\x89PNG not really")
    with pytest.raises(LoadError, match=r"c\.png: cannot be read as an image"):
        ImageFolder(tmp_path)[2]
    whole = (tmp_path / "cat" / "a.png").read_bytes()
    (tmp_path / "cat" / "c.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LoadError, match=r"c\.png: cannot be read as an image"):
        ImageFolder(tmp_path)[2]


# --- CSV


def table(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "table.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


GOOD = "a,b,kind\n" + "1,-2.5,x\n3e1,4,y\n" * 6


def test_csv_classification(tmp_path: Path) -> None:
    split = load_csv(table(tmp_path, GOOD), target="kind", standardized=False)
    assert split.classes == ("x", "y")
    assert split.train_y.dtype == torch.int64
    both = torch.cat([split.train_x, split.test_x]), torch.cat([split.train_y, split.test_y])
    assert both[0].shape == (12, 2)
    assert torch.equal(both[0], torch.tensor([[1.0, -2.5], [30.0, 4.0]])[both[1]])
    standardized = load_csv(table(tmp_path, GOOD), target="kind")
    torch.testing.assert_close(standardized.train_x.mean(0), torch.zeros(2), atol=1e-6, rtol=0)


def test_csv_regression_and_task(tmp_path: Path) -> None:
    text = "y;x\n" + "".join(f'{i};"{2 * i}"\n' for i in range(10))
    split = load_csv(table(tmp_path, text), target="y", delimiter=";", standardized=False)
    assert split.classes == ()
    assert split.train_y.dtype == torch.float32
    torch.testing.assert_close(split.train_x[:, 0], 2 * split.train_y)
    labels = load_csv(table(tmp_path, "y,x\n" + "0,1\n1,2\n" * 5), target="y", task="classification")
    assert labels.classes == ("0", "1")


def test_csv_with_byte_order_mark_quotes_and_windows_line_ends(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbf" + b'"a, first",kind\r\n' + b'1.5,"x\r\ny"\r\n2.5,z\r\n' * 4
    split = load_csv(table(tmp_path, text), target="kind")
    assert split.classes == ("x\r\ny", "z")
    assert split.train_x.shape[1] == 1


@pytest.mark.parametrize(("text", "match"), [
    ("", r"table\.csv: is empty"),
    ("a,kind\n", r"table\.csv: has a header but no row below it"),
    ("a,b\n1,2\n3,4\n", r"table\.csv, line 1: has no column 'kind'; it has: a, b"),
    ("a,a,kind\n1,2,x\n", r"line 1: a column's name stands twice: a"),
    ("kind\nx\ny\n", "line 1: has no column beside the target"),
    ("a,kind\n1,x\n\n2,y,9\n", r"table\.csv, line 4: has 3 cells; the header has 2"),
    ("a,kind\n1,x\ntwo,y\n", r"table\.csv, line 3: column 'a' is 'two'; it must be a number"),
    ("a,kind\n1,x\u2028x\n,y\n", r"line 3: column 'a' is ''; it must be a number"),
    ("a,kind\n1,x\nnan,y\n", r"line 3: column 'a' is 'nan'; it must be finite"),
    ("a,kind\n1,x\n2,\n", r"line 3: column 'kind' is empty"),
    ('a,kind\n1,x\n"2,y\n', r"line 3: not valid CSV"),
    (b"a,kind\n1,x\n2,\xff\n", r"line 3: not UTF-8 text \(byte 0xff\)"),
    ("a,kind\n1,x\n2,x\n3,y\n", r"table\.csv cannot be split with test_size=0\.3"),
    (pickle.dumps({"a": 1}), r"table\.csv: is or may hold a pickle"),
])  # fmt: skip
def test_hostile_csv(text: str | bytes, match: str, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=match) as caught:
        load_csv(table(tmp_path, text), target="kind")
    assert "\n" not in str(caught.value)


def test_csv_path_and_task(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"missing\.csv: no such file"):
        load_csv(tmp_path / "missing.csv", target="a")
    with pytest.raises(LoadError, match="is a folder; give a file"):
        load_csv(tmp_path, target="a")
    with pytest.raises(ValueError, match="'task' is 'guess'; allowed: auto, classification, regression"):
        load_csv(table(tmp_path, GOOD), target="kind", task="guess")


# --- text


def test_text_file_and_folder(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"second\r\nline")
    (tmp_path / "a.txt").write_text("é first", encoding="utf-8")
    (tmp_path / "c.md").write_text("left out")
    assert load_text(tmp_path) == "é first\n\nsecond\nline"
    assert load_text(tmp_path / "c.md") == "left out"


def test_hostile_text(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"holds no \.txt file"):
        load_text(tmp_path)
    with pytest.raises(LoadError, match="no such file or folder"):
        load_text(tmp_path / "x" / "y.txt")
    path = tmp_path / "a.txt"
    path.write_text(" \n")
    with pytest.raises(LoadError, match="is empty"):
        load_text(path)
    path.write_bytes(b"one\ntwo\nthr\xe9e")
    with pytest.raises(LoadError, match=r"a\.txt, line 3: not UTF-8 text \(byte 0xe9\)"):
        load_text(path)
    path.write_bytes(pickle.dumps("text"))
    with pytest.raises(LoadError, match="may hold a pickle"):
        load_text(path)


# --- safetensors


def save(path: Path, **tensors: torch.Tensor) -> Path:
    safetensors.torch.save_file(tensors, path)
    return path


def test_safetensors_is_lazy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "m.safetensors", b=torch.arange(6.0).reshape(2, 3), a=torch.ones(4, dtype=torch.bfloat16))
    with load_safetensors(path) as checkpoint:
        assert list(checkpoint) == ["a", "b"]
        assert len(checkpoint) == 2
        assert "b" in checkpoint
        assert "c" not in checkpoint
        assert checkpoint.shape("b") == (2, 3)
        assert checkpoint.dtype("a") == "BF16"
        assert torch.equal(checkpoint["b"], torch.arange(6.0).reshape(2, 3))
        with pytest.raises(KeyError, match="has no tensor 'c'"):
            checkpoint["c"]
        assert checkpoint.get("c") is None
    assert checkpoint["a"].dtype == torch.bfloat16  # opens again
    assert repr(checkpoint).endswith("2 tensors in 1 files)")


def test_sharded_checkpoints(tmp_path: Path) -> None:
    save(tmp_path / "model-1.safetensors", a=torch.zeros(1))
    save(tmp_path / "model-2.safetensors", b=torch.ones(2))
    assert {name: tuple(t.shape) for name, t in load_safetensors(tmp_path).items()} == {"a": (1,), "b": (2,)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    for path in (tmp_path, index):
        checkpoint = load_safetensors(path)
        assert torch.equal(checkpoint["b"], torch.ones(2))
        assert [p.name for p in checkpoint.files] == ["model-1.safetensors", "model-2.safetensors"]


@pytest.mark.parametrize(("text", "match"), [
    ("{\n\n oops", r"index\.json, line 3: not valid JSON"),
    ("[]", "must hold an object 'weight_map'"),
    ('{"weight_map": 3}', "must hold an object 'weight_map'"),
    ('{"weight_map": {"a": "../secret.safetensors"}}', "outside the index's folder"),
    ('{"weight_map": {"a": "/etc/passwd"}}', "outside the index's folder"),
    ('{"weight_map": {"a": "gone.safetensors"}}', r"gone\.safetensors: no such file"),
    ('{"weight_map": {"a": "old.bin"}}', r"old\.bin: is or may hold a pickle"),
    ('{"weight_map": {"z": "model.safetensors"}}', "has no tensor 'z', which"),
])  # fmt: skip
def test_hostile_index(text: str, match: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save(tmp_path / "secret.safetensors", a=torch.zeros(1))
    save(folder / "model.safetensors", a=torch.zeros(1))
    (folder / "old.bin").write_bytes(b"PK")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(LoadError, match=match):
        load_safetensors(folder)


def test_hostile_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"holds no \.safetensors file; it holds: nothing"):
        load_safetensors(tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(LoadError, match="runs code when it is read; convert it to safetensors"):
        load_safetensors(tmp_path / "model.pt")
    disguised = tmp_path / "disguised.safetensors"
    disguised.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(LoadError, match="may hold a pickle"):
        load_safetensors(disguised)
    disguised.unlink()
    whole = save(tmp_path / "m.safetensors", a=torch.zeros(100))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-10])
    with pytest.raises(LoadError, match=r"cut\.safetensors: not a valid safetensors file"):
        load_safetensors(cut)
    cut.write_bytes(b"\xff" * 64)
    with pytest.raises(LoadError, match="not a valid safetensors file"):
        load_safetensors(cut)
    cut.write_bytes(whole.read_bytes())
    with pytest.raises(LoadError, match=r"tensor 'a' stands in cut\.safetensors too"):
        load_safetensors(tmp_path)
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(LoadError, match=r"has suffix '\.md'; allowed: \.safetensors, \.json"):
        load_safetensors(tmp_path / "notes.md")

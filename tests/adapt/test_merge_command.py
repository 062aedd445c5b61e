"""The command ``merge``: files in, files out; killed and resumed to the same bits; memory; bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from corollary.adapt import ConcreteMasks, average, concrete, task_arithmetic, ties
from corollary.cli.main import main
from corollary.data import CheckpointWriter, TensorSpec, load_safetensors

MERGE = [sys.executable, "-c", "from corollary.cli.main import main; main()", "merge"]


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The command line in this process: what it says and its exit status."""

    def call(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["corollary", "merge", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return Done(int(left.value.code or 0), out, err)

    return call


def write(out: Path, tensors: dict[str, Tensor], shard_bytes: int = 10**9, metadata: dict[str, str] | None = None) -> Path:
    specs = {name: TensorSpec(t.dtype, t.shape) for name, t in tensors.items()}
    with CheckpointWriter(out, specs, max_shard_bytes=shard_bytes, metadata=metadata) as writer:
        for name in writer.pending:
            writer.append(name, tensors[name])
    return writer.path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base as one folder with its configuration, and three tuned ones: a file, shards by index, a folder of shards."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(8, 6).to(torch.bfloat16 if i % 2 else torch.float32) for i in range(5)}
    base |= {"position_ids": torch.arange(4), "norm.num_batches_tracked": torch.tensor(3)}
    write(root / "base", base, metadata={"format": "pt", "origin": "here"})
    (root / "base" / "config.json").write_text('{"model_type": "toy"}')
    (root / "base" / "pytorch_model.bin").write_bytes(b"old weights")
    (root / "base" / ".hidden").write_text("x")
    tuned = []
    for i in range(3):
        changed = {n: (t + 0.1 * torch.randn(t.shape)).to(t.dtype) if t.is_floating_point() else t for n, t in base.items()}
        changed["norm.num_batches_tracked"] = torch.tensor(10 + i)
        tuned.append(write(root / ("one.safetensors" if i == 0 else f"shards{i}"), changed, shard_bytes=200))
    return root / "base", [tuned[0], tuned[1] / "model.safetensors.index.json", tuned[2]]


def test_files_equal_the_functions(run: Callable[..., Done], checkpoints: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, tuned = checkpoints
    opened, others = load_safetensors(base), [load_safetensors(path) for path in tuned]
    floating = {name: opened[name].float() for name in opened if opened[name].is_floating_point()}
    scales = {name: torch.tensor([0.2, 0.3, 0.4]) for name in floating}
    masks = ConcreteMasks({name: torch.randn(t.shape) for name, t in floating.items()}, scales, seed=4)
    masks.save(tmp_path / "masks.safetensors")
    cases: list[tuple[list[object], Callable[[], Any]]] = [
        (["--method", "average"], lambda: average(opened, others)),
        (["--method", "average", *(["--weight", "1", "--weight", "2", "--weight", "3"])], lambda: average(opened, others, weights=[1, 2, 3])),
        ([], lambda: task_arithmetic(opened, others)),
        (["--method", "ties", "--density", "0.4", "--scale", "0.8"], lambda: ties(opened, others, density=0.4, scale=0.8)),
        (["--method", "ties", "--scope", "tensor"], lambda: ties(opened, others, scope="tensor")),
        (["--method", "concrete", "--masks", tmp_path / "masks.safetensors"], lambda: concrete(opened, others, masks)),
    ]  # fmt: skip
    for i, (words, expected) in enumerate(cases):
        out = tmp_path / (f"out{i}.safetensors" if i == 2 else f"out{i}")
        done = run(base, *tuned, "--out", out, "--json", "-", *words)
        assert done.returncode == 0, done.stderr
        summary = json.loads(done.stdout)
        assert (summary["tensors"], summary["merged"], summary["kept"], summary["resumed"]) == (7, 5, 2, 0)
        merged, right = load_safetensors(out), expected()
        assert set(merged) == set(right)
        for name in merged:
            assert torch.equal(merged[name], right[name]), name
        assert int(merged["norm.num_batches_tracked"]) == 3
        with safetensors.safe_open(str(merged.files[0]), framework="pt") as file:
            metadata = file.metadata()
        assert (metadata["format"], metadata["origin"]) == ("pt", "here")
        assert json.loads(metadata["corollary.merge"])["tasks"] == 3
        if out.is_dir():
            assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
            assert summary["copied"] == ["config.json"]
    sharded = run(base, *tuned, "--out", tmp_path / "shards", "--shard-bytes", 300)
    assert sharded.returncode == 0
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def big(folder: Path, count: int, tensors: int, size: int) -> list[Path]:
    paths = []
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        specs = {f"t{j:03d}": TensorSpec("F32", (size,)) for j in range(tensors)}
        with CheckpointWriter(folder / f"c{i}.safetensors", specs) as writer:
            for name in writer.pending:
                writer.append(name, torch.randn(size, generator=generator))
        paths.append(writer.path)
    return paths


def test_killed_in_the_middle_goes_on_to_the_same_bits(run: Callable[..., Done], tmp_path: Path) -> None:
    base, *tuned = big(tmp_path, 4, 120, 60_000)
    words = [str(base), *map(str, tuned), "--method", "ties"]
    assert run(*words, "--out", tmp_path / "whole").returncode == 0
    out, journal = tmp_path / "out", tmp_path / ".out.partial" / "journal"
    kept = []
    for _ in range(2):  # killed, resumed, killed again, resumed
        before = journal.read_bytes().count(b"\n") if journal.exists() else 0
        process = subprocess.Popen([*MERGE, *words, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not journal.exists() or journal.read_bytes().count(b"\n") < before + 10:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept.append(journal.read_bytes().count(b"\n") - 1)
        assert not out.exists()
    assert 0 < kept[0] < kept[1] < 120
    other = run(*words, "--out", out, "--shard-bytes", 10**6)
    assert other.returncode == 2
    assert "interrupted work of other inputs or settings" in other.stderr
    done = run(*words, "--out", out, "--json", tmp_path / "summary.json")
    assert done.returncode == 0, done.stderr
    assert kept[1] - 1 <= json.loads((tmp_path / "summary.json").read_text())["resumed"] <= kept[1]
    assert [p.name for p in out.iterdir()] == ["model.safetensors"]
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of resident memory from /proc")
def test_memory_stays_far_below_the_files(tmp_path: Path) -> None:
    base, *tuned = big(tmp_path, 4, 20, 1_000_000)  # 80 MB each, 320 MB in all, tensors of 4 MB
    script = (
        "import sys; from corollary.cli.merge import MergeRequest, run_merge; from pathlib import Path\n"
        "def peak(): return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) / 1000\n"
        "before = peak(); base, *rest, out = map(Path, sys.argv[1:])\n"
        "status = run_merge(MergeRequest(base, rest, 'ties', out)); print(status, before, peak())"
    )
    words = [sys.executable, "-c", script, *map(str, (base, *tuned)), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    status, before, after = done.stdout.split()[-3:]
    assert status == "0"
    assert float(after) - float(before) < 200, (before, after)  # torch's own start, 32 MB of mapped input, some tensors


@pytest.mark.parametrize(("words", "match"), [
    (["--method", "slerp"], "there is no method 'slerp'; allowed: average, task-arithmetic, ties, concrete"),
    (["--method", "concrete"], r"needs --masks FILE: .*\.fit_concrete_masks\(model, checkpoints, inputs\)\.save\(FILE\)"),
    (["--density", "0.1"], "--density is no option of method 'task-arithmetic', but of ties"),
    (["--method", "ties", "--density", "1.5"], r"'density' must lie in \(0, 1\], not 1.5"),
    (["--method", "ties", "--scope", "layer"], "'scope' is 'layer'; allowed: checkpoint, tensor"),
    (["--method", "average", "--weight", "1"], "'weights' must be 3 finite numbers"),
    (["--scale", "nan"], "'scale' must be one finite number"),
    (["--method", "concrete", "--masks", "BASE"], "holds no Concrete masks; they come from"),
    (["--out", "BASE"], "which is being merged; give another place"),
    (["--out", "/gone/out"], "there is no folder '/gone'"),
    (["--json", "/gone/x.json"], "its folder is missing"),
])  # fmt: skip
def test_bad_words_are_one_line(
    run: Callable[..., Done], words: list[str], match: str, checkpoints: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, tuned = checkpoints
    given = [str(base) if word == "BASE" else word for word in words]
    done = run(base, *tuned, *([] if "--out" in words else ["--out", tmp_path / "out"]), *given)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    with pytest.raises(ValueError, match=match):
        raise ValueError(done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_bad_files_are_one_line(run: Callable[..., Done], checkpoints: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, tuned = checkpoints
    torch.save({"a": torch.zeros(1)}, tmp_path / "pickled.bin")
    (tmp_path / "cut.safetensors").write_bytes(tuned[0].read_bytes()[:-7])
    other = {name: load_safetensors(base)[name] for name in load_safetensors(base)}
    write(tmp_path / "less.safetensors", {n: t for n, t in other.items() if n != "layers.2.weight"})
    write(tmp_path / "shape.safetensors", other | {"layers.3.weight": torch.zeros(6, 8)})
    for name, match in [
        ("gone.safetensors", "no such file or folder"),
        ("pickled.bin", "is or may hold a pickle"),
        ("cut.safetensors", "not a valid safetensors file"),
        ("less.safetensors", "has no tensor 'layers.2.weight', which"),
        ("shape.safetensors", r"tensor 'layers.3.weight' is (6, 8), in"),
    ]:
        done = run(base, tmp_path / name, "--out", tmp_path / "out")
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert match in done.stderr
        assert name in done.stderr
    assert not (tmp_path / "out").exists()
    assert not os.path.lexists(tmp_path / ".out.partial")

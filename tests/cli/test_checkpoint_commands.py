"""``inspect`` and ``diff`` as a user meets them: on good, odd and hostile files, interrupted, and as pages."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch

from corollary.cli import main
from corollary.cli.checkpoints import Journal, kind_of, printable, size_text, spread


@dataclass
class Done:
    """What a command left."""

    returncode: int
    stdout: str
    stderr: str


def run(*words: str | Path, cwd: Path) -> Done:
    """The command line's own entry, in this process: starting one takes longer than most commands."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(cwd)
        patch.setenv("COLUMNS", "200")
        patch.setattr(sys, "argv", ["corollary", *map(str, words), "--jobs", "1"])
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
    assert "Traceback" not in out.getvalue() + err.getvalue()
    return Done(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded folder as transformers writes it, a tuned copy, and odd tensors."""
    root = tmp_path_factory.mktemp("checkpoints")
    generator = torch.Generator().manual_seed(0)
    base = {f"model.layers.{i}.{kind}.weight": torch.randn(96, 96, generator=generator) for i in range(3) for kind in "qv"}
    base |= {"model.norm.weight": torch.ones(96), "ids": torch.arange(5), "empty": torch.empty(0, 4)}
    base |= {"bad": torch.full((4, 4), torch.nan), "conv.weight": torch.randn(8, 3, 3, 3, generator=generator)}
    tuned = {name: t.clone() for name, t in base.items()}
    for i in range(3):
        b, a = torch.randn(96, 2, generator=generator), torch.randn(2, 96, generator=generator)
        tuned[f"model.layers.{i}.q.weight"] += b @ a
        tuned[f"model.layers.{i}.v.weight"] += 0.01 * torch.randn(96, 96, generator=generator)
    for name, tensors in (("base", base), ("tuned", tuned)):
        (root / name).mkdir()
        names = sorted(tensors)
        shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, own in shards.items():
            safetensors.torch.save_file({n: tensors[n] for n in own}, root / name / file)
        index = {"metadata": {}, "weight_map": {n: file for file, own in shards.items() for n in own}}
        (root / name / "model.safetensors.index.json").write_text(json.dumps(index))
    return root


def digest(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_inspect(folder: Path, tmp_path: Path) -> None:
    before = digest(folder)
    done = run("inspect", folder / "base", "--json", "out.json", "--html", "out.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "model.layers.*.q.weight" in done.stdout
    assert "bad: 16 NaN" in done.stdout
    assert "empty: no entries" in done.stdout
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["nan"] == 16
    assert {t["name"] for t in report["tensors"]} >= {"bad", "empty", "ids", "model.norm.weight"}
    assert digest(folder) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.html", "out.json"]
    each = run("inspect", folder / "base", "--all", "--match", "model.layers.1.*", cwd=tmp_path)
    assert "model.layers.1.q.weight" in each.stdout
    assert "layers.2" not in each.stdout
    piped = run("inspect", folder / "base", "--json", "-", "--top", "3", cwd=tmp_path)
    assert {t["method"] for t in json.loads(piped.stdout)["tensors"]} == {"top", "none"}


def test_diff(folder: Path, tmp_path: Path) -> None:
    done = run("diff", folder / "base", folder / "tuned", "--json", "out.json", "--html", "out.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "6 intruder dimensions" in done.stdout
    assert "bad: not compared" in done.stdout
    diff = json.loads((tmp_path / "out.json").read_text())
    by_name = {t["name"]: t for t in diff["tensors"]}
    assert by_name["model.layers.0.q.weight"]["rank"] == 2
    assert by_name["model.layers.0.v.weight"]["rank"] == 96
    assert by_name["conv.weight"]["status"] == "same"
    loose = run("diff", folder / "base", folder / "tuned", "--epsilon", "0.01", "-k", "4", "--all", cwd=tmp_path)
    assert "0 intruder dimensions among the 24" in loose.stdout


def test_pages_stand_alone(folder: Path, tmp_path: Path) -> None:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.fail("no chromium; 'make test' installs one")
    from playwright.sync_api import sync_playwright

    run("inspect", folder / "base", "--html", "a.html", cwd=tmp_path)
    run("diff", folder / "base", folder / "tuned", "--html", "b.html", cwd=tmp_path)
    for name in ("a.html", "b.html"):
        text = (tmp_path / name).read_text()
        assert "model.layers.2.q.weight" in text
        assert not re.search(r'(src|href)="(?!#|data:)', text)
    wrong: list[str] = []

    def look() -> None:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
            page = browser.new_page()
            page.on("console", lambda m: wrong.append(m.text))
            page.on("pageerror", lambda e: wrong.append(str(e)))
            for name, head in (("a.html", "Checkpoint"), ("b.html", "What changed")):
                page.goto((tmp_path / name).as_uri())
                assert page.locator("h1").inner_text() == head
                assert page.locator("figure svg.plot").count() >= 3
            browser.close()

    # In a thread of its own: another file's browser may hold this thread's event loop.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(look).result()
    assert wrong == []


def hostile(tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    """Files and words that must be refused, with what is said."""

    def header(text: bytes, data: bytes = b"", length: int | None = None) -> bytes:
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    files = {
        "cut.safetensors": b"abc",
        "far.safetensors": header(b"{}", length=10**12),
        "pickle.safetensors": b"\x80\x04\x95",
        "twice.safetensors": header(f'{{"a":{entry},"a":{entry}}}'.encode(), bytes(4)),
        "lap.safetensors": header(f'{{"a":{entry},"b":{entry}}}'.encode(), bytes(4)),
        "type.safetensors": header(entry.replace("F32", "F16").join(['{"a":', "}"]).encode(), bytes(4)),
        "out.safetensors.index.json": b'{"weight_map":{"a":"../../etc/passwd"}}',
        "model.bin": b"PK\x03\x04",
        "fine.safetensors": header(f'{{"\\u001b[31mred":{entry}}}'.encode(), bytes(4)),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return {
        "cut": (["cut.safetensors"], "truncated"),
        "far": (["far.safetensors"], "1000000000000 bytes"),
        "pickle": (["pickle.safetensors"], "pickle"),
        "twice": (["twice.safetensors"], "stands twice"),
        "overlap": (["lap.safetensors"], "overlaps"),
        "dtype": (["type.safetensors"], "does not take"),
        "index": (["out.safetensors.index.json"], "beside the index"),
        "bin": (["model.bin"], "pickle"),
        "missing": (["gone.safetensors"], "no such file"),
        "match": (["fine.safetensors", "--match", "x*"], "no tensor matches 'x*'"),
        "json": (["fine.safetensors", "--json", "no/such/x.json"], "cannot write"),
        "html": (["fine.safetensors", "--html", "no/such/x.html"], "cannot write the page"),
        "both": (["fine.safetensors", "--top", "2", "--full"], "exclude each other"),
    }


def test_hostile_files_get_one_line(tmp_path: Path) -> None:
    """Status 2, one line that says what is wrong, and nothing else: no output, no part of a file."""
    cases = hostile(tmp_path)
    before = sorted(tmp_path.iterdir())
    for name, (words, says) in cases.items():
        more = [] if name in ("json", "html") else ["--json", "out.json", "--html", "out.html"]
        done = run("inspect", *words, *more, cwd=tmp_path)
        assert done.returncode == 2, name
        assert says in done.stderr, (name, done.stderr)
        assert done.stderr.startswith("corollary: ")
        assert done.stderr.count("\n") == 1, (name, done.stderr)
        assert done.stdout == ""
    assert sorted(tmp_path.iterdir()) == before
    shown = run("inspect", "fine.safetensors", "--all", cwd=tmp_path)
    assert shown.returncode == 0
    assert "\x1b[31m" not in shown.stdout  # a tensor's name cannot paint the terminal
    other = run("diff", "fine.safetensors", "cut.safetensors", cwd=tmp_path)
    assert other.returncode == 2
    assert "truncated" in other.stderr


def test_checkpoints_that_share_nothing(folder: Path, tmp_path: Path) -> None:
    safetensors.torch.save_file({"z": torch.ones(2)}, tmp_path / "z.safetensors")
    done = run("diff", folder / "base", "z.safetensors", cwd=tmp_path)
    assert done.returncode == 2
    assert "share no tensor" in done.stderr


def test_interrupted_run_goes_on(tmp_path: Path) -> None:
    """A long run, stopped by Ctrl-C after some tensors: the next one starts from there and gives the same report."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"w.{i}": torch.randn(1200, 1200, generator=generator) for i in range(8)}
    safetensors.torch.save_file(tensors, tmp_path / "m.safetensors")
    start = "from corollary.cli import checkpoints, main; checkpoints._PATIENCE = 0.0; main()"
    command = [sys.executable, "-c", start]
    words = ["inspect", "m.safetensors", "--full", "--jobs", "1", "--json", "out.json"]
    process = subprocess.Popen([*command, *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    kept = tmp_path / ".corollary" / "checkpoints"
    limit = time.monotonic() + 60
    while not (kept.is_dir() and any(kept.iterdir())) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "the same command goes on from there" in err
    assert not (tmp_path / "out.json").exists()
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d+ of 8 tensors are known", done.stdout)
    assert not (tmp_path / ".corollary").exists()
    first = json.loads((tmp_path / "out.json").read_text())
    again = run(*words[:-2], "--json", "again.json", "--store", "elsewhere", cwd=tmp_path)
    assert again.returncode == 0
    assert json.loads((tmp_path / "again.json").read_text()) == first


def test_journal_belongs_to_its_files_and_options(tmp_path: Path) -> None:
    one = Journal(tmp_path, ["inspect", [["a", 1, 2]]])
    one.keep({"name": "x"})
    assert one.flush()
    assert Journal(tmp_path, ["inspect", [["a", 1, 2]]]).done() == [{"name": "x"}]
    assert Journal(tmp_path, ["inspect", [["a", 1, 3]]]).done() == []
    with one.path.open("a") as file:
        file.write('{"name": "y"')  # cut off
    assert one.done() == [{"name": "x"}]
    one.close()
    assert list(tmp_path.iterdir()) == []


def test_small_words() -> None:
    assert kind_of("model.layers.10.mlp.w1.weight") == "model.layers.*.mlp.w1.weight"
    assert kind_of("h.0.attn.c_attn.weight") == "h.*.attn.c_attn.weight"
    assert printable("a\x1b[0m\n[red]b") == "a\ufffd[0m\ufffd\\[red]b"
    assert [size_text(n) for n in (5, 1500, 2_000_000, 7.5e9, 2e12)] == ["5 B", "1.5 kB", "2 MB", "7.5 GB", "2000 GB"]
    assert spread([None, None]) == "–"
    assert spread([1.0, None]) == "1"
    assert spread([1.0, 2.0, 4.0]).startswith("2 ")


def test_a_thousand_fuzzed_headers(tmp_path: Path) -> None:
    """Every refusal of the reader becomes one line of the command; what is not refused is written whole."""
    draw = random.Random(1)
    good = json.dumps({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    refused = 0
    for _ in range(1000):
        content = bytearray(struct.pack("<Q", len(good)) + good + bytes(24))
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(len(content) - 24)] = draw.randrange(256)
        if draw.random() < 0.2:
            content = content[: draw.randrange(len(content))]
        (tmp_path / "f.safetensors").write_bytes(content)
        done = run("inspect", "f.safetensors", "--json", "out.json", cwd=tmp_path)
        if done.returncode:
            refused += 1
            assert done.returncode == 2, done.stderr
            assert done.stderr.startswith("corollary: f.safetensors: "), done.stderr
            assert done.stderr.count("\n") == 1
            assert done.stdout == ""
            assert not (tmp_path / "out.json").exists()
        else:
            json.loads((tmp_path / "out.json").read_text())
            (tmp_path / "out.json").unlink()
    assert refused > 700

"""Inspect a generated checkpoint of 8 GB: peak memory, and throughput against reading the files alone; kept for the docs.

Usage: python -m benchmarks.inspect_scale [--gigabytes 8] [--jobs 2] [--folder DIR]

The shards hold the layers of a LLaMA 4,096 wide in bfloat16, with spectra that fall as a power. They are removed afterwards. Before each
measurement the files are dropped from the cache of the system, so that both come from the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from corollary.claims.environment import commit, machine, packages

RESULTS = Path(__file__).parent / "inspect_scale.json"
SHARD = 1_000_000_000


def shapes(nbytes: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensors of a LLaMA, embedding first, as many layers as the size wants."""
    yield "model.embed_tokens.weight", (32000, 4096)
    left, layer = nbytes - 32000 * 4096 * 2, 0
    while left > 0:
        for name, shape in (
            *((f"self_attn.{kind}_proj", (4096, 4096)) for kind in "qkvo"),
            *((f"mlp.{kind}_proj", (11008, 4096)) for kind in ("gate", "up")),
            ("mlp.down_proj", (4096, 11008)),
            ("input_layernorm", (4096,)),
        ):
            yield f"model.layers.{layer}.{name}.weight", shape
            size = 2
            for side in shape:
                size *= side
            left -= size
        layer += 1


def generate(folder: Path, nbytes: int) -> int:
    """Write the shards and their index, a few rows at a time; gives the bytes written."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(512, 11008, generator=generator)
    shards: list[list[tuple[str, tuple[int, ...], int]]] = [[]]
    room = SHARD
    for name, shape in shapes(nbytes):
        size = 2
        for side in shape:
            size *= side
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD
        shards[-1].append((name, shape, size))
        room -= size
    names = {}
    total = 0
    for number, tensors in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        header, at = {}, 0
        for name, shape, size in tensors:
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
            names[name] = file
            at += size
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for name, shape, _ in tensors:
                columns = shape[-1]
                scale = 0.02 + torch.arange(1, columns + 1).float().pow(-0.6)  # what training makes of the spectrum's top
                rows = shape[0] if len(shape) == 2 else 1
                for begin in range(0, rows, 512):
                    turn = (zlib.crc32(f"{name} {begin}".encode())) % 512
                    part = block.roll(turn, 0)[: min(512, rows - begin), :columns] * scale
                    out.write(part.bfloat16().view(torch.int16).numpy().tobytes())
        total += at
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": names}))
    return total


def forget(folder: Path) -> None:
    """Drop the files from the system's cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_alone(folder: Path) -> float:
    """Seconds to read every byte once."""
    forget(folder)
    buffer = bytearray(8 << 20)
    begin = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - begin


def inspect(folder: Path, jobs: int, *options: str) -> tuple[float, float, int, dict[str, Any]]:
    """Seconds of wall and of processor time and peak resident bytes of the command, and its report."""
    forget(folder)
    words = ["inspect", str(folder), "--json", str(folder / "out.json"), "--jobs", str(jobs), *options]
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", "from corollary.cli import main; main()", *words], stdout=subprocess.DEVNULL, cwd=folder
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    if status:
        raise SystemExit(f"inspect ended with status {status}")
    report = json.loads((folder / "out.json").read_text())
    (folder / "out.json").unlink()
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    needed = int(arguments.gigabytes * 1e9)
    parent = arguments.folder or Path(tempfile.gettempdir())
    if shutil.disk_usage(parent).free < needed * 1.2:
        raise SystemExit(f"{parent} has {shutil.disk_usage(parent).free:,} bytes free; {needed * 1.2:,.0f} are needed")
    folder = Path(tempfile.mkdtemp(dir=parent, prefix="inspect-scale-"))
    try:
        total = generate(folder, needed)
        reading = read_alone(folder)
        rows = []
        for name, options in (("spectra estimated (default)", ()), ("the 8 largest singular values (--top 8)", ("--top", "8"))):
            seconds, processor, peak, report = inspect(folder, arguments.jobs, *options)
            largest = max(t["nbytes"] for t in report["tensors"])
            rows.append(
                {
                    "what": name,
                    "seconds": seconds,
                    "processor_seconds": processor,
                    "gb_per_second": total / seconds / 1e9,
                    "peak_bytes": peak,
                }
            )
            print(
                f"{name}: {seconds:.1f} s ({processor:.0f} s of processor time), {total / seconds / 1e9:.3f} GB/s, peak {peak / 1e9:.2f} GB"
            )
    finally:
        shutil.rmtree(folder)
    kept = {
        "bytes": total,
        "tensors": len(report["tensors"]),
        "parameters": report["parameters"],
        "files": report["files"],
        "largest_tensor_bytes": largest,
        "jobs": arguments.jobs,
        "read_seconds": reading,
        "read_gb_per_second": total / reading / 1e9,
        "rows": rows,
        "commit": commit(),
        "machine": machine(),
        "packages": packages(),
    }
    print(f"reading alone: {reading:.1f} s, {total / reading / 1e9:.2f} GB/s")
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()

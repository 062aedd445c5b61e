"""Checkpoints as lazy mappings: a tensor is read when it is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corollary.data.loaders import LoadError, check_path

_INDEX = ".safetensors.index.json"


class SafetensorsFile(Mapping[str, Tensor]):
    """What `load_safetensors` gives: tensor's name to tensor, in the order of names, each read from disk on access.

    `shape` and `dtype` answer from the header alone. As a context manager it lets go of the files at the end.
    """

    def __init__(self, path: Path, files: Mapping[str, Path], device: str) -> None:
        self.path = path
        self.device = device
        self._files = dict(sorted(files.items()))
        self._open: dict[Path, Any] = {}

    def _file(self, name: str) -> Any:
        try:
            path = self._files[name]
        except KeyError:
            raise KeyError(f"{self.path} has no tensor '{name}'") from None
        if path not in self._open:
            self._open[path] = _open(path, self.device)
        return self._open[path]

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file(name).get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files  # Mapping's own would read the tensor

    def shape(self, name: str) -> torch.Size:
        """A tensor's shape, without reading it."""
        return torch.Size(self._file(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """A tensor's dtype as safetensors spells it ('F32', 'BF16', 'I64', ...), without reading it."""
        spelled: str = self._file(name).get_slice(name).get_dtype()
        return spelled

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        return tuple(sorted(set(self._files.values())))

    def close(self) -> None:
        """Let go of the open files; the next access opens them again."""
        self._open.clear()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"SafetensorsFile('{self.path}', {len(self)} tensors in {len(self.files)} files)"


def _open(path: Path, device: str) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(path), framework="pt", device=device)
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{path}: not a valid safetensors file: {error}") from error


def load_safetensors(path: str | Path, *, device: str = "cpu") -> SafetensorsFile:
    """A checkpoint as a mapping from name to tensor that reads each tensor only when it is asked for.

    Args:
        path: a ``.safetensors`` file, a ``.safetensors.index.json`` that lists shards, or a folder with one of them.
        device: where tensors are put, as torch spells it.

    Returns:
        A `SafetensorsFile`; iterate over it one tensor at a time and a checkpoint larger than memory is no trouble.

    Raises:
        LoadError: on a wrong path, a pickle, a broken file, an index that names a missing file or one outside its folder, or
            a tensor that stands in two shards.

    Example:
        >>> import tempfile, torch, safetensors.torch
        >>> from corollary.data import load_safetensors
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     safetensors.torch.save_file({"weight": torch.eye(2), "bias": torch.zeros(2)}, f"{folder}/model.safetensors")
        ...     with load_safetensors(folder) as checkpoint:
        ...         list(checkpoint), checkpoint.shape("weight"), checkpoint["bias"]
        (['bias', 'weight'], torch.Size([2, 2]), tensor([0., 0.]))
    """
    path = check_path(path, "path", (".safetensors", ".json"))
    if path.is_dir():
        return _from_folder(path, device)
    if path.suffix == ".json":
        return _from_index(path, device)
    return SafetensorsFile(path, dict.fromkeys(_open(path, device).keys(), path), device)


def _from_folder(folder: Path, device: str) -> SafetensorsFile:
    indices = sorted(folder.glob(f"*{_INDEX}"))
    if len(indices) > 1:
        raise LoadError(f"{folder}: holds several indices ({', '.join(p.name for p in indices)}); give one of them")
    if indices:
        return _from_index(indices[0], device)
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        held = sorted(p.name for p in folder.iterdir())[:5]
        raise LoadError(f"{folder}: holds no .safetensors file; it holds: {', '.join(held) or 'nothing'}")
    files: dict[str, Path] = {}
    for shard in shards:
        for name in _open(shard, device).keys():  # noqa: SIM118 - a safetensors handle is no mapping
            if name in files:
                raise LoadError(f"{shard}: tensor '{name}' stands in {files[name].name} too; give one file")
            files[name] = shard
    return SafetensorsFile(folder, files, device)


def _from_index(index: Path, device: str) -> SafetensorsFile:
    if not index.name.endswith(_INDEX):
        raise LoadError(f"{index}: has suffix '.json'; allowed: .safetensors, {_INDEX}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): index.parent / file for name, file in weight_map.items()}
    except json.JSONDecodeError as error:
        raise LoadError(f"{index}, line {error.lineno}: not valid JSON: {error.msg}") from error
    except (UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{index}: must hold an object 'weight_map' from a tensor's name to its file") from error
    held: dict[Path, set[str]] = {}
    for name, file in files.items():
        # An index comes with a download: it must not be able to point anywhere else on the disk.
        if file.resolve().parent != index.parent.resolve() and file.parent != index.parent:
            raise LoadError(f"{index}: tensor '{name}' is said to be in {file}, outside the index's folder")
        if file not in held:
            check_path(file, "file", (".safetensors",))
            held[file] = set(_open(file, device).keys())
        if name not in held[file]:
            raise LoadError(f"{file}: has no tensor '{name}', which {index.name} says it has")
    return SafetensorsFile(index, files, device)

"""Checkpoints larger than memory, written tensor by tensor: interrupted at will, and never half there under their final name."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from corollary.data.checkpoint_layout import TensorSpec, WriteError, lay_out

_JOURNAL = "journal"


class CheckpointWriter:
    r"""Writes safetensors whose tensors come one at a time; after an interruption it goes on behind the last whole tensor.

    All names, dtypes and shapes are known first, so the header stands at the file's start before any tensor does, and only
    one tensor has to be in memory; they may come in any order. Everything is written to a hidden folder beside the target,
    ``.<name>.partial``, with a journal of the tensors that are whole and of their checksums. `finish` gives it its final name
    in one step: whoever looks sees the whole checkpoint or none. A writer made anew with the same arguments verifies the
    journal against the bytes and has in `pending` what is missing; the outcome is, to the bit, that of an undisturbed writer.

    Args:
        out: a ``.safetensors`` file, or a folder, which then holds ``model.safetensors`` or, above ``max_shard_bytes``,
            ``model-00001-of-0000n.safetensors`` and so on with ``model.safetensors.index.json``, as transformers names them.
            A file is replaced; a folder must not exist, or be empty.
        tensors: name to `TensorSpec`, in the order wanted. A file holds wider dtypes first, so that all are aligned.
        metadata: text to text, kept in every file's header.
        max_shard_bytes: a folder's files hold no more, except one tensor alone.
        identity: any text that tells this work from another, such as the inputs' names, sizes and settings. Only a writer with
            the same one goes on where an interrupted one stopped.
        fresh: throw an interrupted writer's work away instead of going on.

    Attributes:
        resumed: how many tensors an interrupted writer had left whole.

    Raises:
        WriteError: where ``out`` cannot be written to, has a wrong suffix, is a folder with something in it, is being written by
            another process, holds other interrupted work, or the disk is too full; for a name or metadata that is no text.

    Used as a context manager it finishes at the end of the block; an exception leaves the partial work for the next writer.

    When not to use it: for what fits in memory twice ``safetensors.torch.save_file`` is enough.

    Example:
        >>> import tempfile, torch
        >>> from corollary.data import CheckpointWriter, TensorSpec, load_safetensors
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     specs = {"weight": TensorSpec(torch.float32, (2, 2)), "bias": TensorSpec("BF16", (2,))}
        ...     with CheckpointWriter(f"{folder}/model.safetensors", specs) as writer:
        ...         for name in writer.pending:
        ...             writer.append(name, torch.ones(specs[name].shape, dtype=specs[name].torch_dtype))
        ...     load_safetensors(writer.path)["bias"]
        tensor([1., 1.], dtype=torch.bfloat16)

    Source: the safetensors format's description, https://github.com/huggingface/safetensors.
    """

    def __init__(
        self,
        out: str | Path,
        tensors: Mapping[str, TensorSpec],
        *,
        metadata: Mapping[str, str] | None = None,
        max_shard_bytes: int = 5_000_000_000,
        identity: str = "",
        fresh: bool = False,
    ) -> None:
        if sys.byteorder != "little":
            raise WriteError("safetensors are little-endian, and this machine is not")
        self.path = Path(out)
        self._single = self.path.suffix == ".safetensors"
        self._check_target()
        self._specs = dict(tensors)
        if max_shard_bytes < 1:
            raise WriteError(f"'max_shard_bytes' must be at least 1, not {max_shard_bytes}")
        shards = lay_out(self._specs, metadata or {}, math.inf if self._single else max_shard_bytes)
        self._shards = dict(zip(self._files(len(shards)), shards, strict=True))
        self._home = {name: file for file, shard in self._shards.items() for name in shard.places}
        self._folder = self.path.parent / f".{self.path.name}.partial"
        self._done: set[str] = set()
        self._journal = self._open_journal(identity, fresh)
        self.resumed = len(self._done)

    def _check_target(self) -> None:
        path = self.path
        if not path.parent.is_dir():
            raise WriteError(f"{path}: there is no folder '{path.parent}'")
        if not os.access(path.parent, os.W_OK):
            raise WriteError(f"{path}: folder '{path.parent}' is not writable")
        if self._single and path.is_dir():
            raise WriteError(f"{path}: is a folder; give a file, or a folder without the suffix .safetensors")
        if not self._single and path.suffix and not path.is_dir() and path.suffix.lower() in (".bin", ".pt", ".pth", ".json"):
            raise WriteError(f"{path}: has suffix '{path.suffix}'; allowed: .safetensors, or a folder")
        if not self._single and path.exists():
            if not path.is_dir():
                raise WriteError(f"{path}: is a file; give a folder, or a file that ends in .safetensors")
            held = next(path.iterdir(), None)
            if held is not None:
                raise WriteError(f"{path}: the folder is not empty (it holds '{held.name}'); give a new one")

    def _files(self, count: int) -> list[str]:
        if self._single:
            return [self.path.name]
        if count == 1:
            return ["model.safetensors"]
        return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]

    # ------------------------------------------------------------------------------------------------------------- journal

    def _data(self, file: str) -> Path:
        return self._folder / "checkpoint" / file

    def _open_journal(self, identity: str, fresh: bool) -> IO[bytes]:
        digest = hashlib.sha256(identity.encode("utf-8", "surrogatepass"))
        for file, shard in self._shards.items():
            digest.update(f"\0{file}\0".encode() + shard.header)
        plan = json.dumps({"plan": digest.hexdigest()}).encode() + b"\n"
        (self._folder / "checkpoint").mkdir(parents=True, exist_ok=True)
        journal = open(self._folder / _JOURNAL, "a+b", buffering=0)  # noqa: SIM115 - it stays open, and locked, until the end
        try:
            self._lock(journal)
            if fresh:
                journal.truncate(0)
            journal.seek(0)
            first = journal.readline()
            if first == plan:
                self._resume(journal)
            elif first.endswith(b"\n"):
                raise WriteError(
                    f"{self._folder}: holds the interrupted work of other inputs or settings; repeat that work, or remove the folder"
                )
            else:  # new, or cut off in the very first line
                journal.truncate(0)
                self._start()
                journal.write(plan)
        except BaseException:
            journal.close()
            raise
        return journal

    def _lock(self, journal: IO[bytes]) -> None:
        try:
            import fcntl
        except ModuleNotFoundError:  # Windows, where two writers of one target are on their own
            return
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise WriteError(f"{self.path}: is being written by another process") from error

    def _start(self) -> None:
        for left in self._data("").iterdir():
            left.unlink()
        needed, free = self.nbytes, shutil.disk_usage(self._folder).free
        if needed > free:
            self._folder.joinpath(_JOURNAL).unlink()
            self._data("").rmdir()
            self._folder.rmdir()
            raise WriteError(f"{self.path}: needs {needed:,} bytes, and the disk has {free:,} left")
        for file, shard in self._shards.items():
            with open(self._data(file), "wb") as data:
                data.write(shard.header)
                data.truncate(shard.nbytes)

    def _resume(self, journal: IO[bytes]) -> None:
        """Take over what the journal says and the bytes confirm."""
        whole = journal.tell()
        for line in journal:
            try:
                name, checksum = json.loads(line)
            except ValueError:
                break  # the line that was being written
            if not line.endswith(b"\n"):
                break
            if name in self._specs and self._checksum(name) == checksum:
                self._done.add(name)
            whole += len(line)
        journal.truncate(whole)
        for file, shard in self._shards.items():
            with open(self._data(file), "ab") as data:
                data.truncate(shard.nbytes)
            with open(self._data(file), "r+b") as data:
                data.write(shard.header)

    def _checksum(self, name: str) -> int | None:
        """Of a tensor's bytes on disk; None where they are missing."""
        file, left, value = self._home[name], self._specs[name].nbytes, 0
        try:
            with open(self._data(file), "rb") as data:
                data.seek(self._shards[file].places[name])
                while left:
                    piece = data.read(min(left, 1 << 24))
                    if not piece:
                        return None
                    value, left = zlib.crc32(piece, value), left - len(piece)
        except FileNotFoundError:
            return None
        return value

    # ------------------------------------------------------------------------------------------------------------- writing

    @property
    def nbytes(self) -> int:
        """Bytes of all files together, headers included."""
        return sum(shard.nbytes for shard in self._shards.values())

    @property
    def pending(self) -> tuple[str, ...]:
        """Tensors still to come, in the order in which they lie on disk."""
        return tuple(name for name in self._home if name not in self._done)

    def append(self, name: str, tensor: Tensor) -> None:
        """Write one tensor: any device, any strides; dtype and shape as announced.

        Raises:
            WriteError: for a name that was not announced or is written already, another dtype or shape, or a full disk.
        """
        if self._journal.closed:
            raise WriteError(f"{self.path}: this writer is closed")
        if name not in self._specs or name in self._done:
            raise WriteError(f"tensor '{name}' is {'written already' if name in self._specs else 'not among those announced'}")
        spec, came = self._specs[name], TensorSpec(tensor.dtype, tensor.shape)
        if came != spec:
            raise WriteError(f"tensor '{name}' is {came.dtype} {came.shape}; announced was {spec.dtype} {spec.shape}")
        flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        raw = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
        file = self._home[name]
        try:
            with open(self._data(file), "r+b", buffering=0) as data:
                data.seek(self._shards[file].places[name])
                at = 0
                while at < len(raw):
                    at += data.write(raw[at : at + (1 << 30)])
            # Only now: a line in the journal says that the tensor before it is whole.
            self._journal.write(json.dumps([name, zlib.crc32(raw)]).encode() + b"\n")
        except OSError as error:
            raise WriteError(f"{self.path}: cannot write tensor '{name}': {error.strerror}") from error
        self._done.add(name)

    def add_file(self, source: str | Path) -> None:
        """Copy a file, such as ``config.json``, into the folder that is being written.

        Raises:
            WriteError: where a single file is being written, or the file's name is taken by the checkpoint's own files.
        """
        source = Path(source)
        if self._single:
            raise WriteError(f"{self.path}: is a single file; '{source.name}' can be added to a folder only")
        if source.name in self._shards or source.name.endswith(".safetensors.index.json"):
            raise WriteError(f"{self.path}: '{source.name}' is one of the checkpoint's own files")
        shutil.copyfile(source, self._data(source.name))

    def finish(self) -> Path:
        """Give the checkpoint its final name, in one step.

        Returns:
            The path of the file or folder.

        Raises:
            WriteError: where tensors are still to come; the message names the first.
        """
        if self.pending:
            raise WriteError(f"{self.path}: tensor '{self.pending[0]}' was not written ({len(self.pending)} missing)")
        if len(self._shards) > 1:
            index = {"metadata": {"total_size": sum(s.nbytes for s in self._specs.values())}, "weight_map": self._home}
            text = json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
            self._data("model.safetensors.index.json").write_text(text, encoding="utf-8")
        for file in self._data("").iterdir():
            _sync(file)
        if self._single:
            os.replace(self._data(self.path.name), self.path)
        else:
            _sync(self._data(""))
            with suppress(FileNotFoundError):
                self.path.rmdir()  # it is empty: the constructor saw to that, and this refuses if it no longer is
            os.replace(self._data(""), self.path)
        _sync(self.path.parent)
        self.close()
        shutil.rmtree(self._folder)
        return self.path

    def close(self) -> None:
        """Let go of the partial work; a writer with the same arguments goes on from it."""
        self._journal.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self.pending)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.finish()
        self.close()


def _sync(path: Path) -> None:
    """Have the disk itself hold what was written."""
    if path.is_dir() and os.name == "nt":
        return  # Windows does not open folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

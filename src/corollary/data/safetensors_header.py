"""The header of a safetensors file, read without trust: every field is checked before a byte of a tensor is touched."""

from __future__ import annotations

import json
import math
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from corollary.data.loaders import LoadError, check_path

# Bits of an element. What torch has no dtype for is listed too: its size can be checked, and its bytes counted.
BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
MAX_HEADER = 100_000_000
"""longest header in bytes; the reference implementation has the same limit"""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        name: of the tensor.
        dtype: as safetensors spells it ('F32', 'BF16', ...).
        shape: as the header gives it.
        path: of the file.
        offset: of the first byte in the file.
        nbytes: how many bytes it takes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(path: str | Path) -> dict[str, TensorEntry]:
    """The tensors that a safetensors file holds, from its header alone.

    The header must be what the format says, to the letter: its length within the file, UTF-8, one JSON object without repeated
    keys, every dtype known, every size equal to that of shape and dtype, and the tensors one after the other from the first
    byte of the data to the last, without a gap and without an overlap. So a tensor can neither read another one's bytes nor
    lie beyond the end.

    Args:
        path: of the file.

    Returns:
        Name to entry, in the order of offsets.

    Raises:
        LoadError: names the file, the tensor where there is one, and what is wrong with it.

    When not to use it: to read tensors, for which there is `open_checkpoint`.

    Example:
        >>> import tempfile, torch, safetensors.torch
        >>> from corollary.data.safetensors_header import read_header
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     safetensors.torch.save_file({"bias": torch.zeros(3)}, f"{folder}/model.safetensors")
        ...     entry = read_header(f"{folder}/model.safetensors")["bias"]
        >>> entry.dtype, entry.shape, entry.nbytes
        ('F32', (3,), 12)

    Source: the format's description in the safetensors project.
    """
    path = check_path(path, "file", (".safetensors",))
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise LoadError(f"{path}: is no regular file")
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise LoadError(f"{path}: truncated: {len(start)} bytes, and a safetensors file has at least 8")
            length = int.from_bytes(start, "little")
            if length > status.st_size - 8:
                raise LoadError(
                    f"{path}: the header is said to take {length} bytes, but {status.st_size - 8} follow; truncated?"
                )
            if length > MAX_HEADER:
                raise LoadError(f"{path}: the header is said to take {length} bytes; allowed: up to {MAX_HEADER}")
            raw = file.read(length)
    except OSError as error:
        raise LoadError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(raw) < length:
        raise LoadError(f"{path}: truncated: the header ends after {len(raw)} of {length} bytes")
    return _entries(path, parse_json(raw, f"{path}: header"), 8 + length, status.st_size - 8 - length)


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """A JSON object out of bytes that nobody vouches for; raises `LoadError` on repeated keys, NaN, depth and what is no object."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise LoadError(f"{where}: the name {shown(twice)} stands twice")
        return found

    def constant(text: str) -> NoReturn:
        raise LoadError(f"{where}: not valid JSON: {text}")

    if not raw.startswith(b"{"):
        raise LoadError(f"{where}: begins with {raw[:8]!r}, not with '{{'; is this another kind of file?")
    try:
        # The format lets a header be padded with spaces at its end, and nothing else.
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except LoadError:
        raise
    except UnicodeDecodeError as error:
        raise LoadError(f"{where}: not UTF-8 text at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise LoadError(f"{where}: not valid JSON: {error.msg} at character {error.pos}") from error
    except (RecursionError, ValueError) as error:  # nested too deep, or an integer with thousands of digits
        raise LoadError(f"{where}: not valid JSON: {type(error).__name__}") from error
    if not isinstance(data, dict):
        raise LoadError(f"{where}: holds a {type(data).__name__}, not an object")
    return data


def shown(value: object, most: int = 60) -> str:
    """A name or value from a file on one line of a message, whatever characters are in it."""
    text = ascii(value)
    return text if len(text) <= most else text[: most - 4] + "...'"


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _entries(path: Path, header: Mapping[str, Any], begin: int, size: int) -> dict[str, TensorEntry]:
    found: list[TensorEntry] = []
    for name, facts in header.items():
        where = f"{path}: tensor {shown(name)}"
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as error:
            raise LoadError(f"{where}: the name is not valid Unicode") from error
        if name == "__metadata__":
            if not isinstance(facts, dict) or not all(isinstance(v, str) for v in facts.values()):
                raise LoadError(f"{path}: '__metadata__' must map text to text")
            continue
        if not isinstance(facts, dict) or set(facts) != {"dtype", "shape", "data_offsets"}:
            raise LoadError(f"{where}: must have dtype, shape and data_offsets and nothing else, not {shown(facts)}")
        dtype, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
        if not isinstance(dtype, str) or dtype not in BITS:
            raise LoadError(f"{where}: dtype is {shown(dtype)}; allowed: {', '.join(BITS)}")
        if not isinstance(shape, list) or not all(map(_whole, shape)):
            raise LoadError(f"{where}: shape is {shown(shape)}; allowed: a list of whole numbers from 0 up")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_whole, offsets)):
            raise LoadError(f"{where}: data_offsets is {shown(offsets)}; allowed: two whole numbers from 0 up")
        first, last = offsets
        if first > last or last > size:
            raise LoadError(f"{where}: data_offsets is {shown(offsets)}, but the data takes bytes 0 to {size}; truncated?")
        # Multiply nothing that hostile dimensions could blow up: no more elements than bits in the file.
        bits, numel = (last - first) * 8, 1
        for dim in [0] if 0 in shape else shape:
            numel *= dim
            if numel > bits:
                break
        if numel * BITS[dtype] != bits:
            raise LoadError(f"{where}: {dtype} of shape {shown(shape)} does not take the {last - first} bytes that it has")
        found.append(TensorEntry(name, dtype, tuple(shape), path, begin + first, last - first))
    found.sort(key=lambda entry: (entry.offset, entry.nbytes))
    at = begin
    for entry in found:
        if entry.offset != at:
            kind = (
                "overlaps the one before it"
                if entry.offset < at
                else f"begins {entry.offset - at} bytes after the one before it"
            )
            raise LoadError(f"{path}: tensor {shown(entry.name)}: {kind}; tensors must lie one after the other")
        at += entry.nbytes
    if at != begin + size:
        raise LoadError(f"{path}: {begin + size - at} bytes at the end belong to no tensor")
    return {entry.name: entry for entry in found}

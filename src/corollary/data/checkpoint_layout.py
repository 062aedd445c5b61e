"""How a safetensors checkpoint lies on disk, planned from the tensors' names, dtypes and shapes alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

# The reference implementation refuses a longer header, in bytes.
_MAX_HEADER = 100_000_000


class WriteError(ValueError):
    """A checkpoint cannot be written; the message says what is wrong and what would be right."""


# What safetensors calls torch's dtypes; older torch has not all of them.
DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, spelled)
    for name, spelled in {
        "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
        "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
        "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
        "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    }.items()
    if hasattr(torch, spelled)
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """What has to be known of a tensor before it is written.

    Args:
        dtype: as safetensors spells it (``'BF16'``) or as torch does (``torch.bfloat16``).
        shape: its sizes.

    Raises:
        WriteError: for a dtype that safetensors and torch do not share, or a negative size.
    """

    dtype: str
    shape: tuple[int, ...]

    def __init__(self, dtype: str | torch.dtype, shape: Any) -> None:
        name = _NAMES.get(dtype, str(dtype)) if isinstance(dtype, torch.dtype) else str(dtype)
        if name not in DTYPES:
            raise WriteError(f"dtype '{name}' cannot be written; allowed: {', '.join(DTYPES)}")
        sizes = tuple(int(size) for size in shape)
        if min(sizes, default=0) < 0:
            raise WriteError(f"shape {sizes} has a negative size")
        object.__setattr__(self, "dtype", name)
        object.__setattr__(self, "shape", sizes)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it."""
        return DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.torch_dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class Shard:
    """One file: its header's bytes, and its tensors with their offsets in it."""

    header: bytes
    places: Mapping[str, int]
    nbytes: int


def lay_out(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str], limit: float) -> list[Shard]:
    """Files of at most ``limit`` bytes of tensors each, in the order given; one tensor alone may be larger.

    Raises:
        WriteError: for a name or metadata that is no text, or a header longer than readers take.
    """
    for key, value in (*metadata.items(), *((name, "") for name in specs)):
        if not isinstance(key, str) or not isinstance(value, str):
            raise WriteError(f"names and metadata must be text, not {key!r}: {value!r}")
    if "__metadata__" in specs:
        raise WriteError("'__metadata__' is no name for a tensor")
    groups: list[dict[str, TensorSpec]] = [{}]
    taken = 0
    for name, spec in specs.items():
        if groups[-1] and taken + spec.nbytes > limit:
            groups.append({})
            taken = 0
        groups[-1][name] = spec
        taken += spec.nbytes
    return [_shard(group, metadata) for group in groups]


def _shard(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> Shard:
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at, offsets = 0, {}
    # Wider dtypes first, so that each tensor lies where its dtype can be mapped.
    for name, spec in sorted(specs.items(), key=lambda item: -item[1].torch_dtype.itemsize):
        offsets[name] = at
        table[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [at, at + spec.nbytes]}
        at += spec.nbytes
    try:
        text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError as error:
        raise WriteError(f"a name or metadata is not valid Unicode: {error.object!r}") from error
    text += b" " * (-len(text) % 8)
    if len(text) % 256 == 0x80:
        text += b" " * 8  # the byte 0x80 at a file's start is how a pickle begins, and some readers refuse it
    if len(text) > _MAX_HEADER:
        raise WriteError(f"the header would take {len(text)} bytes; allowed: up to {_MAX_HEADER}; take smaller shards")
    header = len(text).to_bytes(8, "little") + text
    return Shard(header, {name: len(header) + offset for name, offset in offsets.items()}, len(header) + at)

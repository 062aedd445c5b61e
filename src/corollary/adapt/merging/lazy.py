"""What every way of merging gives: a mapping whose tensors are merged one at a time, when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from corollary.data.checkpoint_layout import DTYPES, TensorSpec

_FLOATING = ("F16", "BF16", "F32", "F64")


class MergeError(ValueError):
    """Checkpoints do not fit together; the message names the first tensor that does not, and how."""


class Tensors:
    """One tensor of every checkpoint, in the working dtype, read anew each time it is iterated over: one is in memory at a time.

    Args:
        checkpoints: what is merged.
        name: of the tensor.
        like: has the working dtype and the device.
    """

    def __init__(self, checkpoints: Sequence[Mapping[str, Tensor]], name: str, like: Tensor) -> None:
        self._checkpoints, self._name, self._like = checkpoints, name, like

    def __len__(self) -> int:
        return len(self._checkpoints)

    def __iter__(self) -> Iterator[Tensor]:
        for checkpoint in self._checkpoints:
            yield checkpoint[self._name].to(self._like)


Combine = Callable[[str, Tensor, Tensors], Tensor]


class MergedCheckpoint(Mapping[str, Tensor]):
    """A merged checkpoint as a mapping from name to tensor, in the base's dtypes; nothing is computed before it is asked for.

    Half precision is merged in float32. Tensors of whole numbers and booleans are the base's: they must be equal everywhere,
    except single numbers, such as the batch counters of batch normalization. Gradients flow where inputs require them.

    Args:
        base: what the checkpoints were fine-tuned from: any mapping from name to tensor, such as a ``state_dict`` or what
            `corollary.data.load_safetensors` gives.
        checkpoints: as many as there are tasks; each has the base's names and shapes.
        combine: merges one floating tensor: a function of its name, the base's tensor and the checkpoints' `Tensors`, all in
            the working dtype.

    Raises:
        MergeError: names the first tensor that is missing, extra, of another shape or another kind of dtype.
        TypeError: where something is no mapping.

    Example:
        >>> import torch
        >>> from corollary.adapt.merging import MergedCheckpoint
        >>> largest = MergedCheckpoint({"w": torch.zeros(2)}, [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 0.0])}],
        ...                            lambda name, base, tensors: torch.stack(list(tensors)).amax(0))
        >>> largest["w"]
        tensor([3., 2.])
    """

    def __init__(self, base: Mapping[str, Tensor], checkpoints: Sequence[Mapping[str, Tensor]], combine: Combine) -> None:
        self._specs = check_checkpoints(base, checkpoints)
        self._base, self._checkpoints, self._combine = base, tuple(checkpoints), combine

    def __getitem__(self, name: str) -> Tensor:
        spec = self._specs[name]
        tensor = self._base[name]
        if spec.dtype not in _FLOATING:
            return tensor
        work = tensor.to(working_dtype(spec))
        merged = self._combine(name, work, Tensors(self._checkpoints, name, work))
        return merged.to(tensor.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def __contains__(self, name: object) -> bool:
        return name in self._specs  # Mapping's own would merge the tensor

    def shape(self, name: str) -> torch.Size:
        """A tensor's shape, without merging it."""
        return torch.Size(self._specs[name].shape)

    def dtype(self, name: str) -> str:
        """A tensor's dtype as safetensors spells it, without merging it."""
        return self._specs[name].dtype

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Name to dtype and shape: what `corollary.data.CheckpointWriter` wants to know beforehand."""
        return dict(self._specs)


def working_dtype(spec: TensorSpec) -> torch.dtype:
    """Where a tensor's arithmetic happens: float64 for float64, otherwise float32."""
    return torch.float64 if spec.dtype == "F64" else torch.float32


def floating(specs: Mapping[str, TensorSpec]) -> list[str]:
    """The names of the tensors that are merged."""
    return [name for name, spec in specs.items() if spec.dtype in _FLOATING]


def _spec(checkpoint: Any, name: str, where: str) -> TensorSpec:
    """Dtype and shape, from the header alone where there is one."""
    if callable(getattr(checkpoint, "shape", None)) and callable(getattr(checkpoint, "dtype", None)):
        dtype, shape = checkpoint.dtype(name), checkpoint.shape(name)
    else:
        tensor = checkpoint[name]
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{where}: '{name}' must be a tensor, not {type(tensor).__name__}")
        dtype, shape = tensor.dtype, tensor.shape
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise MergeError(f"{where}: tensor '{name}' is {dtype}, which torch does not have; dequantize the checkpoint first")
    return TensorSpec(dtype, shape)


def described(checkpoint: object, fallback: str) -> str:
    """A checkpoint's path, or its place among the arguments."""
    path = getattr(checkpoint, "path", None)
    return fallback if path is None else str(path)


def check_checkpoints(base: Mapping[str, Tensor], checkpoints: Sequence[Mapping[str, Tensor]]) -> dict[str, TensorSpec]:
    """The base's dtypes and shapes, after every checkpoint was held against them.

    Raises:
        MergeError: names the first tensor that does not fit.
        TypeError: where something is no mapping.
    """
    if isinstance(checkpoints, Mapping) or not isinstance(checkpoints, Sequence):
        raise TypeError(f"'checkpoints' must be a list of mappings, not {type(checkpoints).__name__}")
    if not checkpoints:
        raise MergeError("'checkpoints' is empty; give at least one")
    given: tuple[Any, ...] = (base, *checkpoints)
    for i, mapping in enumerate(given):
        if not isinstance(mapping, Mapping):
            what = f"checkpoints[{i - 1}]" if i else "base"
            raise TypeError(f"'{what}' must map names to tensors, not be a {type(mapping).__name__}")
    origin = described(base, "base")
    specs = {name: _spec(base, name, origin) for name in base}
    for i, checkpoint in enumerate(checkpoints):
        where = described(checkpoint, f"checkpoints[{i}]")
        for name, spec in specs.items():
            if name not in checkpoint:
                raise MergeError(f"{where}: has no tensor '{name}', which {origin} has")
            _check_one(checkpoint, base, name, spec, where, origin)
        extra = next((name for name in checkpoint if name not in specs), None)
        if extra is not None:
            raise MergeError(f"{where}: has a tensor '{extra}' that {origin} has not")
    return specs


def _check_one(checkpoint: Any, base: Any, name: str, spec: TensorSpec, where: str, origin: str) -> None:
    other = _spec(checkpoint, name, where)
    if other.shape != spec.shape:
        raise MergeError(f"{where}: tensor '{name}' is {other.shape}, in {origin} it is {spec.shape}")
    if (spec.dtype in _FLOATING) != (other.dtype in _FLOATING):
        came, there = (str(DTYPES[s.dtype]).removeprefix("torch.") for s in (other, spec))
        raise MergeError(f"{where}: tensor '{name}' is {came}, in {origin} it is {there}; one is floating, the other is not")
    if spec.dtype in _FLOATING:
        return
    if spec.dtype.startswith(("F8", "C")):
        raise MergeError(
            f"{origin}: tensor '{name}' is {spec.dtype}; allowed: {', '.join(_FLOATING)}, whole numbers, booleans. "
            "Dequantize the checkpoint first"
        )
    if spec.shape and not torch.equal(base[name], checkpoint[name]):
        raise MergeError(
            f"{where}: tensor '{name}' holds whole numbers ({DTYPES[spec.dtype]}) that differ from those in {origin}; "
            "they cannot be merged. If they are quantized weights, dequantize the checkpoint first"
        )

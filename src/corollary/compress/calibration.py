"""What layers see: second moments of their inputs, streamed over data of any length in memory of one size."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from corollary.adapt.site import Site
from corollary.compress.sites import Target, compressible, first_tensor, input_rows, site_of

_FORMAT = "corollary-calibration"
Batch = Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Moments:
    r"""Moments of one layer over the data: all that the low-rank solver needs to know of it.

    Args:
        second: :math:`E[x x^\top]` of the inputs, float64 (in, in); (in,) where it is diagonal, as for an embedding.
        mean: :math:`E[x]`, float64 (in,).
        count: how many inputs were seen: rows of a linear layer, patches of a convolution, tokens of an embedding.
        outputs: :math:`E[g g^\top]` of the loss's gradient at the layer's output, float64 (out, out), where a loss was given.
    """

    second: Tensor
    mean: Tensor
    count: int
    outputs: Tensor | None = None


class Calibration(Mapping[str, Moments]):
    """Layer's name to its `Moments`; made by `calibrate`, kept by `save` as a safetensors file.

    The file holds for each layer ``<layer>.second`` and ``<layer>.mean``, and ``<layer>.outputs`` where it was measured; the counts
    stand in its metadata. `load_calibration` reads it back, layer by layer.
    """

    def __init__(self, moments: Mapping[str, Moments]) -> None:
        self._moments = dict(moments)

    def __getitem__(self, name: str) -> Moments:
        try:
            return self._moments[name]
        except KeyError:
            raise KeyError(f"calibration has no layer '{name}'; it has for example: {', '.join(list(self)[:3])}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)

    def __contains__(self, name: object) -> bool:
        return name in self._moments

    def save(self, path: str | Path) -> Path:
        """Write a ``.safetensors`` file, whole or not at all.

        Raises:
            ValueError: another suffix, or a missing folder.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(f"'path' must end in .safetensors, not '{path}'")
        if not path.parent.is_dir():
            raise ValueError(f"'path': there is no folder '{path.parent}'")
        tensors: dict[str, Tensor] = {}
        for name, held in self.items():
            tensors[f"{name}.second"], tensors[f"{name}.mean"] = held.second.contiguous(), held.mean.contiguous()
            if held.outputs is not None:
                tensors[f"{name}.outputs"] = held.outputs.contiguous()
        counts = json.dumps({name: held.count for name, held in self.items()})
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            save_file(tensors, temporary, {"format": _FORMAT, "version": "1", "counts": counts})
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return path


class StoredCalibration(Calibration):
    """A calibration file as a mapping that reads a layer's moments only when they are asked for."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"'path': there is no file '{path}'")
        try:
            opened: Any = safe_open(str(path), framework="pt")
            metadata, keys = opened.metadata() or {}, set(opened.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"'path': '{path}' is not a valid safetensors file: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"'path': '{path}' is no calibration; make one with corollary.compress.calibrate(...).save(path)")
        try:
            counts = {str(name): int(count) for name, count in json.loads(metadata["counts"]).items()}
        except (KeyError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"'path': the metadata of '{path}' is broken: {error!r}") from error
        for name in counts:
            for part in ("second", "mean"):
                if f"{name}.{part}" not in keys:
                    raise ValueError(f"'path': '{path}' counts layer '{name}' and has no tensor '{name}.{part}'")
        self._file, self._counts, self._keys = opened, counts, keys

    def __getitem__(self, name: str) -> Moments:
        if name not in self._counts:
            raise KeyError(f"calibration has no layer '{name}'; it has for example: {', '.join(list(self)[:3])}")
        outputs = f"{name}.outputs"
        return Moments(
            self._file.get_tensor(f"{name}.second"),
            self._file.get_tensor(f"{name}.mean"),
            self._counts[name],
            self._file.get_tensor(outputs) if outputs in self._keys else None,
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)

    def __contains__(self, name: object) -> bool:
        return name in self._counts


def load_calibration(path: str | Path) -> StoredCalibration:
    """What `Calibration.save` wrote; each layer's moments are read when they are asked for.

    Raises:
        ValueError: a missing file, one that is no safetensors file, or no calibration of ours.

    Example:
        >>> import tempfile, torch
        >>> from corollary.compress import calibrate, load_calibration
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     seen = calibrate(torch.nn.Linear(3, 2), [torch.randn(5, 3)])
        ...     load_calibration(seen.save(f"{folder}/moments.safetensors"))[""].count
        5
    """
    return StoredCalibration(path)


class _Accumulator:
    """Running sums of one layer, in float64."""

    def __init__(self, site: Site, dtype: torch.dtype) -> None:
        self.site, self.dtype = site, dtype
        self.count = self.gradients = 0
        self.second: Tensor | None = None
        self.mean: Tensor | None = None
        self.outputs: Tensor | None = None

    def see(self, x: Tensor, mask: Tensor | None) -> None:
        n = self.site.in_features
        if mask is not None and mask.shape == x.shape[: mask.ndim]:
            x = x[mask]
        if self.site.kind == "embedding":
            counts = torch.bincount(x.reshape(-1), minlength=n).to(self.dtype)
            self.count += x.numel()
            self.second = self.mean = counts if self.second is None else self.second.add_(counts)
            return
        rows = input_rows(self.site, x.detach()).to(self.dtype)
        if self.second is None or self.mean is None:
            self.second, self.mean = rows.new_zeros(n, n), rows.new_zeros(n)
        self.second.addmm_(rows.T, rows)
        self.mean.add_(rows.sum(0))
        self.count += len(rows)

    def see_gradient(self, g: Tensor, mask: Tensor | None) -> None:
        if mask is not None and mask.shape == g.shape[: mask.ndim]:
            g = g[mask]
        if self.site.kind.startswith("conv"):
            g = g.movedim(-len(self.site.stride) - 1, -1)
        rows = g.detach().reshape(-1, self.site.out_features).to(self.dtype)
        self.outputs = rows.T @ rows if self.outputs is None else self.outputs.addmm_(rows.T, rows)
        self.gradients += len(rows)

    def moments(self, name: str) -> Moments:
        if self.second is None or self.mean is None or not self.count:
            raise ValueError(f"'data' never reached layer '{name}'; leave it out of 'targets'")
        outputs = None if self.outputs is None else self.outputs / self.gradients
        second, mean = self.second / self.count, self.mean / self.count
        if not bool(mean.isfinite().all() and second.isfinite().all()):
            raise ValueError(f"layer '{name}' got NaN or infinity from 'data'")
        return Moments(second, mean, self.count, outputs)


@contextmanager
def _watching(layers: Mapping[str, nn.Module], seen: Mapping[str, _Accumulator], state: dict[str, Any]) -> Iterator[None]:
    """Hooks on the layers for as long as the block runs; they come off whatever happens in it."""

    def hook(name: str) -> Callable[..., None]:
        def call(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
            seen[name].see(first_tensor(args, kwargs), state["mask"])
            if state["loss"] and out.requires_grad:
                out.register_hook(lambda g: seen[name].see_gradient(g, state["mask"]))  # type: ignore[no-untyped-call]

        return call

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(hook(name), with_kwargs=True).remove)
        yield


def run_batch(model: nn.Module, batch: Batch) -> Any:
    """The model on a batch: a tensor, positional arguments, or named ones."""
    if isinstance(batch, Tensor):
        return model(batch)
    return model(**batch) if isinstance(batch, Mapping) else model(*batch)


def calibrate(
    model: nn.Module,
    data: Iterable[Batch],
    targets: Target | Sequence[Target] | None = None,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    mask: str = "attention_mask",
    layers_at_once: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Calibration:
    r"""Second moments and means of layers' inputs over data, batch by batch: memory does not grow with the data.

    Args:
        model: in whatever mode it is; switch to ``eval()`` first where it has dropout or batch norm.
        data: batches: a tensor, a sequence of positional arguments, or a mapping of named ones. With ``layers_at_once`` it is gone
            through several times, so it must be no iterator.
        targets: which layers, as in `corollary.adapt.adapt`; None: every linear layer.
        forward: ``forward(model, batch)`` where the model is not called with the batch alone.
        loss: ``loss(model, batch)`` gives a scalar; then second moments of its gradient at each layer's output are measured too. Of
            a mean over a batch: the scale does not matter, the size of the batches must be one.
        mask: where a batch is a mapping with this key, positions where it is 0 (padding) are not counted.
        layers_at_once: how many layers are watched in one pass over the data; less memory for more passes. None: all.
        dtype: of the sums; float32 takes half of the memory and loses directions below 1e-4 of the largest one.

    Returns:
        A `Calibration`. A layer of n inputs takes n² + n numbers; an embedding of n rows takes n.

    Raises:
        TypeError, ValueError: for targets that cannot be compressed; data that is empty, never reaches a layer, or is not finite.

    Hooks are taken off again even where the model fails; parameters, gradients and modes are left as they were.

    Example:
        >>> import torch
        >>> from corollary.compress import calibrate
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> seen = calibrate(model, (torch.randn(16, 4) for _ in range(10)))
        >>> list(seen), seen["2"].second.shape, seen["2"].count
        (['0', '2'], torch.Size([8, 8]), 160)
    """
    layers = compressible(model, targets)
    if layers_at_once is not None and layers_at_once < 1:
        raise ValueError(f"'layers_at_once' must be at least 1, not {layers_at_once}")
    width = layers_at_once or len(layers)
    if width < len(layers) and iter(data) is data:
        raise ValueError(
            "'data' is an iterator and can be gone through once only; give a list or a loader, or no 'layers_at_once'"
        )
    found: dict[str, Moments] = {}
    names = list(layers)
    for begin in range(0, len(names), width):
        chosen = {name: layers[name] for name in names[begin : begin + width]}
        found.update(_one_pass(model, data, chosen, forward or run_batch, loss, mask, dtype))
    return Calibration(found)


def _one_pass(
    model: nn.Module,
    data: Iterable[Batch],
    layers: Mapping[str, nn.Module],
    forward: Callable[[nn.Module, Any], Any],
    loss: Callable[[nn.Module, Any], Tensor] | None,
    mask: str,
    dtype: torch.dtype,
) -> dict[str, Moments]:
    seen = {name: _Accumulator(site_of(name, layer), dtype) for name, layer in layers.items()}
    state: dict[str, Any] = {"mask": None, "loss": loss is not None}
    batches = 0
    with _watching(layers, seen, state):
        for batch in data:
            given = batch.get(mask) if isinstance(batch, Mapping) else None
            state["mask"] = given.bool() if isinstance(given, Tensor) else None
            if loss is None:
                with torch.no_grad():
                    forward(model, batch)
            else:
                with torch.enable_grad():
                    value = loss(model, batch)
                    trained = [p for p in model.parameters() if p.requires_grad]
                    if not trained:
                        raise ValueError("'loss' needs gradients, and no parameter of the model has 'requires_grad'")
                    # Not backward(): the gradients that the user's parameters hold stay as they are.
                    torch.autograd.grad(value, trained, allow_unused=True)
            batches += 1
    if not batches:
        raise ValueError("'data' is empty")
    return {name: seen[name].moments(name) for name in layers}

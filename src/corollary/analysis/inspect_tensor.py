"""What is inside a checkpoint: of each tensor its size, its outliers and its spectrum, whatever the size of the file."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from corollary.analysis._streamed import (
    Blocks,
    as_matrix,
    effective_rank,
    estimated_spectrum,
    far_out,
    flat_parts,
    leading,
    moments,
    new_axes,
    tail_exponent,
    walk,
)
from corollary.data.loaders import LoadError
from corollary.data.tensor_stream import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXACT_UP_TO = 1024
"""shorter side of a matrix up to which its whole spectrum is computed"""
_POINTS = 48  # of a spectrum that is kept for drawing
OUTLIER = 6.0
"""standard deviations from the mean beyond which an entry is an outlier"""


@dataclass(frozen=True)
class TensorReport:
    r"""What `inspect_tensor` gives. A number that was not or cannot be computed is None.

    Attributes:
        name: of the tensor.
        dtype: as torch or safetensors spells it.
        shape: of the tensor; spectra are those of (first dimension, all others).
        nbytes: on disk or in memory.
        nan, inf: entries that are not finite. Everything below is over the finite ones.
        zeros: entries equal to 0.
        low, high, mean, std: of the entries.
        max_abs, l1, frobenius: norms.
        outliers: entries over 6 standard deviations from the mean.
        method: where the spectrum is from: 'exact', 'estimated' (all of it), 'top' (its top alone), or 'none'.
        spectral: the largest singular value σ₁; a near lower bound where it is not exact.
        nuclear: sum of the singular values.
        stable_rank: :math:`\|W\|_F^2 / σ_1^2`.
        effective_rank: exp of the entropy of the singular values over their sum.
        rank: singular values above max(m, n) ε σ₁, ε that of float32 (in float64: above what the Gram matrix resolves).
        condition: σ₁ over the smallest singular value; None where that is lost in rounding.
        tail_exponent: of a power law fitted to the largest eigenvalues of :math:`W^\top W`.
        ranks, spectrum: places, from 1, and singular values there, spread over the spectrum for drawing.
        note: why something is missing.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    nan: int = 0
    inf: int = 0
    zeros: int = 0
    low: float | None = None
    high: float | None = None
    mean: float | None = None
    std: float | None = None
    max_abs: float | None = None
    l1: float | None = None
    frobenius: float | None = None
    outliers: int = 0
    method: str = "none"
    spectral: float | None = None
    nuclear: float | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None
    rank: int | None = None
    condition: float | None = None
    tail_exponent: float | None = None
    ranks: tuple[float, ...] = ()
    spectrum: tuple[float, ...] = ()
    note: str = ""

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TensorReport:
        """The report that `to_dict` wrote."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the spectrum on logarithmic axes."""
        axes = new_axes(ax)
        if self.spectrum:
            axes.loglog(self.ranks, self.spectrum, marker=".")
        else:
            axes.text(0.5, 0.5, self.note or "no spectrum", ha="center", transform=axes.transAxes)
        axes.set_xlabel("place")
        axes.set_ylabel("singular value")
        axes.set_title(self.name)
        return axes


@dataclass(frozen=True)
class CheckpointReport:
    """What `inspect_checkpoint` gives: a report of each tensor, and totals.

    Attributes:
        path: what was inspected.
        tensors: in the order in which people count layers.
        parameters, nbytes: of all tensors.
        files: how many.
        dtypes: parameters of each dtype.
        nan, inf: entries that are not finite.
    """

    path: str
    tensors: tuple[TensorReport, ...]
    parameters: int
    nbytes: int
    files: int
    dtypes: Mapping[str, int]
    nan: int
    inf: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        data = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        return data | {"tensors": [tensor.to_dict() for tensor in self.tensors], "dtypes": dict(self.dtypes)}

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw each matrix's effective rank as a share of its shorter side."""
        axes = new_axes(ax)
        found = [
            (i, t.effective_rank / min(as_matrix_shape(t.shape)))
            for i, t in enumerate(self.tensors)
            if t.effective_rank is not None
        ]
        axes.plot([i for i, _ in found], [share for _, share in found], "o")
        axes.set_xlabel("tensor")
        axes.set_ylabel("effective rank / shorter side")
        axes.set_ylim(0, 1.02)
        return axes


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def as_matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """The shape of a tensor as a matrix: (first dimension, all others)."""
    return shape[0], math.prod(shape[1:])


def inspect_tensor(
    tensor: Tensor,
    name: str = "",
    *,
    top: int | None = None,
    full: bool = False,
    exact_up_to: int = EXACT_UP_TO,
    seed: int = 0,
) -> TensorReport:
    r"""Norms, outliers and the spectrum of one tensor, in memory of a few blocks beside it.

    The singular values of W, of shape (m, n), are the roots of the eigenvalues of the Gram matrix G of its shorter side s, which is
    summed over blocks in float64: :math:`G = \sum_b W_b^\top W_b`. That resolves singular values down to 1e-7 of the largest. Where s
    exceeds ``exact_up_to``, G is not formed: the leading 32 singular values come from randomized subspace iteration, and the rest of the
    spectrum, for nuclear norm and effective rank, from stochastic Lanczos quadrature on what is orthogonal to them. With ``top`` alone the leading singular values come from randomized subspace iteration.

    Args:
        tensor: any shape and dtype. Tensors of more than two dimensions are flattened to (first, rest). Those of fewer, and integers,
            get norms alone.
        name: kept in the report; the random numbers hang on it and on ``seed``.
        top: compute this many leading singular values and nothing else of the spectrum.
        full: compute the whole spectrum whatever the size; O(m n s + s³) time and 16 s² bytes.
        exact_up_to: shorter side up to which the whole spectrum is computed without ``full``.
        seed: of the estimates.

    Returns:
        A `TensorReport`.

    Raises:
        TypeError: ``tensor`` is none.
        ValueError: ``top`` is below 1, or given together with ``full``.

    When not to use it: for singular vectors (`torch.linalg.svd`), or a few singular values to many digits of a matrix that fits into
    memory.

    Example:
        >>> import torch
        >>> from corollary.analysis import inspect_tensor
        >>> report = inspect_tensor(torch.diag(torch.tensor([3.0, 1.0, 1.0, 1.0])), "weight")
        >>> report.spectral, report.stable_rank, report.rank
        (3.0, 1.3333333333333333, 4)

    Sources: Rudelson, Vershynin, "Sampling from large matrices" (stable rank); Roy, Vetterli, "The effective rank" (EUSIPCO 2007);
    Ubaru, Chen, Saad, 2017 (quadrature); `tail_exponent` after Clauset et al., arXiv 0706.1062.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"'tensor' must be a tensor, not {type(tensor).__name__}")
    if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
        raise ValueError(f"'top' must be a whole number from 1 up, not {top!r}")
    if top is not None and full:
        raise ValueError("'top' and 'full' exclude each other: take one")
    with torch.no_grad():
        return _inspect(tensor.detach(), name, top, full, exact_up_to, seed)


def _inspect(tensor: Tensor, name: str, top: int | None, full: bool, exact_up_to: int, seed: int) -> TensorReport:
    kept: dict[str, Any] = {
        "name": name,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": tuple(tensor.shape),
        "nbytes": tensor.numel() * tensor.element_size(),
    }
    if not tensor.numel():
        return TensorReport(**kept, note="no entries")
    if tensor.is_complex():
        return TensorReport(**kept, note="complex: not looked at")
    wide = torch.float64 if tensor.dtype in (torch.float64, torch.int64, torch.int32) else torch.float32
    if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64):
        wide = torch.float64
    sums = moments(flat_parts(tensor, wide))
    kept |= {"nan": sums.nan, "inf": sums.inf, "zeros": sums.zeros}
    if not sums.count:
        return TensorReport(**kept, note="no entry is finite")
    reach = OUTLIER * sums.std
    if max(sums.high - sums.mean, sums.mean - sums.low) > reach > 0:
        kept["outliers"] = far_out(flat_parts(tensor, wide), sums.mean, reach)
    kept |= {
        "low": sums.low,
        "high": sums.high,
        "mean": sums.mean,
        "std": sums.std,
        "max_abs": max(-sums.low, sums.high),
        "l1": _finite(sums.absolute),
        "frobenius": _finite(math.sqrt(sums.squares)),
    }
    if tensor.dim() < 2 or not tensor.is_floating_point():
        return TensorReport(**kept)
    if sums.nan or sums.inf:
        return TensorReport(**kept, note="entries that are not finite: no spectrum")
    if not math.isfinite(sums.squares) or kept["max_abs"] > 1e30:
        return TensorReport(**kept, note="entries too large for a spectrum")
    if not sums.squares:
        return TensorReport(**kept, rank=0, note="zero throughout")
    if not 1e-10 < kept["max_abs"] < 1e10:
        wide = torch.float64  # products of products must stay within the dtype
    blocks = Blocks(as_matrix(tensor), dtype=wide)
    generator = torch.Generator().manual_seed((zlib.crc32(name.encode("utf-8", "replace")) << 20) ^ seed)
    if top is not None and top < blocks.short:
        values, _ = leading(blocks, top, generator)
        sigma = float(values[0])
        ranks = _places(len(values))
        return TensorReport(
            **kept,
            method="top",
            spectral=sigma,
            stable_rank=sums.squares / sigma**2,
            ranks=tuple(float(i) for i in ranks),
            spectrum=tuple(values[[i - 1 for i in ranks]].tolist()),
        )
    if full or blocks.short <= exact_up_to:
        return TensorReport(**kept, **_exact(blocks, tensor.dtype))
    return TensorReport(**kept, **_estimated(blocks, sums.squares, generator))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _places(n: int) -> list[int]:
    """At most so many places from 1 to n as are drawn, closer at the top."""
    return sorted({round(n ** (i / (_POINTS - 1))) for i in range(_POINTS)})


def _exact(blocks: Blocks, dtype: torch.dtype) -> dict[str, Any]:
    gram = blocks.gram()
    eigenvalues = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    values = eigenvalues.sqrt()
    sigma, least = float(values[0]), float(values[-1])
    # What the Gram matrix cannot tell from zero, and what the entries' own rounding hides.
    lost = math.sqrt(blocks.short * torch.finfo(torch.float64).eps)
    floor = sigma * max(lost, blocks.long * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps)
    places = [i for i in _places(len(values)) if float(values[i - 1]) > sigma * lost]
    return {
        "method": "exact",
        "spectral": sigma,
        "nuclear": float(values.sum()),
        "stable_rank": float(gram.trace()) / sigma**2,
        "effective_rank": effective_rank(values),
        "rank": int((values > floor).sum()),
        "condition": sigma / least if least > floor else None,
        "tail_exponent": tail_exponent(eigenvalues),
        "ranks": tuple(float(i) for i in places),
        "spectrum": tuple(values[[i - 1 for i in places]].tolist()),
    }


def _estimated(blocks: Blocks, squares: float, generator: torch.Generator) -> dict[str, Any]:
    found = estimated_spectrum(blocks, generator)
    sigma = found.values[0]
    return {
        "method": "estimated",
        "spectral": sigma,
        "nuclear": found.nuclear,
        "stable_rank": squares / sigma**2,
        "effective_rank": found.effective_rank,
        "ranks": found.places,
        "spectrum": found.values,
        "note": "spectrum estimated",
    }


def iter_inspect(
    checkpoint: Checkpoint,
    names: Sequence[str] | None = None,
    *,
    top: int | None = None,
    full: bool = False,
    exact_up_to: int = EXACT_UP_TO,
    seed: int = 0,
    workers: int = 1,
) -> Iterator[TensorReport]:
    """Reports of a checkpoint's tensors as they are done, in any order; arguments as `inspect_checkpoint`."""

    def work(name: str) -> TensorReport:
        entry = checkpoint[name]
        try:
            tensor = checkpoint.tensor(name)
        except LoadError as error:
            if "torch has no dtype" not in str(error):
                raise
            return TensorReport(name, entry.dtype, entry.shape, entry.nbytes, note=f"torch has no dtype for {entry.dtype}")
        return inspect_tensor(tensor, name, top=top, full=full, exact_up_to=exact_up_to, seed=seed)

    chosen = list(checkpoint) if names is None else list(names)
    for _, report in walk([(name, checkpoint[name].nbytes) for name in chosen], work, workers):
        yield report


def inspect_checkpoint(
    checkpoint: str | Path | Checkpoint,
    *,
    top: int | None = None,
    full: bool = False,
    exact_up_to: int = EXACT_UP_TO,
    seed: int = 0,
    workers: int = 1,
    progress: Callable[[TensorReport], None] | None = None,
) -> CheckpointReport:
    """Inspect every tensor of a checkpoint on disk; memory is that of the largest tensor, whatever the checkpoint's size.

    Args:
        checkpoint: a path as `corollary.data.open_checkpoint` takes it, or what that gives.
        top, full, exact_up_to, seed: as for `inspect_tensor`.
        workers: threads; with more than one, tensors of up to 512 MiB together are in work at a time.
        progress: called with each report when it is done.

    Returns:
        A `CheckpointReport`.

    Raises:
        LoadError: the checkpoint cannot be read; see `open_checkpoint`.
        ValueError: as `inspect_tensor`.

    When not to use it: on a model in memory; call `inspect_tensor` on its ``state_dict()``.

    Example:
        >>> import tempfile, torch, safetensors.torch
        >>> from corollary.analysis import inspect_checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     safetensors.torch.save_file({"w": torch.eye(8), "b": torch.ones(8)}, f"{folder}/model.safetensors")
        ...     report = inspect_checkpoint(folder)
        >>> report.parameters, [(t.name, t.stable_rank) for t in report.tensors]
        (72, [('b', None), ('w', 8.0)])
    """
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    reports = []
    for report in iter_inspect(opened, top=top, full=full, exact_up_to=exact_up_to, seed=seed, workers=workers):
        reports.append(report)
        if progress is not None:
            progress(report)
    return checkpoint_report(opened, reports)


def checkpoint_report(checkpoint: Checkpoint, reports: Sequence[TensorReport]) -> CheckpointReport:
    """Reports of a checkpoint's tensors, brought into its order and summed."""
    by_name = {report.name: report for report in reports}
    ordered = tuple(by_name[name] for name in checkpoint if name in by_name)
    dtypes: dict[str, int] = {}
    for report in ordered:
        dtypes[report.dtype] = dtypes.get(report.dtype, 0) + report.numel
    return CheckpointReport(
        path=str(checkpoint.path),
        tensors=ordered,
        parameters=sum(report.numel for report in ordered),
        nbytes=sum(report.nbytes for report in ordered),
        files=len({checkpoint[report.name].path for report in ordered}),
        dtypes=dtypes,
        nan=sum(report.nan for report in ordered),
        inf=sum(report.inf for report in ordered),
    )

"""What fine-tuning did to a checkpoint: of each tensor the size and rank of the change, and what became of its singular vectors."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from corollary.analysis._streamed import Blocks, as_matrix, effective_rank, estimated_spectrum, leading, new_axes, walk
from corollary.analysis.inspect_tensor import EXACT_UP_TO, _places, _plain
from corollary.analysis.lora_vs_full import leading_similarity, similarity
from corollary.data.loaders import LoadError
from corollary.data.tensor_stream import Checkpoint, natural, open_checkpoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_REFERENCE = 256
_BLOCK = 1 << 20


@dataclass(frozen=True)
class TensorDiff:
    r"""What `diff_tensors` gives, of Δ = tuned - base. A number that was not or cannot be computed is None.

    Attributes:
        name, shape, dtype: of the tensor; dtype of the tuned one.
        status: 'same' (equal entry by entry), 'changed', 'only in base', 'only in tuned', 'shape differs' or 'not compared'.
        changed: share of the entries that differ.
        norm: :math:`\|Δ\|_F`.
        base_norm: :math:`\|W_0\|_F`.
        relative: the norm over that of the base; None where that is 0.
        max_abs: the largest change of an entry.
        method: where spectra are from: 'exact', 'estimated' (see `diff_tensors`) or 'none'.
        spectral: σ₁(Δ).
        rank: singular values of Δ above what rounding of the weights alone would bring; None where it is over the 136 that were
            looked at.
        stable_rank, effective_rank: of Δ, as in `TensorReport`.
        intruders: intruder dimensions among the k leading singular vectors of the tuned weight; an upper bound if estimated.
        similarity: largest absolute cosine of each of these vectors with a left singular vector of the base.
        overlap: mean squared length of these vectors' projections onto the k leading ones of the base.
        ranks, spectrum: places, from 1, and singular values of Δ there, for drawing.
        note: why something is missing.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    status: str
    changed: float | None = None
    norm: float | None = None
    base_norm: float | None = None
    relative: float | None = None
    max_abs: float | None = None
    method: str = "none"
    spectral: float | None = None
    rank: int | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None
    intruders: int | None = None
    similarity: tuple[float, ...] = ()
    overlap: float | None = None
    ranks: tuple[float, ...] = ()
    spectrum: tuple[float, ...] = ()
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TensorDiff:
        """The result that `to_dict` wrote."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the similarity of each leading singular vector of the tuned weight."""
        axes = new_axes(ax)
        if self.similarity:
            axes.bar(range(1, len(self.similarity) + 1), self.similarity)
            axes.set_ylim(0, 1.02)
        else:
            axes.text(0.5, 0.5, self.note or self.status, ha="center", transform=axes.transAxes)
        axes.set_xlabel("place of the tuned singular vector")
        axes.set_ylabel("largest cosine with a base singular vector")
        axes.set_title(self.name)
        return axes


@dataclass(frozen=True)
class CheckpointDiff:
    """What `diff_checkpoints` gives.

    Attributes:
        base, tuned: what was compared.
        tensors: in the order in which people count layers.
        k, epsilon: of the intruder dimensions.
        changed: tensors that changed.
        intruders, matrices: intruder dimensions over all the matrices in which they were counted.
        norm, relative: of the whole change, all tensors taken as one vector.
    """

    base: str
    tuned: str
    tensors: tuple[TensorDiff, ...]
    k: int
    epsilon: float
    changed: int
    intruders: int
    matrices: int
    norm: float
    relative: float | None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        data = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        return data | {"tensors": [tensor.to_dict() for tensor in self.tensors]}

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the relative size of each tensor's change."""
        axes = new_axes(ax)
        found = [(i, t.relative) for i, t in enumerate(self.tensors) if t.relative]
        axes.semilogy([i for i, _ in found], [size for _, size in found], "o")
        axes.set_xlabel("tensor")
        axes.set_ylabel("change / base, Frobenius norms")
        return axes


def diff_tensors(
    base: Tensor,
    tuned: Tensor,
    name: str = "",
    *,
    k: int = 10,
    epsilon: float = 0.5,
    full: bool = False,
    exact_up_to: int = EXACT_UP_TO,
    seed: int = 0,
) -> TensorDiff:
    r"""Size, rank and spectrum of a tensor's change, and its intruder dimensions, in memory of a few blocks beside the two.

    Singular values of Δ and cosines of singular vectors come from Gram matrices of the shorter side in float64, summed over blocks.
    A singular value of Δ counts towards its rank above :math:`0.9\, u\, (\max_i \|w_{i:}\| + \max_j \|w_{:j}\|)`, about twice the norm
    of the noise that rounding the weights to their dtype (unit roundoff u) brings into a difference of two of them; so the
    change of a merged low-rank adapter has its own rank, not that of its rounding.

    Above ``exact_up_to`` the effective rank is estimated by stochastic Lanczos quadrature, and leading singular vectors come
    from randomized subspace iteration: the tuned ones are compared with the 256 leading ones of the base.

    Args:
        base, tuned: of one shape. Tensors of more than two dimensions are flattened to (first, rest); those of fewer, and
            integers, get the size of the change alone.
        name: kept in the result; the random numbers hang on it and on ``seed``.
        k, epsilon: as for `intruder_dimensions`.
        full: exact whatever the size.
        exact_up_to: shorter side up to which everything is exact without ``full``.
        seed: of the estimates.

    Returns:
        A `TensorDiff`.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes differ, or ``k`` or ``epsilon`` is out of range.

    When not to use it: for one number, the distance of two tensors, of which ``torch.dist`` is the quick way.

    Example:
        >>> import torch
        >>> from corollary.analysis import diff_tensors
        >>> generator = torch.Generator().manual_seed(0)
        >>> base, b, a = (torch.randn(s, generator=generator) for s in ((64, 64), (64, 2), (2, 64)))
        >>> found = diff_tensors(base, base + b @ a, "weight")
        >>> found.status, found.rank, found.intruders
        ('changed', 2, 2)

    Source: Shuttleworth et al., arXiv 2410.21228, for intruder dimensions.
    """
    for argument, value in (("base", base), ("tuned", tuned)):
        if not isinstance(value, Tensor):
            raise TypeError(f"'{argument}' must be a tensor, not {type(value).__name__}")
    check_intruder(k, epsilon)
    if base.shape != tuned.shape:
        raise ValueError(f"'base' and 'tuned' must have one shape, not {tuple(base.shape)} and {tuple(tuned.shape)}")
    with torch.no_grad():
        return _diff(base.detach(), tuned.detach(), name, k, epsilon, full, exact_up_to, seed)


def check_intruder(k: int, epsilon: float) -> None:
    """Raise `ValueError` unless ``k`` and ``epsilon`` can be used to count intruder dimensions."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"'k' must be a whole number from 1 up, not {k!r}")
    if not 0 < epsilon <= 1:
        raise ValueError(f"'epsilon' must be in (0, 1], not {epsilon!r}")


def _diff(
    base: Tensor, tuned: Tensor, name: str, k: int, epsilon: float, full: bool, exact_up_to: int, seed: int
) -> TensorDiff:
    kept: dict[str, Any] = {"name": name, "shape": tuple(base.shape), "dtype": str(tuned.dtype).removeprefix("torch.")}
    if base.is_complex() or tuned.is_complex():
        return TensorDiff(**kept, status="not compared", note="complex: not looked at")
    squares = whole = most = 0.0
    differing = 0
    before, after = base.reshape(-1), tuned.reshape(-1)
    for begin in range(0, before.numel(), _BLOCK):
        old = before[begin : begin + _BLOCK].double()
        step = after[begin : begin + _BLOCK].double() - old
        whole += float(torch.dot(old, old))
        if not bool(step.count_nonzero()):
            continue
        differing += int(step.count_nonzero())
        squares += float(torch.dot(step, step))
        most = max(most, float(step.abs().max()))
    if not (math.isfinite(squares) and math.isfinite(whole)):
        return TensorDiff(**kept, status="not compared", note="entries that are not finite, or too large")
    kept["base_norm"] = math.sqrt(whole)
    if not differing:
        return TensorDiff(**kept, status="same", changed=0.0, norm=0.0, relative=0.0, max_abs=0.0)
    norm = math.sqrt(squares)
    kept |= {
        "status": "changed",
        "changed": differing / before.numel(),
        "norm": norm,
        "relative": norm / math.sqrt(whole) if whole else None,
        "max_abs": most,
    }
    if base.dim() < 2 or not (base.is_floating_point() and tuned.is_floating_point()):
        return TensorDiff(**kept)
    old_matrix, new_matrix = as_matrix(base), as_matrix(tuned)
    exact = full or min(old_matrix.shape) <= exact_up_to
    old_blocks, new_blocks = Blocks(old_matrix), Blocks(new_matrix)
    step_blocks = Blocks(new_matrix, old_matrix)
    unit = max(torch.finfo(base.dtype).eps, torch.finfo(tuned.dtype).eps) / 2
    floor = 0.9 * unit * max(_longest(old_blocks), _longest(new_blocks))
    if exact:
        values = torch.linalg.eigvalsh(step_blocks.gram()).flip(0).clamp_min(0).sqrt()
        found = similarity(old_blocks, new_blocks, k)
        shape: dict[str, Any] = {"method": "exact", "effective_rank": effective_rank(values)}
        rank: int | None = int((values > max(floor, float(values[0]) * 1e-7)).sum())
    else:
        generator = torch.Generator().manual_seed((zlib.crc32(name.encode("utf-8", "replace")) << 20) ^ seed)
        values, _ = leading(step_blocks, 136, generator)
        rank = int((values > max(floor, float(values[0]) * 1e-5)).sum())
        rank = rank if rank < len(values) else None
        found = leading_similarity(old_blocks, new_blocks, k, _REFERENCE, generator)
        spread = effective_rank(values[:rank]) if rank else estimated_spectrum(step_blocks, generator).effective_rank
        shape = {"method": "estimated", "effective_rank": spread}
        if rank is None:
            kept["note"] = f"rank over {len(values)}"
    places = [i for i in _places(len(values)) if float(values[i - 1]) > float(values[0]) * 1e-9]
    return TensorDiff(
        **kept,
        **shape,
        spectral=float(values[0]),
        rank=rank,
        stable_rank=squares / float(values[0]) ** 2,
        intruders=sum(value < epsilon for value in found.similarity),
        similarity=found.similarity,
        overlap=found.overlap,
        ranks=tuple(float(i) for i in places),
        spectrum=tuple(values[[i - 1 for i in places]].tolist()),
    )


def _longest(blocks: Blocks) -> float:
    """The norms of a matrix's longest row and of its longest column, added."""
    columns = torch.zeros(blocks.short, dtype=torch.float64, device=blocks.device)
    row = 0.0
    for block in blocks:
        squares = block.square()
        columns += squares.sum(0)
        row = max(row, float(squares.sum(1).max()))
    return math.sqrt(row) + math.sqrt(float(columns.max()))


def iter_diff(
    base: Checkpoint,
    tuned: Checkpoint,
    names: Sequence[str] | None = None,
    *,
    k: int = 10,
    epsilon: float = 0.5,
    full: bool = False,
    exact_up_to: int = EXACT_UP_TO,
    seed: int = 0,
    workers: int = 1,
) -> Iterator[TensorDiff]:
    """Differences of two checkpoints' tensors as they are done, in any order; arguments as `diff_checkpoints`."""

    def work(name: str) -> TensorDiff:
        entry = tuned[name] if name in tuned else base[name]
        facts = (name, entry.shape, entry.dtype)
        if name not in base or name not in tuned:
            return TensorDiff(*facts, status="only in tuned" if name in tuned else "only in base")
        if base[name].shape != tuned[name].shape:
            return TensorDiff(*facts, status="shape differs", note=f"base has {list(base[name].shape)}")
        try:
            tensors = base.tensor(name), tuned.tensor(name)
        except LoadError as error:
            if "torch has no dtype" not in str(error):
                raise
            return TensorDiff(*facts, status="not compared", note=f"torch has no dtype for {entry.dtype}")
        return diff_tensors(*tensors, name, k=k, epsilon=epsilon, full=full, exact_up_to=exact_up_to, seed=seed)

    chosen = diff_names(base, tuned) if names is None else list(names)
    sizes = [(name, sum(c[name].nbytes for c in (base, tuned) if name in c)) for name in chosen]
    for _, found in walk(sizes, work, workers):
        yield found


def diff_names(base: Checkpoint, tuned: Checkpoint) -> list[str]:
    """Every name of two checkpoints; raises `ValueError` where they share none."""
    if not set(base) & set(tuned):
        first = [next(iter(c), "nothing") for c in (base, tuned)]
        raise ValueError(f"the two share no tensor: base has {first[0]!a} and tuned {first[1]!a}, for instance")
    return sorted({*base, *tuned}, key=natural)


def diff_checkpoints(
    base: str | Path | Checkpoint,
    tuned: str | Path | Checkpoint,
    *,
    k: int = 10,
    epsilon: float = 0.5,
    full: bool = False,
    exact_up_to: int = EXACT_UP_TO,
    seed: int = 0,
    workers: int = 1,
    progress: Callable[[TensorDiff], None] | None = None,
) -> CheckpointDiff:
    """Compare two checkpoints on disk tensor by tensor; memory is that of the two largest tensors, whatever their size.

    Args:
        base, tuned: paths as `corollary.data.open_checkpoint` takes them, or what that gives. Tensors are matched by name.
        k, epsilon, full, exact_up_to, seed: as for `diff_tensors`.
        workers: threads.
        progress: called with each result when it is done.

    Returns:
        A `CheckpointDiff`.

    Raises:
        LoadError: a checkpoint cannot be read; see `open_checkpoint`.
        ValueError: the two share no tensor, or as `diff_tensors`.

    When not to use it: on models in memory; `intruder_dimensions` takes them, and `diff_tensors` two tensors.

    Example:
        >>> import tempfile, torch, safetensors.torch
        >>> from corollary.analysis import diff_checkpoints
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name, b in (("base", 0.0), ("tuned", 1.0)):
        ...         safetensors.torch.save_file({"w": torch.eye(8), "b": torch.full((4,), b)}, f"{folder}/{name}.safetensors")
        ...     found = diff_checkpoints(f"{folder}/base.safetensors", f"{folder}/tuned.safetensors")
        >>> found.norm, [(t.name, t.status) for t in found.tensors]
        (2.0, [('b', 'changed'), ('w', 'same')])
    """
    check_intruder(k, epsilon)
    opened = [c if isinstance(c, Checkpoint) else open_checkpoint(c) for c in (base, tuned)]
    found = []
    options = {"k": k, "epsilon": epsilon, "full": full, "exact_up_to": exact_up_to, "seed": seed, "workers": workers}
    for each in iter_diff(*opened, **options):  # type: ignore[arg-type]
        found.append(each)
        if progress is not None:
            progress(each)
    return checkpoint_diff(opened[0], opened[1], found, k, epsilon)


def checkpoint_diff(base: Checkpoint, tuned: Checkpoint, found: Sequence[TensorDiff], k: int, epsilon: float) -> CheckpointDiff:
    """Differences of two checkpoints' tensors, brought into order and summed."""
    ordered = tuple(sorted(found, key=lambda t: natural(t.name)))
    squares = sum(t.norm**2 for t in ordered if t.norm is not None)
    whole = sum(t.base_norm**2 for t in ordered if t.base_norm is not None)
    counted = [t for t in ordered if t.intruders is not None]
    return CheckpointDiff(
        base=str(base.path),
        tuned=str(tuned.path),
        tensors=ordered,
        k=k,
        epsilon=epsilon,
        changed=sum(t.status == "changed" for t in ordered),
        intruders=sum(t.intruders or 0 for t in counted),
        matrices=len(counted),
        norm=math.sqrt(squares),
        relative=math.sqrt(squares / whole) if whole else None,
    )

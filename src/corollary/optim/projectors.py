"""Where a low-rank optimizer keeps state: how each projector chooses its subspace, and what it stores of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corollary.linalg.dct import dct, dct_columns
from corollary.linalg.lowrank import leading_right_vectors, randomized_right_vectors
from corollary.linalg.quantize import Quantized, dequantize, quantize
from corollary.optim.subspaces import Basis, Nothing, Selection, Subspace, Whole

State = dict[str, Any]


@dataclass(frozen=True)
class Site:
    """Which parameter a subspace is chosen for, and when.

    Args:
        shape: (m, n) of the gradient matrix.
        dtype: of the gradient.
        rank: dimension of the subspace; for `Blocks` the number of active parameters.
        index: number of the parameter among those that its group projects.
        place: the same, counted over all groups.
        members: parameters that the group projects.
        refreshes: how often the subspace was chosen before.
        seed: of the optimizer.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    rank: int
    index: int
    place: int
    members: int
    refreshes: int
    seed: int

    @property
    def dim(self) -> int:
        """The shorter dimension, where the moments of rank r are the smaller; columns where both are equal."""
        return 1 if self.shape[0] >= self.shape[1] else 0

    def generator(self, *, shared: bool = False) -> torch.Generator:
        """Randomness that depends on seed, parameter and refresh alone, so that a resumed run draws as the whole one did."""
        key = (self.seed, self.refreshes) if shared else (self.seed, self.refreshes, self.place)
        return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


class Projector(ABC):
    """Chooses the subspace of each gradient matrix, and keeps what it needs of it in the parameter's state.

    A projector holds options and no state: state is plain tensors and numbers beside the moments.
    """

    keys: tuple[str, ...]
    """names of what it keeps in the state"""

    @abstractmethod
    def refresh(self, gradient: Tensor, state: State, site: Site) -> None:
        """Choose a subspace for ``gradient`` (m, n) and write it to ``state``."""

    @abstractmethod
    def subspace(self, state: State, site: Site) -> Subspace:
        """The subspace that ``state`` holds."""

    def low_shape(self, state: State, site: Site) -> tuple[int, int]:
        """Shape of the coordinates, and so of the moments."""
        m, n = site.shape
        return (m, site.rank) if site.dim else (site.rank, n)

    def dimension(self, rank: float, shape: tuple[int, int], members: int) -> int:
        """The rank in force: a float is a share of the shorter side.

        Raises:
            ValueError: it is not in 1..min(shape).
        """
        side = min(shape)
        size = max(1, round(rank * side)) if isinstance(rank, float) else rank
        if not 1 <= size <= side:
            raise ValueError(f"'rank' must be in 1..{side} for a matrix of shape {shape}, not {rank}")
        return size


@dataclass(frozen=True)
class _BasisProjector(Projector):
    """Keeps an orthonormal basis of shape (length, rank), in the gradient's dtype or in 4 or 8 bits.

    Args:
        bits: None keeps the basis as it is; 4 or 8 quantizes it (see `corollary.linalg.quantize`).
        group_size: entries that share a quantization step.
    """

    bits: int | None = None
    group_size: int = 256

    def __post_init__(self) -> None:
        if self.bits not in (None, 4, 8):
            raise ValueError(f"'bits' must be None, 4 or 8, not {self.bits}")
        if self.group_size < 1:
            raise ValueError(f"'group_size' must be at least 1, not {self.group_size}")

    @property
    def keys(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("basis",) if self.bits is None else ("basis_codes", "basis_scale", "basis_zero")

    @abstractmethod
    def choose(self, matrix: Tensor, state: State, site: Site) -> Tensor:
        """The basis for rows of ``matrix``, which is turned so that the basis acts on its columns: (length, rank)."""

    def refresh(self, gradient: Tensor, state: State, site: Site) -> None:
        basis = self.choose(gradient if site.dim else gradient.T, state, site)
        if self.bits is None:
            state["basis"] = basis
        else:
            stored = quantize(basis, self.bits, group_size=self.group_size)
            state["basis_codes"], state["basis_scale"], state["basis_zero"] = stored

    def basis(self, state: State, site: Site) -> Tensor:
        """The stored basis, (length, rank)."""
        if self.bits is None:
            kept: Tensor = state["basis"]
            return kept
        stored = Quantized(state["basis_codes"], state["basis_scale"], state["basis_zero"])
        return dequantize(stored, (site.shape[site.dim], site.rank), self.bits, group_size=self.group_size)

    def subspace(self, state: State, site: Site) -> Basis:
        return Basis(self.basis(state, site), site.dim, orthonormal=self.bits is None)


@dataclass(frozen=True)
class SVD(_BasisProjector):
    """Leading singular vectors of the gradient on its shorter side, as in GaLore; exact, and the slowest to refresh.

    Example:
        >>> from corollary.optim import ProjectedAdamW
        >>> weight = torch.nn.Parameter(torch.randn(8, 6))
        >>> optimizer = ProjectedAdamW([weight], lr=0.1, rank=2, projector=SVD())
    """

    def choose(self, matrix: Tensor, state: State, site: Site) -> Tensor:
        return leading_right_vectors(matrix, site.rank)


@dataclass(frozen=True)
class RandomizedSVD(_BasisProjector):
    """Leading singular vectors by randomized subspace iteration that starts from the previous subspace.

    Args:
        oversampling: extra columns carried along.
        n_iter: iterations; the subspace's error falls by (σ_{rank+oversampling+1}/σ_i)² with each.
    """

    oversampling: int = 8
    n_iter: int = 2

    def choose(self, matrix: Tensor, state: State, site: Site) -> Tensor:
        start = self.basis(state, site) if self.keys[0] in state else None
        return randomized_right_vectors(
            matrix,
            site.rank,
            start=start,
            oversampling=self.oversampling,
            n_iter=self.n_iter,
            generator=site.generator(),
        )


@dataclass(frozen=True)
class RandomBasis(_BasisProjector):
    """A random orthonormal basis, drawn anew at each refresh; it does not look at the gradient."""

    def choose(self, matrix: Tensor, state: State, site: Site) -> Tensor:
        dtype = torch.float32 if matrix.dtype in (torch.float16, torch.bfloat16) else matrix.dtype
        drawn = torch.randn(matrix.shape[1], site.rank, generator=site.generator(), dtype=dtype)
        basis: Tensor = torch.linalg.qr(drawn.to(matrix.device)).Q
        return basis.to(matrix.dtype)


@dataclass(frozen=True)
class DCT(Projector):
    r"""The columns of the cosine basis that the gradient has most of; only their indices are kept.

    With D the orthonormal DCT-II basis of the shorter side, the columns j of G D with the largest norm are chosen.

    Args:
        norm: which norm of a column decides: 1 or 2. With 2 no choice of as many columns captures more energy.
    """

    norm: int = 2
    keys = ("indices",)

    def __post_init__(self) -> None:
        if self.norm not in (1, 2):
            raise ValueError(f"'norm' must be 1 or 2, not {self.norm}")

    def refresh(self, gradient: Tensor, state: State, site: Site) -> None:
        waves = dct(gradient, dim=site.dim)
        strength = torch.linalg.vector_norm(waves, ord=self.norm, dim=1 - site.dim)
        # Ascending order makes the state independent of how topk orders ties between equal sets.
        state["indices"] = strength.topk(site.rank).indices.sort().values.to(torch.int32)

    def subspace(self, state: State, site: Site) -> Subspace:
        return _Waves(state["indices"], site.shape[site.dim], site.dim, site.dtype)


class _Waves(Basis):
    """Cosine waves by index, formed when they are used."""

    def __init__(self, indices: Tensor, length: int, dim: int, dtype: torch.dtype) -> None:
        super().__init__(dct_columns(length, indices, dtype=dtype), dim)
        self.indices = indices

    def similarity(self, earlier: Subspace) -> float:
        """The share of the indices that both have."""
        if not isinstance(earlier, _Waves):
            raise TypeError(f"'earlier' must come from the same projector, not {type(earlier).__name__}")
        return float(torch.isin(self.indices, earlier.indices).float().mean())


@dataclass(frozen=True)
class Columns(Projector):
    """Randomly chosen columns (or rows) of the gradient, drawn anew at each refresh.

    Args:
        dim: 1 for columns, 0 for rows, None for the shorter side.
    """

    dim: int | None = 1
    keys = ("indices",)

    def __post_init__(self) -> None:
        if self.dim not in (None, 0, 1):
            raise ValueError(f"'dim' must be None, 0 or 1, not {self.dim}")

    def _dim(self, site: Site) -> int:
        return site.dim if self.dim is None else self.dim

    def refresh(self, gradient: Tensor, state: State, site: Site) -> None:
        order = torch.randperm(site.shape[self._dim(site)], generator=site.generator())
        state["indices"] = order[: site.rank].sort().values.to(torch.int32).to(gradient.device)

    def subspace(self, state: State, site: Site) -> Selection:
        return Selection(state["indices"], self._dim(site))

    def low_shape(self, state: State, site: Site) -> tuple[int, int]:
        m, n = site.shape
        return (m, site.rank) if self._dim(site) else (site.rank, n)

    def dimension(self, rank: float, shape: tuple[int, int], members: int) -> int:
        """A float is a share of the side that is chosen from."""
        side = min(shape) if self.dim is None else shape[self.dim]
        size = max(1, int(rank * side)) if isinstance(rank, float) else rank
        if not 1 <= size <= side:
            raise ValueError(f"'rank' must be in 1..{side} for a matrix of shape {shape}, not {rank}")
        return size


@dataclass(frozen=True)
class Blocks(Projector):
    """Whole parameters: some are active, with full moments; the others have none until their turn.

    The group's ``rank`` is the number of active parameters (int) or their share (float).

    Args:
        order: 'random' draws anew at each refresh; 'ascending' and 'descending' take turns.
    """

    order: str = "random"
    keys = ("active",)

    def __post_init__(self) -> None:
        if self.order not in ("random", "ascending", "descending"):
            raise ValueError(f"'order' must be 'random', 'ascending' or 'descending', not {self.order!r}")

    def refresh(self, gradient: Tensor, state: State, site: Site) -> None:
        if self.order == "random":
            place = int((torch.randperm(site.members, generator=site.generator(shared=True)) == site.index).nonzero())
        else:
            index = site.index if self.order == "ascending" else site.members - 1 - site.index
            place = (index - site.refreshes * site.rank) % site.members
        state["active"] = place < site.rank

    def subspace(self, state: State, site: Site) -> Subspace:
        return Whole() if state["active"] else Nothing()

    def low_shape(self, state: State, site: Site) -> tuple[int, int]:
        return site.shape if state["active"] else (site.shape[0], 0)

    def dimension(self, rank: float, shape: tuple[int, int], members: int) -> int:
        size = max(1, round(rank * members)) if isinstance(rank, float) else rank
        if not 1 <= size <= members:
            raise ValueError(f"'rank' counts active parameters and must be in 1..{members}, not {rank}")
        return size


NAMED: dict[str, Projector] = {
    "svd": SVD(),
    "randomized": RandomizedSVD(),
    "dct": DCT(),
    "random": RandomBasis(),
    "columns": Columns(),
    "blocks": Blocks(),
}
"""what a projector's name stands for"""

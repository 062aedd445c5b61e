"""Intruder dimensions: leading singular vectors of a tuned weight that resemble none of the weight that it was tuned from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from corollary.analysis._streamed import Blocks, as_matrix, cross_gram, leading, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Weights = Tensor | nn.Module | Mapping[str, Tensor]


@dataclass(frozen=True)
class Intruders:
    """One matrix of an `IntruderReport`.

    Attributes:
        name: of the weight.
        shape: as a matrix.
        count: intruder dimensions among the k leading singular vectors.
        similarity: for each of those vectors, in falling order of singular values, the largest absolute cosine with a left
            singular vector of the base.
        singular_values: the tuned weight's, as many.
        match: place, from 0, of the base's singular vector that each resembles most.
    """

    name: str
    shape: tuple[int, int]
    count: int
    similarity: tuple[float, ...]
    singular_values: tuple[float, ...]
    match: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "count": self.count,
            "similarity": list(self.similarity),
            "singular_values": list(self.singular_values),
            "match": list(self.match),
        }


@dataclass(frozen=True)
class IntruderReport:
    """What `intruder_dimensions` gives.

    Attributes:
        matrices: each weight that was compared.
        total: intruder dimensions of all of them.
        k, epsilon: what was asked.
    """

    matrices: tuple[Intruders, ...]
    total: int
    k: int
    epsilon: float

    @property
    def mean(self) -> float:
        """Intruder dimensions per matrix."""
        return self.total / len(self.matrices)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        matrices = [matrix.to_dict() for matrix in self.matrices]
        return {"matrices": matrices, "total": self.total, "k": self.k, "epsilon": self.epsilon}

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw each leading vector's similarity over its place; what lies below the line is an intruder."""
        axes = new_axes(ax)
        for matrix in self.matrices:
            places = range(1, len(matrix.similarity) + 1)
            axes.plot(places, matrix.similarity, ".", color="C0", alpha=max(0.15, 1 / len(self.matrices)))
        axes.axhline(self.epsilon, color="C3", linestyle="--")
        axes.set_xlabel("place of the tuned singular vector")
        axes.set_ylabel("largest cosine with a base singular vector")
        axes.set_ylim(0, 1.02)
        axes.set_title(f"{self.total} intruder dimensions in {len(self.matrices)} matrices")
        return axes


def intruder_dimensions(
    base: Weights, tuned: Weights | Iterable[tuple[str, Tensor]], *, k: int = 10, epsilon: float = 0.5
) -> IntruderReport:
    r"""Count the intruder dimensions that fine-tuning has brought into weights.

    With the singular value decompositions :math:`W_0 = U_0 Σ_0 V_0^\top` of a pre-trained weight and
    :math:`W = U Σ V^\top` of the tuned one, the j-th left singular vector :math:`u_j`, j ≤ k, is an intruder dimension where

    .. math::
        \max_i |\langle u_j, u^0_i \rangle| < ε

    over all left singular vectors of the base. Only Gram matrices of the shorter side are formed, in float64: for a tall weight
    :math:`U^\top U_0 = Σ^{-1} V^\top (W^\top W_0) V_0 Σ_0^{-1}`, so that an embedding table of 100,000 rows costs no more memory than its
    width squared.

    Args:
        base: a module, a mapping from names to tensors, or one tensor.
        tuned: likewise, of the same shapes; or pairs of name and tensor, taken one at a time. Of names, those are compared that are in
            both and hold floating matrices; kernels of convolutions are flattened to (out, rest).
        k: how many leading singular vectors of each tuned weight are examined (fewer where the shorter side is).
        epsilon: the similarity ε in (0, 1] below which a vector is an intruder.

    Returns:
        An `IntruderReport`.

    Raises:
        TypeError: a weight is no tensor, or is not floating.
        ValueError: shapes differ, a weight is not finite, nothing can be compared, or ``k`` or ``epsilon`` is out of range.

    Deviations:
        The authors' script decomposes in float32 and compares with all vectors of the thin decomposition, those of singular
        value zero included. Those are arbitrary, and are left out here.

    When not to use it: on weights narrower than about 16 ε⁻². In s dimensions, with all s base vectors to choose from, a random
    direction reaches a cosine of about :math:`\sqrt{2 \ln s / s}`, so that at s = 32 nothing falls below 0.5. Nor as evidence of
    forgetting by itself: a vector spread over m base vectors is an intruder as soon as m > ε⁻².

    Example:
        >>> import torch
        >>> from corollary.analysis import intruder_dimensions
        >>> base = torch.diag(torch.linspace(2, 1, 128))
        >>> new = torch.ones(128) / 128**0.5  # resembles no singular vector of the base
        >>> intruder_dimensions(base, base + 5 * torch.outer(new, new)).total
        1

    Source: Shuttleworth, Andreas, Torralba, Sharma, "LoRA vs Full Fine-tuning: An Illusion of Equivalence", arXiv 2410.21228, the
    definition and Algorithm 1; k and ε are the defaults of the authors' ``find_intruder_dimensions.py``.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"'k' must be a whole number from 1 up, not {k!r}")
    if not 0 < epsilon <= 1:
        raise ValueError(f"'epsilon' must be in (0, 1], not {epsilon!r}")
    known = _named(base, "base")
    matrices = []
    with torch.no_grad():
        for name, weight in _pairs(tuned):
            if name not in known:
                continue
            before = known[name]
            if not isinstance(weight, Tensor) or not isinstance(before, Tensor):
                raise TypeError(f"'{name}' must be a tensor, not {type(weight).__name__} and {type(before).__name__}")
            if weight.shape != before.shape:
                raise ValueError(f"'{name}' has shape {tuple(weight.shape)} in 'tuned' and {tuple(before.shape)} in 'base'")
            if weight.dim() < 2 or not weight.numel():
                continue
            if not weight.is_floating_point() or not before.is_floating_point():
                if name:
                    continue
                raise TypeError(f"weights must be floating, not {before.dtype} and {weight.dtype}")
            matrices.append(_compare(name, as_matrix(before), as_matrix(weight), k, epsilon))
    if not matrices:
        raise ValueError(
            "there are no matrices to compare: 'tuned' and 'base' share no name of a floating weight of 2 dimensions"
        )
    return IntruderReport(tuple(matrices), sum(m.count for m in matrices), k, epsilon)


def _named(weights: Any, argument: str) -> Mapping[str, Tensor]:
    if isinstance(weights, Tensor):
        return {"": weights}
    if isinstance(weights, nn.Module):
        return {name: p.detach() for name, p in weights.named_parameters()}
    if isinstance(weights, Mapping):
        return weights
    raise TypeError(f"'{argument}' must be a tensor, a module or a mapping of tensors, not {type(weights).__name__}")


def _pairs(weights: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(weights, Tensor | nn.Module | Mapping):
        for name in (named := _named(weights, "tuned")):
            yield name, named[name]
    elif isinstance(weights, Iterable):
        yield from weights
    else:
        _named(weights, "tuned")


def _compare(name: str, before: Tensor, after: Tensor, k: int, epsilon: float) -> Intruders:
    for argument, matrix in (("base", before), ("tuned", after)):
        if not bool(matrix.isfinite().all()):
            raise ValueError(f"'{argument}' has NaN or infinity in '{name}'; weights must be finite")
    found = similarity(Blocks(before), Blocks(after), k)
    shape = (int(before.shape[0]), int(before.shape[1]))
    count = sum(value < epsilon for value in found.similarity)
    return Intruders(name, shape, count, found.similarity, found.singular_values, found.match)


@dataclass(frozen=True)
class Similarity:
    """Leading left singular vectors of a tuned matrix against those of its base.

    Attributes:
        similarity: largest absolute cosine of each leading vector.
        match: place of the base's vector that has it.
        singular_values: of the tuned matrix.
        overlap: mean squared length of the leading vectors' projections onto as many leading ones of the base.
    """

    similarity: tuple[float, ...]
    match: tuple[int, ...]
    singular_values: tuple[float, ...]
    overlap: float


def similarity(before: Blocks, after: Blocks, k: int) -> Similarity:
    """Compare with all left singular vectors of the base; O(l s² + s³) for sides s ≤ l."""
    values_0, right_0 = _decompose(before.gram())
    values_1, right_1 = _decompose(after.gram())
    k = min(k, int((values_1 > values_1[0] * 1e-8).sum()) if values_1[0] > 0 else 0)
    known = values_0 > values_0[0] * 1e-8 if values_0[0] > 0 else torch.zeros_like(values_0, dtype=torch.bool)
    values_0, right_0, values_1, right_1 = values_0[known], right_0[:, known], values_1[:k], right_1[:, :k]
    if before.tall:  # the shorter side is that of right vectors; the left ones follow from them
        cosines = right_1.T @ cross_gram(after, before) @ right_0 / (values_1[:, None] * values_0)
    else:
        cosines = right_1.T @ right_0
    return _similar(cosines, values_1)


def leading_similarity(before: Blocks, after: Blocks, k: int, reference: int, generator: torch.Generator) -> Similarity:
    """Compare with the ``reference`` leading left singular vectors of the base alone; O(l s reference).

    A tuned vector that resembles a base vector further down counts as an intruder, so the count is an upper bound.
    """
    _, short_0 = leading(before, min(reference, before.short), generator)
    values, short_1 = leading(after, min(k, after.short), generator)
    if before.tall:
        left_0, left_1 = (torch.linalg.qr(m.lift(v)).Q for m, v in ((before, short_0), (after, short_1)))
        return _similar((left_1.T @ left_0).double(), values)
    return _similar((short_1.T @ short_0).double(), values)


def _decompose(gram: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)


def _similar(cosines: Tensor, values: Tensor) -> Similarity:
    if not cosines.numel():  # one of the two is zero: nothing resembles anything
        return Similarity((0.0,) * len(values), (0,) * len(values), tuple(values.tolist()), 0.0)
    best, match = cosines.abs().clamp_max(1.0).max(1)
    k = len(cosines)
    overlap = float(cosines[:, :k].square().sum() / k)
    return Similarity(
        tuple(best.tolist()),
        tuple(match.tolist()),
        tuple(values.tolist()),
        min(1.0, overlap) if not math.isnan(overlap) else 0.0,
    )

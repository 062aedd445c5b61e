"""Low-rank factors in a chosen metric: one configuration, of which the methods are presets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from corollary.compress.base import CompressConfig, Place, Replacement, Spec
from corollary.compress.budget import allocate_ranks, uniform_ranks
from corollary.compress.calibration import Moments
from corollary.compress.layers import factored, set_factors
from corollary.linalg import LowRankSolution, weighted_low_rank

METRICS = ("none", "inputs", "outputs", "both")
BUDGETS = ("parameters", "macs", "bytes")
ALLOCATIONS = ("global", "uniform")


def solve(matrix: Tensor, moments: Moments | None, metric: str, centered: bool, damping: float) -> LowRankSolution:
    """The weighted problem of one matrix in a metric by name."""
    if metric == "none" or moments is None:
        return weighted_low_rank(matrix)
    inputs = moments.second if metric in ("inputs", "both") else None
    outputs = moments.outputs if metric in ("outputs", "both") else None
    if metric in ("outputs", "both") and outputs is None:
        raise ValueError(f"metric '{metric}' needs gradients at the outputs: calibrate with 'loss'")
    mean = moments.mean if centered and inputs is not None else None
    return weighted_low_rank(
        matrix,
        None if inputs is None else inputs.to(matrix.device),
        None if outputs is None else outputs.to(matrix.device),
        mean=None if mean is None else mean.to(matrix.device),
        damping=damping,
    )


@dataclass(frozen=True)
class LowRank(CompressConfig):
    r"""Layers factored as W ≈ B A, the error measured in a metric, the ranks chosen under one budget.

    With C the second moment and μ the mean of a layer's inputs, and G that of the loss's gradient at its output,

    .. math:: \min_{\mathrm{rank}\,W' \le r} \mathrm{tr}\,\bigl(G\,(W - W')(C - \mu\mu^\top)(W - W')^\top\bigr), \qquad
              b' = b + (W - W')\,\mu,

    with the identity for what ``metric`` leaves out and μ = 0 unless ``centered``. By ``ratio`` a layer that would not shrink stays dense.

    Args:
        ratio: the share to keep of what all chosen layers cost together, in (0, 1]. Give this or ``rank``.
        rank: the same for all layers where it is a whole number; a share of the smaller side where it is a fraction below 1; or
            layer's name to rank. It is what you get, whether or not the layer shrinks.
        metric: 'none', 'inputs', 'outputs' (needs calibration with a loss), or 'both'.
        centered: take the inputs' mean off and put what it loses into a bias, which layers without one get.
        budget: what ``ratio`` is a share of: 'parameters' of the weights, 'macs' over the calibration data, or 'bytes'.
        allocation: 'global' spends the budget where it takes off the most error, see `allocate_ranks`; 'uniform' keeps the same share
            of every layer. None: global where the metric has the outputs in it, so that the errors of all layers are in one unit, the
            loss's; else uniform. Global without that unit goes by each layer's error relative to its own output, which need not be what
            the model minds: it is better on some models and worse on others.
        multiple_of: ranks are multiples of this.
        damping: see `weighted_low_rank`.

    Raises:
        ValueError: for settings out of range, or both or none of ``ratio`` and ``rank``.

    When not to use it: on layers whose outputs fill their space, such as a first convolution; and where kernels are so small
    that two products take longer than one.

    Example:
        >>> import torch
        >>> from corollary.compress import LowRank, compress
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 32))
        >>> small = compress(model, LowRank(ratio=0.5, metric="inputs"), calibration=[torch.randn(64, 32)])
        >>> small[0].rank, small[2].rank
        (8, 8)
    """

    ratio: float | None = None
    rank: int | float | Mapping[str, int] | None = None
    metric: str = "none"
    centered: bool = False
    budget: str = "parameters"
    allocation: str | None = None
    multiple_of: int = 1
    damping: float = 1e-6

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.rank is None):
            raise ValueError("give one of 'ratio' and 'rank'")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"'ratio' must be in (0, 1], not {self.ratio}")
        ranks = self.rank.values() if isinstance(self.rank, Mapping) else () if self.rank is None else (self.rank,)
        for rank in ranks:
            if isinstance(rank, bool) or not ((rank >= 1 and rank == int(rank)) or 0 < rank < 1):
                raise ValueError(f"'rank' must be at least 1, or a fraction in (0, 1), not {rank}")
        for name, allowed in (("metric", METRICS), ("budget", BUDGETS), ("allocation", ALLOCATIONS)):
            if getattr(self, name) not in allowed and (name, self.allocation) != ("allocation", None):
                raise ValueError(f"'{name}' must be one of {', '.join(allowed)}, not '{getattr(self, name)}'")
        if self.multiple_of < 1:
            raise ValueError(f"'multiple_of' must be at least 1, not {self.multiple_of}")
        if self.damping < 0:
            raise ValueError(f"'damping' must be at least 0, not {self.damping}")
        if self.centered and self.metric not in ("inputs", "both"):
            raise ValueError("'centered' needs a metric of the inputs: there is no mean to take off otherwise")

    @property
    def calibrated(self) -> bool:
        return self.metric != "none" or self.budget == "macs"

    # --------------------------------------------------------------------------------------------------------------- ranks

    def costs(self, place: Place) -> tuple[float, float]:
        """What a rank costs on this layer, and what the layer costs dense."""
        m, n = place.site.out_features, place.site.in_features
        each = 1.0
        if self.budget == "bytes":
            each = place.itemsize
        if self.budget == "macs":
            if place.moments is None:
                raise ValueError("'budget' is 'macs', which counts inputs: give 'calibration'")
            each = place.moments.count
        if place.site.kind == "embedding" and self.budget == "macs":
            return each * m, each * m  # a lookup costs nothing, so factoring one can only cost: it is as good as dense
        return each * (m + n), each * m * n

    def choose(self, places: Sequence[Place]) -> Sequence[int | None]:
        if self.rank is not None:
            return [self._given(place) for place in places]
        assert self.ratio is not None
        costs, dense = zip(*(self.costs(place) for place in places), strict=True)
        if not self.searches:
            return self._shrinking(places, uniform_ranks(costs, dense, self.ratio, multiple_of=self.multiple_of).ranks)
        return self.allocate(places, [self.errors(place) for place in places])

    @property
    def searches(self) -> bool:
        """Whether ranks are chosen by looking at the errors of all layers."""
        chosen = self.allocation or ("global" if self.metric in ("outputs", "both") else "uniform")
        return self.ratio is not None and self.ratio < 1 and chosen == "global"

    def errors(self, place: Place) -> Tensor:
        """What rank 0, 1, ... of one layer costs in the search: float64, on the CPU.

        The squared error over the data in the loss's unit where the metric has it, else relative to the layer's size.
        """
        errors = self._solve(place).errors()
        if self.metric in ("outputs", "both") and place.moments is not None:
            return (errors * place.moments.count).cpu()
        return (errors / errors[0].clamp_min(torch.finfo(errors.dtype).tiny)).cpu()

    def allocate(self, places: Sequence[Place], errors: Sequence[Tensor]) -> Sequence[int | None]:
        """Ranks under the budget, given what each layer errs by at every rank."""
        assert self.ratio is not None
        costs, dense = zip(*(self.costs(place) for place in places), strict=True)
        try:
            found = allocate_ranks(errors, costs, dense, self.ratio * sum(dense), multiple_of=self.multiple_of)
        except ValueError as error:
            raise ValueError(f"'ratio' {self.ratio} is less than what rank {self.multiple_of} costs: {error}") from error
        return found.ranks

    def _given(self, place: Place) -> int | None:
        rank = self.rank
        most = min(place.site.out_features, place.site.in_features)
        if isinstance(rank, Mapping):
            rank = rank.get(place.name)
        if rank is None:
            return None
        if rank < 1:
            rank = max(self.multiple_of, int(rank * most) // self.multiple_of * self.multiple_of)
        if rank > most:
            raise ValueError(f"'rank' {rank} is above {most}, the smaller side of '{place.name}'")
        return int(rank)

    def _shrinking(self, places: Sequence[Place], ranks: Sequence[int | None]) -> list[int | None]:
        """Ranks that take no fewer numbers than the dense layer leave it dense."""
        sides = [(p.site.out_features, p.site.in_features) for p in places]
        return [None if r is None or r * (m + n) >= m * n else r for r, (m, n) in zip(ranks, sides, strict=True)]

    # ------------------------------------------------------------------------------------------------------------- factors

    def _centers(self, place: Place) -> bool:
        # The row of a padding token is zero and has to stay so, which a bias would undo.
        return self.centered and getattr(place.layer, "padding_idx", None) is None

    def _solve(self, place: Place) -> LowRankSolution:
        if place.memo is not None and "solution" in place.memo:
            kept: LowRankSolution = place.memo["solution"]
            return kept
        solution = solve(place.matrix, place.moments, self.metric, self._centers(place), self.damping)
        if place.memo is not None:
            place.memo["solution"] = solution
        return solution

    def spec(self, place: Place, choice: int) -> Spec:
        return {"rank": choice, "bias": place.has_bias or self._centers(place)}

    def replace(self, place: Place, choice: int) -> Replacement:
        solution = self._solve(place)
        if place.memo is not None:
            place.memo.clear()
        up, down = solution.factors(choice)
        bias = None if place.bias is None else place.bias.to(up)
        if self._centers(place):
            assert place.moments is not None
            mean = place.moments.mean.to(up)
            lost = place.matrix.to(up) @ mean - up @ (down @ mean)
            bias = lost if bias is None else bias + lost
        module = set_factors(factored(place.layer, choice, bias=bias is not None), up, down, bias)
        errors = solution.errors()
        m, n = place.site.out_features, place.site.in_features
        return Replacement(
            module=module,
            spec=self.spec(place, choice),
            rank=choice,
            macs=choice * m if place.site.kind == "embedding" else choice * (m + n),
            error=float(errors[choice] / errors[0]) if float(errors[0]) > 0 else 0.0,
        )

    def build(self, layer: nn.Module, spec: Spec) -> nn.Module:
        return factored(layer, int(spec["rank"]), bias=bool(spec["bias"]))


@dataclass(frozen=True)
class SVD(LowRank):
    """Plain singular value decomposition of the weights, which looks at no data: what activation-aware methods are measured against.

    A preset of `LowRank` with ``metric='none'``; its errors are relative to each weight's own norm.

    Example:
        >>> import torch
        >>> from corollary.compress import SVD, compress
        >>> compress(torch.nn.Linear(16, 16, bias=False), SVD(rank=2)).matrix().shape
        torch.Size([16, 16])

    Source: Eckart and Young, "The approximation of one matrix by another of lower rank", Psychometrika 1936.
    """


@dataclass(frozen=True)
class FeaturePCA(LowRank):
    r"""Atomic feature mimicking: principal components of a layer's outputs, the mean taken off and put into the bias.

    With :math:`y = W x + b`, and U the leading eigenvectors of the outputs' covariance,

    .. math:: y \approx U U^\top (y - E[y]) + E[y], \qquad B = U,\; A = U^\top W,\; b' = b + (W - B A)\,E[x].

    A preset of `LowRank` with ``metric='inputs'`` and ``centered=True``: the covariance of the outputs is W Cov(x) Wᵀ, so the inputs'
    moments are all that is needed.

    Deviations: the factors are scaled so that column and row of a direction are equally long, where the authors leave U orthonormal;
    their product is the same.

    When not to use it: where calibration data look unlike what the model will see.

    Example:
        >>> import torch
        >>> from corollary.compress import FeaturePCA, compress
        >>> x = torch.randn(100, 3) @ torch.randn(3, 16) + 5.0  # inputs of rank 3 around a mean
        >>> layer = torch.nn.Linear(16, 12)
        >>> small = compress(layer, FeaturePCA(rank=3), calibration=[x])
        >>> torch.allclose(small(x), layer(x), atol=1e-3)
        True

    Source: Yu and Wu, "Compressing Transformers: Features Are Low-Rank, but Weights Are Not!", AAAI 2023.
    """

    metric: str = "inputs"
    centered: bool = True

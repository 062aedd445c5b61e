"""EoRA: a low-rank path beside a compressed weight that makes up for its error where the inputs are large; and the compression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from corollary.adapt.site import Site
from corollary.compress.base import CompressConfig, Place, Replacement, Spec
from corollary.compress.lowrank import solve
from corollary.compress.packed import PackedLinear

METHODS = ("nearest", "gptq")
CRITERIA = ("magnitude", "wanda")
_SIZED = {2: torch.float16, 4: torch.float32, 8: torch.float64}


@dataclass(frozen=True)
class Quantize(CompressConfig):
    """Linear layers stored in few bits, with two zeros in four, or both, as `PackedLinear`.

    Args:
        bits: 4, 8, or None to keep floating values.
        group_size: entries of a row that share step and zero point.
        sparsity: '2:4', or None.
        method: 'nearest', or 'gptq', which looks at activations and takes no sparsity.
        criterion: which two of four stay: the largest by 'magnitude', or by 'wanda', magnitude times the input's size.

    Raises:
        ValueError: for settings out of range, or nothing to do.

    When not to use it: for speed. Weights are unpacked at every call; what is saved is memory and bytes on disk.

    Example:
        >>> import torch
        >>> from corollary.compress import Quantize, compress, compression_report
        >>> round(compression_report(compress(torch.nn.Linear(256, 256), Quantize(bits=4))).ratio, 3)
        0.148

    Sources: Frantar et al., "GPTQ", arXiv 2210.17323; Mishra et al., arXiv 2104.08378; Sun et al., "Wanda", arXiv 2306.11695.
    """

    bits: int | None = 4
    group_size: int = 64
    sparsity: str | None = None
    method: str = "nearest"
    criterion: str = "magnitude"

    def __post_init__(self) -> None:
        if self.bits not in (4, 8, None):
            raise ValueError(f"'bits' must be 4, 8 or None, not {self.bits}")
        if self.group_size < 1:
            raise ValueError(f"'group_size' must be at least 1, not {self.group_size}")
        if self.sparsity not in ("2:4", None):
            raise ValueError(f"'sparsity' must be '2:4' or None, not {self.sparsity!r}")
        if self.bits is None and self.sparsity is None:
            raise ValueError("'bits' and 'sparsity' are both None: nothing would be compressed")
        for name, allowed in (("method", METHODS), ("criterion", CRITERIA)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"'{name}' must be one of {', '.join(allowed)}, not '{getattr(self, name)}'")
        if self.method == "gptq" and (self.sparsity or self.bits is None):
            raise ValueError("'method' is 'gptq', which needs 'bits' and takes no 'sparsity'")

    @property
    def calibrated(self) -> bool:
        return self.method == "gptq" or (self.sparsity is not None and self.criterion == "wanda")

    def choose(self, places: Sequence[Place]) -> Sequence[int | None]:
        for place in places:
            if place.site.kind != "linear":
                raise TypeError(
                    f"'targets': '{place.name}' is of kind {place.site.kind}; {type(self).__name__} takes linear layers"
                )
            if self.sparsity and place.site.in_features % 4:
                raise ValueError(f"'{place.name}' has {place.site.in_features} inputs; 2:4 sparsity needs a multiple of 4")
        return [self.rank_of(place) for place in places]

    def rank_of(self, place: Place) -> int:
        """Rank of the path beside the packed weight."""
        return 0

    def _empty(self, layer: nn.Module, rank: int, bias: bool) -> PackedLinear:
        site, weight = Site.of(layer), layer.weight
        assert isinstance(weight, Tensor)
        return PackedLinear(
            site.in_features,
            site.out_features,
            bits=self.bits,
            group_size=self.group_size,
            sparse=self.sparsity is not None,
            rank=rank,
            bias=bias,
            device=weight.device,
            dtype=weight.dtype,
        ).train(layer.training)

    def spec(self, place: Place, choice: int) -> Spec:
        return {"rank": choice, "bias": place.has_bias}

    @torch.no_grad()
    def replace(self, place: Place, choice: int) -> Replacement:
        layer, moments, matrix = self._empty(place.layer, choice, place.bias is not None), place.moments, place.matrix
        second = None if moments is None else moments.second.to(matrix.device)
        layer.pack(
            matrix,
            inputs=second if self.method == "gptq" else None,
            scale=second.diagonal().sqrt() if second is not None and self.criterion == "wanda" else None,
        )
        if layer.bias is not None and place.bias is not None:
            layer.bias.copy_(place.bias)
        delta = matrix - layer.dense()
        left = self.compensate(layer, delta, place)
        wide = matrix.to(torch.float64)
        size = float((wide if second is None else wide @ second.to(wide)).mul(wide).sum())
        m, n = place.site.out_features, place.site.in_features
        return Replacement(
            module=layer,
            spec=self.spec(place, choice),
            rank=choice or None,
            macs=m * n + choice * (m + n),
            error=left / size if size > 0 else 0.0,
        )

    def compensate(self, layer: PackedLinear, delta: Tensor, place: Place) -> float:
        """Fill the low-rank path, and give the squared error that is left, in the metric of the inputs where they are known."""
        wide = delta.to(torch.float64)
        return float((wide if place.moments is None else wide @ place.moments.second.to(wide)).mul(wide).sum())

    def build(self, layer: nn.Module, spec: Spec) -> nn.Module:
        return self._empty(layer, int(spec["rank"]), bool(spec["bias"]))


@dataclass(frozen=True)
class EoRA(Quantize):
    r"""A compressed weight with the low-rank path that makes up best for its error on the layer's inputs, without any training.

    With :math:`\Delta W = W - \hat W`, the inputs' second moment :math:`C = Q \Lambda Q^\top` and :math:`Q' = Q \Lambda^{1/2}`,

    .. math:: \Delta W\, Q' = U \Sigma V^\top, \qquad B = U_r \Sigma_r^{1/2}, \quad A = \Sigma_r^{1/2} V_r^\top Q'^{-1}, \qquad
              y = \hat W x + B A x,

    which is the best rank-r answer to :math:`E\|\Delta W x - B A x\|^2`. Since :math:`B A = U_r U_r^\top \Delta W`, no inverse is
    needed: see `weighted_low_rank`.

    Args:
        bits, group_size, sparsity, method, criterion: how the weight is compressed, see `Quantize`.
        rank: of the path; 16 where nothing is given.
        ratio: instead of ``rank``: each layer's path gets what packed weight leaves of this share of the dense weight's bytes.
        metric: 'inputs'; 'none' is plain singular value decomposition of the error, what EoRA is measured against.
        damping: see `weighted_low_rank`.

    Raises:
        ValueError: as `Quantize`, or a rank below 1 or above a layer's smaller side.

    Deviations: the factors are balanced so that column and row of a direction are equally long. The authors replace negative
    eigenvalues of C by the smallest positive one and invert; here there is nothing to invert. Their code measures each block's inputs
    behind the blocks that are already compressed and compensated: ``compress(..., sequential=True)`` does so layer by layer.

    When not to use it: where the compressed weight is already good to the last bit that counts, or where the path's own bytes buy more
    as bits of the weight.

    Example:
        >>> import torch
        >>> from corollary.compress import EoRA, compress
        >>> x = torch.randn(200, 32) * torch.logspace(0, -2, 32)
        >>> layer = torch.nn.Linear(32, 32)
        >>> error = lambda small: (small(x) - layer(x)).norm().item()
        >>> plain, eigen = (compress(layer, EoRA(rank=4, metric=m), calibration=[x]) for m in ("none", "inputs"))
        >>> error(eigen) < error(plain)
        True

    Source: Liu et al., "EoRA: Training-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation",
    arXiv 2410.21271; the steps are those of eora.py in the authors' code.
    """

    rank: int | None = None
    ratio: float | None = None
    metric: str = "inputs"
    damping: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and self.ratio is not None:
            raise ValueError("give one of 'rank' and 'ratio'")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"'rank' must be at least 1, not {self.rank}")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise ValueError(f"'ratio' must be in (0, 1), not {self.ratio}")
        if self.metric not in ("inputs", "none"):
            raise ValueError(f"'metric' must be one of inputs, none, not '{self.metric}'")
        if self.damping < 0:
            raise ValueError(f"'damping' must be at least 0, not {self.damping}")

    @property
    def calibrated(self) -> bool:
        return self.metric == "inputs" or super().calibrated

    def rank_of(self, place: Place) -> int:
        m, n = place.site.out_features, place.site.in_features
        if self.ratio is not None:
            empty = PackedLinear(
                n, m, bits=self.bits, group_size=self.group_size, sparse=self.sparsity is not None, device="meta", dtype=_SIZED[place.itemsize]
            )  # fmt: skip
            packed = sum(buffer.nbytes for buffer in empty.buffers())
            rank = int((self.ratio * m * n * place.itemsize - packed) / ((m + n) * place.itemsize))
            if rank < 1:
                share = packed / (m * n * place.itemsize)
                raise ValueError(
                    f"'ratio' {self.ratio} leaves no rank for '{place.name}', whose packed weight takes {share:.2g}"
                )
            return min(rank, m, n)
        rank = 16 if self.rank is None else self.rank
        if rank > min(m, n):
            raise ValueError(f"'rank' {rank} is above {min(m, n)}, the smaller side of '{place.name}'")
        return rank

    def compensate(self, layer: PackedLinear, delta: Tensor, place: Place) -> float:
        up, down = solve(delta, place.moments, self.metric, False, self.damping).factors(layer.rank)
        layer.up.weight.copy_(up)
        layer.down.weight.copy_(down)
        return super().compensate(layer, delta - (up @ down).to(delta), place)

"""LoRD: every linear layer of a language model factored in one shot, by the principal components of its outputs."""

from __future__ import annotations

from dataclasses import dataclass

from corollary.compress.lowrank import LowRank


@dataclass(frozen=True)
class LoRD(LowRank):
    r"""One-shot low-rank decomposition of a trained model by its features, without any training after it.

    Each linear layer's output is projected onto the leading eigenvectors U of its covariance over a little calibration data (atomic
    feature mimicking, see `FeaturePCA`):

    .. math:: W \approx U_r U_r^\top W, \qquad \mathrm{Cov}(W x) = U \Lambda U^\top,

    with the mean of what is lost put into the bias. All layers are decomposed from statistics of the original model, in one shot.

    Args:
        ratio: the share to keep of the weights of all chosen layers together, in (0, 1].
        rank: instead of ``ratio``: one rank for all, a share of the smaller side, or layer's name to rank.
        allocation: 'uniform' as in the paper, where every layer of a kind gets the same rank (None means that too), or 'global'.
        multiple_of, budget, damping, metric, centered: see `LowRank`.

    Deviations: factors are balanced. Layers without a bias get one for the mean; ``centered=False`` leaves them without.

    When not to use it: where inference is bound by the launch of many small kernels and not by arithmetic or memory: a factored layer
    is two of them. On a square layer a rank must fall below half of its side before it saves anything.

    Example:
        >>> import torch
        >>> from corollary.compress import LoRD, compress
        >>> from corollary.models import GPT
        >>> model = GPT(256, dim=32, depth=1, heads=2, context=16)
        >>> text = [torch.randint(256, (8, 16)) for _ in range(4)]
        >>> small = compress(model, LoRD(ratio=0.7), r"blocks\..*_proj", calibration=text)
        >>> small(text[0]).shape
        torch.Size([8, 16, 256])

    Source: Kaushal, Vaidhya and Rish, "LORD: Low Rank Decomposition Of Monolingual Code LLMs For One-Shot Compression",
    arXiv 2309.14021, by the decomposition of Yu and Wu, AAAI 2023, see `FeaturePCA`.
    """

    metric: str = "inputs"
    centered: bool = True

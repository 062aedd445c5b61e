"""DCT-AdamW: AdamW on a few cosine waves of each gradient, of which only the indices are stored."""

from __future__ import annotations

from torch.optim.optimizer import ParamsT

from corollary.optim.projected import ProjectedAdamW
from corollary.optim.projectors import DCT


class DCTAdamW(ProjectedAdamW):
    r"""AdamW on the columns of the cosine basis along which the gradient is largest.

    With D the orthonormal DCT-II basis of the shorter side, each refresh transforms the gradient, S = G D, keeps the ``rank`` columns
    of S with the largest norm, and stores their indices. The choice is a fast transform and a sort, whatever the rank, in place of a
    singular value decomposition; D itself is never stored. A preset of `ProjectedAdamW`, where the other options and the errors
    are described.

    Args:
        params: parameters or groups, see `low_rank_groups`.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        rank: number of columns, or their share of the shorter side.
        update_proj_gap: steps between two choices; 1, the paper's, chooses at every step.
        norm: 1 or 2: which norm of a column decides. 2 keeps the most energy.
        moments: 'rotate' carries the moments over to the new columns: between distinct cosine waves that keeps those of the waves
            that stay and sets the others to zero. 'keep' leaves them in place, whatever their column now means.
        scale: factor on the learning rate of the projected parameters.
        seed, foreach: as in `ProjectedAdamW`.

    State of an m × n matrix, m ≥ n: two moments of m · rank and rank indices of 4 bytes; no basis.

    Deviations: the error feedback that the authors' code offers, off by default, is left out: it stores a full gradient. Their
    default norm is 1.

    When not to use it: where gradients have no structure along their index order and the rank is small: cosine waves then hold
    hardly more energy than random columns, where singular vectors hold most.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(8, 6))
        >>> optimizer = DCTAdamW([weight], lr=0.1, rank=2)
        >>> (weight - 1).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[weight]["indices"].dtype, 0 in optimizer.state[weight]["indices"]  # a constant is wave 0
        (torch.int32, True)

    Reference:
        Modoranu et al., "SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models" (later "FFT-based Dynamic
        Subspace Selection"), arXiv 2505.17967, Algorithm 2.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: float | None = 128,
        update_proj_gap: int = 1,
        norm: int = 2,
        moments: str = "rotate",
        scale: float = 1.0,
        seed: int | None = None,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            rank=rank,
            update_proj_gap=update_proj_gap,
            scale=scale,
            projector=DCT(norm),
            residual="drop",
            moments=moments,
            seed=seed,
            foreach=foreach,
        )

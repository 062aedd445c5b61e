"""GaLore: AdamW on the projection of each gradient onto its leading singular vectors."""

from __future__ import annotations

from torch.optim.optimizer import ParamsT

from corollary.optim.projected import ProjectedAdamW
from corollary.optim.projectors import Projector


class GaLore(ProjectedAdamW):
    r"""AdamW in the leading singular subspace of each gradient matrix; the rest of the gradient is dropped.

    With P the leading ``rank`` singular vectors of G on its shorter side, computed anew every ``update_proj_gap`` steps,
    W ← W - η s P · Adam(Pᵀ G). A preset of `ProjectedAdamW`, where the other options and the errors are described.

    Args:
        params: parameters or groups, see `low_rank_groups`.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        rank: dimension of the subspace, or its share of the shorter side.
        update_proj_gap: steps between two decompositions.
        scale: s, which the paper calls α.
        projector: 'randomized' finds nearly the same subspace as 'svd', which is the paper's, at a small part of the cost.
        seed, foreach: as in `ProjectedAdamW`.

    Deviations: the leading singular vectors come from randomized subspace iteration unless ``projector='svd'``. Weight decay comes before the update and ε after bias correction, as in torch; the authors' package follows an
    older AdamW that has both the other way round.

    When not to use it: `Fira` stores one more number for each matrix and uses the whole gradient.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(6, 8))
        >>> optimizer = GaLore([weight], lr=0.1, rank=2)
        >>> (weight - 1).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[weight]["exp_avg"].shape
        torch.Size([2, 8])

    Reference:
        Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", arXiv 2403.03507, Algorithm 2.
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
        update_proj_gap: int = 200,
        scale: float = 0.25,
        projector: str | Projector = "randomized",
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
            projector=projector,
            residual="drop",
            seed=seed,
            foreach=foreach,
        )

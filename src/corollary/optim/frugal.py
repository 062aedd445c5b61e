"""FRUGAL: Adam on a part of each gradient, and a sign step, which needs no state, on all the rest."""

from __future__ import annotations

from torch.optim.optimizer import ParamsT

from corollary.optim.projected import ProjectedAdamW
from corollary.optim.projectors import Projector
from corollary.optim.residuals import PlainSGD, Residual, SignSGD


class Frugal(ProjectedAdamW):
    r"""Adam in a subspace that changes every ``update_proj_gap`` steps, signSGD or SGD outside of it.

    With P the projection onto the subspace, W ← W - η Adam(P G) - η s sign(G - P G). The subspace is a random choice of whole
    parameters or columns, a random basis, or the leading singular vectors; the moments start from zero in each new subspace.
    A preset of `ProjectedAdamW`, where the other options and the errors are described.

    Args:
        params: parameters or groups, see `low_rank_groups`.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        density: share of the gradient that has state: of the parameters ('blocks'), the columns or the shorter side.
        update_proj_gap: steps between two choices of the subspace.
        residual: 'sign' (the paper's choice), 'sgd', or 'drop'.
        residual_lr_scale: s, the ratio of the state-free learning rate to the other.
        projector: 'blocks', 'columns', 'random', 'svd' or a `Projector`.
        scale: factor on the learning rate of the projected parameters.
        moments: what a new subspace does to the moments: 'reset' (the paper's), 'keep' or 'rotate'.
        seed, foreach: as in `ProjectedAdamW`.

    Deviation: the authors' code carries a refresh out for all parameters of a group at once, before any gradient is looked at;
    here a parameter without gradient waits for its first one.

    When not to use it: with a learning rate far from AdamW's; the sign step moves every entry by η s, however small its gradient.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(4, 8))
        >>> optimizer = Frugal([weight], lr=0.1, density=0.25, projector="columns")
        >>> (weight - 1).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[weight]["exp_avg"].shape
        torch.Size([4, 2])

    Reference:
        Zmushko et al., "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training",
        arXiv 2411.07837, Algorithm 1.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        density: float | None = 0.25,
        update_proj_gap: int = 200,
        residual: str | Residual = "sign",
        residual_lr_scale: float = 1.0,
        projector: str | Projector = "blocks",
        scale: float = 1.0,
        moments: str = "reset",
        seed: int | None = None,
        foreach: bool | None = None,
    ) -> None:
        if residual == "sign":
            residual = SignSGD(residual_lr_scale)
        elif residual == "sgd":
            residual = PlainSGD(residual_lr_scale)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            rank=None if density is None else float(density),
            update_proj_gap=update_proj_gap,
            scale=scale,
            projector=projector,
            residual=residual,
            moments=moments,
            seed=seed,
            foreach=foreach,
        )

"""Fira: full-rank training with low-rank state, by scaling the rest of the gradient as Adam scaled the projected part."""

from __future__ import annotations

from torch.optim.optimizer import ParamsT

from corollary.optim.projected import ProjectedAdamW
from corollary.optim.projectors import Projector
from corollary.optim.residuals import NormScaled


class Fira(ProjectedAdamW):
    r"""Low-rank AdamW plus the rest of the gradient, scaled by Adam's own ratio and limited in growth.

    With P the leading singular vectors of G on its shorter side, R = PᵀG and ψ = Adam(R), each slice i along the longer side gets

    .. math:: \phi_i = \frac{\|\psi_i\|}{\|R_i\|}, \qquad S = \phi \odot (G - P R),

    S is shrunk so that :math:`\|S_t\| \le \gamma \|S_{t-1}\|`, and W ← W - η s (P ψ + S). A preset of `ProjectedAdamW`, where the
    other options and the errors are described.

    Args:
        params: parameters or groups, see `low_rank_groups`.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        rank: dimension of the subspace, or its share of the shorter side.
        update_proj_gap: steps between two choices of the subspace.
        scale: s, which the authors' code calls alpha.
        growth_limit: γ of the norm-growth limiter; None turns it off.
        projector: 'randomized' finds nearly the same subspace as 'svd', which is the paper's, at a small part of the cost.
        seed, foreach: as in `ProjectedAdamW`.

    State of an m × n matrix, m ≥ n: two moments of m · rank, the basis of n · rank and one number.

    Deviations: the leading singular vectors come from randomized subspace iteration unless ``projector='svd'``. Weight decay comes before the update and ε after bias correction, as in torch. The authors' code multiplies the
    subtracted projection by alpha too, so that its residual is whole only for alpha = 1, its default; here ``scale`` is a factor
    of the whole update.

    When not to use it: where the state of full AdamW fits; and with very small batches, where the residual is mostly noise that
    no average smooths.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(6, 8))
        >>> optimizer = Fira([weight], lr=0.1, rank=1)
        >>> (weight - torch.randn(6, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> int(torch.linalg.matrix_rank(weight.detach()))  # GaLore's first step would have rank 1
        6

    Reference:
        Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?", arXiv 2410.01623, Algorithm 1.
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
        scale: float = 1.0,
        growth_limit: float | None = 1.01,
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
            residual=NormScaled(growth_limit),
            seed=seed,
            foreach=foreach,
        )

"""Q-GaLore: GaLore with its projection in 4 bits, weights in 8, and fewer decompositions where the subspace stays."""

from __future__ import annotations

from torch.optim.optimizer import ParamsT

from corollary.optim.projected import ProjectedAdamW
from corollary.optim.projectors import SVD, Projector


class QGaLore(ProjectedAdamW):
    r"""AdamW in a singular subspace that is kept in 4 bits and chosen anew only as often as a layer needs.

    With :math:`\tilde P` the INT4 form of the leading ``rank`` singular vectors of G on its shorter side,
    :math:`W \leftarrow \mathrm{SR}\bigl(W - \eta s\,\tilde P\,\mathrm{Adam}(\tilde P^\top G)\bigr)`, where SR rounds at random to the
    8-bit codes of W. Each parameter has its own gap between two decompositions: where the mean of the last ``lazy_window``
    similarities of successive subspaces, \|cos\| between their leading vectors, is at least ``lazy_threshold``, the gap is
    multiplied by ``lazy_factor``. A preset of `ProjectedAdamW`, where the other options and the errors are described.

    The weights are in 8 bits if the model's are: call `quantize_weights_` first. With floating weights there is no rounding.

    Args:
        params: parameters or groups, see `low_rank_groups`.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        rank: dimension of the subspace, or its share of the shorter side.
        update_proj_gap: steps between the first decompositions.
        scale: s, which the paper calls α.
        projector: what chooses the subspace; the default is the paper's, `SVD` in 4 bits with a step for each 256 entries.
        lazy_threshold, lazy_window, lazy_factor: when and by how much a gap grows; ``lazy_threshold=None`` keeps it.
        seed: of the rounding. foreach: as in `ProjectedAdamW`.

    State of an m × n matrix, m ≥ n: two moments of m · rank in its dtype, n · rank / 2 bytes of codes, and a step and a byte for
    each 256 of these.

    Deviations: weight decay comes before the update and ε after bias correction, as in torch. The authors' code keeps the moments
    in 8 bits too, compares singular vectors with their sign, which is arbitrary, and before they are quantized, and so keeps one
    more vector.

    When not to use it: where memory is no bottleneck, `GaLore` or `Fira` take cleaner steps; rounding adds noise of about half a
    step of the codes to each weight at each write.

    Example:
        >>> import torch
        >>> from corollary.optim import low_rank_groups, quantize_weights_
        >>> model = quantize_weights_(torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)))
        >>> optimizer = QGaLore(low_rank_groups(model, rank=4), lr=1e-2, scale=1.0)
        >>> model(torch.randn(16, 32)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.state[model[0].weight]["basis_codes"].numel()  # 32 · 4 entries, two to a byte
        64

    Reference:
        Zhang et al., "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients", arXiv 2407.08296,
        Algorithm 1.
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
        projector: str | Projector = SVD(bits=4),  # noqa: B008  # frozen
        lazy_threshold: float | None = 0.4,
        lazy_window: int = 5,
        lazy_factor: int = 2,
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
            lazy_threshold=lazy_threshold,
            lazy_window=lazy_window,
            lazy_factor=lazy_factor,
            seed=seed,
            foreach=foreach,
        )

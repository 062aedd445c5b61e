"""BAdam: Adam on a few parameters at a time, the others stand still."""

from __future__ import annotations

from torch.optim.optimizer import ParamsT

from corollary.optim.projected import ProjectedAdamW
from corollary.optim.projectors import Blocks


class BAdam(ProjectedAdamW):
    r"""Block coordinate descent: AdamW on the active parameters, nothing on the others, until the next ones' turn.

    Only active parameters have moments, which start from zero at each turn. A preset of `ProjectedAdamW`, where the other options
    and the errors are described; `Frugal` with ``projector='blocks'`` moves the inactive parameters too.

    Args:
        params: parameters or groups, see `low_rank_groups`.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        active: how many parameters are active at a time (int), or their share (float in (0, 1]).
        update_proj_gap: steps of a turn, the paper's K.
        order: 'random', 'ascending' or 'descending', in the order of the group.
        seed, foreach: as in `ProjectedAdamW`.

    Deviation: a block is one tensor; the paper's are a Transformer's layers.

    When not to use it: in pre-training, where a step that moves a part of the model is mostly a part of a step.

    Example:
        >>> import torch
        >>> weights = [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(3)]
        >>> optimizer = BAdam(weights, lr=0.1, active=1, order="ascending")
        >>> sum((w - 1).square().sum() for w in weights).backward()
        >>> optimizer.step()
        >>> [bool(w.any()) for w in weights]
        [True, False, False]

    Reference:
        Luo et al., "BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language Models", arXiv 2404.02827,
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
        active: float | None = 1,
        update_proj_gap: int = 100,
        order: str = "random",
        seed: int | None = None,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            rank=active,
            update_proj_gap=update_proj_gap,
            projector=Blocks(order),
            residual="drop",
            moments="reset",
            seed=seed,
            foreach=foreach,
        )

"""Smooth adversarial comp-sum loss: a comp-sum loss on clean inputs plus the largest shift of the margins nearby."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from corollary.losses._reduction import NO_INDEX, arguments, need_number, need_reduction, reduce_loss
from corollary.losses.adversarial import need_pair
from corollary.losses.comp_sum import comp_sum_loss


def margin_shift(logits: Tensor, adversarial_logits: Tensor, target: Tensor) -> Tensor:
    """Euclidean distance between the margins ``h_y - h_{y'}`` of clean and attacked logits, for each sample, classes last.

    What the attack of the smooth adversarial comp-sum loss maximizes.

    Example:
        >>> import torch
        >>> from corollary.losses import margin_shift
        >>> margin_shift(torch.zeros(1, 3), torch.tensor([[-1.0, 0.0, 0.0]]), torch.tensor([0]))
        tensor([1.4142])
    """
    moved = adversarial_logits - logits
    # The margin of y to itself never moves, so the norm may run over all classes.
    shift: Tensor = torch.linalg.vector_norm(moved.gather(-1, target.unsqueeze(-1)) - moved, dim=-1)
    return shift


def smooth_adversarial_comp_sum_loss(
    logits: Tensor,
    adversarial_logits: Tensor,
    target: Tensor,
    *,
    tau: float = 1.0,
    rho: float = 1.0,
    nu: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Smooth adversarial comp-sum loss; see `SmoothAdversarialCompSumLoss`.

    Example:
        >>> import torch
        >>> from corollary.losses import smooth_adversarial_comp_sum_loss
        >>> logits, target = torch.zeros(1, 3), torch.tensor([0])
        >>> moved = torch.tensor([[-1.0, 0.0, 0.0]])
        >>> round(smooth_adversarial_comp_sum_loss(logits, moved, target, nu=0.5).item(), 4)  # log 3 + 0.5 sqrt 2
        1.8057
    """
    need_number("rho", rho, strict=True)
    need_number("nu", nu)
    need_reduction(reduction)
    need_pair(logits, adversarial_logits, target)
    # Every sample has a margin here, so no index stands for "ignore".
    clean = comp_sum_loss(logits / rho, target, tau=tau, ignore_index=NO_INDEX, reduction="none")
    return reduce_loss(clean + nu * margin_shift(logits, adversarial_logits, target), reduction)


class SmoothAdversarialCompSumLoss(nn.Module):
    r"""Smooth adversarial comp-sum loss (ADV-COMP-SUM): robust training that leaves the clean term alone.

    With the margins ``d_{y'}(x) = h(x)_y - h(x)_{y'}`` of the true class ``y`` to every other,

    .. math:: \Phi^\tau\left(\sum_{y' \ne y} e^{-d_{y'}(x) / \rho}\right)
              + \nu \max_{\lVert x' - x \rVert \le \gamma} \lVert d(x') - d(x) \rVert_2.

    It bounds the worst comp-sum loss over the ball (with the ``rho``-margin function inside) where
    ``nu >= sqrt(C - 1) / rho``, because ``Phi^tau`` has slope at most 1 and the margin function ``1 / rho``. The maximum is
    the caller's: attack with `pgd` on `margin_shift`. The TRADES term it stands in for bounds a divergence of
    probabilities, which saturates; this one bounds the movement of the scores themselves.

    Args:
        tau: which comp-sum loss, at least 0; see `CompSumLoss`.
        rho: scale of the margins, above 0. For a network whose last layer is free it rescales ``nu`` and the start of training.
        nu: weight of the shift, at least 0. Tune it: too large, and the network becomes constant.
        reduction: ``none``, ``mean`` or ``sum``.

    Shape:
        logits and adversarial_logits (N, C), floating; target (N,) int64. The loss is (N,) without reduction.

    Raises:
        TypeError, ValueError: for wrong dtypes and shapes, or arguments out of what is allowed.

    Deviations: the maximum is approached by projected gradient ascent, as robust training does.

    When not to use it: where no perturbation is expected, or the classes are many and ``nu`` cannot be tuned.

    Example:
        >>> import torch
        >>> from corollary.losses import SmoothAdversarialCompSumLoss, margin_shift, pgd
        >>> model, x, y = torch.nn.Linear(64, 10), torch.rand(5, 64), torch.randint(10, (5,))
        >>> clean = model(x).detach()
        >>> attacked = pgd(model, x, y, eps=0.1, step_size=0.02, steps=5, loss=lambda z, y: margin_shift(clean, z, y))
        >>> SmoothAdversarialCompSumLoss(nu=0.5)(model(x), model(attacked), y).backward()

    Source: arXiv 2304.07288, the smooth adversarial comp-sum losses and the algorithm ADV-COMP-SUM.
    """

    def __init__(self, tau: float = 1.0, *, rho: float = 1.0, nu: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        need_number("tau", tau)
        need_number("rho", rho, strict=True)
        need_number("nu", nu)
        need_reduction(reduction)
        self.tau, self.rho, self.nu = float(tau), float(rho), float(nu)
        self.reduction = reduction

    def forward(self, logits: Tensor, adversarial_logits: Tensor, target: Tensor) -> Tensor:
        """The loss of clean and attacked logits for ``target``."""
        return smooth_adversarial_comp_sum_loss(
            logits, adversarial_logits, target, tau=self.tau, rho=self.rho, nu=self.nu, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        return arguments(tau=self.tau, rho=self.rho, nu=self.nu, reduction=self.reduction)

"""Comp-sum losses: one family from sum-exponential over cross-entropy to the mean absolute error, and its bounds."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corollary.losses._reduction import (
    arguments,
    class_dim,
    index_guard,
    kept,
    need_logits,
    need_number,
    need_reduction,
    need_target,
    need_weight,
    reduce_loss,
)


def _phi(nll: Tensor, tau: float, dtype: torch.dtype) -> Tensor:
    """``Phi^tau`` of ``sum_{y' != y} exp(h_y' - h_y)`` from ``nll = log(1 + that sum)``; finite for every finite ``nll``."""
    if tau == 1:
        return nll
    if tau > 1:
        return torch.expm1((1 - tau) * nll) / (1 - tau)
    # exp((1 - tau) nll) leaves the dtype's range. Where its slope would pass 1/32 of what the dtype holds, it goes on as a
    # logarithm that meets it with the same value and slope: finite, still growing, with a gradient that is never NaN.
    cap = torch.finfo(dtype).max * (1 - tau) / 32
    if cap <= 1:  # tau is so near to 1 that the logistic loss is all that the dtype can tell
        return nll
    edge = math.log(cap) / (1 - tau)
    head = torch.expm1((1 - tau) * nll.clamp(max=edge)) / (1 - tau)
    return head + cap * torch.log1p(F.relu(nll - edge))


def comp_sum_loss(
    logits: Tensor,
    target: Tensor,
    *,
    tau: float = 1.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Comp-sum loss; see `CompSumLoss` for the arguments, the mathematics and the errors.

    Example:
        >>> import torch
        >>> from corollary.losses import comp_sum_loss
        >>> logits, target = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0])
        >>> [round(comp_sum_loss(logits, target, tau=tau).item(), 4) for tau in (0.0, 1.0, 1.5, 2.0)]
        [0.1851, 0.1698, 0.1628, 0.1562]
    """
    need_number("tau", tau)
    need_reduction(reduction)
    classes = need_logits(logits)
    need_target(logits, target)
    need_weight(weight, classes)
    weight = None if weight is None else weight.to(logits.dtype)
    if tau == 1:

        def cross_entropy() -> Tensor:
            return F.cross_entropy(logits, target, weight, ignore_index=ignore_index, reduction=reduction)

        return index_guard(cross_entropy, target, classes, ignore_index)
    # The transformation is of one number per sample, so float16 and bfloat16 afford it in float32.
    wide = torch.promote_types(logits.dtype, torch.float32)
    if target.is_floating_point():
        dim = class_dim(logits)
        share = target if weight is None else target * weight.view(-1, *[1] * (logits.ndim - dim - 1))
        # Under autocast torch's cross-entropy gives float32.
        out = wide if torch.is_autocast_enabled(logits.device.type) else logits.dtype
        nll = -F.log_softmax(logits, dim, dtype=wide)
        return reduce_loss((share * _phi(nll, tau, out)).sum(dim), reduction).to(out)

    def likelihood() -> Tensor:
        return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")

    nll = index_guard(likelihood, target, classes, ignore_index)
    loss = _phi(nll.to(wide), tau, nll.dtype)
    if weight is not None or reduction == "mean":
        share = kept(target, weight, ignore_index, wide)
        loss = loss if weight is None else loss * share
        return reduce_loss(loss, reduction, share.sum()).to(nll.dtype)
    return reduce_loss(loss, reduction).to(nll.dtype)


class CompSumLoss(nn.Module):
    r"""Comp-sum loss: a drop-in for ``nn.CrossEntropyLoss`` with one dial between fast fitting and robustness to noise.

    For scores ``h`` and class ``y``, with ``u = sum_{y' != y} exp(h_{y'} - h_y) = 1 / softmax(h)_y - 1``,

    .. math:: \Phi^\tau(u) = \frac{(1 + u)^{1 - \tau} - 1}{1 - \tau}, \qquad \Phi^1(u) = \log(1 + u),

    continuous in ``tau``. ``tau = 0`` is the sum-exponential loss, ``1`` the logistic loss (cross-entropy), ``1 < tau < 2``
    the generalized cross-entropy ``(1 - p_y^q) / q`` with ``q = tau - 1``, and ``2`` the mean absolute error ``1 - p_y``
    (half the L1 distance between ``softmax(h)`` and the one-hot target). The loss is convex in ``h`` for ``tau <= 1`` and
    bounded by ``1 / (tau - 1)`` above 1.

    It is computed from the log-likelihood alone, so no probability underflows. For ``tau < 1`` the loss grows like
    ``exp((1 - tau) nll)``; from where that slope passes ``(1 - tau) / 32`` of the dtype's largest value it goes on as a
    logarithm (same value and slope there), so loss and gradient stay finite for every finite logit.

    Args:
        tau: at least 0.
        weight: (C,) weight of each class, as in ``nn.CrossEntropyLoss``.
        ignore_index: class index that does not count.
        reduction: ``none``, ``mean`` (over the weights of the samples that count; for probabilities over the samples) or
            ``sum``.

    Shape:
        logits (C,), (N, C) or (N, C, d1, ...), floating; target int64 class indices without the dimension C, or
        probabilities shaped like the logits, for which the loss is their expectation ``sum_y q_y Phi^tau(u_y)``. The loss
        has the logits' dtype and, without reduction, the shape of the class indices.

    Raises:
        TypeError: for integer logits, or a target that is neither int64 nor floating.
        ValueError: for an empty batch, shapes that do not fit, a class out of range (on the CPU; on a GPU torch asserts
            inside the kernel, as in its own loss), or ``tau``, ``weight`` or ``reduction`` out of what is allowed. NaN in
            the logits comes out as NaN, as in torch's losses, because looking for it would make a GPU wait.

    Deviations: none for finite logits below the range given above.

    When not to use it: ``tau`` near 2 hardly learns many classes from scratch, because the gradient carries the factor
    ``p_y^(tau - 1)``; ``tau`` near 0 follows outliers and mislabelled samples.

    Example:
        >>> import torch
        >>> from corollary.losses import CompSumLoss
        >>> logits = torch.zeros(4, 10, requires_grad=True)
        >>> loss = CompSumLoss(tau=1.5)(logits, torch.tensor([0, 1, 2, 3]))
        >>> loss.backward()
        >>> round(loss.item(), 4), logits.grad.shape
        (1.3675, torch.Size([4, 10]))

    Source: A. Mao, M. Mohri, Y. Zhong, Cross-Entropy Loss Functions: Theoretical Analysis and Applications, ICML 2023,
    arXiv 2304.07288.
    """

    weight: Tensor | None

    def __init__(
        self, tau: float = 1.0, *, weight: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean"
    ) -> None:
        super().__init__()
        need_number("tau", tau)
        need_reduction(reduction)
        self.tau = float(tau)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.register_buffer("weight", weight)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of ``logits`` for ``target``."""
        return comp_sum_loss(
            logits,
            target,
            tau=self.tau,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        weighted = None if self.weight is None else f"{len(self.weight)} classes"
        return arguments(tau=self.tau, weight=weighted, ignore_index=self.ignore_index, reduction=self.reduction)


def comp_sum_transform(beta: Tensor, tau: float, num_classes: int) -> Tensor:
    r"""``T_tau(beta)``: the least excess comp-sum risk with which a zero-one excess risk of ``beta`` can come.

    With ``m = ((1 + beta)^a + (1 - beta)^a) / 2`` and ``a = 1 / (2 - tau)``: ``2^(1-tau) (1 - m^(2-tau)) / (1 - tau)`` for
    ``tau < 1``, ``((1 + beta) log(1 + beta) + (1 - beta) log(1 - beta)) / 2`` for ``tau = 1``,
    ``(m^(2-tau) - 1) / ((tau - 1) n^(tau-1))`` for ``1 < tau < 2`` and ``beta / ((tau - 1) n^(tau-1))`` from 2 on.

    Args:
        beta: any shape, values in [0, 1]; computed in float64.
        tau: at least 0.
        num_classes: ``n``, at least 2.

    Raises:
        ValueError: where ``beta``, ``tau`` or ``num_classes`` is out of range.

    Source: arXiv 2304.07288, the H-consistency bound for comp-sum losses.

    Example:
        >>> import torch
        >>> from corollary.losses import comp_sum_transform
        >>> comp_sum_transform(torch.tensor([0.0, 1.0]), tau=1.0, num_classes=3)
        tensor([0.0000, 0.6931], dtype=torch.float64)
    """
    need_number("tau", tau)
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    beta = torch.as_tensor(beta, dtype=torch.float64)
    if not bool(((beta >= 0) & (beta <= 1)).all()):
        raise ValueError("beta must lie in [0, 1]")
    if tau >= 2:
        return beta / float((tau - 1) * num_classes ** (tau - 1))
    if tau == 1:
        return (torch.xlogy(1 + beta, 1 + beta) + torch.xlogy(1 - beta, 1 - beta)) / 2
    a = 1 / (2 - tau)
    # m - 1 and m^(2-tau) - 1 through expm1 and log1p: both are of order beta^2, which 1 would swallow.
    over = (torch.expm1(a * torch.log1p(beta)) + torch.expm1(a * torch.log1p(-beta))) / 2
    power = torch.expm1((2 - tau) * torch.log1p(over)) / (tau - 1)
    scale = 2 ** (1 - tau) if tau < 1 else num_classes ** (1 - tau)
    return power.clamp(min=0) * float(scale)


def comp_sum_bound(excess: Tensor, tau: float, num_classes: int) -> Tensor:
    r"""``Gamma_tau(t)``, the inverse of `comp_sum_transform`: how far above its best the zero-one risk can be.

    For a symmetric and complete hypothesis set H, every ``h`` in H and every distribution satisfy

    .. math:: R_{01}(h) - R^*_{01}(H) + M_{01}(H) \le \Gamma_\tau\left(R_\tau(h) - R^*_\tau(H) + M_\tau(H)\right),

    where ``M`` is the minimizability gap: the best risk in H above the mean of the best conditional risks.

    Args:
        excess: ``t``, any shape, at least 0: comp-sum excess risk plus minimizability gap; computed in float64.
        tau: at least 0.
        num_classes: ``n``, at least 2.

    Returns:
        Shaped like ``excess``, in [0, 1], rounded up within 1e-15.

    Raises:
        ValueError: where ``excess``, ``tau`` or ``num_classes`` is out of range.

    Source: arXiv 2304.07288, the H-consistency bound for comp-sum losses.

    Example:
        >>> import torch
        >>> from corollary.losses import comp_sum_bound
        >>> comp_sum_bound(torch.tensor([0.0, 0.02, 0.6931472]), tau=1.0, num_classes=10)  # about sqrt(2 t)
        tensor([0.0000, 0.1993, 1.0000], dtype=torch.float64)
    """
    excess = torch.as_tensor(excess, dtype=torch.float64)
    if not bool((excess >= 0).all()):
        raise ValueError("excess must be at least 0")
    low, high = torch.zeros_like(excess), torch.ones_like(excess)
    unreached = excess >= comp_sum_transform(high, tau, num_classes)
    for _ in range(64):  # bisection: the transform is increasing, and 64 halvings exhaust float64
        middle = (low + high) / 2
        above = comp_sum_transform(middle, tau, num_classes) > excess
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return torch.where(unreached, 1.0, torch.where(excess == 0, 0.0, high))

"""Adversarial examples by projected gradient, and TRADES: what robust training methods and their comparisons share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corollary.losses._reduction import (
    NO_INDEX,
    arguments,
    index_guard,
    need_logits,
    need_number,
    need_reduction,
    need_target,
    reduce_loss,
)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none")


def _over_samples(values: Tensor, x: Tensor) -> Tensor:
    """Per-sample ``values`` with trailing dimensions of size 1, so that they broadcast over the inputs ``x``."""
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))


def _norm(delta: Tensor, samples: int) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(delta.flatten(samples), dim=-1)
    return length


def _start(x: Tensor, samples: int, eps: float, norm: str, generator: torch.Generator | None) -> Tensor:
    """A point drawn uniformly from the ball around each input."""
    if norm == "inf":
        return torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device).mul_(2 * eps).sub_(eps)
    delta = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    size = x[(0,) * samples].numel()
    radius = torch.rand(x.shape[:samples], generator=generator, dtype=x.dtype, device=x.device) ** (1 / size)
    return delta * _over_samples(eps * radius / _norm(delta, samples), x)


def pgd(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    norm: str = "inf",
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    clip: tuple[float, float] | None = (0.0, 1.0),
    random_start: bool = True,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient ascent on a loss within a ball around each input: adversarial examples.

    Args:
        model: gives logits for inputs shaped like ``x``; put it into the mode that you want (``eval`` freezes batch norm).
            Its parameters get no gradient.
        x: inputs; the leading dimensions, as many as ``y`` has, are samples.
        y: passed to ``loss``; class indices (N,), or with further leading dimensions for stacked models.
        eps: radius of the ball, in the inputs' units, above 0.
        step_size: length of one step: ``step_size * sign(gradient)`` for ``inf``, ``step_size * gradient / |gradient|``
            for ``2``.
        steps: at least 1.
        norm: ``"inf"`` or ``"2"``.
        loss: what to maximize, ``(logits, y) -> one value per sample``; cross-entropy without one.
        clip: range of valid inputs, or ``None``.
        random_start: start from a point drawn uniformly from the ball, not from ``x``.
        restarts: how many starts; the point with the largest loss is kept for each sample.
        generator: source of the random starts, on the device of ``x``.

    Returns:
        The adversarial inputs, shaped like ``x``, detached.

    Raises:
        ValueError: where an argument is out of what is allowed, or ``loss`` does not give one value per sample.

    When not to use it: as the only proof of robustness; it gives an upper bound of the robust accuracy.

    Example:
        >>> import torch
        >>> from corollary.losses import pgd
        >>> x, y = torch.rand(5, 64), torch.randint(10, (5,))
        >>> attacked = pgd(torch.nn.Linear(64, 10), x, y, eps=0.1, step_size=0.02, steps=10)
        >>> bool((attacked - x).abs().max() <= 0.1 + 1e-6)
        True

    Source: A. Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018, arXiv 1706.06083.
    """
    if norm not in ("inf", "2"):
        raise ValueError(f"norm is {norm!r}; allowed: inf, 2")
    need_number("eps", eps, strict=True)
    need_number("step_size", step_size, strict=True)
    for name, count in (("steps", steps), ("restarts", restarts)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if not x.is_floating_point() or x.shape[: y.ndim] != y.shape or x.numel() == 0:
        raise ValueError(
            f"x must be floating, not empty, and begin with the shape of y, {tuple(y.shape)}, got {x.dtype} {tuple(x.shape)}"
        )
    samples, x, objective = y.ndim, x.detach(), loss or _cross_entropy
    best, best_loss = x, torch.full(y.shape, -torch.inf, dtype=x.dtype, device=x.device)
    for _ in range(restarts):
        point = x + _start(x, samples, eps, norm, generator) if random_start else x
        if random_start and clip is not None:
            point = point.clamp(*clip)
        for _ in range(steps):
            point = point.detach().requires_grad_()
            with torch.enable_grad():
                value = objective(model(point), y)
                if value.shape != y.shape:
                    raise ValueError(f"loss must give one value per sample, {tuple(y.shape)}, got {tuple(value.shape)}")
                (slope,) = torch.autograd.grad(value.sum(), point)
            if norm == "inf":
                delta = (point.detach() - x).add_(slope.sign_(), alpha=step_size).clamp_(-eps, eps)
            else:
                length = _norm(slope, samples).clamp_(min=torch.finfo(x.dtype).tiny)
                delta = point.detach() - x + slope * _over_samples(step_size / length, x)
                delta *= _over_samples((eps / _norm(delta, samples).clamp(min=eps)), x)
            point = x + delta
            if clip is not None:
                point = point.clamp_(*clip)
        if restarts == 1:
            return point
        with torch.no_grad():
            value = objective(model(point), y)
        better = value > best_loss
        best = torch.where(_over_samples(better, x), point, best)
        best_loss = torch.where(better, value, best_loss)
    return best


def kl_shift(logits: Tensor, adversarial_logits: Tensor) -> Tensor:
    """``KL(softmax(logits) || softmax(adversarial_logits))`` of each sample, classes last: what TRADES' attack maximizes.

    Example:
        >>> import torch
        >>> from corollary.losses import kl_shift
        >>> kl_shift(torch.zeros(2, 3), torch.zeros(2, 3))
        tensor([0., 0.])
    """
    clean, moved = F.log_softmax(logits, -1), F.log_softmax(adversarial_logits, -1)
    return (clean.exp() * (clean - moved)).sum(-1)


def need_pair(logits: Tensor, adversarial_logits: Tensor, target: Tensor) -> None:
    """Check two sets of logits (N, C) and their class indices (N,)."""
    need_logits(logits)
    if adversarial_logits.shape != logits.shape:
        raise ValueError(
            f"adversarial_logits must be shaped like logits, {tuple(logits.shape)}, got {tuple(adversarial_logits.shape)}"
        )
    if logits.ndim != 2:
        raise ValueError(f"logits must have shape (N, C), got {tuple(logits.shape)}")
    need_logits(adversarial_logits, "adversarial_logits")
    need_target(logits, target, probabilities=False)


def trades_loss(
    logits: Tensor, adversarial_logits: Tensor, target: Tensor, *, beta: float = 6.0, reduction: str = "mean"
) -> Tensor:
    """TRADES loss; see `TradesLoss`.

    Example:
        >>> import torch
        >>> from corollary.losses import trades_loss
        >>> loss = trades_loss(torch.zeros(2, 4), torch.eye(4)[:2], torch.tensor([0, 1]))
        >>> round(loss.item(), 4)  # log 4 + 6 (log(3 + e) - log 4 - 1/4)
        2.0305
    """
    need_number("beta", beta)
    need_reduction(reduction)
    need_pair(logits, adversarial_logits, target)

    def cross_entropy() -> Tensor:
        return F.cross_entropy(logits, target, ignore_index=NO_INDEX, reduction="none")

    clean = index_guard(cross_entropy, target, logits.shape[1], NO_INDEX)
    return reduce_loss(clean + beta * kl_shift(logits, adversarial_logits), reduction)


class TradesLoss(nn.Module):
    """TRADES: cross-entropy on clean inputs plus ``beta`` times the divergence to the attacked inputs.

    ``CE(h(x), y) + beta * max_{x'} KL(softmax(h(x)) || softmax(h(x')))``. The maximum is the caller's: attack with `pgd` on
    `kl_shift`.

    Args:
        beta: weight of the divergence, at least 0 (``1 / lambda`` in the paper).
        reduction: ``none``, ``mean`` or ``sum``.

    Shape:
        logits and adversarial_logits (N, C), floating; target (N,) int64. The loss is (N,) without reduction.

    Raises:
        TypeError, ValueError: for wrong dtypes and shapes, or arguments out of what is allowed.

    Deviations: none.

    When not to use it: where no perturbation is expected; it costs clean accuracy.

    Example:
        >>> import torch
        >>> from corollary.losses import TradesLoss, kl_shift, pgd
        >>> model, x, y = torch.nn.Linear(64, 10), torch.rand(5, 64), torch.randint(10, (5,))
        >>> clean = model(x).detach()
        >>> attacked = pgd(model, x, y, eps=0.1, step_size=0.02, steps=5, loss=lambda z, _: kl_shift(clean, z))
        >>> TradesLoss(beta=3.0)(model(x), model(attacked), y).backward()

    Source: H. Zhang et al., Theoretically Principled Trade-off between Robustness and Accuracy, ICML 2019, arXiv 1901.08573.
    """

    def __init__(self, beta: float = 6.0, *, reduction: str = "mean") -> None:
        super().__init__()
        need_number("beta", beta)
        need_reduction(reduction)
        self.beta = float(beta)
        self.reduction = reduction

    def forward(self, logits: Tensor, adversarial_logits: Tensor, target: Tensor) -> Tensor:
        """The loss of clean and attacked logits for ``target``."""
        return trades_loss(logits, adversarial_logits, target, beta=self.beta, reduction=self.reduction)

    def extra_repr(self) -> str:
        return arguments(beta=self.beta, reduction=self.reduction)

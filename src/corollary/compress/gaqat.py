"""GAQAT: sharpness-aware training of quantized networks that freezes the task gradient of steps whose gradient has settled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from corollary.compress.lsq import LSQQuantizer
from corollary.optim.sharpness import FixedRadius, _batches, check_at_least_zero


def gradient_disorder(first: Tensor, second: Tensor | None = None) -> Tensor:
    r"""How often two sequences of gradients point in opposite directions.

    .. math:: δ(a, b) = \frac{1}{K} \sum_{i=1}^{K} \mathbb 1[\mathrm{sign}(a_i) = -\mathrm{sign}(b_i) \ne 0]

    Of one sequence alone it is that of :math:`a_1 … a_{K-1}` against :math:`a_2 … a_K`: how often the gradient turns round from
    one step to the next. Random signs give 1/2, a gradient that always points the same way 0.

    Args:
        first: a, the steps along the last axis, (..., K), floating.
        second: b, of the same shape; None for ``first`` one step later.

    Returns:
        (...), in [0, 1]. A NaN in a sequence is a NaN in its result.

    Raises:
        TypeError: a sequence that is not floating.
        ValueError: shapes that differ, or too few steps: one is needed, two for a single sequence.

    Example:
        >>> gradient_disorder(torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, -1.0, 2.0, -2.0]]))
        tensor([0., 1.])

    Source: Jiang et al., "GAQAT", arXiv 2412.05551, section 3, the definition of gradient disorder.
    """
    for name, x in (("first", first), ("second", second)):
        if x is not None and not x.is_floating_point():
            raise TypeError(f"'{name}' must be floating, not {x.dtype}")
    if second is not None and first.shape != second.shape:
        raise ValueError(f"'first' and 'second' must have one shape, not {tuple(first.shape)} and {tuple(second.shape)}")
    needed = 1 if second is not None else 2
    if first.ndim < 1 or first.shape[-1] < needed or not first.numel():
        raise ValueError(f"'first' has shape {tuple(first.shape)}; allowed: (..., K) and not empty, K >= {needed}")
    one, two = (first[..., :-1], first[..., 1:]) if second is None else (first, second)
    # A NaN has the sign 0, so that it is added again by its own difference.
    return (one.sign() * two.sign()).clamp(max=0).neg().add(one - one).add(two - two).mean(-1)


def gaqat_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two parameter groups: all but the quantizers' steps, and the steps, marked as such for `GAQAT`.

    Args:
        model: as `quantize_aware` made it.

    Raises:
        ValueError: a model without quantizers.

    Example:
        >>> from corollary.compress import LSQLinear
        >>> [len(group["params"]) for group in gaqat_groups(nn.Sequential(LSQLinear(4, 3), LSQLinear(3, 2)))]
        [4, 4]
    """
    scales = [m.scale for m in model.modules() if isinstance(m, LSQQuantizer)]
    if not scales:
        raise ValueError("'model' has no quantizer; make it quantization-aware with 'quantize_aware'")
    known = {id(scale) for scale in scales}
    return [{"params": [p for p in model.parameters() if id(p) not in known]}, {"params": scales, "scales": True}]


class GAQAT(FixedRadius):
    r"""Sharpness-aware training of a quantized model whose steps are steadied by leaving out, for a while, one of two gradients.

    Every parameter follows the mean of the task gradient and of the one at a point nearby, as in sharpness-aware gradient matching:

    .. math::
        g_\mathrm{task} = ∇L(θ), \qquad g_\mathrm{smooth} = ∇L\Big(θ + \big(\tfrac{ρ}{\|g_\mathrm{task}\|} - α\big)
        g_\mathrm{task}\Big), \qquad θ ← \mathrm{base}\big(θ, \tfrac12 (m\, g_\mathrm{task} + g_\mathrm{smooth})\big)

    with m = 1. For the steps s of the quantizers the two can pull in opposite directions. Every ``period`` steps the disorder of
    each one's task gradient over that time is taken (`gradient_disorder`: how often its sign turned), and where it is below
    ``threshold``, m is 0 for the next ``period`` steps: the gradient has settled against the other, which is left to act alone.

    Args:
        params: groups from `gaqat_groups`, any other parameters or groups, or an optimizer that is already made.
        base_optimizer: class of the optimizer that takes the step; None where ``params`` is an optimizer.
        rho: radius ρ.
        alpha: α, at least 0: how much of the gradient is taken off the climb.
        threshold: in [0, 1]; 0 freezes nothing, which is sharpness-aware gradient matching.
        period: K, at least 2.
        scales: whether a group's parameters are steps that may be frozen; `gaqat_groups` says so of its second one.
        model: its batch norms keep their running statistics in the second pass.
        foreach: treat all parameters of a dtype and device together; None means yes.
        base_options: given to ``base_optimizer``.

    The window's signs, counts and masks are in ``state`` beside the base's own and go through ``state_dict``.

    Raises:
        TypeError: no ``base_optimizer``, or a complex or distributed parameter.
        ValueError: an option out of range; a period above 128 with steps in half precision, which cannot count so far.
        RuntimeError: ``step`` without a closure, ``second_step`` without ``first_step``, or a sparse gradient.

    Deviations: the paper's text has not been at hand (see its record): that it is the task gradient's own disorder which decides,
    and that a frozen step is looked at again after the next period, is read from what its reviewers quote.

    When not to use it: where a step's cost of two passes is not paid back; without quantizers it is gradient matching alone.

    Example:
        >>> from corollary.compress import LSQConfig, quantize_aware
        >>> model, x = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1)), torch.randn(64, 6)
        >>> _ = quantize_aware(model, LSQConfig(bits=4), x)
        >>> optimizer = GAQAT(gaqat_groups(model), torch.optim.SGD, lr=0.05, period=10, threshold=0.3, model=model)
        >>> def closure():
        ...     loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
        ...     loss.backward()
        ...     return loss
        >>> losses = [optimizer.step(closure).item() for _ in range(60)]
        >>> losses[-1] < losses[0]
        True

    Reference:
        Jiang et al., "GAQAT: gradient-adaptive quantization-aware training for domain generalization", arXiv 2412.05551, section
        3; Wang et al., "Sharpness-Aware Gradient Matching for Domain Generalization", arXiv 2303.10353, and its authors' code.
    """

    shards = False

    def __init__(
        self,
        params: ParamsT | Optimizer,
        base_optimizer: Callable[..., Optimizer] | None = None,
        rho: float = 0.05,
        *,
        alpha: float = 0.0,
        threshold: float = 0.3,
        period: int = 50,
        scales: bool = False,
        model: nn.Module | None = None,
        foreach: bool | None = None,
        **base_options: Any,
    ) -> None:
        own = {"rho": rho, "alpha": alpha, "threshold": threshold, "period": period, "scales": scales, "foreach": foreach}
        own["age"] = 0  # steps since the last decision
        if foreach is not None:
            base_options["foreach"] = foreach
        self._task: dict[Tensor, Tensor] = {}
        super().__init__(params, base_optimizer, model, own, base_options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._task = {}

    def _check_group(self, group: Mapping[str, Any]) -> None:
        check_at_least_zero(group, "rho", "alpha")
        if not 0 <= group["threshold"] <= 1:
            raise ValueError(f"'threshold' must be in [0, 1], not {group['threshold']}")
        period = group["period"]
        if isinstance(period, bool) or not isinstance(period, int) or period < 2:
            raise ValueError(f"'period' must be an integer of at least 2, not {period!r}")
        if group["scales"] and period > 128 and any(p.dtype in (torch.float16, torch.bfloat16) for p in group["params"]):
            raise ValueError(f"'period' must be at most 128 for steps in half precision, not {period}")

    def _scales(self, group: Mapping[str, Any], params: Sequence[Tensor]) -> list[Tensor] | None:
        return None

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` gave; a climb that has begun is forgotten."""
        super().load_state_dict(state_dict)
        self._task = {}

    @torch.no_grad()
    def first_step(self, zero_grad: bool = True) -> None:
        """Take the task gradients that ``backward`` left, and climb by them; then run forward and backward again, then `second_step`.

        The gradients are taken out of ``grad``, whatever ``zero_grad`` says: they are needed again.
        """
        task = {p: p.grad for group in self.param_groups for p in group["params"] if p.grad is not None}
        radius: Callable[[Mapping[str, Any]], float | Tensor] = lambda group: group["rho"]  # noqa: E731
        if task and any(group["alpha"] for group in self.param_groups):
            norm = nn.utils.get_total_norm([g for g in task.values() if g.layout is torch.strided])
            norm = norm.nan_to_num(nan=0.0, posinf=0.0)
            radius = lambda group: group["rho"] - group["alpha"] * norm  # noqa: E731
        self._climb(radius, zero_grad=False)
        self._task = task
        for p in task:
            p.grad = None

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Go back to θ, mix the two gradients, let the base optimizer step, and decide on freezing where a period has passed.

        Raises:
            RuntimeError: `first_step` did not come before.
        """
        task = self._task
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and p in task]
            for batch in _batches(params, group["foreach"]):
                self._mix(group, batch, [task[p] for p in batch])
        super().second_step(zero_grad)
        for group in self.param_groups:
            if group["scales"]:
                self._watch(group, [p for p in group["params"] if p in task], task)
        self._task = {}

    def _return(self) -> None:
        super()._return()
        self._task = {}

    def _mix(self, group: Mapping[str, Any], params: list[Tensor], task: list[Tensor]) -> None:
        """g_smooth becomes (m g_task + g_smooth) / 2 in place."""
        grads: Any = [p.grad for p in params]
        if group["scales"]:
            masks = [self.state[p].get("active") for p in params]
            task = [g if mask is None else g * mask for g, mask in zip(task, masks, strict=True)]
        torch._foreach_add_(grads, task)
        torch._foreach_mul_(grads, 0.5)

    def _watch(self, group: dict[str, Any], params: Sequence[Tensor], task: Mapping[Tensor, Tensor]) -> None:
        """Count the turns of the task gradient's sign; at the end of a period the share of turns says what is frozen."""
        for p in params:
            if "active" not in self.state[p]:  # after the base's step: an empty state is how the base knows a new parameter
                self.state[p] |= {"active": torch.ones_like(p), "turns": torch.zeros_like(p), "last": torch.zeros_like(p)}
        if not params:
            return
        signs = torch._foreach_sign([task[p] for p in params])
        last, turns = ([self.state[p][key] for p in params] for key in ("last", "turns"))
        against = torch._foreach_mul(signs, last)
        torch._foreach_clamp_max_(against, 0)
        torch._foreach_sub_(turns, against)
        torch._foreach_copy_(last, signs)
        group["age"] += 1
        if group["age"] < group["period"]:
            return
        for p, count in zip(params, turns, strict=True):
            self.state[p]["active"].copy_(count / (group["period"] - 1) >= group["threshold"])
        torch._foreach_zero_(turns)
        torch._foreach_zero_(last)
        group["age"] = 0

    @torch.no_grad()
    def frozen(self) -> float:
        """The share of steps whose task gradient is left out now."""
        states = [self.state.get(p, {}) for group in self.param_groups for p in group["params"]]
        masks = [state["active"].flatten().double() for state in states if "active" in state]
        return float(1 - torch.cat(masks).mean()) if masks else 0.0

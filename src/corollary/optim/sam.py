"""SAM: gradients at the worst point of a ball around the parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from corollary.optim.sharpness import FixedRadius, check_at_least_zero


class SAM(FixedRadius):
    r"""Sharpness-aware minimization: a base optimizer fed with gradients from the top of a ball of radius ρ.

    .. math::
        ε = ρ \, \frac{∇L(θ)}{\|∇L(θ)\|_2 + 10^{-12}}, \qquad θ ← \mathrm{base}\big(θ, ∇L(θ + ε)\big)

    The norm runs over all parameters of all groups. Where it is zero or not finite, finite gradients give ε = 0, so that a NaN in
    one parameter's gradient does not spread to the others.

    Args:
        params: parameters or groups (a group may have its own ``rho``), or an optimizer that is already made, to be wrapped.
        base_optimizer: class of the optimizer that takes the step, such as ``torch.optim.AdamW``; None where ``params`` is an
            optimizer.
        rho: radius ρ, in the parameters' own units.
        model: its batch norms keep their running statistics in the second pass; None leaves them alone.
        foreach: treat all parameters of a dtype and device together; None means yes. The base gets it too where it is given.
        base_options: given to ``base_optimizer``: ``lr`` and the like.

    ``param_groups`` and ``state`` are the base optimizer's own, and so is ``state_dict()``. Parameters sharded by ``fully_shard``
    work: the norm is that of the whole gradient.

    Raises:
        TypeError: no ``base_optimizer``, or a complex parameter.
        ValueError: ``rho`` negative, or a base that needs a closure itself.
        RuntimeError: ``step`` without a closure, ``second_step`` without ``first_step``, or a sparse gradient.

    When not to use it: where a step's cost of twice the base's is not paid back, or a closure cannot be run twice on one batch.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1)
        >>> x, y = torch.randn(64, 3), torch.randn(64, 1)
        >>> optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.05)
        >>> def closure():
        ...     loss = torch.nn.functional.mse_loss(model(x), y)
        ...     loss.backward()
        ...     return loss
        >>> losses = [optimizer.step(closure).item() for _ in range(50)]
        >>> losses[-1] < losses[0]
        True

    Reference:
        Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving Generalization",
        arXiv 2010.01412, Algorithm 1.
    """

    def __init__(
        self,
        params: ParamsT | Optimizer,
        base_optimizer: Callable[..., Optimizer] | None = None,
        rho: float = 0.05,
        *,
        model: nn.Module | None = None,
        foreach: bool | None = None,
        **base_options: Any,
    ) -> None:
        if foreach is not None:
            base_options["foreach"] = foreach
        super().__init__(params, base_optimizer, model, {"rho": rho, "foreach": foreach}, base_options)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        check_at_least_zero(group, "rho")

    def _scales(self, group: Mapping[str, Any], params: Sequence[Tensor]) -> list[Tensor] | None:
        return None

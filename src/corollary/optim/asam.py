"""ASAM: SAM in a neighbourhood that is as wide for each parameter as the parameter is large."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from corollary.optim.sharpness import FixedRadius, check_at_least_zero


class ASAM(FixedRadius):
    r"""Adaptive sharpness-aware minimization: SAM that does not change when a layer's weights are scaled.

    With :math:`T = |θ| + η` and products taken entry by entry,

    .. math::
        ε = ρ \, \frac{T^2 ⊙ ∇L(θ)}{\|T ⊙ ∇L(θ)\|_2 + 10^{-12}}, \qquad θ ← \mathrm{base}\big(θ, ∇L(θ + ε)\big)

    Args:
        params: parameters or groups (a group may have its own ``rho`` and ``eta``), or an optimizer that is already made.
        base_optimizer: class of the optimizer that takes the step; None where ``params`` is an optimizer.
        rho: radius ρ, relative to the parameters; about ten times SAM's.
        eta: η, so that a weight of zero can move; 0 gives the form in which TRAM uses it.
        model: its batch norms keep their running statistics in the second pass; None leaves them alone.
        foreach: treat all parameters of a dtype and device together; None means yes. The base gets it too where it is given.
        base_options: given to ``base_optimizer``: ``lr`` and the like.

    Raises:
        TypeError: no ``base_optimizer``, or a complex parameter.
        ValueError: ``rho`` or ``eta`` negative, or a base that needs a closure itself.
        RuntimeError: ``step`` without a closure, ``second_step`` without ``first_step``, or a sparse gradient.

    Deviations: the authors' code adapts to tensors named "weight" alone; here a group for the biases can have its own options.

    When not to use it: as `SAM`; and where parameters begin at zero (an adapter's second factor), which η alone lets move.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1)
        >>> x, y = torch.randn(64, 3), torch.randn(64, 1)
        >>> optimizer = ASAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5)
        >>> def closure():
        ...     loss = torch.nn.functional.mse_loss(model(x), y)
        ...     loss.backward()
        ...     return loss
        >>> losses = [optimizer.step(closure).item() for _ in range(50)]
        >>> losses[-1] < losses[0]
        True

    Reference:
        Kwon, Kim, Park, Choi, "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural
        Networks", arXiv 2102.11600, Algorithm 1.
    """

    def __init__(
        self,
        params: ParamsT | Optimizer,
        base_optimizer: Callable[..., Optimizer] | None = None,
        rho: float = 0.5,
        eta: float = 0.01,
        *,
        model: nn.Module | None = None,
        foreach: bool | None = None,
        **base_options: Any,
    ) -> None:
        if foreach is not None:
            base_options["foreach"] = foreach
        super().__init__(params, base_optimizer, model, {"rho": rho, "eta": eta, "foreach": foreach}, base_options)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        check_at_least_zero(group, "rho", "eta")

    def _scales(self, group: Mapping[str, Any], params: Sequence[Tensor]) -> list[Tensor] | None:
        return magnitudes(params, group["eta"])


def magnitudes(params: Sequence[Tensor], eta: float) -> list[Tensor]:
    """:math:`|θ| + η` for each parameter."""
    scales = list(torch._foreach_abs(list(params)))
    if eta:
        torch._foreach_add_(scales, eta)
    return scales

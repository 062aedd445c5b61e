"""Gradient descent with a backtracking line search, the deterministic inner method of target-space surrogates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT


class ArmijoGD(Optimizer):
    r"""Gradient descent whose step size is found by backtracking to Armijo's condition.

    From ``expand`` times the last step size (or ``lr``, the first time), η shrinks by ``backtrack`` until

    .. math::
        f(θ - η g) ≤ f(θ) - c \, η \, ‖g‖^2 .

    Meant for deterministic functions: the closure must be the same function each time it is called. It gives the loss and
    calls ``backward``; within the search it is called without gradients, and must then leave ``backward`` out::

        def closure():
            optimizer.zero_grad()
            loss = f(model)
            if loss.requires_grad:
                loss.backward()
            return loss

    Args:
        params: parameters of one group: real, dense.
        lr: first step size that is tried.
        c: share of the decrease that the gradient promises, in (0, 1).
        backtrack: factor on a step size that failed, in (0, 1).
        expand: factor, at least 1, on the last step size before the next search.
        max_search: most step sizes that are tried; where none will do, nothing moves.

    Raises:
        ValueError: an option out of range, a second group, or no closure.
        RuntimeError: a sparse gradient.

    When not to use it: on losses that change from call to call.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([3.0]))
        >>> optimizer = ArmijoGD([x])
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = (x**2).sum()
        ...     if loss.requires_grad:
        ...         loss.backward()
        ...     return loss
        >>> optimizer.step(closure).item(), x.abs().item() < 3
        (9.0, True)

    Reference:
        Armijo, "Minimization of functions having Lipschitz continuous first partial derivatives", 1966; with the defaults that
        the authors of target-based surrogates (arXiv 2302.02607) use.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 10.0,
        *,
        c: float = 0.5,
        backtrack: float = 0.9,
        expand: float = 1.8,
        max_search: int = 100,
    ) -> None:
        for name, value, good, allowed in (
            ("lr", lr, lr >= 0, "at least 0"),
            ("c", c, 0 < c < 1, "in (0, 1)"),
            ("backtrack", backtrack, 0 < backtrack < 1, "in (0, 1)"),
            ("expand", expand, expand >= 1, "at least 1"),
            ("max_search", max_search, max_search >= 1, "at least 1"),
        ):
            if not good:
                raise ValueError(f"'{name}' must be {allowed}, not {value}")
        super().__init__(params, {"lr": lr, "c": c, "backtrack": backtrack, "expand": expand, "max_search": max_search})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the only parameter group; a second one is refused, because one step size covers all parameters."""
        if self.param_groups:
            raise ValueError("ArmijoGD takes one parameter group, because one step size covers all parameters")
        super().add_param_group(param_group)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the search depends on values
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; gives the loss before it.

        Args:
            closure: gives the loss, after ``backward`` where gradients are enabled, see the class.
        """
        if closure is None:
            raise ValueError("step() needs a 'closure': the line search evaluates the loss again")
        with torch.enable_grad():
            loss = closure()
        group = self.param_groups[0]
        params = [p for p in group["params"] if p.grad is not None]
        gradients: list[Tensor] = [p.grad for p in params if p.grad is not None]
        if any(g.layout is not torch.strided for g in gradients):
            raise RuntimeError("ArmijoGD needs dense gradients, not sparse ones")
        square = sum(float(g.double().square().sum()) for g in gradients)
        if not square or not group["lr"]:
            return loss
        begin = torch._foreach_add(params, 0)
        size, value = group["lr"], float(loss)
        rounding = torch.finfo(torch.float32 if params[0].dtype in (torch.float16, torch.bfloat16) else params[0].dtype).eps
        for _ in range(group["max_search"]):
            if group["c"] * size * square <= rounding * abs(value):
                break  # nothing that could still be seen in the loss
            torch._foreach_copy_(params, torch._foreach_add(begin, gradients, alpha=-size))
            if float(closure()) <= value - group["c"] * size * square:
                group["lr"] = size * group["expand"]
                return loss
            size *= group["backtrack"]
        torch._foreach_copy_(params, begin)
        return loss

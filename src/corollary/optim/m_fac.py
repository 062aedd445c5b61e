"""M-FAC: gradient descent preconditioned by the inverse empirical Fisher matrix of the last gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from corollary.optim.sliding_fisher import SlidingFisher, zeros_window

_SHARED = ("ngrads", "damp")


class MFAC(Optimizer):
    r"""SGD whose gradient is multiplied by the inverse empirical Fisher matrix of the last m gradients of all parameters.

    The gradient of step t takes the oldest one's place in the window, and then

    .. math::
        F_t = λ I + \frac{1}{m} \sum_{i=t-m+1}^{t} g_i g_i^\top, \quad
        u_t = F_t^{-1} g_t, \quad
        v_t = β v_{t-1} + (1-β) u_t, \quad
        θ_t = θ_{t-1} - η v_t

    without any matrix larger than m × m beside the window: O(d m + m³) a step (see `SlidingFisher`). Before m steps the missing
    gradients are zeros and still count in m, as in the authors' code.

    Args:
        params: parameters or parameter groups, real and floating; under ``fully_shard`` too. All share one Fisher matrix.
        lr: step size η. It does not transfer from SGD: along the window's gradients the step has the length of Newton's.
        momentum: β in [0, 1), of a running mean of steps (not torch's running sum).
        weight_decay: multiple of the parameter that is added to its gradient, before the window.
        ngrads: m, gradients in the window. State takes m times the memory of the parameters: 4 kilobytes for each float32
            parameter at the authors' 1024.
        damp: λ > 0. Where the window's gradients say nothing, the step is η/λ times the gradient.
        foreach: update the parameters of a group together; None means yes.

    State, for each parameter: ``grads`` (m, \*shape), its part of the window, and ``momentum_buffer`` if β > 0, both in the
    parameter's dtype, or float32 for half precision. The first of them also keeps ``gram`` (m, m), float64, for all.

    A parameter without a gradient in a step counts as one of gradient zero, and does not move. A step whose gradients hold a NaN
    or infinity is refused, because the window would carry it on for m steps.

    Raises:
        ValueError: a hyperparameter out of range, ``ngrads`` or ``damp`` differing between groups, gradients that are not
            finite (nothing has changed then), or a loaded state of other shapes.
        TypeError: a complex or integer parameter.
        RuntimeError: a sparse gradient.

    When not to use it: where m times the parameters does not fit in memory; where batches are so small that a few hundred
    gradients are mostly noise.

    Deviations from the paper: those of `SlidingFisher`. The authors' ``sparse`` option is not needed: under a pruning mask of
    ``torch.nn.utils.prune`` gradients, and so steps, are zero where the mask is.

    Example:
        >>> import torch
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch...>
        >>> model = torch.nn.Linear(3, 1)
        >>> x, y = torch.randn(64, 3), torch.randn(64, 1)
        >>> optimizer = MFAC(model.parameters(), lr=0.05, ngrads=16, damp=0.1)
        >>> losses = []
        >>> for _ in range(50):
        ...     loss = torch.nn.functional.mse_loss(model(x), y)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        ...     losses.append(loss.item())
        >>> losses[-1] < losses[0]
        True

    Reference:
        Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information",
        arXiv 2107.03356, the optimizer built on the dynamic algorithm.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        ngrads: int = 1024,
        damp: float = 1e-5,
        *,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "ngrads": ngrads,
            "damp": damp,
            "foreach": foreach,
            "iteration": 0,  # steps taken, kept here to be saved; the window's next row counts by the first group's
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as ``torch.optim.Optimizer`` does; to the window its past gradients are zeros."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1], self.param_groups[0])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state, keeping the dtypes it was saved in; the next step equals that of the saved run bit by bit."""
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        groups = state_dict["param_groups"]
        for saved_id, param in zip(saved_ids, self._params(), strict=False):
            wanted = {"grads": (groups[0].get("ngrads"), *param.shape), "momentum_buffer": tuple(param.shape)}
            for key, value in state_dict["state"].get(saved_id, {}).items():
                if key in wanted and tuple(value.shape) != wanted[key]:
                    raise ValueError(
                        f"state '{key}' of parameter {saved_id} has shape {tuple(value.shape)}; this one needs {wanted[key]}"
                    )
        super().load_state_dict(dict(state_dict))
        # The base class casts state to each parameter's dtype: the Gram matrix and half precision's float32 would be rounded.
        for saved_id, param in zip(saved_ids, self._params(), strict=True):
            for key, value in state_dict["state"].get(saved_id, {}).items():
                self.state[param][key] = value.detach().to(param.device, copy=True)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a factorization that looks at its own success cannot be traced
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; gives what ``closure`` returned, or None.

        Args:
            closure: computes the loss and its gradients and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = {p: g for group in self.param_groups for p, g in _decayed_gradients(group)}
        if not gradients:
            return loss
        first = self.param_groups[0]
        made = [p for p in gradients if "grads" not in self.state.get(p, {})]
        for p in made:
            self.state[p]["grads"] = zeros_window(p, first["ngrads"])
        seen = [p for p in self._params() if "grads" in self.state.get(p, {})]
        # Kept with the first parameter of the window, whichever that was; a late one starts with scalar products of zero.
        owner = next((p for p in seen if "gram" in self.state[p]), None)
        fisher = SlidingFisher(
            [self.state[p]["grads"] for p in seen], first["damp"], gram=None if owner is None else self.state[owner]["gram"]
        )
        try:
            pieces = self._precondition(fisher, first["iteration"] % first["ngrads"], [gradients.get(p) for p in seen])
        except ValueError:
            for p in made:
                del self.state[p]
            raise
        if owner is None:
            self.state[seen[0]]["gram"] = fisher.gram
        steps = dict(zip(seen, pieces, strict=True))
        for group in self.param_groups:
            members = [p for p in group["params"] if p in gradients]
            for batch in [members] if group["foreach"] is not False else [[p] for p in members]:
                self._update(group, batch, [steps[p] for p in batch])
        for group in self.param_groups:
            group["iteration"] += 1
        return loss

    def _precondition(self, fisher: SlidingFisher, row: int, gradients: list[Tensor | None]) -> list[Tensor]:
        fisher.update(row, gradients)
        return fisher.solve_row(row)

    def inverse_fisher_product(self, vectors: list[Tensor]) -> list[Tensor]:
        """F⁻¹ x for an x in the shapes of the parameters that have had a gradient, with the window as the last step left it."""
        seen = [p for p in self._params() if "grads" in self.state.get(p, {})]
        if not seen:
            raise RuntimeError("the window is empty: take a step first")
        owner = next(p for p in seen if "gram" in self.state[p])
        windows = [self.state[p]["grads"] for p in seen]
        return SlidingFisher(windows, self.param_groups[0]["damp"], gram=self.state[owner]["gram"]).solve(vectors)

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _update(self, group: dict[str, Any], params: list[Tensor], steps: list[Tensor]) -> None:
        beta = group["momentum"]
        if beta and params:
            for p, u in zip(params, steps, strict=True):
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(u)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_lerp_(buffers, steps, 1 - beta)
            steps = buffers
        if not params:
            return
        # A half-precision parameter is added to in float32 and rounded once.
        wide = [p if p.dtype == u.dtype else p.to(u.dtype) for p, u in zip(params, steps, strict=True)]
        torch._foreach_add_(wide, steps, alpha=-float(group["lr"]))
        for p, w in zip(params, wide, strict=True):
            if w is not p:
                p.copy_(w)


def _decayed_gradients(group: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
    params = [p for p in group["params"] if p.grad is not None]
    gradients = [p.grad for p in params]
    for gradient in gradients:
        if gradient.layout is not torch.strided:
            raise RuntimeError(f"MFAC needs dense gradients, not {gradient.layout}: use nn.Embedding(sparse=False)")
    if group["weight_decay"] and params:
        gradients = list(torch._foreach_add(gradients, params, alpha=group["weight_decay"]))
    return list(zip(params, gradients, strict=True))


def _check_group(group: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    for i, param in enumerate(group["params"]):
        if not param.is_floating_point():
            kind = "complex (see torch.view_as_real)" if param.is_complex() else "not floating"
            raise TypeError(f"'params[{i}]' is {param.dtype}, {kind}; MFAC takes real floating parameters")
    for name, good, allowed in (
        ("lr", group["lr"] >= 0, "at least 0"),
        ("momentum", 0 <= group["momentum"] < 1, "in [0, 1)"),
        ("weight_decay", group["weight_decay"] >= 0, "at least 0"),
        ("ngrads", isinstance(group["ngrads"], int) and group["ngrads"] >= 1, "an integer of at least 1"),
        ("damp", 0 < group["damp"] < math.inf, "above 0 and finite"),
    ):
        if not good:
            raise ValueError(f"'{name}' must be {allowed}, not {group[name]}")
    for name in _SHARED:
        if group[name] != first[name]:
            raise ValueError(
                f"'{name}' must be the same in every group, because one Fisher matrix covers all parameters; "
                f"the first group has {first[name]}, this one {group[name]}"
            )

"""AdaGrad-Norm: one adaptive step size for all parameters, from the accumulated norm of the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

_Work = tuple[dict[str, Any], list[Tensor], list[Tensor]]  # a group, its parameters that have gradients, those gradients
_SHARED = ("initial_accumulator_value", "eps")


class AdaGradNorm(Optimizer):
    r"""AdaGrad with one number in place of a number for each entry: the accumulated squared norm of the whole gradient.

    .. math::
        b_k^2 = b_{k-1}^2 + \|g_k\|^2, \qquad θ_{k+1} = θ_k - \frac{α}{b_k + ε} g_k

    where the norm runs over the parameters of all groups together, and α may differ between groups. It is the optimizer of
    AdAdaGrad-Norm, whose batch size `norm_test` sets.

    Args:
        params: parameters or parameter groups: real, floating, with dense gradients.
        lr: step size α; the first step has a length near it, whatever the scale of the loss.
        initial_accumulator_value: :math:`b_0^2 > 0`, which bounds the first step where the first gradient is small.
        eps: ε, added to the root.
        weight_decay: λ, an L2 penalty: λθ is added to the gradient before its norm is taken, as in ``torch.optim.Adagrad``.
        foreach: update all parameters together; None means yes.

    State, for each parameter: ``step`` and ``sum`` (the parameter's own share of :math:`b_k^2 - b_0^2`), both scalars on the
    parameter's device, in float32 or, for float64 parameters, float64. Of a DTensor the norm is that of the whole tensor, so
    that every process of ``fully_shard`` takes the step of a single one.

    Raises:
        ValueError: a hyperparameter out of range, or ``initial_accumulator_value`` or ``eps`` differing between groups.
        TypeError: a complex parameter.
        RuntimeError: a sparse gradient, or a gradient with NaN or infinity: it would put a NaN into every parameter, so
            ``step`` refuses before anything has moved. The check costs one transfer of a scalar a step.

    When not to use it: where gradients of different layers or rare features differ by orders of magnitude, which
    ``torch.optim.Adagrad`` rescales entry by entry; with a step size that never recovers from one huge early gradient.

    Deviations from the authors' code: there the optimizer of this name keeps a sum for each row of a matrix and for each entry
    of a bias; here, as in the paper, one for all.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1)
        >>> x, y = torch.randn(64, 3), torch.randn(64, 1)
        >>> optimizer = AdaGradNorm(model.parameters(), lr=1.0)
        >>> losses = []
        >>> for _ in range(30):
        ...     optimizer.zero_grad()
        ...     loss = torch.nn.functional.mse_loss(model(x), y)
        ...     loss.backward()
        ...     optimizer.step()
        ...     losses.append(loss.item())
        >>> losses[-1] < losses[0]
        True

    Reference:
        Lau, Liu, Kolar, "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods", arXiv 2402.11215,
        AdAdaGrad-Norm; the optimizer is that of Ward, Wu, Bottou, arXiv 1806.01811, Algorithm 1.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        *,
        initial_accumulator_value: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
            "weight_decay": weight_decay,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as ``torch.optim.Optimizer`` does, checking its parameters and options."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1], self.param_groups[0])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state; the next step equals that of the saved run bit by bit."""
        super().load_state_dict(dict(state_dict))
        # The base class casts floating state to the parameter's dtype, which would round the sums of half precision.
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for saved_id, param in zip(saved_ids, params, strict=True):
            for key, value in state_dict["state"].get(saved_id, {}).items():
                tensor = torch.as_tensor(value)
                if tensor.dim():
                    raise ValueError(f"state '{key}' has shape {tuple(tensor.shape)}; AdaGradNorm keeps scalars: ()")
                self.state[param][key] = tensor.to(param.device, copy=True)

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
        work: list[_Work] = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            gradients = [_dense(p.grad) for p in params]
            if group["weight_decay"] and params:
                gradients = list(torch._foreach_add(gradients, params, alpha=group["weight_decay"]))
            work.append((group, params, gradients))
        if any(params for _, params, _ in work):
            root = math.sqrt(self._accumulate(work))
            for group, params, gradients in work:
                scale = -float(group["lr"]) / (root + group["eps"])
                if group["foreach"] is False:
                    for param, gradient in zip(params, gradients, strict=True):
                        param.add_(gradient, alpha=scale)
                elif params:
                    torch._foreach_add_(params, gradients, alpha=scale)
        return loss

    def _accumulate(self, work: Sequence[_Work]) -> float:
        """Add the gradients' squared norms to the state and give b_k²; where one is not finite, raise and add none."""
        grown = {}
        for group, params, gradients in work:
            for param, norm in zip(params, _norms(gradients, loop=group["foreach"] is False), strict=True):
                earlier = self.state[param].get("sum") if param in self.state else None
                grown[param] = norm.square() if earlier is None else earlier + norm.square()
        # Parameters that had a gradient earlier, but have none now, keep their share.
        rest = [
            self.state[p]["sum"] for group in self.param_groups for p in group["params"] if p in self.state and p not in grown
        ]
        sums = [*grown.values(), *rest]
        shares = torch.stack([s.double().to(sums[0].device) for s in sums]).tolist()  # the one transfer of the step
        for number, share in enumerate(shares):
            if not math.isfinite(share):
                raise RuntimeError(
                    f"the norm of gradient {number}, counting parameters that have one, is {share}, not finite: a NaN or an "
                    "infinity would scale every parameter, so nothing was moved"
                )
        for param, total in grown.items():
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros((), dtype=total.dtype, device=total.device)
            state["step"] += 1
            state["sum"] = total
        return float(self.param_groups[0]["initial_accumulator_value"]) + math.fsum(shares)


def _norms(gradients: Sequence[Tensor], loop: bool) -> list[Tensor]:
    """Euclidean norms as scalars: float64 of float64, else float32; of a DTensor over all its shards."""
    found: dict[int, Tensor] = {}
    kinds: dict[torch.dtype, list[int]] = {}
    for i, gradient in enumerate(gradients):
        kinds.setdefault(torch.float64 if gradient.dtype == torch.float64 else torch.float32, []).append(i)
    for dtype, places in kinds.items():
        batch = [gradients[i] for i in places]
        norms = [torch.linalg.vector_norm(g, dtype=dtype) for g in batch] if loop else torch._foreach_norm(batch, 2, dtype)
        found.update(zip(places, norms, strict=True))
    whole = [getattr(found[i], "full_tensor", None) for i in range(len(gradients))]
    return [found[i] if gather is None else gather() for i, gather in enumerate(whole)]


def _dense(gradient: Tensor) -> Tensor:
    if gradient.layout is not torch.strided:
        raise RuntimeError(f"AdaGradNorm needs dense gradients, not {gradient.layout}: use nn.Embedding(sparse=False)")
    return gradient


def _check_group(group: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    for i, param in enumerate(group["params"]):
        if param.is_complex():
            raise TypeError(f"'params[{i}]' is {param.dtype}; AdaGradNorm takes real parameters (see torch.view_as_real)")
    start = group["initial_accumulator_value"]
    for name, value, good, allowed in (
        ("lr", group["lr"], group["lr"] >= 0, "at least 0"),
        ("initial_accumulator_value", start, 0 < start < math.inf, "above 0 and finite"),
        ("eps", group["eps"], group["eps"] >= 0, "at least 0"),
        ("weight_decay", group["weight_decay"], group["weight_decay"] >= 0, "at least 0"),
    ):
        if not good:
            raise ValueError(f"'{name}' must be {allowed}, not {value}")
    for name in _SHARED:
        if group[name] != first[name]:
            raise ValueError(
                f"'{name}' must be the same in every group, because one sum covers all parameters; "
                f"the first group has {first[name]}, this one {group[name]}"
            )

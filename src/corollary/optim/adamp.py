"""AdamP and SGDP: momentum steps without the radial component on weights whose scale does not matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from corollary.optim._batched import BatchedOptimizer, State, check_options
from corollary.optim._scale_invariant import ScaleInvariant, on_host


class AdamP(BatchedOptimizer):
    r"""AdamW that leaves the norm of scale-invariant weights alone.

    A weight before a normalization layer is scale-invariant: its gradient stands at right angles to it, so a momentum step only
    lengthens it, and the *effective* step size :math:`η / ‖w‖^2` shrinks faster than the schedule says. With Adam's update
    :math:`u_t`, for every parameter of two or more dimensions,

    .. math::
        w_t = w_{t-1} - η\, Π_{w}(u_t), \qquad
        Π_w(u) = u - \frac{w^\top u}{(‖w‖ + ε)^2}\, w
        \quad\text{if}\quad \max_r |\cos(w_r, ∇f_r)| < \frac{δ}{\sqrt{\dim w_r}}, \quad\text{else } u

    The test is made first for the rows :math:`w_r` along dimension 0 (channels, as a BatchNorm scales them), then for the whole
    tensor (as a LayerNorm does); the first view that passes is projected, row by row or as one. Weight decay is decoupled, and
    multiplied by ``wd_ratio`` where a projection was made, for decay only changes the effective step size there.

    Args:
        params: parameters or parameter groups: real, floating, dense.
        lr: step size η.
        betas: decay rates (β₁, β₂) of the gradient's mean and of its square's mean.
        eps: ε, added to the square root, and to a norm before it divides.
        weight_decay: λ, decoupled: :math:`w` is multiplied by :math:`1 - ηλ`, or :math:`1 - ηλ\,r` (r = ``wd_ratio``).
        delta: δ, threshold of the cosine test; 0 projects nothing.
        wd_ratio: share of the weight decay that projected parameters get, in [0, 1].
        nesterov: look ahead with the current gradient: :math:`β_1 m_t + (1-β_1) ∇f` in place of :math:`m_t`.
        foreach: update all parameters of a dtype and device together; None means yes.

    State, for each parameter: ``step``, ``exp_avg``, ``exp_avg_sq``, in the parameter's dtype, or float32 for half precision,
    whose steps are computed in float32. A NaN in a gradient stays with its own parameter.

    Under ``fully_shard`` the sums over rows are gathered, so that every process makes the decisions of one process.

    Raises:
        ValueError: a hyperparameter out of range, or a loaded state of another shape.
        TypeError: a complex parameter.
        RuntimeError: a sparse gradient.

    When not to use it: on networks without normalization layers it is AdamW with the cost of a test. A weight that happens to
    stand at right angles to its gradient is projected too (an embedding under LayerNorm, often).

    Deviations from the paper: the test's second view and ``wd_ratio`` are as in the authors' code.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
        >>> x, y = torch.randn(64, 4), torch.randint(2, (64,))
        >>> optimizer = AdamP(model.parameters(), lr=0.01)
        >>> before = model[0].weight.norm(dim=1)
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     nn.functional.cross_entropy(model(x), y).backward()
        ...     optimizer.step()
        >>> bool((model[0].weight.norm(dim=1) / before < 1.1).all())
        True

    Reference:
        Heo, Chun, Oh, Han, Yun, Kim, Uh, Ha, "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant
        Weights", arXiv 2006.08217, Algorithm 2.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "nesterov": nesterov,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        check_options(
            group,
            {
                "lr": (group["lr"] >= 0, "at least 0"),
                "betas[0]": (0 <= beta1 < 1, "in [0, 1)"),
                "betas[1]": (0 <= beta2 < 1, "in [0, 1)"),
                **_common_options(group),
            },
        )

    def _new_state(self, param: Tensor, dtype: torch.dtype, group: Mapping[str, Any]) -> State:
        return {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format),
        }

    def _update(self, group: Mapping[str, Any], params: list[Tensor], grads: list[Tensor], states: list[State]) -> None:
        lr, weight_decay = float(group["lr"]), group["weight_decay"]
        torch._foreach_add_([s["step"] for s in states], 1)
        weights = ScaleInvariant(params, grads, group)
        means, squares = ([s[key] for s in states] for key in ("exp_avg", "exp_avg_sq"))
        if not group["nesterov"] and _one_pass(params, grads, means, squares):
            _fused_adam(weights.others(params), weights.others(grads), weights.others(states), group, lr, weight_decay)
            # On zeros, one unit of step uphill, it leaves Adam's update there.
            updates = [torch.zeros_like(p, memory_format=torch.preserve_format) for p in weights.among(params)]
            _fused_adam(updates, weights.among(grads), weights.among(states), group, -1.0, 0.0)
        else:
            made = _adam_updates(grads, states, group)
            if weight_decay and weights.others(params):
                torch._foreach_mul_(weights.others(params), 1 - lr * weight_decay)
            if weights.others(params):
                torch._foreach_add_(weights.others(params), weights.others(made), alpha=-lr)
            updates = weights.among(made)
        if updates:
            weights.project(params, updates, (0.0, 1.0), lr, lr * weight_decay)
            torch._foreach_add_(weights.among(params), updates, alpha=-lr)


def _fused_adam(
    targets: list[Tensor], grads: list[Tensor], states: list[State], group: Mapping[str, Any], lr: float, weight_decay: float
) -> None:
    if targets:
        torch._fused_adamw_(
            targets,
            grads,
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            lr=lr,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=weight_decay,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


def _adam_updates(grads: list[Tensor], states: list[State], group: Mapping[str, Any]) -> list[Tensor]:
    (beta1, beta2), eps = group["betas"], group["eps"]
    counters, means, squares = ([s[key] for s in states] for key in ("step", "exp_avg", "exp_avg_sq"))
    torch._foreach_lerp_(means, grads, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
    taken = [float(c) for c in counters]
    denominators = torch._foreach_sqrt(squares)
    torch._foreach_mul_(denominators, [(1 - beta1**t) / (1 - beta2**t) ** 0.5 for t in taken])
    torch._foreach_add_(denominators, [eps * (1 - beta1**t) for t in taken])
    numerators = torch._foreach_lerp(means, grads, 1 - beta1) if group["nesterov"] else means
    return list(torch._foreach_div(numerators, denominators))


class SGDP(BatchedOptimizer):
    r"""SGD with momentum that leaves the norm of scale-invariant weights alone.

    .. math::
        m_t = μ m_{t-1} + (1 - τ) ∇f(w_{t-1}), \qquad w_t = w_{t-1} - η\, Π_w(m_t)

    with the projection Π and its test as in `AdamP`. Weight decay is decoupled, and written for the lasting step size that
    momentum makes: :math:`w` is multiplied by :math:`1 - ηλ / (1 - μ)`, or by :math:`1 - ηλ r / (1 - μ)` where projected.

    Args:
        params: parameters or parameter groups: real, floating, dense.
        lr: step size η.
        momentum: μ in [0, 1).
        dampening: τ in [0, 1]. The buffer starts at zero, so the first step is dampened too, unlike in ``torch.optim.SGD``.
        weight_decay: λ.
        nesterov: step along :math:`∇f + μ m_t`.
        eps: ε, added to a norm before it divides.
        delta: δ, threshold of the cosine test; 0 projects nothing.
        wd_ratio: r, share of the weight decay that projected parameters get, in [0, 1].
        project_momentum: keep the projected momentum, as the authors' code does (without Nesterov it projects its buffer in
            place), where the paper's Algorithm 1 keeps it whole. Has no effect with ``nesterov``.
        foreach: update all parameters of a dtype and device together; None means yes.

    State, for each parameter: ``momentum_buffer``, in the parameter's dtype, or float32 for half precision.

    Raises:
        ValueError: a hyperparameter out of range, or a loaded state of another shape.
        TypeError: a complex parameter.
        RuntimeError: a sparse gradient.

    When not to use it: as `AdamP`.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = SGDP([weight], lr=0.1, momentum=0.9)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     (weight[:, 0] / weight.norm(dim=1)).sum().backward()  # depends on the direction alone
        ...     optimizer.step()
        >>> bool((weight.norm() - 5).abs() < 0.01)
        True

    Reference:
        Heo et al., arXiv 2006.08217, Algorithm 1.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eps: float = 1e-8,
        *,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        project_momentum: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "eps": eps,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "project_momentum": project_momentum,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        check_options(
            group,
            {
                "lr": (group["lr"] >= 0, "at least 0"),
                "momentum": (0 <= group["momentum"] < 1, "in [0, 1)"),
                "dampening": (0 <= group["dampening"] <= 1, "in [0, 1]"),
                **_common_options(group),
            },
        )

    def _new_state(self, param: Tensor, dtype: torch.dtype, group: Mapping[str, Any]) -> State:
        return {"momentum_buffer": torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)}

    def _update(self, group: Mapping[str, Any], params: list[Tensor], grads: list[Tensor], states: list[State]) -> None:
        lr, momentum, dampening, nesterov = float(group["lr"]), group["momentum"], group["dampening"], group["nesterov"]
        buffers = [s["momentum_buffer"] for s in states]
        decay = lr * group["weight_decay"] / (1 - momentum)
        weights = ScaleInvariant(params, grads, group)
        if decay and weights.others(params):
            torch._foreach_mul_(weights.others(params), 1 - decay)
        if group["project_momentum"] and not nesterov:
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, grads, alpha=1 - dampening)
            weights.project(params, weights.among(buffers), (0.0, 1.0), lr, decay, from_moments=True)
            torch._foreach_add_(params, buffers, alpha=-lr)
            return
        # The step is k_g g + k_m m of the old buffer m, so its radial part is known before the buffer moves.
        parts = (1 - dampening, momentum)
        if nesterov:
            parts = (1 + momentum * parts[0], momentum * parts[1])
        weights.project(params, weights.among(buffers), parts, lr, decay)
        if momentum and _one_pass(params, grads, buffers):  # the kernel keeps no buffer without momentum
            torch._fused_sgd_(
                params,
                grads,
                buffers,
                weight_decay=0.0,
                momentum=momentum,
                lr=lr,
                dampening=dampening,
                nesterov=nesterov,
                maximize=False,
                is_first_step=False,
            )
            return
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, grads, alpha=1 - dampening)
        if nesterov:
            torch._foreach_add_(params, grads, alpha=-lr)
        torch._foreach_add_(params, buffers, alpha=-lr * momentum if nesterov else -lr)


def _common_options(group: Mapping[str, Any]) -> dict[str, tuple[bool, str]]:
    return {
        "eps": (group["eps"] > 0, "above 0"),
        "weight_decay": (group["weight_decay"] >= 0, "at least 0"),
        "delta": (group["delta"] >= 0, "at least 0"),
        "wd_ratio": (0 <= group["wd_ratio"] <= 1, "in [0, 1]"),
    }


def _one_pass(*lists: Sequence[Tensor]) -> bool:
    """Whether torch's fused kernels may take them: on a CPU they go over memory once where foreach goes seven times.

    They walk through raw memory, so all that belongs to one parameter must lie in one order, without gaps.
    """
    orders = (torch.contiguous_format, torch.channels_last)
    return on_host(lists[0]) and all(
        any(all(t.is_contiguous(memory_format=order) for t in tensors) for order in orders[: 2 if tensors[0].dim() == 4 else 1])
        for tensors in zip(*lists, strict=True)
    )

"""Lion-K: Lion with the sign replaced by the gradient of any convex function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from corollary.optim._batched import BatchedOptimizer, State, check_options
from corollary.optim.kappas import L1, Kappa

_CACHED = 2**16  # entries of a parameter; with momentum, gradient and update 1 MiB of float32


class LionK(BatchedOptimizer):
    r"""Lion for any convex κ: momentum steps that end at the minimum of a loss plus a penalty, or under a constraint.

    With :math:`g_t = ∇f(x_t)`,

    .. math::
        c_t &= β_1 m_t + (1-β_1) g_t, &
        x_{t+1} &= (1 - ηλ)\, x_t + η\, ∇κ(-c_t), &
        m_{t+1} &= β_2 m_t + (1-β_2) g_t

    As the paper shows, this minimizes :math:`f(x) + κ^*(λx)/λ`. Lion itself is κ = `L1`, whose conjugate κ* is zero within a
    box and infinite outside: weight decay λ means :math:`\min f(x)` subject to :math:`‖x‖_∞ ≤ 1/λ`. It goes in two phases. First
    :math:`λx` approaches the domain of κ*, at least as fast as :math:`(1 - ηλ)^t`, and then never leaves it (`excess`). There
    a Lyapunov function falls up to terms of order η² (`lyapunov`).

    Args:
        params: parameters or parameter groups: real, floating, dense. Groups may differ in ``kappa`` too.
        lr: step size η; 3 to 10 times smaller than Adam's, for every entry moves by the whole of it.
        betas: (β₁, β₂): the share of the momentum in the update, and the momentum's decay. The theory asks for β₁ ≤ β₂.
        weight_decay: λ, decoupled. It sets the size of the feasible set.
        kappa: the convex function, a `Kappa`: `L1` (Lion; the default), `Lp`, `GroupL2`, `Huber`, `LogCosh`, `Entropic`, your own.
        foreach: update all parameters of a dtype and device together; None means yes.

    State, for each parameter: ``exp_avg`` (m) in the parameter's dtype. A saved state holds kappa's ``repr`` in its place.
    A NaN in a gradient shows in its parameter, where the sign of other Lions makes it a zero and the momentum NaN for good.

    Raises:
        ValueError: a hyperparameter out of range, a loaded state of another shape or of another kappa.
        TypeError: a complex parameter, or a ``kappa`` that is none.
        RuntimeError: a sparse gradient.

    When not to use it: with ``weight_decay=0`` no constraint is left to speak of; with small batches, whose noise the sign
    amplifies.

    Deviations from the paper: the momentum is stored with the gradient's sign, as Lion does, so that κ is given its negative.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.zeros(3))
        >>> optimizer = LionK([x], lr=0.01, weight_decay=2.0)
        >>> for _ in range(600):
        ...     optimizer.zero_grad()
        ...     ((x - torch.tensor([0.2, 3.0, -3.0])) ** 2).sum().backward()  # the box of radius 1/2 cuts two of them off
        ...     optimizer.step()
        >>> bool((x - torch.tensor([0.2, 0.5, -0.5])).abs().max() < 0.02), float(optimizer.excess())
        (True, 0.0)

    Reference:
        Chen, Liu, Liang, Liu, "Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts", arXiv 2310.05898; Lion:
        Chen et al., arXiv 2302.06675.
    """

    wide_state = False  # half the memory of Adam is why people take Lion; the sign forgives the rounding

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        kappa: Kappa | None = None,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "kappa": L1() if kappa is None else kappa,
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
                "weight_decay": (group["weight_decay"] >= 0, "at least 0"),
            },
        )
        if not isinstance(group["kappa"], Kappa):
            raise TypeError(f"'kappa' must be a Kappa, such as L1() or Huber(0.1), not {group['kappa']!r}")

    def state_dict(self) -> dict[str, Any]:
        """The state as plain values: each group's ``kappa`` is given by its ``repr``."""
        state = super().state_dict()
        for group in state["param_groups"]:
            group["kappa"] = repr(group["kappa"])
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state; the groups keep the ``kappa`` they have, which must be the one that was saved."""
        groups = [dict(group) for group in state_dict["param_groups"]]
        for i, (saved, own) in enumerate(zip(groups, self.param_groups, strict=False)):
            if saved["kappa"] != repr(own["kappa"]):
                raise ValueError(f"'state_dict' was saved with kappa {saved['kappa']} in group {i}, which has {own['kappa']!r}")
            saved["kappa"] = own["kappa"]
        super().load_state_dict({**state_dict, "param_groups": groups})

    def _batches(self, group: Mapping[str, Any]) -> Iterator[list[Tensor]]:
        for batch in super()._batches(group):
            if batch[0].device.type != "cpu":
                yield batch
                continue
            # Five passes over a weight are one over memory if it stays in the CPU's cache from the first to the last.
            piece, entries = [batch[0]], batch[0].numel()
            for param in batch[1:]:
                if entries + param.numel() > _CACHED:
                    yield piece
                    piece, entries = [], 0
                piece.append(param)
                entries += param.numel()
            yield piece

    def _new_state(self, param: Tensor, dtype: torch.dtype, group: Mapping[str, Any]) -> State:
        return {"exp_avg": torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)}

    def _update(self, group: Mapping[str, Any], params: list[Tensor], grads: list[Tensor], states: list[State]) -> None:
        (beta1, beta2), lr, kappa = group["betas"], float(group["lr"]), group["kappa"]
        means = [s["exp_avg"] for s in states]
        mixed = list(torch._foreach_lerp(means, grads, 1 - beta1))
        torch._foreach_lerp_(means, grads, 1 - beta2)
        if not kappa.even:
            torch._foreach_neg_(mixed)
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        kappa.move(params, mixed, -lr if kappa.even else lr)

    @torch.no_grad()
    def excess(self) -> Tensor:
        """How far outside its feasible set the worst parameter is: the largest :math:`κ.excess(λx)`, zero within.

        Each step makes every parameter's smaller by the factor 1 - ηλ or more.
        """
        found = [
            group["kappa"].excess(group["weight_decay"] * p)
            for group in self.param_groups
            for p in group["params"]
            if p.numel()
        ]
        return torch.stack(found).amax()

    @torch.no_grad()
    def lyapunov(self, loss: Tensor | float) -> Tensor:
        r"""The Lyapunov function of the parameters and their momentum, summed over all parameters:

        .. math::
            H = f(x) + \frac{1}{λ} κ^*(λx) + \frac{εβ_1}{ελ(1-β_1) + 1-β_2} \left( κ^*(λx) + κ(-m) + λ⟨x, m⟩ \right),
            \qquad ε = \frac{η}{1 - ηλ}

        Where :math:`f` has an L-Lipschitz gradient and :math:`λx` is feasible, a step changes it by at most
        :math:`\frac{L}{2} ‖x_{t+1} - x_t‖^2` minus two terms that are never negative.

        Args:
            loss: f at the present parameters, on which the momentum does not depend yet.

        Raises:
            ValueError: where ``weight_decay`` is 0, ``lr * weight_decay`` at least 1, or β₁ above β₂.
        """
        total = torch.as_tensor(loss)
        for group in self.param_groups:
            (beta1, beta2), lr, decay, kappa = group["betas"], group["lr"], group["weight_decay"], group["kappa"]
            if not 0 < lr * decay < 1 or beta1 > beta2:
                raise ValueError(
                    "'lr' * 'weight_decay' must be in (0, 1) and 'betas' must not fall for a Lyapunov function; "
                    f"they are {lr} * {decay} and {tuple(group['betas'])}"
                )
            step = lr / (1 - lr * decay)
            weight = step * beta1 / (step * decay * (1 - beta1) + 1 - beta2)
            for p in group["params"]:
                m = self.state[p]["exp_avg"] if self.state.get(p) else torch.zeros_like(p)
                conjugate = kappa.conjugate(decay * p)
                total = total + conjugate / decay + weight * (conjugate + kappa.value(-m) + decay * (p * m).sum())
        return total

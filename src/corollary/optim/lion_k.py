"""Lion-K: Lion with the sign replaced by the gradient of any convex function, and the convex functions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from corollary.optim._batched import BatchedOptimizer, State, check_options


class Kappa(ABC):
    r"""A convex function :math:`κ` of one tensor, which decides what `LionK` solves: :math:`\min f(x) + κ^*(λx)/λ`.

    Each parameter is one tensor to it. Write your own by giving the four methods; a frozen dataclass has the ``repr`` by which
    a saved state knows whether it fits.
    """

    even: bool = True  # κ(-x) = κ(x); spares LionK a pass over memory

    @abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """κ(x), a scalar."""

    @abstractmethod
    def gradient(self, x: Tensor) -> Tensor:
        """∇κ(x), or a subgradient, in the shape of ``x``; may overwrite ``x``. Its values fill the domain of κ*."""

    @abstractmethod
    def conjugate(self, y: Tensor) -> Tensor:
        r""":math:`κ^*(y) = \sup_x ⟨x, y⟩ - κ(x)` for ``y`` in its domain, a scalar; outside, a finite continuation may come."""

    @abstractmethod
    def excess(self, y: Tensor) -> Tensor:
        """How far ``y`` is outside the domain of κ*: a convex function of y, a scalar, zero inside."""

    def gradients(self, xs: list[Tensor]) -> list[Tensor]:
        """`gradient` of each tensor; give it a ``foreach`` form where there is one."""
        return [self.gradient(x) for x in xs]

    def move(self, params: list[Tensor], xs: list[Tensor], size: float) -> None:
        """Add ``size`` times the gradient at each of ``xs``, which may be overwritten, to its parameter."""
        torch._foreach_add_(params, self.gradients(xs), alpha=size)


@dataclass(frozen=True)
class L1(Kappa):
    r""":math:`\sum_i |x_i|`: the sign, hence Lion. :math:`κ^*` is zero on the box :math:`‖y‖_∞ ≤ 1`.

    Example:
        >>> import torch
        >>> L1().gradient(torch.tensor([3.0, -0.1, 0.0]))
        tensor([ 1., -1.,  0.])
    """

    def value(self, x: Tensor) -> Tensor:
        return x.abs().sum()

    def gradient(self, x: Tensor) -> Tensor:
        return _sign(x)

    def move(self, params: list[Tensor], xs: list[Tensor], size: float) -> None:
        limit = {torch.float32: 1e-30, torch.bfloat16: 2.0**-100, torch.float64: 1e-200}.get(xs[0].dtype)
        if limit is None:  # float16 has no numbers so small
            super().move(params, xs, size)
            return
        # The sign without hiding NaN, in as many passes: clipped to a tiny value, and that scaled up while it is added.
        if xs[0].device.type == "cpu":
            for x in xs:
                x.clamp_(-limit, limit)
        else:
            torch._foreach_clamp_min_(xs, -limit)
            torch._foreach_clamp_max_(xs, limit)
        torch._foreach_add_(params, xs, alpha=size / limit)

    def conjugate(self, y: Tensor) -> Tensor:
        return torch.zeros_like(y).sum()

    def excess(self, y: Tensor) -> Tensor:
        return _above_one(y.abs())


@dataclass(frozen=True)
class Lp(Kappa):
    r""":math:`‖x‖_p` of the whole tensor, :math:`1 < p < ∞`: at p = 2 the normalized momentum.

    :math:`κ^*` is zero on the ball :math:`‖y‖_q ≤ 1`, :math:`1/p + 1/q = 1`.

    Args:
        p: the exponent.

    Example:
        >>> import torch
        >>> Lp(2).gradient(torch.tensor([3.0, -4.0]))
        tensor([ 0.6000, -0.8000])
    """

    p: float = 2.0

    def __post_init__(self) -> None:
        if not 1 < self.p < math.inf:
            raise ValueError(f"'p' must be above 1 and finite, not {self.p}; L1() is p = 1")

    def value(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x.sum()
        largest = x.abs().amax().clamp_min(_tiny(x))
        norm: Tensor = largest * torch.linalg.vector_norm(x / largest, self.p)
        return norm

    def gradient(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x
        x.div_(x.abs().amax().clamp_min(_tiny(x)))  # else a power could over- or underflow
        norm = torch.linalg.vector_norm(x, self.p).clamp_min(1)  # at least the largest entry's, unless x = 0
        if self.p == 2:
            return x.div_(norm)
        return x.sign().mul_(x.abs().div_(norm).pow_(self.p - 1))

    def conjugate(self, y: Tensor) -> Tensor:
        return torch.zeros_like(y).sum()

    def excess(self, y: Tensor) -> Tensor:
        return _above_one(torch.linalg.vector_norm(y, self.p / (self.p - 1)))


@dataclass(frozen=True)
class GroupL2(Kappa):
    r""":math:`\sum_r ‖x_r‖_2` over the slices along one dimension: every row moves by a unit vector.

    :math:`κ^*` is zero where :math:`‖y_r‖_2 ≤ 1` for every slice. A tensor without that dimension is one slice.

    Args:
        dim: the dimension that counts the groups; 0 makes a group of each output channel.

    Example:
        >>> import torch
        >>> GroupL2().gradient(torch.tensor([[3.0, 4.0], [0.0, -2.0]]))
        tensor([[ 0.6000,  0.8000],
                [ 0.0000, -1.0000]])
    """

    dim: int = 0

    def __post_init__(self) -> None:
        if self.dim < 0:
            raise ValueError(f"'dim' must be at least 0, not {self.dim}")

    def _others(self, x: Tensor) -> tuple[int, ...]:
        return tuple(d for d in range(x.dim()) if d != self.dim or x.dim() <= self.dim)

    def _norms(self, x: Tensor) -> Tensor:
        others = self._others(x)
        if not others or not x.numel():  # every entry is a group
            return x.abs()
        largest = x.abs().amax(others, keepdim=True).clamp_min(_tiny(x))
        norms: Tensor = largest * torch.linalg.vector_norm(x / largest, dim=others, keepdim=True)
        return norms

    def value(self, x: Tensor) -> Tensor:
        return self._norms(x).sum()

    def gradient(self, x: Tensor) -> Tensor:
        others = self._others(x)
        if not others or not x.numel():
            return _sign(x)
        x.div_(x.abs().amax(others, keepdim=True).clamp_min(_tiny(x)))  # else a square could over- or underflow
        return x.div_(torch.linalg.vector_norm(x, dim=others, keepdim=True).clamp_min(1))

    def conjugate(self, y: Tensor) -> Tensor:
        return torch.zeros_like(y).sum()

    def excess(self, y: Tensor) -> Tensor:
        return _above_one(self._norms(y))


@dataclass(frozen=True)
class Huber(Kappa):
    r"""Huber's function of each entry: :math:`x^2/2δ` up to δ, :math:`|x| - δ/2` beyond; the gradient is a clipped momentum.

    :math:`κ^*(y) = \frac{δ}{2} ‖y‖_2^2` on the box :math:`‖y‖_∞ ≤ 1`.

    Args:
        delta: δ > 0, where the parabola ends.

    Example:
        >>> import torch
        >>> Huber(0.5).gradient(torch.tensor([0.1, -2.0]))
        tensor([ 0.2000, -1.0000])
    """

    delta: float = 1.0

    def __post_init__(self) -> None:
        _positive("delta", self.delta)

    def value(self, x: Tensor) -> Tensor:
        return torch.nn.functional.huber_loss(x, torch.zeros_like(x), reduction="sum", delta=self.delta) / self.delta

    def gradient(self, x: Tensor) -> Tensor:
        return x.div_(self.delta).clamp_(-1, 1)

    def gradients(self, xs: list[Tensor]) -> list[Tensor]:
        torch._foreach_div_(xs, self.delta)
        torch._foreach_clamp_min_(xs, -1.0)
        torch._foreach_clamp_max_(xs, 1.0)
        return xs

    def conjugate(self, y: Tensor) -> Tensor:
        return self.delta / 2 * y.square().sum()

    def excess(self, y: Tensor) -> Tensor:
        return _above_one(y.abs())


@dataclass(frozen=True)
class LogCosh(Kappa):
    r""":math:`τ \sum_i \log\cosh(x_i/τ)`: a smooth sign, :math:`\tanh(x/τ)`.

    :math:`κ^*(y) = \frac{τ}{2} \sum_i (1+y_i)\log(1+y_i) + (1-y_i)\log(1-y_i)` on the box, the entropy of coins of mean y.

    Args:
        temperature: τ > 0; towards 0 it becomes the sign.

    Example:
        >>> import torch
        >>> LogCosh(0.1).gradient(torch.tensor([0.0, 1.0]))
        tensor([0., 1.])
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        _positive("temperature", self.temperature)

    def value(self, x: Tensor) -> Tensor:
        z = x / self.temperature
        return self.temperature * (z.abs() + torch.nn.functional.softplus(-2 * z.abs()) - math.log(2)).sum()

    def gradient(self, x: Tensor) -> Tensor:
        return x.div_(self.temperature).tanh_()

    def gradients(self, xs: list[Tensor]) -> list[Tensor]:
        torch._foreach_div_(xs, self.temperature)
        torch._foreach_tanh_(xs)
        return xs

    def conjugate(self, y: Tensor) -> Tensor:
        up, down = (1 + y).clamp_min(0), (1 - y).clamp_min(0)
        return self.temperature / 2 * (torch.xlogy(up, up) + torch.xlogy(down, down)).sum()

    def excess(self, y: Tensor) -> Tensor:
        return _above_one(y.abs())


@dataclass(frozen=True)
class Entropic(Kappa):
    r""":math:`τ \log \sum_i \exp(x_i/τ)` of the whole tensor: the softmax of the momentum.

    :math:`κ^*(y) = τ \sum_i y_i \log y_i` on the simplex: :math:`λx` becomes a distribution over the tensor's entries. Not even,
    so the momentum's direction counts.

    Args:
        temperature: τ > 0.

    Example:
        >>> import torch
        >>> Entropic().gradient(torch.zeros(4))
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    temperature: float = 1.0
    even = False

    def __post_init__(self) -> None:
        _positive("temperature", self.temperature)

    def value(self, x: Tensor) -> Tensor:
        return self.temperature * torch.logsumexp((x / self.temperature).flatten(), 0)

    def gradient(self, x: Tensor) -> Tensor:
        return (x / self.temperature).flatten().softmax(0).view(x.shape)

    def conjugate(self, y: Tensor) -> Tensor:
        inside = y.clamp_min(0)
        return self.temperature * torch.xlogy(inside, inside).sum()

    def excess(self, y: Tensor) -> Tensor:
        return y.clamp_max(0).abs().sum() + (y.sum() - 1).abs()


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


def _sign(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), x, x.sign())  # torch's sign of NaN is 0, which would hide it


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny


def _above_one(sizes: Tensor) -> Tensor:
    return (sizes - 1).clamp_min(0).amax()


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"'{name}' must be above 0 and finite, not {value}")

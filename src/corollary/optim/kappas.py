"""Convex functions of one tensor with gradient, conjugate and the conjugate's domain: what decides which problem Lion-K solves."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


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


def _sign(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), x, x.sign())  # torch's sign of NaN is 0, which would hide it


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny


def _above_one(sizes: Tensor) -> Tensor:
    return (sizes - 1).clamp_min(0).amax()


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"'{name}' must be above 0 and finite, not {value}")

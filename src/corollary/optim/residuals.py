"""What becomes of the part of the gradient that keeps no state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from corollary.optim.subspaces import Subspace


@dataclass(frozen=True)
class Step:
    """What a rule has to work with.

    Args:
        gradient: G, shape (m, n).
        low: its coordinates L.
        update: Adam's direction U in coordinates, before bias correction; may be overwritten.
        subspace: the projection and the way back, E.
        state: of the parameter.
        lr: learning rate η, with the group's scale.
        step_size: ``lr`` times the bias correction of U.
    """

    gradient: Tensor
    low: Tensor
    update: Tensor
    subspace: Subspace
    state: dict[str, Any]
    lr: float
    step_size: float


class Residual(ABC):
    """Applies Adam's low-rank update, and its own rule to the rest of the gradient.

    With G the gradient, L its coordinates, E the map back up and U Adam's direction in coordinates, the rest is R = G - E L.
    """

    @abstractmethod
    def apply_(self, param: Tensor, step: Step) -> None:
        """Change ``param``, of shape (m, n), in place."""


@dataclass(frozen=True)
class Drop(Residual):
    """Nothing: W ← W - η E U, as in GaLore."""

    def apply_(self, param: Tensor, step: Step) -> None:
        step.subspace.add_(param, step.update, -step.step_size)


@dataclass(frozen=True)
class SignSGD(Residual):
    """Its sign: W ← W - η E U - η s sign(R), as in FRUGAL.

    Args:
        lr_scale: s.
    """

    lr_scale: float = 1.0

    def __post_init__(self) -> None:
        _check_scale(self.lr_scale)

    def apply_(self, param: Tensor, step: Step) -> None:
        rest = step.gradient.clone(memory_format=torch.contiguous_format)
        step.subspace.add_(rest, step.low, -1.0)
        param.add_(rest.sign_(), alpha=-step.lr * self.lr_scale)
        step.subspace.add_(param, step.update, -step.step_size)


@dataclass(frozen=True)
class PlainSGD(Residual):
    """A gradient step: W ← W - η E U - η s R.

    Args:
        lr_scale: s.
    """

    lr_scale: float = 1.0

    def __post_init__(self) -> None:
        _check_scale(self.lr_scale)

    def apply_(self, param: Tensor, step: Step) -> None:
        # E U step + s lr (G - E L) = s lr G + E (step U - s lr L): R is never formed.
        rate = step.lr * self.lr_scale
        param.add_(step.gradient, alpha=-rate)
        step.subspace.add_(param, step.update.mul_(step.step_size).sub_(step.low, alpha=rate), -1.0)


@dataclass(frozen=True)
class NormScaled(Residual):
    r"""Scaled as Adam scaled the part beside it, with a limit on its growth, as in Fira.

    For each slice i along the long dimension

    .. math:: \phi_i = \frac{\|U_i\|}{\|L_i\| + 10^{-8}}, \qquad S_i = \phi_i R_i,

    and S is shrunk so that :math:`\|S_t\| \le \gamma \|S_{t-1}\|`; then W ← W - η (E U + S).

    Args:
        growth_limit: γ, at least 1; None lets the norm grow at will.
        scaled: False leaves φ = 1, the ablation of the paper's key idea.
    """

    growth_limit: float | None = 1.01
    scaled: bool = True

    def __post_init__(self) -> None:
        if self.growth_limit is not None and not self.growth_limit >= 1:
            raise ValueError(f"'growth_limit' must be at least 1, or None, not {self.growth_limit}")

    def apply_(self, param: Tensor, step: Step) -> None:
        low, update, dim = step.low, step.update, step.subspace.dim
        wide = torch.float32 if low.dtype in (torch.float16, torch.bfloat16) else None
        if self.scaled:
            scale = torch.linalg.vector_norm(update, dim=dim, keepdim=True, dtype=wide)
            scale = scale / (torch.linalg.vector_norm(low, dim=dim, keepdim=True, dtype=wide) + 1e-8)
        else:
            scale = torch.ones_like(torch.linalg.vector_norm(low, dim=dim, keepdim=True, dtype=wide))
        if self.growth_limit is not None:
            norm = (scale.square() * step.subspace.residual_norm_sq(step.gradient, low)).sum().sqrt()
            last = step.state.get("residual_norm")
            if last is not None:
                limiter = (norm / (last.to(norm.dtype) + 1e-8)).clamp_min(self.growth_limit) / self.growth_limit
                scale, norm = scale / limiter, norm / limiter
            step.state["residual_norm"] = norm
        scale = scale.to(param.dtype)
        # φR + E U = φG + E (U - φL): the residual is never formed.
        param.addcmul_(step.gradient, scale, value=-step.step_size)
        step.subspace.add_(param, update.sub_(scale * low), -step.step_size)


def _check_scale(value: float) -> None:
    if not value >= 0:
        raise ValueError(f"'lr_scale' must be at least 0, not {value}")


NAMED: dict[str, Residual] = {"drop": Drop(), "sign": SignSGD(), "sgd": PlainSGD(), "norm": NormScaled()}
"""what a residual rule's name stands for"""

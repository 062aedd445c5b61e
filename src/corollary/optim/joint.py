"""Several optimizers, each with its own parameters, behind the interface of one."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from corollary.linalg.manifolds import manifold_of


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of a model that live on a manifold, and the rest; each once, in the order of ``parameters()``.

    Example:
        >>> from torch import nn
        >>> from corollary.nn import GrassmannLinear
        >>> curved, rest = split_parameters(nn.Sequential(nn.Linear(8, 8), GrassmannLinear(8, 3, 2)))
        >>> [tuple(p.shape) for p in curved], [tuple(p.shape) for p in rest]
        ([(3, 2, 8)], [(8, 8), (8,)])
    """
    curved: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for p in model.parameters():
        (rest if manifold_of(p) is None else curved).append(p)
    return curved, rest


class JointOptimizer(Optimizer):
    """Several optimizers stepped as one, so that manifold parameters train beside any torch optimizer for the rest.

    ``param_groups`` are the members' own groups, in their order: a learning-rate scheduler on the joint optimizer scales every
    member's rate by its own rule, and so do ``GradScaler`` and gradient clipping see all parameters.

    Args:
        optimizers: at least one, with no parameter in common. An optimizer that must call its closure several times
            (``torch.optim.LBFGS``) cannot be a member.

    Raises:
        ValueError: no optimizer, a shared parameter, or LBFGS.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from corollary.nn import GrassmannLinear
        >>> from corollary.optim import RiemannianSGD
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), GrassmannLinear(8, 3, 2))
        >>> curved, rest = split_parameters(model)
        >>> optimizer = JointOptimizer([RiemannianSGD(curved, lr=0.1, momentum=0.9), torch.optim.AdamW(rest, lr=1e-3)])
        >>> schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
        >>> nn.functional.cross_entropy(model(torch.randn(4, 8)), torch.tensor([0, 1, 2, 0])).backward()
        >>> optimizer.step()
        >>> schedule.step()
        >>> [round(group["lr"], 6) for group in optimizer.param_groups]
        [0.097553, 0.000976]
    """

    optimizers: tuple[Optimizer, ...]

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        members = tuple(optimizers)
        if not members:
            raise ValueError("optimizers must hold at least one optimizer, got none")
        seen: set[int] = set()
        for member in members:
            if not isinstance(member, Optimizer):
                raise TypeError(f"optimizers must hold torch optimizers, got {type(member).__name__}")
            if isinstance(member, torch.optim.LBFGS):
                raise ValueError("optimizers must not hold LBFGS, which calls its closure several times in one step")
            own = {id(p) for group in member.param_groups for p in group["params"]}
            if seen & own:
                raise ValueError(f"optimizers must not share parameters; {len(seen & own)} of them are in two")
            seen |= own
        # Optimizer.__init__ would make groups of its own; __setstate__ sets up hooks alone, as after unpickling.
        self.__setstate__({"defaults": {}, "optimizers": members})

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The members' own groups: always the live ones, because loading a state replaces them."""
        return [group for member in self.optimizers for group in member.param_groups]

    @property
    def state(self) -> ChainMap[Tensor, Any]:  # type: ignore[override]
        """The members' states, looked up by parameter."""
        return ChainMap(*(member.state for member in self.optimizers))

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": self.defaults, "optimizers": self.optimizers}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not here: only the caller knows which member should own the group."""
        raise TypeError("add the group to the member that should own it: joint.optimizers[i].add_param_group(...)")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of every member's parameters."""
        for member in self.optimizers:
            member.zero_grad(set_to_none)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Call ``closure`` once, then step every member from the same gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for member in self.optimizers:
            member.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Plain data: each member's own state under ``optimizers``."""
        return {"optimizers": [member.state_dict() for member in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave; raises ``ValueError`` where the number of members differs."""
        states = state_dict.get("optimizers")
        if not isinstance(states, list) or len(states) != len(self.optimizers):
            got = len(states) if isinstance(states, list) else "none"
            raise ValueError(f"state_dict must hold the states of {len(self.optimizers)} optimizers, got {got}")
        for member, state in zip(self.optimizers, states, strict=True):
            member.load_state_dict(state)

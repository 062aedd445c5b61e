"""Learning-rate schedules that are a function of the step alone: one base class for all of them."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler


class MultiplierLR(LRScheduler):
    r"""Base of schedules that multiply each group's initial learning rate by a function of the step.

    .. math:: \eta_t = \eta_{\mathrm{initial}} \cdot m(t), \qquad t = 0, 1, 2, \dots

    A subclass sets its own attributes, calls ``super().__init__`` (which sets the rate of step 0) and gives ``multiplier``.
    Rates are computed in closed form, never from the rate before, so that they carry no rounding along and a run resumed from
    ``state_dict()`` repeats the uninterrupted one bit by bit. Attributes that are plain values or tensors are saved.

    A group added to the optimizer during the run joins in with the rate that it was added with as its initial rate, from the
    next step on. ``SequentialLR`` may hold such a schedule. In ``ChainedScheduler`` it must come first, because it sets the
    rate, as ``LambdaLR`` does, instead of changing it.

    Args:
        optimizer: any torch optimizer; a rate that is a tensor is filled in place.
        last_epoch: number of the last step done, for building a schedule in the middle of a run; -1 starts at step 0.

    Raises:
        TypeError: ``optimizer`` is none.
        ValueError: a state of another schedule, or of an optimizer with another number of groups.

    Example:
        >>> import torch
        >>> class Halving(MultiplierLR):
        ...     def multiplier(self, step: int) -> float:
        ...         return 0.5**step
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=8.0)
        >>> schedule = Halving(optimizer)
        >>> for _ in range(3):
        ...     optimizer.step()
        ...     schedule.step()
        >>> schedule.get_last_lr()
        [1.0]
    """

    @abstractmethod
    def multiplier(self, step: int) -> float:
        """The factor m(t) on every group's initial rate at step ``step``, counted from 0."""

    def get_lr(self) -> list[float | Tensor]:
        """The rates of step ``last_epoch``, a new value for each group; ``get_last_lr()`` tells those in use."""
        groups = self.optimizer.param_groups
        if len(groups) > len(self.base_lrs):
            for group in groups[len(self.base_lrs) :]:
                rate = group["lr"]
                self.base_lrs.append(group.setdefault("initial_lr", rate.clone() if isinstance(rate, Tensor) else rate))
        factor = self.multiplier(self.last_epoch)
        return [base * factor for base in self.base_lrs]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` gave; load the optimizer's state too, which carries the rates in use."""
        wanted = set(self.state_dict())
        if set(state_dict) != wanted:
            raise ValueError(
                f"'state_dict' is of another schedule: it holds {sorted(state_dict)}; {type(self).__name__} takes {sorted(wanted)}"
            )
        saved, groups = len(state_dict["base_lrs"]), len(self.optimizer.param_groups)
        if saved != groups:
            raise ValueError(f"'state_dict' is of an optimizer with {saved} parameter group(s); this one has {groups}")
        super().load_state_dict({k: list(v) if isinstance(v, list) else v for k, v in state_dict.items()})

"""What methods share that begin anew every so many steps: the count, the warm-up after each restart, the optimizer's forgetting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class PeriodicRestart:
    """Counts steps of training and restarts every ``interval`` of them; a subclass says what a restart does.

    Args:
        optimizer: of the model; what it remembers of restarted parameters is dropped.
        interval: steps between two restarts.
        warmup: steps after each restart over which `factor` rises to 1.

    Raises:
        ValueError: ``interval`` is below 1, or ``warmup`` is not in 0 to ``interval``.
    """

    def __init__(self, optimizer: Optimizer, *, interval: int, warmup: int) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"'optimizer' must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
        for name, value, least in (("interval", interval, 1), ("warmup", warmup, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"'{name}' must be an int of at least {least}, not {value!r}")
        if warmup > interval:
            raise ValueError(f"'warmup' is {warmup}, longer than 'interval' = {interval}")
        self.optimizer, self.interval, self.warmup, self.count = optimizer, interval, warmup, 0

    def factor(self, step: int) -> float:
        """What the learning rate of a step (from 0) is multiplied by: rises linearly to 1 after each restart.

        Give it to ``torch.optim.lr_scheduler.LambdaLR``, times a schedule of your own.
        """
        return min(1.0, (step % self.interval + 1) / (self.warmup + 1))

    def step(self) -> None:
        """Count one step of training, after ``optimizer.step()``; restart where that is due."""
        self.count += 1
        self.after_step()
        if self.count % self.interval == 0:
            self.restart()

    def after_step(self) -> None:
        """What is done after every step; nothing by default."""

    def restart(self) -> None:
        """Begin anew: what ``step`` calls every ``interval`` steps."""
        raise NotImplementedError

    def forget(self, parameters: Iterable[Tensor]) -> None:
        """Drop what the optimizer remembers of these parameters."""
        for parameter in parameters:
            self.optimizer.state.pop(parameter, None)

    def state_dict(self) -> dict[str, Any]:
        """The count of steps: all else is in the model's and the optimizer's states."""
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self.count = int(state["count"])

"""CUBER: gradient projection memory that lets a new task improve the old ones it agrees with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from corollary.adapt.continual import Loss, as_matrix
from corollary.adapt.gpm import _NOISE, GPM, _write


class CUBER(GPM):
    r"""`GPM` with backward transfer: a layer may move inside the inputs of old tasks whose gradient the new one's agrees with.

    When task t starts, its gradient :math:`G_t` and the one that old task j ended with, :math:`G_j`, are compared layer by layer.
    Task j counts as positively correlated, and its inputs' subspace :math:`S_j` is opened, where

    .. math:: \|G_t S_j S_j^\top\| \ge \epsilon_1 \|G_t\| \quad\text{and}\quad
              \langle G_j, G_t\rangle \ge \epsilon_2 \|G_j\| \|G_t\|.

    All other tasks are protected as by GPM. In what was opened, the layer is held back by
    :math:`\lambda \|(W - W_{t-1}) S_j S_j^\top\|_F^2`. To first order a step then lowers the loss of the tasks whose subspace it
    enters: that is backward transfer, without a sample of them.

    Args:
        model, threshold, exclude, project: as in `GPM`.
        min_projection: ε₁ of the sufficient projection, in [0, 1].
        min_correlation: ε₂ of the positive correlation, in [-1, 1].
        regularization: λ, at least 0.

    Raises:
        TypeError, ValueError: as in `GPM`.

    State: beside GPM's, one gradient for each layer and task; and during a task the weights that it started from.

    Deviations: the paper's second regime (sufficient projection, no positive correlation) also lets the new task reuse old weights
    through a scaling matrix of its own, as TRGP does. That transfers forward, changes the forward pass, and needs to know the task
    when testing; it is left out here, so that such tasks are only protected. Without a call of `begin_task` all old tasks are.

    When not to use it: where old tasks must not change at all (`GPM`); and where tasks share neither inputs nor labels, since then
    no task is correlated and this is GPM with more memory.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> x = torch.eye(3)
        >>> learner = CUBER(model)
        >>> learner.end_task(lambda: (model(x) - 3).square())
        >>> learner.begin_task(lambda: (model(x) - 4).square())  # the same inputs, and targets on the same side
        >>> learner.regimes()
        {'': [3]}
        >>> learner.begin_task(lambda: (model(x) + 4).square())
        >>> learner.regimes()
        {'': [2]}

    Reference:
        Lin et al., "Beyond Not-Forgetting: Continual Learning with Backward Knowledge Transfer", arXiv 2211.00789.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        threshold: float = 0.97,
        min_projection: float = 0.5,
        min_correlation: float = 0.0,
        regularization: float = 0.1,
        exclude: Iterable[str] = (),
        project: Literal["gradient", "update"] = "gradient",
    ) -> None:
        super().__init__(model, threshold=threshold, exclude=exclude, project=project)
        if not 0 <= min_projection <= 1:
            raise ValueError(f"'min_projection' must be in [0, 1], not {min_projection}")
        if not -1 <= min_correlation <= 1:
            raise ValueError(f"'min_correlation' must be in [-1, 1], not {min_correlation}")
        if not 0 <= regularization < float("inf"):
            raise ValueError(f"'regularization' must be finite and at least 0, not {regularization}")
        self.min_projection = min_projection
        self.min_correlation = min_correlation
        self.regularization = regularization
        self.gradients: dict[str, Tensor] = {
            name: layer.weight.new_zeros(0, len(layer.weight), len(self.bases[name])) for name, layer in self.layers.items()
        }
        self._close()

    def _close(self) -> None:
        """No task is open: everything that is remembered is protected."""
        self._regimes = {name: self.owners[name].new_ones(self.num_tasks, dtype=torch.int64) for name in self.layers}
        self._anchors = {name: layer.weight.new_zeros(0, len(self.bases[name])) for name, layer in self.layers.items()}
        self._split()

    def _split(self) -> None:
        """The basis of each layer, apart: what is protected, and what was opened."""
        self._shut: dict[str, Tensor] = {}
        self._opened: dict[str, Tensor] = {}
        for name, owners in self.owners.items():
            shut = owners[self._regimes[name] != 3].any(0)
            self._shut[name] = self.bases[name][:, shut]
            self._opened[name] = self.bases[name][:, ~shut]

    # ------------------------------------------------------------------------------------------------------------ memory

    def begin_task(self, loss: Loss) -> None:
        """Compare the new task with the old ones and open what agrees; ``loss`` gives its loss on some of its samples."""
        self._anchors = {n: as_matrix(m, m.weight, m.bias).detach().clone() for n, m in self.layers.items()}
        self.assess(loss)

    def assess(self, loss: Loss) -> None:
        """Compare again, in the middle of a task: the gradient has changed since it began."""
        gradients = self._gradients(self._losses(loss))
        for name, gradient in gradients.items():
            self._regimes[name] = self._compare(name, gradient)
        self._split()

    @torch.no_grad()
    def _compare(self, name: str, gradient: Tensor) -> Tensor:
        """1, 2 or 3 for each old task: no sufficient projection; projection alone; both, so that the layer may move there."""
        gradient = gradient.double()
        along = (gradient @ self.bases[name].double()).square().sum(0)
        share = (self.owners[name].double() @ along).sqrt()
        norm = gradient.norm()
        old = self.gradients[name].double()
        inner = torch.einsum("joi,oi->j", old, gradient)
        sufficient = (share >= self.min_projection * norm) & (norm > 0)
        positive = inner >= self.min_correlation * old.flatten(1).norm(dim=1) * norm
        regimes: Tensor = 1 + sufficient.long() * (1 + positive.long())
        return regimes

    def _choose(self, kept: Tensor, energy: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        # The fewest vectors that hold the threshold, old or new: a task's subspace is no larger than the task itself.
        every = torch.cat([kept, energy])
        order = every.argsort(descending=True)
        before = every[order].cumsum(0) - every[order]
        chosen = order[(before < self.threshold * total) & (every[order] > _NOISE * total)]
        old = torch.zeros_like(kept, dtype=torch.bool)
        old[chosen[chosen < len(kept)]] = True
        return old, chosen[chosen >= len(kept)].sort().values - len(kept)

    def _gradients(self, loss: Tensor) -> dict[str, Tensor]:
        weights = [layer.weight for layer in self.layers.values()]
        biases = [layer.bias for layer in self.layers.values() if layer.bias is not None]
        found = torch.autograd.grad(
            loss, [*weights, *biases], torch.full_like(loss, 1 / loss.numel()), allow_unused=True, materialize_grads=True
        )
        rest = iter(found[len(weights) :])
        return {
            name: as_matrix(layer, gradient, None if layer.bias is None else next(rest))
            for (name, layer), gradient in zip(self.layers.items(), found[: len(weights)], strict=True)
        }

    def _remember(self, loss: Tensor) -> None:
        for name, gradient in self._gradients(loss).items():
            self.gradients[name] = torch.cat([self.gradients[name], gradient[None].to(self.gradients[name])])

    def end_task(self, loss: Loss) -> None:
        """Remember the task's inputs and its last gradient; ``loss`` runs the model on some of its samples."""
        super().end_task(loss)
        self._close()

    def protected(self, name: str) -> Tensor:
        """The orthonormal directions (inputs, r) in which the layer ``name`` may not move in this task."""
        return self._shut[name]

    def regimes(self) -> dict[str, list[int]]:
        """For each layer, each old task's regime in this task: 1 no sufficient projection, 2 not correlated, 3 opened."""
        return {name: regimes.tolist() for name, regimes in self._regimes.items()}

    # ------------------------------------------------------------------------------------------------------------- steps

    def _add_pull(self, name: str, layer: nn.Linear | nn.Conv2d) -> None:
        opened = self._opened[name]
        if not self.regularization or not opened.shape[1] or not len(self._anchors[name]):
            return
        assert layer.weight.grad is not None
        moved = as_matrix(layer, layer.weight, layer.bias) - self._anchors[name]
        bias = None if layer.bias is None else layer.bias.grad
        pull = torch.addmm(as_matrix(layer, layer.weight.grad, bias), moved @ opened, opened.T, alpha=2 * self.regularization)
        _write(layer, layer.weight.grad, bias, pull)

    # ------------------------------------------------------------------------------------------------------------- state

    _PARTS = ("gradients", "regimes", "anchor")

    def state_dict(self) -> dict[str, Tensor]:
        """GPM's, and for each layer ``gradients`` (tasks, outputs, inputs), and of the task under way ``regimes`` and ``anchor``."""
        state = super().state_dict()
        for name in self.layers:
            parts = (self.gradients[name], self._regimes[name], self._anchors[name])
            state |= {f"{name}.{part}": tensor for part, tensor in zip(self._PARTS, parts, strict=True)}
        return state

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over a state, also from the middle of a task."""
        super().load_state_dict(state_dict)
        for name, layer in self.layers.items():
            gradients, regimes, anchor = (state_dict[f"{name}.{part}"] for part in self._PARTS)
            self.gradients[name] = gradients.to(layer.weight).clone()
            self._regimes[name] = regimes.to(layer.weight.device).clone()
            self._anchors[name] = anchor.to(layer.weight).clone()
        self._split()

    def _check(self, state: Mapping[str, Tensor], extra: Iterable[str] = ()) -> int:
        tasks = super()._check(state, [*extra, *(f"{name}.{part}" for name in self.layers for part in self._PARTS)])
        for name, layer in self.layers.items():
            shape = (len(layer.weight), len(self.bases[name]))
            allowed = {"gradients": ((tasks, *shape),), "regimes": ((tasks,),), "anchor": (shape, (0, shape[1]))}
            for part, shapes in allowed.items():
                if tuple(state[f"{name}.{part}"].shape) not in shapes:
                    raise ValueError(
                        f"'state_dict': '{name}.{part}' has shape {tuple(state[f'{name}.{part}'].shape)}; allowed: {shapes[0]}"
                    )
        return tasks

"""Elastic weight consolidation: what old tasks need is held by springs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from corollary.adapt.continual import ContinualLearner, Loss


class EWC(ContinualLearner):
    r"""Pull each parameter to where old tasks left it, as strongly as its Fisher information says.

    .. math:: L(\theta) + \frac{\lambda}{2} \sum_j \sum_i F_{j,i} (\theta_i - \theta^*_{j,i})^2, \qquad
              F_{j,i} = \frac1n \sum_{s=1}^n \Big(\frac{\partial \ell_s}{\partial \theta_i}\Big)^2 .

    The sums over tasks are kept, not the tasks, so that memory does not grow; the penalty is the same. Its gradient is added
    before each step of the attached optimizer.

    Args:
        model: any module.
        strength: λ, at least 0.
        chunk: samples whose gradients are taken at once.

    Raises:
        TypeError, ValueError: an argument is not of the allowed kind; ``loss`` does not give one finite loss for each sample.

    State: two numbers for each parameter.

    Deviations: the Fisher information is the empirical one, at the labels of the data.

    When not to use it: where the rate times λ F comes near 2: the step then overshoots the spring.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> learner = EWC(model, strength=10.0)
        >>> x = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
        >>> learner.end_task(lambda: model(x)[:, 0].square())  # one loss for each sample
        >>> (learner.fisher["weight"] > 0).tolist()  # the second input is always 0
        [[True, False]]

    Reference:
        Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", arXiv 1612.00796, equation 3.
    """

    def __init__(self, model: nn.Module, *, strength: float = 100.0, chunk: int = 64) -> None:
        super().__init__(model)
        if not 0 <= strength < float("inf"):
            raise ValueError(f"'strength' must be finite and at least 0, not {strength}")
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"'chunk' must be an int of at least 1, not {chunk!r}")
        self.strength = strength
        self.chunk = chunk
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._parameters:
            raise ValueError("'model' has no trainable parameters")
        self.fisher = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        self.pull = {name: torch.zeros_like(p) for name, p in self._parameters.items()}

    def end_task(self, loss: Loss) -> None:
        """Remember the parameters and their Fisher information; ``loss`` gives one loss for each of some samples, (n,)."""
        losses = self._losses(loss)
        if losses.dim() != 1:
            raise ValueError(f"'loss' must give one loss for each sample, of shape (n,), not {tuple(losses.shape)}")
        parameters = list(self._parameters.values())
        sums = [torch.zeros_like(p) for p in parameters]
        rows = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)
        for part in torch.split(rows, self.chunk):
            found = torch.autograd.grad(
                losses, parameters, part, retain_graph=True, is_grads_batched=True, allow_unused=True, materialize_grads=True
            )
            torch._foreach_add_(sums, [gradient.square().sum(0) for gradient in found])
        for name, total in zip(self._parameters, sums, strict=True):
            self.fisher[name] += total / len(losses)
            self.pull[name] += total / len(losses) * self._parameters[name].detach()
        self.num_tasks += 1

    @torch.no_grad()
    def _before_step(self) -> None:
        found = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        if not found or not self.num_tasks or not self.strength:
            return
        names, gradients = list(found), list(found.values())
        torch._foreach_addcmul_(
            gradients, [self.fisher[name] for name in names], [self._parameters[name] for name in names], self.strength
        )
        torch._foreach_add_(gradients, [self.pull[name] for name in names], alpha=-self.strength)

    def penalty(self) -> Tensor:
        """The penalty λ/2 Σ F (θ - θ*)², up to a constant, for reports; its gradient is what a step gets."""
        terms = [
            (f * p.square() / 2 - self.pull[n] * p).sum()
            for (n, p), f in zip(self._parameters.items(), self.fisher.values(), strict=True)
        ]
        return self.strength * torch.stack(terms).sum()

    def state_dict(self) -> dict[str, Tensor]:
        """For each parameter ``fisher`` and ``pull`` (Σ F θ*), and the number of tasks."""
        state = {"num_tasks": torch.tensor(self.num_tasks)}
        for name in self._parameters:
            state |= {f"{name}.fisher": self.fisher[name], f"{name}.pull": self.pull[name]}
        return state

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over a state; raises ``ValueError`` naming the key that is missing, unknown or of a shape that does not fit."""
        own = self.state_dict()
        for key in sorted(set(own) ^ set(state_dict)):
            raise ValueError(f"'state_dict': '{key}' is {'missing' if key in own else 'unknown'}")
        for key, tensor in own.items():
            if tensor.shape != state_dict[key].shape:
                raise ValueError(
                    f"'state_dict': '{key}' has shape {tuple(state_dict[key].shape)}; allowed: {tuple(tensor.shape)}"
                )
        for name, parameter in self._parameters.items():
            self.fisher[name] = state_dict[f"{name}.fisher"].to(parameter).clone()
            self.pull[name] = state_dict[f"{name}.pull"].to(parameter).clone()
        self.num_tasks = int(state_dict["num_tasks"])

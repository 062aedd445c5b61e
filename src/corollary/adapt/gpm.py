"""Gradient projection memory: a new task moves the weights only across the inputs that old tasks had."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from corollary.adapt.continual import ContinualLearner, Loss, as_matrix, collect_grams, covered_layers


class GPM(ContinualLearner):
    r"""Keep a basis of each layer's inputs and project every step onto its orthogonal complement.

    With R the inputs that a layer had in a task (columns), the basis U grows by the leading left singular vectors of
    :math:`\hat R = R - UU^\top R` until

    .. math:: \|UU^\top R\|_F^2 \ge \epsilon \|R\|_F^2,

    and in later tasks the gradient becomes :math:`G - G\,UU^\top`. Then :math:`W x` does not change for any x in the span of U,
    so that old tasks keep their outputs. A bias is a weight of the constant input 1.

    Args:
        model: any module. ``Linear`` and ``Conv2d`` are covered; after the first task, all other trainable parameters (norms,
            embeddings) get no step, as in the authors' code, but for what ``exclude`` names.
        threshold: ε, the share of the inputs' energy that is kept for old tasks, in (0, 1].
        exclude: names of modules (``*`` as in a shell) that may move freely, such as a head that only one task uses.
        project: 'gradient', the paper's; or 'update', which projects what the optimizer did to the weights: it costs a copy of
            them, and holds for momentum, weight decay and adaptive steps too. The two are one for plain SGD.

    Raises:
        TypeError, ValueError: an argument is not of the allowed kind; a loss is not finite; a layer saw no input.

    State: a layer of d inputs takes d · r numbers for r basis vectors, and r flags for each task.

    Deviations: the paper decomposes a sample of some hundred inputs; here all that runs while ``loss`` is called counts, through
    its Gram matrix. The authors' code keeps one vector less than equation 5 asks for after the first task; here the equation
    holds. They build layers without biases.

    When not to use it: with many tasks of high-dimensional inputs, where the free space runs out; and where the order of tasks is
    not known while training.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 1, bias=False)
        >>> first, second = torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([[1.0, 1, 0, 0]])
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> memory = GPM(model).attach(optimizer)
        >>> memory.end_task(lambda: model(first).square())
        >>> before = model(first).item()
        >>> (model(second) - 5).square().sum().backward()
        >>> optimizer.step()  # moves the second weight alone
        >>> model(first).item() == before, model(second).item() == before
        (True, False)

    Reference:
        Saha et al., "Gradient Projection Memory for Continual Learning", arXiv 2103.09762, equations 5 to 9, Algorithm 1.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        threshold: float = 0.97,
        exclude: Iterable[str] = (),
        project: Literal["gradient", "update"] = "gradient",
    ) -> None:
        super().__init__(model)
        if not 0 < threshold <= 1:
            raise ValueError(f"'threshold' must be in (0, 1], not {threshold}")
        if project not in ("gradient", "update"):
            raise ValueError(f"'project' is {project!r}; allowed: 'gradient', 'update'")
        self.threshold = threshold
        self.project = project
        self.layers = covered_layers(model, exclude)
        patterns = [exclude] if isinstance(exclude, str) else list(exclude)
        free = covered_parameters(model, patterns)
        covered = {id(p) for layer in self.layers.values() for p in layer.parameters(recurse=False)}
        self._frozen = [p for p in model.parameters() if id(p) not in covered and id(p) not in free]
        self.bases: dict[str, Tensor] = {}
        self.owners: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            width = as_matrix(layer, layer.weight, layer.bias).shape[1]
            self.bases[name] = layer.weight.new_zeros(width, 0)
            self.owners[name] = torch.zeros(0, 0, dtype=torch.bool, device=layer.weight.device)
        self._before: dict[str, Tensor] = {}

    # ------------------------------------------------------------------------------------------------------------ memory

    @torch.no_grad()
    def end_task(self, loss: Loss) -> None:
        """Add the inputs that the layers see while ``loss`` runs to the memory."""
        with collect_grams(self.layers) as grams:
            value = self._losses(loss)
        for name in self.layers:
            if name not in grams:
                raise ValueError(
                    f"layer '{name}' saw no input while 'loss' ran; name it in 'exclude' if the task does not use it"
                )
        self._remember(value)
        for name, gram in grams.items():
            if not bool(gram.isfinite().all()):
                raise ValueError(f"layer '{name}' saw inputs that are not finite")
            self._extend(name, gram)
        self.num_tasks += 1

    def _remember(self, loss: Tensor) -> None:
        """What a subclass keeps of the task beside its inputs."""

    def _extend(self, name: str, gram: Tensor) -> None:
        basis = self.bases[name].double()
        total = gram.trace()
        kept = torch.einsum("dr,de,er->r", basis, gram, basis)
        # The Gram matrix of what the basis leaves of the inputs.
        left = gram - basis @ (basis.T @ gram)
        left = left - (left @ basis) @ basis.T
        energy, vectors = torch.linalg.eigh((left + left.T) / 2)
        energy, vectors = energy.flip(0).clamp(min=0), vectors.flip(1)
        room = len(gram) - basis.shape[1]
        energy, vectors = energy[:room], vectors[:, :room]
        old, new = self._choose(kept, energy, total)
        # Two passes keep the basis orthonormal to machine precision, however close the new vectors are to the old.
        fresh = vectors[:, new]
        for _ in range(2):
            fresh, _ = torch.linalg.qr(fresh - basis @ (basis.T @ fresh))
        self.bases[name] = torch.cat([basis, fresh], 1).to(self.bases[name].dtype)
        owners = torch.nn.functional.pad(self.owners[name], (0, fresh.shape[1]))
        mine = torch.cat([old, old.new_ones(fresh.shape[1])])
        self.owners[name] = torch.cat([owners, mine[None]])

    def _choose(self, kept: Tensor, energy: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """Which old vectors (flags) belong to the task and which new ones (indices) join, from the energy along each."""
        missing = self.threshold * total - kept.sum()
        before = energy.cumsum(0) - energy
        count = int(((before < missing) & (energy > _NOISE * total)).sum())
        return torch.ones_like(kept, dtype=torch.bool), torch.arange(count, device=kept.device)

    def protected(self, name: str) -> Tensor:
        """The orthonormal directions (inputs, r) in which the layer ``name`` may not move now."""
        return self.bases[name]

    # ------------------------------------------------------------------------------------------------------------- steps

    @torch.no_grad()
    def _before_step(self) -> None:
        if not self.num_tasks:
            return
        for parameter in self._frozen:
            parameter.grad = None
        for name, layer in self.layers.items():
            if layer.weight.grad is None:
                continue
            self._add_pull(name, layer)
            if self.project == "update":
                self._before[name] = as_matrix(layer, layer.weight, layer.bias).clone()
            else:
                bias = None if layer.bias is None else layer.bias.grad
                matrix = as_matrix(layer, layer.weight.grad, bias)
                _write(layer, layer.weight.grad, bias, self._across(name, matrix))

    def _add_pull(self, name: str, layer: nn.Linear | nn.Conv2d) -> None:
        """What a subclass adds to a layer's gradient."""

    @torch.no_grad()
    def _after_step(self) -> None:
        for name, before in self._before.items():
            layer = self.layers[name]
            moved = as_matrix(layer, layer.weight, layer.bias) - before
            _write(layer, layer.weight, layer.bias, before + self._across(name, moved))
        self._before = {}

    def _across(self, name: str, matrix: Tensor) -> Tensor:
        basis = self.protected(name).to(matrix.dtype)
        return torch.addmm(matrix, matrix @ basis, basis.T, alpha=-1)

    # ------------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Tensor]:
        """For each layer ``basis`` (inputs, r) and ``owners`` (tasks, r), and the number of tasks."""
        state = {"num_tasks": torch.tensor(self.num_tasks)}
        for name in self.layers:
            state |= {f"{name}.basis": self.bases[name], f"{name}.owners": self.owners[name]}
        return state

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over a state; raises ``ValueError`` naming the key that is missing, unknown or of a shape that does not fit."""
        tasks = self._check(state_dict)
        for name, layer in self.layers.items():
            self.bases[name] = state_dict[f"{name}.basis"].to(layer.weight).clone()
            self.owners[name] = state_dict[f"{name}.owners"].to(layer.weight.device).clone()
        self.num_tasks = tasks

    def _check(self, state: Mapping[str, Tensor], extra: Iterable[str] = ()) -> int:
        wanted = {"num_tasks", *(f"{name}.{part}" for name in self.layers for part in ("basis", "owners")), *extra}
        for key in sorted(wanted ^ set(state)):
            raise ValueError(f"'state_dict': '{key}' is {'missing' if key in wanted else 'unknown'}")
        tasks = int(state["num_tasks"])
        for name in self.layers:
            basis, owners = state[f"{name}.basis"], state[f"{name}.owners"]
            width = len(self.bases[name])
            if basis.dim() != 2 or len(basis) != width:
                raise ValueError(f"'state_dict': '{name}.basis' has shape {tuple(basis.shape)}; allowed: ({width}, r)")
            if tuple(owners.shape) != (tasks, basis.shape[1]) or owners.dtype != torch.bool:
                raise ValueError(
                    f"'state_dict': '{name}.owners' is {owners.dtype} of shape {tuple(owners.shape)}; "
                    f"allowed: torch.bool of shape {(tasks, basis.shape[1])}"
                )
        return tasks


_NOISE = 1e-12
"""share of the inputs' energy below which a direction is rounding noise"""


def covered_parameters(model: nn.Module, patterns: Iterable[str]) -> set[int]:
    """Identities of the parameters inside the modules that match."""
    return {
        id(p)
        for name, module in model.named_modules()
        if any(fnmatchcase(name, x) for x in patterns)
        for p in module.parameters()
    }


def _write(layer: nn.Linear | nn.Conv2d, weight: Tensor, bias: Tensor | None, matrix: Tensor) -> None:
    columns = layer.weight[0].numel()
    weight.copy_(matrix[:, :columns].reshape(weight.shape))
    if bias is not None:
        bias.copy_(matrix[:, columns])

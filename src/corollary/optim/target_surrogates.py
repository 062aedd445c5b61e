"""SSO: many cheap parameter updates for each expensive gradient, on a surrogate of the loss in the space of the model's outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from corollary.optim.armijo import ArmijoGD

SCHEDULES = ("constant", "sqrt", "line_search")
REDUCTIONS = ("mean", "sum")
Loss = Callable[..., Tensor | tuple[Any, ...]]


class TargetSurrogate:
    r"""The quadratic model of a loss ℓ around targets z_t that SSO minimizes:

    .. math::
        g(z) = ℓ(z_t) + ⟨∇ℓ(z_t), z - z_t⟩ + \frac{1}{2 η n} ‖z - z_t‖^2

    with n the number of samples for a mean over samples, and 1 for a sum. Where ∇ℓ is L-Lipschitz in z (L/n for the mean of n
    losses with constant L) and η ≤ 1/L, g lies above ℓ everywhere and touches it at z_t.

    Args:
        targets: z_t, one tensor or several.
        gradients: ∇ℓ(z_t), in the targets' shapes.
        loss: ℓ(z_t).
        eta: η.
        samples: n.

    Example:
        >>> import torch
        >>> z = torch.zeros(4)
        >>> surrogate = TargetSurrogate([z], [torch.full((4,), 0.5)], loss=1.0, eta=2.0)
        >>> surrogate(z), surrogate(z - 1.0)
        (tensor(1.), tensor(0.))
    """

    def __init__(
        self, targets: Sequence[Tensor], gradients: Sequence[Tensor], loss: float, eta: float, samples: int = 1
    ) -> None:
        self.targets = [_wide(z.detach()) for z in targets]
        self.gradients = [_wide(g) for g in gradients]
        self.loss, self.eta, self.samples = loss, eta, samples

    def __call__(self, *targets: Tensor) -> Tensor:
        """g at other targets, one argument for each target; differentiable in them."""
        total = self.targets[0].new_tensor(self.loss)
        for z, start, g in zip(targets, self.targets, self.gradients, strict=True):
            if z.shape != start.shape:
                raise ValueError(
                    f"targets of shape {tuple(z.shape)} came where the step began with {tuple(start.shape)}: "
                    "the closure must give the same samples throughout one step"
                )
            move = _wide(z) - start
            total = total + (g * move).sum() + move.square().sum() / (2 * self.eta * self.samples)
        return total


class SSO(Optimizer):
    r"""Surrogate optimization in target space: one expensive gradient a step, and several parameter updates from it.

    For a loss ℓ(f(θ)) of a model's targets z = f(θ) (logits, actions, predictions), a step evaluates ∇ℓ(z_t) once and then
    takes ``inner_steps`` steps of any deterministic optimizer on the surrogate

    .. math::
        g_t(θ) = ⟨∇ℓ(z_t), f(θ) - z_t⟩ + \frac{1}{2 η_t} ‖f(θ) - z_t‖^2

    which needs the model alone. Minimized exactly it is gradient descent on z, projected onto what the model can express;
    for η ≤ 1/L it majorizes a loss with L-Lipschitz gradient in z, so that no step raises the loss of its batch.

    ``step`` needs a closure that keeps the two apart: it gives the targets with their graph, and the loss as a function of
    them::

        optimizer.step(lambda: (model(x), lambda z: loss_fn(z, y)))

    The closure is called for each evaluation of the model, always with gradients as the inner optimizer needs them, and must
    take the same samples throughout one step. The *loss function is called once*, with targets cut off from the model (more
    often without gradients for ``schedule='line_search'``). It gives a scalar, or (scalar, gradients) where a simulator or
    another library computes them: one tensor, or one for each target.

    Args:
        params: one group of parameters: real, floating, undistributed.
        lr: η, the step size in target space: 1/L for a loss of one sample with L-Lipschitz gradient in its targets (4 for
            binary and 2 for multiclass cross-entropy, 1/2 for the squared error).
        inner: makes the inner optimizer of the parameters, as ``inner(params, **inner_options)``: any class of
            ``torch.optim``, or `ArmijoGD`.
        inner_options: its options.
        inner_steps: its steps, m; fewer where the surrogate's gradient is below ``inner_tol``.
        inner_tol: Euclidean norm of the surrogate's gradient at which a step ends early.
        schedule: η_t = lr ('constant'), lr / √t ('sqrt', for stochastic batches), or found by backtracking from lr on
            the loss in target space ('line_search').
        reduction: how the loss function reduces over samples, the first axis of the targets: 'mean' or 'sum'. With 'mean'
            the quadratic term is divided by their number, so that ``lr`` does not depend on the batch.
        reset_inner: start the inner optimizer afresh in each step. Otherwise its state is kept, and saved with this
            optimizer's (without pickle only where it holds tensors and numbers, which LBFGS's does not).
        c: share of the promised decrease that 'line_search' asks for.

    State, in the parameter group: ``iteration`` (t), ``inner_evaluations`` (of the model by the inner optimizer) and
    ``loss_evaluations`` (of the loss without its gradient). ``.grad`` is overwritten, and cleared at the end of a step.

    Raises:
        ValueError: an option out of range or unknown, a second parameter group, no closure, a closure or loss function that
            gives something else than it should, or other targets in the midst of a step.
        TypeError: a complex parameter, or a DTensor.
        RuntimeError: targets without graph, sparse gradients, or a loss or gradient that is not finite, before any move.

    When not to use it: where the loss's gradient costs no more than the model's; there a plain step is as good. Layers that
    draw at random or count batches (dropout, batch normalization) see every inner evaluation.

    Deviations from the authors' code: the quadratic term has the factor 1/2 of the paper, which the code leaves out (its step
    size counts half); gradients may come from outside autograd.

    Example:
        >>> import torch
        >>> from torch.nn.functional import cross_entropy
        >>> x, y = torch.randn(60, 4), torch.randint(3, (60,))
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = SSO(model.parameters(), lr=2.0, inner_steps=10)
        >>> losses = [optimizer.step(lambda: (model(x), lambda z: cross_entropy(z, y))) for _ in range(5)]
        >>> bool(losses[-1] < losses[0])
        True

    Reference:
        Lavington, Vaswani, Babanezhad, Schmidt, Le Roux, "Target-based Surrogates for Stochastic Optimization",
        arXiv 2302.02607, Algorithms 1 and 2.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        *,
        inner: Callable[..., Optimizer] = ArmijoGD,
        inner_options: dict[str, Any] | None = None,
        inner_steps: int = 10,
        inner_tol: float = 0.0,
        schedule: str = "constant",
        reduction: str = "mean",
        reset_inner: bool = True,
        c: float = 0.5,
    ) -> None:
        for name, value, allowed in (("schedule", schedule, SCHEDULES), ("reduction", reduction, REDUCTIONS)):
            if value not in allowed:
                raise ValueError(f"'{name}' is '{value}'; allowed: {', '.join(allowed)}")
        for name, number, good, wanted in (
            ("lr", lr, lr >= 0, "at least 0"),
            ("inner_steps", inner_steps, inner_steps >= 1, "at least 1"),
            ("inner_tol", inner_tol, inner_tol >= 0, "at least 0"),
            ("c", c, 0 < c < 1, "in (0, 1)"),
        ):
            if not good:
                raise ValueError(f"'{name}' must be {wanted}, not {number}")
        self.inner, self.inner_options = inner, dict(inner_options or {})
        defaults = {
            "lr": lr,
            "inner_steps": inner_steps,
            "inner_tol": inner_tol,
            "schedule": schedule,
            "reduction": reduction,
            "reset_inner": reset_inner,
            "c": c,
            "iteration": 0,
            "inner_evaluations": 0,
            "loss_evaluations": 0,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the only parameter group; a second one is refused, because one step size in target space covers all."""
        if self.param_groups:
            raise ValueError("SSO takes one parameter group, because one step size in target space covers all parameters")
        super().add_param_group(param_group)
        for i, param in enumerate(self.param_groups[0]["params"]):
            kind = "a DTensor" if _is_distributed(param) else str(param.dtype) if param.is_complex() else ""
            if kind:
                self.param_groups.pop()
                raise TypeError(f"'params[{i}]' is {kind}; SSO takes real, undistributed parameters")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "inner": self.inner, "inner_options": self.inner_options}

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # how many inner steps are taken depends on values
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor:
        """Take one step: one gradient of the loss in the targets, then the inner steps. Gives the loss before them.

        Args:
            closure: gives (targets, loss function), see the class.
        """
        if closure is None:
            raise ValueError("step() needs a 'closure' that gives (targets, loss_fn)")
        group = self.param_groups[0]
        with torch.enable_grad():
            targets, loss_fn = _closure(closure())
        loss, gradients = self._oracle(targets, loss_fn)
        samples = 1
        if group["reduction"] == "mean":
            counts = {z.shape[0] if z.dim() else 1 for z in targets}
            if len(counts) > 1:
                raise ValueError(f"targets must share their first axis for reduction 'mean'; theirs are {sorted(counts)}")
            samples = max(1, counts.pop())
        eta = self._eta(targets, loss_fn, float(loss), gradients, samples)
        group["iteration"] += 1
        if eta > 0:
            # Without the constant, whose rounding would drown the last of the surrogate's decrease.
            self._minimize(closure, TargetSurrogate(targets, gradients, 0.0, eta, samples))
        return loss

    def _oracle(self, targets: Sequence[Tensor], loss_fn: Loss) -> tuple[Tensor, list[Tensor]]:
        """The one expensive call: the loss at the targets, and its gradient in them."""
        with torch.enable_grad():
            leaves = [z.detach().requires_grad_() for z in targets]
            given = loss_fn(*leaves)
            if isinstance(given, tuple):
                loss = torch.as_tensor(given[0]).detach()
                slopes = given[1] if isinstance(given[1], (tuple, list)) else [given[1]]
                gradients = [torch.as_tensor(g, dtype=z.dtype, device=z.device) for g, z in zip(slopes, leaves, strict=True)]
            else:
                loss = given
                if not isinstance(loss, Tensor) or not loss.requires_grad:
                    raise ValueError("the loss function must give a tensor that depends on the targets, or (loss, gradients)")
                if loss.numel() == 1:
                    gradients = list(torch.autograd.grad(loss, leaves, materialize_grads=True))
        if loss.numel() != 1:
            raise ValueError(f"the loss function must give a scalar, not a tensor of shape {tuple(loss.shape)}")
        for g, z in zip(gradients, leaves, strict=True):
            if g.layout is not torch.strided:
                raise RuntimeError(f"SSO needs dense gradients in the targets, not {g.layout} (sparse)")
            if g.shape != z.shape:
                raise ValueError(f"a gradient has shape {tuple(g.shape)}; its targets have {tuple(z.shape)}")
        if not (bool(loss.isfinite().all()) and all(bool(g.isfinite().all()) for g in gradients)):
            raise RuntimeError(f"the loss ({float(loss)}) or its gradient in the targets is not finite; no step was taken")
        return loss.detach(), gradients

    def _eta(self, targets: Sequence[Tensor], loss_fn: Loss, loss: float, gradients: Sequence[Tensor], samples: int) -> float:
        group = self.param_groups[0]
        eta = float(group["lr"])
        if group["schedule"] == "sqrt":
            return eta / math.sqrt(group["iteration"] + 1)
        if group["schedule"] == "line_search" and eta:
            square = sum(float(_wide(g).square().sum()) for g in gradients)
            for _ in range(60):
                given = loss_fn(*(z.detach() - eta * samples * g for z, g in zip(targets, gradients, strict=True)))
                group["loss_evaluations"] += 1
                if float(given[0] if isinstance(given, tuple) else given) <= loss - group["c"] * eta * samples * square:
                    break
                eta *= 0.8
        return eta

    def _minimize(self, closure: Callable[[], Any], surrogate: TargetSurrogate) -> None:
        group = self.param_groups[0]
        params = [p for p in group["params"] if p.requires_grad]
        inner = self.inner(params, **self.inner_options)
        if not group["reset_inner"]:
            for p, fresh in inner.state.items():  # what some optimizers lay out when they are made
                if not self.state.get(p):
                    self.state[p] = fresh
            inner.state = self.state
        done = False

        def evaluate() -> Tensor:
            nonlocal done
            for p in params:
                p.grad = None
            value = surrogate(*_closure(closure())[0])
            group["inner_evaluations"] += 1
            if value.requires_grad:
                value.backward()  # type: ignore[no-untyped-call]
                if group["inner_tol"]:
                    norms = [torch.linalg.vector_norm(p.grad) for p in params if p.grad is not None]
                    done = float(torch.stack(norms).norm()) <= group["inner_tol"] if norms else True
            return value

        for _ in range(group["inner_steps"]):
            inner.step(evaluate)  # type: ignore[arg-type]
            if done:
                break
        for p in params:
            p.grad = None


def _closure(given: Any) -> tuple[tuple[Tensor, ...], Loss]:
    if not (isinstance(given, tuple) and len(given) == 2 and callable(given[1])):
        raise ValueError(f"the closure must give (targets, loss_fn), not {type(given).__name__}")
    targets = (given[0],) if isinstance(given[0], Tensor) else tuple(given[0])
    if not targets or not all(isinstance(z, Tensor) for z in targets):
        raise ValueError("the closure's targets must be a tensor, or several")
    if torch.is_grad_enabled() and not any(z.requires_grad for z in targets):
        raise RuntimeError("the closure's targets have no graph: give them without detach() or no_grad()")
    return targets, given[1]


def _wide(tensor: Tensor) -> Tensor:
    """Half precision in float32, where the small moves between targets would be lost."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _is_distributed(param: Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(param, DTensor)

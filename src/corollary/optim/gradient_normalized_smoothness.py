"""Gradient-regularized Newton steps with exact or approximate Hessians and an adaptive radius of gradient-normalized smoothness."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from corollary.linalg.cg import conjugate_gradient
from corollary.linalg.curvature import HessianOperator, SymmetricOperator
from corollary.linalg.gauss_newton import FisherOperator, GaussNewtonOperator

CURVATURES = ("hessian", "gauss_newton", "fisher")
Curvature = Callable[["Evaluation", Sequence[Tensor]], SymmetricOperator]


class Evaluation(NamedTuple):
    """One evaluation of the closure: the loss, and the outputs and the loss of the outputs where the closure gave them."""

    loss: Tensor
    outputs: tuple[Tensor, ...] = ()
    loss_fn: Callable[..., Tensor] | None = None


class GradientNormalizedNewton(Optimizer):
    r"""Newton's method with a regularization in proportion to the gradient's norm, for exact and approximate Hessians.

    With g the gradient and H the Hessian or an approximation of it, the step solves, by conjugate gradients and without
    forming H,

    .. math::
        θ_{k+1} = θ_k - \left( H_k + \frac{‖g_k‖}{γ_k} I \right)^{-1} g_k

    γ is the radius of gradient-normalized smoothness: the largest ball around θ in which
    :math:`‖∇f(θ + h) - ∇f(θ) - H h‖ ≤ ‖∇f(θ)‖ ‖h‖ / γ`. It is not known, and found by search: a step is taken once it gives

    .. math::
        f(θ_k) - f(θ_{k+1}) ≥ \frac{γ_k}{8 ‖g_k‖} ‖g_{k+1}‖^2 ,

    else γ is halved and the step computed anew; after a step γ is doubled. No step is longer than γ where H is positive
    semidefinite. Where γ stays bounded below, as with logistic and softmax losses, the method converges linearly from
    wherever it starts; near a solution with the exact Hessian it becomes Newton's method.

    ``step`` needs a closure that gives the loss *with its graph*, without calling ``backward``::

        optimizer.step(lambda: loss_fn(model(x), y))                     # curvature="hessian"
        optimizer.step(lambda: (model(x), lambda z: loss_fn(z, y)))      # any curvature: the outputs, and the loss of them

    The closure is called once, and once more for each trial of γ; it must give the same function each time.

    Args:
        params: one group of parameters: real, floating, dense, undistributed, all of one dtype and device.
        lr: factor on the accepted step; 1 is the paper's method, and what the theory is about.
        curvature: 'hessian' (exact), 'gauss_newton' (of the loss of the outputs), 'fisher' (of ``likelihood``, the mean over
            samples), or a function of (`Evaluation`, parameters) that gives an operator with ``shape``, ``dtype``, ``device``
            and ``@``. The parameters are read as one vector, in their order, each flattened row by row.
        likelihood: of 'fisher': 'categorical', 'bernoulli' or 'gaussian', see `FisherOperator`.
        radius: γ before the first step.
        adaptive: search for γ as above; otherwise every step is taken with ``radius``.
        min_radius: γ is doubled from at least this.
        max_search: most trials of γ in a step. Where none gives the progress asked for, nothing moves and γ is as before.
        tol: relative residual at which conjugate gradients stop.
        max_cg: most products with H for a trial; 10 times the parameters' entries by default.

    State, all of it in the parameter group: ``radius`` (γ), ``evaluations`` (of loss and gradient), ``solves`` (trials of γ)
    and ``products`` (with H), counted over all steps. ``.grad`` is not touched.

    Where H + ‖g‖/γ I turns out not to be positive definite, the trial counts as failed. Half precision is computed in float32
    apart from the model itself.

    Raises:
        ValueError: a hyperparameter out of range, an unknown ``curvature``, a second parameter group, several dtypes or
            devices, no closure, or a closure that gives something else than it should.
        TypeError: a complex parameter, or a DTensor.
        RuntimeError: a loss without graph, a sparse gradient, or a loss or gradient that is not finite at the start of the
            step; the parameters stay as they were.

    When not to use it: on mini-batches that change between steps without a common minimum, where the progress test measures
    noise; with operations that lack a second derivative; under DistributedDataParallel or FSDP.

    Deviations from the authors' code: conjugate gradients instead of a Cholesky factor; a matrix that is not positive definite
    shortens the radius, where the code gives the search up; a search that fails leaves the parameters alone, where the
    code takes its last trial; the progress test forgives the rounding of f.

    Example:
        >>> import torch
        >>> from torch.nn.functional import cross_entropy
        >>> x, y = torch.randn(60, 4), torch.randint(3, (60,))
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = GradientNormalizedNewton(model.parameters(), curvature="gauss_newton")
        >>> losses = [optimizer.step(lambda: (model(x), lambda z: cross_entropy(z, y))) for _ in range(8)]
        >>> bool(losses[-1] < losses[0])
        True

    Reference:
        Semenov, Jaggi, Doikov, "Gradient-Normalized Smoothness for Optimization with Approximate Hessians", arXiv 2506.13710,
        Algorithm 1.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        *,
        curvature: str | Curvature = "hessian",
        likelihood: str = "categorical",
        radius: float = 1.0,
        adaptive: bool = True,
        min_radius: float = 1e-9,
        max_search: int = 40,
        tol: float = 1e-6,
        max_cg: int | None = None,
    ) -> None:
        if isinstance(curvature, str) and curvature not in CURVATURES:
            raise ValueError(f"'curvature' is '{curvature}'; allowed: {', '.join(CURVATURES)}, or a function")
        self.curvature, self.likelihood = curvature, likelihood
        defaults = {
            "lr": lr,
            "radius": radius,
            "adaptive": adaptive,
            "min_radius": min_radius,
            "max_search": max_search,
            "tol": tol,
            "max_cg": max_cg,
            "evaluations": 0,
            "solves": 0,
            "products": 0,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the only parameter group; a second one is refused, because one radius covers all parameters."""
        if self.param_groups:
            raise ValueError("GradientNormalizedNewton takes one parameter group, because one radius covers all parameters")
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[0])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "curvature": self.curvature, "likelihood": self.likelihood}

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # second derivatives cannot be traced
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor:
        """Take one step; gives the loss before it.

        Args:
            closure: gives the loss with its graph, or the outputs and a function from them to the loss, see the class.
        """
        if closure is None:
            raise ValueError("step() needs a 'closure' that gives the loss with its graph: the method evaluates it again")
        group = self.param_groups[0]
        params = [p for p in group["params"] if p.requires_grad]
        evaluation, gradient = self._evaluate(closure, params)
        loss = evaluation.loss.detach()
        f, norm = float(loss), float(torch.linalg.vector_norm(gradient))
        if not (math.isfinite(f) and math.isfinite(norm)):
            raise RuntimeError(f"loss or gradient is not finite (loss {f}, gradient's norm {norm}); no step was taken")
        if norm == 0:
            return loss
        with torch.enable_grad():
            operator = self._operator(evaluation, params)
        radius = group["radius"]
        for _ in range(group["max_search"] if group["adaptive"] else 1):
            shift = self._shift(norm, radius)
            if not math.isfinite(shift):
                break
            solved = conjugate_gradient(operator, -gradient, shift=shift, rtol=group["tol"], max_iter=group["max_cg"])
            group["solves"] += 1
            group["products"] += solved.iterations
            if solved.negative_curvature and group["adaptive"]:
                radius /= 2
                continue
            moves = _blocks(solved.solution, params)
            if not group["adaptive"] or self._progress(closure, params, moves, f, shift):
                if group["adaptive"]:
                    group["radius"] = max(2 * radius, group["min_radius"])
                torch._foreach_add_(params, moves, alpha=float(group["lr"]))
                break
            radius /= 2
        return loss

    def _evaluate(self, closure: Callable[[], Any], params: Sequence[Tensor]) -> tuple[Evaluation, Tensor]:
        with torch.enable_grad():
            evaluation = _evaluation(closure())
            if not evaluation.loss.requires_grad:
                raise RuntimeError("the closure's loss has no graph: give it without detach(), item() or no_grad()")
            try:
                gradients = torch.autograd.grad(evaluation.loss, params, retain_graph=True, materialize_grads=True)
            except RuntimeError as error:
                if "second time" in str(error):
                    raise RuntimeError("the closure's graph is gone: it must not call backward()") from error
                raise
        self.param_groups[0]["evaluations"] += 1
        for i, g in enumerate(gradients):
            if g.layout is not torch.strided:
                raise RuntimeError(
                    f"GradientNormalizedNewton needs dense gradients; that of 'params[{i}]' is {g.layout} (sparse)"
                )
        return evaluation, _flat(gradients)

    def _shift(self, norm: float, radius: float) -> float:
        """The regularization: gradient's norm over radius."""
        return norm / radius

    def _operator(self, evaluation: Evaluation, params: Sequence[Tensor]) -> SymmetricOperator:
        if callable(self.curvature):
            return self.curvature(evaluation, params)
        if self.curvature == "hessian":
            return HessianOperator(evaluation.loss, params)
        if evaluation.loss_fn is None:
            raise ValueError(f"curvature '{self.curvature}' needs a closure that gives (outputs, loss_fn), not the loss alone")
        if self.curvature == "gauss_newton":
            return GaussNewtonOperator(evaluation.loss_fn, evaluation.outputs, params)
        if len(evaluation.outputs) > 1:
            raise ValueError(f"curvature 'fisher' takes one tensor of outputs, not {len(evaluation.outputs)}")
        return FisherOperator(evaluation.outputs[0], params, likelihood=self.likelihood)

    def _progress(
        self, closure: Callable[[], Any], params: Sequence[Tensor], moves: Sequence[Tensor], f: float, shift: float
    ) -> bool:
        """Whether a full step lowers the loss as far as the radius promises; the parameters are as they were afterwards."""
        # Writing into the parameters would spoil the graph that the next trial's products need, so their storage is exchanged.
        begin = [p.data for p in params]
        try:
            for p, trial in zip(params, torch._foreach_add(begin, list(moves)), strict=True):
                p.data = trial
            evaluation, gradient = self._evaluate(closure, params)
        finally:
            for p, data in zip(params, begin, strict=True):
                p.data = data
        new, square = float(evaluation.loss.detach()), float(gradient.square().sum())
        rounding = 4 * torch.finfo(evaluation.loss.dtype).eps * abs(f)
        return f - new + rounding >= square / (8 * shift)  # False for a NaN


def _blocks(vector: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """The parts of a flat vector, each in its parameter's shape and dtype."""
    parts = torch.split(vector, [p.numel() for p in params])
    return [part.view_as(p).to(p.dtype) for part, p in zip(parts, params, strict=True)]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    flat = torch.cat([t.reshape(-1) for t in tensors])
    return flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat


def _evaluation(given: Any) -> Evaluation:
    """What the closure gave, brought into one form."""
    if isinstance(given, Tensor):
        evaluation = Evaluation(given)
    elif isinstance(given, tuple) and len(given) == 2 and callable(given[1]):
        outputs, loss_fn = given
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        evaluation = Evaluation(loss_fn(*outputs), outputs, loss_fn)
    else:
        raise ValueError(f"the closure must give the loss or (outputs, loss_fn), not {type(given).__name__}")
    if not isinstance(evaluation.loss, Tensor) or evaluation.loss.numel() != 1:
        shape = tuple(evaluation.loss.shape) if isinstance(evaluation.loss, Tensor) else type(evaluation.loss).__name__
        raise ValueError(f"the closure's loss must be a scalar tensor, not {shape}")
    return evaluation


def _check_group(group: dict[str, Any]) -> None:
    params = group["params"]
    for i, param in enumerate(params):
        if param.is_complex():
            raise TypeError(f"'params[{i}]' is {param.dtype}; allowed: real parameters (see torch.view_as_real for complex)")
        if _is_distributed(param):
            raise TypeError(f"'params[{i}]' is a DTensor; allowed: undistributed parameters, which second derivatives need")
    kinds = sorted({f"{p.dtype} on {p.device}" for p in params})
    if len(kinds) > 1:
        raise ValueError(f"'params' must share one dtype and device, because they form one vector; they are {', '.join(kinds)}")
    for name, good, allowed in (
        ("lr", group["lr"] >= 0, "at least 0"),
        ("radius", 0 < group["radius"] < math.inf, "above 0 and finite"),
        ("min_radius", group["min_radius"] > 0, "above 0"),
        ("max_search", group["max_search"] >= 1, "at least 1"),
        ("tol", 0 <= group["tol"] < 1, "in [0, 1)"),
        ("max_cg", group["max_cg"] is None or group["max_cg"] >= 1, "None or at least 1"),
    ):
        if not good:
            raise ValueError(f"'{name}' must be {allowed}, not {group[name]}")


def _is_distributed(param: Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(param, DTensor)

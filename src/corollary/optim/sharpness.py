"""What SAM, ASAM and TRAM share: climb to the worst point of a neighbourhood, take the gradient there, step from where it began."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT


@contextmanager
def frozen_running_stats(model: nn.Module | None) -> Iterator[None]:
    """Within it, batch and instance norms in training mode normalize by the batch and leave their running statistics alone.

    Example:
        >>> import torch
        >>> norm = torch.nn.BatchNorm1d(2)
        >>> with frozen_running_stats(norm):
        ...     _ = norm(torch.ones(4, 2))
        >>> norm.running_mean.tolist(), norm.num_batches_tracked.item()
        ([0.0, 0.0], 0)
    """
    kind = nn.modules.batchnorm._NormBase
    modules = [] if model is None else [m for m in model.modules() if isinstance(m, kind)]
    norms = [m for m in modules if m.training and m.track_running_stats]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class SharpnessAware(Optimizer):
    r"""A base optimizer fed with gradients taken at :math:`θ + ε`, where ε climbs the loss by a radius :math:`ρ`.

    A subclass says in `_scales` how far each parameter may move against the others (T below) and gives the radius to `_climb`.
    With products taken entry by entry,

    .. math::
        ε = ρ \, \frac{T^2 ⊙ g}{\|T ⊙ g\|_2 + 10^{-12}}, \qquad θ ← \mathrm{base}\big(θ, ∇L(θ + ε)\big),

    the norm running over all parameters of all groups. Where it is zero or not finite, finite gradients give ε = 0, so that a
    NaN does not spread.

    Args:
        params: parameters or groups, or an optimizer that is already made and is to be wrapped.
        base_optimizer: class of the optimizer that takes the step, called with ``params`` and ``base_options``; None where
            ``params`` is an optimizer.
        model: its batch norms keep their running statistics in every pass but the first.
        own: this method's options and their values in a group that gives none.
        base_options: given to ``base_optimizer``.

    ``param_groups`` and ``state`` are the base's own, so that a scheduler, ``GradScaler`` or gradient clipping sees what it
    expects.

    Raises:
        TypeError: ``base_optimizer`` is missing or no optimizer class, or a parameter is complex.
        ValueError: an option out of range, or LBFGS as the base, which calls closures of its own.
        RuntimeError: ``step`` without a closure, ``second_step`` without ``first_step``, or a sparse gradient.
    """

    shards: ClassVar[bool] = True  # whether parameters may be DTensors
    base_optimizer: Optimizer

    def __init__(
        self,
        params: ParamsT | Optimizer,
        base_optimizer: Callable[..., Optimizer] | None,
        model: nn.Module | None,
        own: Mapping[str, Any],
        base_options: Mapping[str, Any],
    ) -> None:
        name = type(self).__name__
        if isinstance(params, Optimizer):
            if base_optimizer is not None or base_options:
                given = ["base_optimizer"] if base_optimizer is not None else list(base_options)
                raise TypeError(f"'params' is an optimizer, which {name} wraps as it is; leave out {', '.join(given)}")
            base = params
        else:
            if not callable(base_optimizer):
                raise TypeError(
                    f"'base_optimizer' must be an optimizer class such as torch.optim.AdamW, not {base_optimizer!r} "
                    "(or give a made optimizer in place of 'params')"
                )
            base = base_optimizer(params, **base_options)
        if not isinstance(base, Optimizer):
            raise TypeError(f"'base_optimizer' must make a torch.optim.Optimizer, not {type(base).__name__}")
        if isinstance(base, (torch.optim.LBFGS, SharpnessAware)):
            raise ValueError(f"'base_optimizer' must step from gradients alone, which {type(base).__name__} does not")
        self._own = dict(own)
        self._model = model
        self._begin: dict[Tensor, Tensor] = {}  # where the climb began
        # Optimizer.__init__ would make groups of its own; __setstate__ sets up hooks alone, as after unpickling.
        self.__setstate__({"defaults": {**base.defaults, **own}, "base_optimizer": base})
        for group in self.param_groups:
            self._adopt(group)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("defaults", "base_optimizer", "_own", "_model")
        return {name: value for name, value in self.__dict__.items() if name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin = {}
        self._share()

    def _share(self) -> None:
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state

    def _adopt(self, group: dict[str, Any]) -> None:
        for option, value in self._own.items():
            group.setdefault(option, value)
        self._check_group(group)
        for i, param in enumerate(group["params"]):
            if param.is_complex():
                raise TypeError(
                    f"'params[{i}]' is {param.dtype}; {type(self).__name__} takes real parameters, not complex ones"
                )
            if not self.shards and _is_distributed(param):
                raise TypeError(f"'params[{i}]' is a DTensor; {type(self).__name__} takes undistributed parameters")

    def _check_group(self, group: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer, with this method's options where the group has none."""
        self.base_optimizer.add_param_group(param_group)
        try:
            self._adopt(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state; this method's options stand in the groups."""
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` gave; a climb that has begun is forgotten."""
        self.base_optimizer.load_state_dict(dict(state_dict))
        self._begin = {}
        self._share()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients."""
        self.base_optimizer.zero_grad(set_to_none)

    def _climb(self, radius: Callable[[Mapping[str, Any]], float | Tensor], zero_grad: bool) -> None:
        """Move every parameter with a gradient to θ + ε, keeping θ."""
        if self._begin:
            raise RuntimeError(f"{type(self).__name__}.first_step came twice without second_step in between")
        members = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        for _, params in members:
            for p in params:
                if p.grad is not None and p.grad.layout is not torch.strided:
                    raise RuntimeError(f"{type(self).__name__} needs dense gradients, not {p.grad.layout} ones")
        batches = [(group, batch) for group, params in members for batch in _batches(params, group.get("foreach"))]
        directions, lengths = [], []
        for group, batch in batches:
            pulled: Any = [p.grad for p in batch]
            scales: Any = self._scales(group, batch)
            if scales is not None:
                pulled = torch._foreach_mul(pulled, scales)
            lengths += _norms(pulled)
            directions.append(pulled if scales is None else torch._foreach_mul(pulled, scales))
        if not lengths:
            return
        norm = _joint(lengths)
        rate = (1 / (norm + 1e-12)).nan_to_num_(nan=0.0, posinf=0.0)
        rate = torch.where(norm > 0, rate, torch.zeros_like(rate))
        for (group, batch), direction in zip(batches, directions, strict=True):
            locals_ = [_local(p) for p in batch]
            copies = [torch.empty_like(p, memory_format=torch.preserve_format) for p in locals_]
            torch._foreach_copy_(copies, locals_)
            self._begin.update(zip(batch, copies, strict=True))
            far = radius(group)
            factor = rate * (far.to(rate.device, rate.dtype) if isinstance(far, Tensor) else far)
            steps = torch._foreach_mul([_local(d) for d in direction], factor.to(locals_[0].device, _wide(locals_[0].dtype)))
            torch._foreach_add_(locals_, steps)
        if zero_grad:
            self.zero_grad()

    def _scales(self, group: Mapping[str, Any], params: Sequence[Tensor]) -> list[Tensor] | None:
        """T for each parameter, or None for the identity."""
        raise NotImplementedError

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Go back to θ and let the base optimizer step with the gradients that were taken at θ + ε.

        Raises:
            RuntimeError: `first_step` did not come before.
        """
        if not self._begin and any(p.grad is not None for group in self.param_groups for p in group["params"]):
            raise RuntimeError(f"{type(self).__name__}.second_step needs first_step before it")
        self._return()
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    def _return(self) -> None:
        if self._begin:
            torch._foreach_copy_([_local(p) for p in self._begin], list(self._begin.values()))
        self._begin = {}

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        self.zero_grad()  # the climb's gradient must not add to the one at its end
        with torch.enable_grad():
            return closure()

    def _evaluate_again(self, closure: Callable[[], Any]) -> None:
        """The pass at θ + ε; if it fails, the parameters are put back before the error goes on."""
        try:
            with frozen_running_stats(self._model):
                self._evaluate(closure)
        except BaseException:
            self._return()
            raise

    def _need(self, name: str, given: object) -> None:
        if not callable(given):
            raise RuntimeError(
                f"{type(self).__name__}.step needs a {name}, not {given!r}: a step evaluates the loss at two points; or call "
                "first_step() and second_step() yourself, each after a backward pass"
            )


class FixedRadius(SharpnessAware):
    """A neighbourhood whose radius is the option ``rho``: SAM and ASAM."""

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Climb to θ + ε by the gradients that ``backward`` left; then run forward and backward again, then `second_step`."""
        self._climb(lambda group: group["rho"], zero_grad)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # backward passes of a closure cannot be traced
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; gives what the first call of ``closure`` returned.

        Args:
            closure: computes the loss, calls ``backward`` on it and returns it. It is called twice: at θ and at θ + ε.

        Raises:
            RuntimeError: without a closure.
        """
        self._need("closure", closure)
        assert closure is not None
        loss = self._evaluate(closure)
        self.first_step()
        self._evaluate_again(closure)
        self.second_step()
        return loss


def check_at_least_zero(group: Mapping[str, Any], *names: str) -> None:
    """Raise ``ValueError`` for an option of a group that is negative or NaN."""
    for name in names:
        if not group[name] >= 0:
            raise ValueError(f"'{name}' must be at least 0, not {group[name]}")


def _batches(params: Sequence[Tensor], foreach: bool | None) -> list[list[Tensor]]:
    if foreach is False:
        return [[p] for p in params]
    kinds: dict[tuple[Any, ...], list[Tensor]] = {}
    for p in params:
        kinds.setdefault((p.device, p.dtype, _mesh(p)), []).append(p)
    return list(kinds.values())


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """One number for the batch (a list, so that empty batches give none)."""
    if not tensors:
        return []
    norms = torch._foreach_norm(list(tensors), 2, dtype=_wide(tensors[0].dtype))
    norm = torch.linalg.vector_norm(torch.stack(norms))
    whole: Any = norm
    return [whole.full_tensor() if _is_distributed(norm) else norm]


def _joint(lengths: Sequence[Tensor]) -> Tensor:
    if len(lengths) == 1:
        return lengths[0]
    dtype = torch.float64 if any(n.dtype == torch.float64 for n in lengths) else torch.float32
    norm: Tensor = torch.linalg.vector_norm(torch.stack([n.to(lengths[0].device, dtype) for n in lengths]))
    return norm


def _is_distributed(tensor: Tensor) -> bool:
    return _mesh(tensor) is not None


def _mesh(tensor: Tensor) -> Any:
    """The device mesh of a DTensor, None for any other tensor."""
    if not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor

    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor, sharing its memory; any other tensor itself."""
    whole: Any = tensor
    part: Tensor = whole.to_local() if _is_distributed(tensor) else tensor
    return part

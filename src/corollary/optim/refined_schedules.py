"""Linear decay, and learning-rate schedules refined for a task from the gradient norms of an earlier run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import index
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from scipy.ndimage import median_filter
from torch import Tensor
from torch.optim import Optimizer

from corollary.optim.multiplier_lr import MultiplierLR

Norm = Literal["l1", "l2"]
_ORDERS: Mapping[str, int] = {"l1": 1, "l2": 2}


def _whole(name: str, value: int) -> int:
    try:
        return index(value)  # a plain int, whichever kind of integer came: it goes into the state
    except TypeError as error:
        raise TypeError(f"'{name}' must be a whole number, not {value!r}") from error


class LinearDecay(MultiplierLR):
    r"""Linear decay to zero, the schedule with the best worst-case bound on the last iterate, after an optional warm-up.

    With :math:`T` steps, :math:`W` of them warm-up, and :math:`t` counted from 0,

    .. math::
        m(t) = \begin{cases} (t + 1) / W & t < W \\ 1 - (t - W) / (T - W) & W \le t \le T \\ 0 & t > T \end{cases}

    For a convex loss with gradients of norm at most :math:`G`, and the minimum at a distance :math:`D` from the start, SGD over
    two steps or more with the initial rate :math:`D / (G \sqrt T)` ends with :math:`f(x_T) - f_* \le D G / \sqrt T`.

    Args:
        optimizer: any torch optimizer.
        total_steps: steps of the run, at least 1; call ``step()`` after each. From this step on the rate is 0.
        warmup_steps: steps of linear warm-up, in [0, total_steps).
        last_epoch: as in every schedule of torch: number of the last step done, -1 to start.

    Raises:
        ValueError: a number of steps out of range.
        TypeError: ``optimizer`` is no optimizer, or a number of steps is not whole.

    When not to use it: where the length of the run is not known when it starts.

    Deviation from the paper: it counts steps from 1, so that its rate is 0 at the last of :math:`T` steps; here the last step
    still moves, with :math:`m(T - 1) = 1 / T`.

    Example:
        >>> import torch
        >>> from corollary.optim import LinearDecay
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=1.0)
        >>> schedule = LinearDecay(optimizer, total_steps=6, warmup_steps=2)
        >>> rates = []
        >>> for _ in range(6):
        ...     rates += schedule.get_last_lr()
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]

    Reference:
        Defazio, Cutkosky, Mehta, Mishchenko, "When, Why and How Much? Adaptive Learning Rate Scheduling by Refinement", arXiv
        2310.07831, Theorem 1 with equal weights; warm-up as in the authors' code.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, last_epoch: int = -1) -> None:
        total_steps, warmup_steps = _whole("total_steps", total_steps), _whole("warmup_steps", warmup_steps)
        if total_steps < 1:
            raise ValueError(f"'total_steps' must be at least 1, not {total_steps}")
        if not 0 <= warmup_steps < total_steps:
            raise ValueError(f"'warmup_steps' must be in [0, total_steps), here [0, {total_steps}), not {warmup_steps}")
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        super().__init__(optimizer, last_epoch)

    def multiplier(self, step: int) -> float:
        """The factor on every group's initial rate at step ``step``, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return max(0.0, (self.total_steps - step) / (self.total_steps - self.warmup_steps))


def refine_schedule(grad_norms: Tensor | Sequence[float], *, norm: Norm = "l2", smoothing: float = 0.1) -> Tensor:
    r"""The schedule with the best bound for the gradient norms that a run has shown, as multipliers with maximum 1.

    With the norms' running median :math:`\hat G_t`, and :math:`p = 2` for SGD (l2 norms) or :math:`p = 1` for Adam (l1 norms),

    .. math:: w_t = \hat G_t^{-p}, \qquad m_t = w_t \sum_{s = t + 1}^{T} w_s, \qquad \text{scaled to } \max_t m_t = 1

    Large gradients at the start give a warm-up, and small ones towards the end a rate that stays up and then falls rapidly.
    Equal norms give linear decay. The scale of the norms does not matter. The last multiplier is 0.

    Args:
        grad_norms: norm of the whole gradient at each step of a run, in order: (T,) with T at least 2, floating, finite, not
            negative. See `GradNormRecorder`.
        norm: ``l2`` for SGD, with or without momentum, or ``l1`` for Adam and its kin: which norm was recorded, and so which
            weights. Methods that precondition with a matrix A fixed over the run take ``l2`` with norms in the metric of A⁻¹.
        smoothing: width of the running median as a share of T, in [0, 1]; the next lower odd number of steps, or 1 at least.
            Before the first step its value is repeated, past the last one the norms are mirrored. 0 smooths nothing.

    Returns:
        Multipliers (T,), in [0, 1], in the norms' dtype and on their device (float64 for a list). Give them to
        `RefinedSchedule`.

    Raises:
        ValueError: norms of another shape, fewer than 2, negative, not finite, or zero even in the median; ``norm`` or
            ``smoothing`` out of range.
        TypeError: norms that are integers or complex.

    When not to use it: where the median of the norms falls by orders of magnitude, as when training data is fitted perfectly:
    the bound then puts nearly all weight on the last steps. And without a run to learn from.

    Example:
        >>> from corollary.optim import refine_schedule
        >>> refine_schedule([1.0, 1.0, 1.0, 1.0, 1.0], smoothing=0.0).tolist()
        [1.0, 0.75, 0.5, 0.25, 0.0]
        >>> [round(m, 3) for m in refine_schedule([4.0, 2.0, 1.0, 1.0, 1.0], norm="l1", smoothing=0.0).tolist()]
        [0.438, 0.75, 1.0, 0.5, 0.0]

    Reference:
        Defazio, Cutkosky, Mehta, Mishchenko, arXiv 2310.07831, schedule refinement for SGD and for Adam; the weights for Adam and
        the edges of the median as in the authors' code, facebookresearch/adaptive_scheduling.
    """
    if norm not in _ORDERS:
        raise ValueError(f"'norm' is {norm!r}; allowed: {', '.join(_ORDERS)}")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"'smoothing' must be in [0, 1], not {smoothing}")
    given = grad_norms.detach() if isinstance(grad_norms, Tensor) else torch.as_tensor(grad_norms, dtype=torch.float64)
    if not given.is_floating_point():
        raise TypeError(f"'grad_norms' is {given.dtype}; allowed: floating point")
    if given.dim() != 1 or len(given) < 2:
        raise ValueError(f"'grad_norms' has shape {tuple(given.shape)}; allowed: (T,) with T at least 2")
    norms = given.to("cpu", torch.float64).numpy()
    for bad, what in ((~np.isfinite(norms), "finite"), (norms < 0, "at least 0")):
        if bad.any():
            step = int(bad.argmax())
            raise ValueError(f"'grad_norms' must be {what}, not {norms[step]} (step {step})")

    half = int(smoothing * len(norms)) // 2
    padded = np.pad(np.pad(norms, (half, 0), mode="edge"), (0, half), mode="reflect")
    smooth = median_filter(padded, size=2 * half + 1)[half : half + len(norms)]
    if not smooth.min() > 0:
        step = int((smooth == 0).argmax())
        raise ValueError(
            f"'grad_norms' is 0 in the median around step {step}: where gradients vanish there is nothing to refine"
        )
    weights = (smooth.min() / smooth) ** _ORDERS[norm]  # at most 1, so that nothing overflows
    later = np.append(np.cumsum(weights[:0:-1])[::-1], 0.0)
    multipliers = weights * later
    if not multipliers.max() > 0:
        raise ValueError(f"'grad_norms' span too wide a range for float64: from {smooth.min()} to {smooth.max()}")
    return torch.from_numpy(multipliers / multipliers.max()).to(given.device, given.dtype)


class RefinedSchedule(MultiplierLR):
    r"""A schedule given by its multipliers, as `refine_schedule` makes them, stretched to the length of the run.

    The multipliers :math:`m_0, \dots, m_{n-1}` are points of a curve over the run, from its start to its end; step :math:`t` of
    :math:`T` takes the curve's value at :math:`t / T`, interpolated linearly. So a schedule learnt in a short run serves a
    longer one, and multipliers from equal norms give `LinearDecay` exactly.

    Args:
        optimizer: any torch optimizer; its rate is the schedule's peak, to be tuned anew.
        multipliers: (n,) with n at least 2, finite, not negative.
        total_steps: steps of the run; as many as there are multipliers by default. Past them the last multiplier stays.
        last_epoch: as in every schedule of torch: number of the last step done, -1 to start.

    Raises:
        ValueError: multipliers of another shape, fewer than 2, negative or not finite; ``total_steps`` below 1.
        TypeError: ``optimizer`` is no optimizer, or ``total_steps`` is not whole.

    Deviation from the paper: its last of :math:`T` steps has rate 0; here the curve reaches 0 after the last step, so that none
    is wasted. ``total_steps=n - 1`` gives the paper's.

    Example:
        >>> import torch
        >>> from corollary.optim import GradNormRecorder, LinearDecay, RefinedSchedule, refine_schedule
        >>> def train(make_schedule, steps=60):
        ...     torch.manual_seed(0)
        ...     model, x = torch.nn.Linear(8, 1), torch.randn(256, 8)
        ...     y = x.sum(1, keepdim=True) + torch.randn(256, 1)
        ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ...     schedule = make_schedule(optimizer)
        ...     with GradNormRecorder(optimizer) as recorder:
        ...         for _ in range(steps):
        ...             rows = torch.randint(256, (16,))
        ...             optimizer.zero_grad()
        ...             torch.nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
        ...             optimizer.step()
        ...             schedule.step()
        ...     return recorder.norms
        >>> norms = train(lambda optimizer: LinearDecay(optimizer, total_steps=60))
        >>> multipliers = refine_schedule(norms)
        >>> float(multipliers[0]) < 0.5  # warm-up
        True
        >>> _ = train(lambda optimizer: RefinedSchedule(optimizer, multipliers))

    Reference:
        Defazio, Cutkosky, Mehta, Mishchenko, arXiv 2310.07831, schedule refinement.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        multipliers: Tensor | Sequence[float],
        total_steps: int | None = None,
        last_epoch: int = -1,
    ) -> None:
        points = torch.as_tensor(multipliers, dtype=torch.float64, device="cpu").detach().numpy()
        if points.ndim != 1 or len(points) < 2:
            raise ValueError(f"'multipliers' has shape {points.shape}; allowed: (n,) with n at least 2")
        if not np.isfinite(points).all() or points.min() < 0:
            bad = int((~(np.isfinite(points) & (points >= 0))).argmax())
            raise ValueError(f"'multipliers' must be finite and at least 0, not {points[bad]} (entry {bad})")
        self.total_steps = len(points) if total_steps is None else _whole("total_steps", total_steps)
        if self.total_steps < 1:
            raise ValueError(f"'total_steps' must be at least 1, not {total_steps}")
        places = np.arange(self.total_steps + 1) * ((len(points) - 1) / self.total_steps)
        # Plain numbers at every step: a state that JSON takes, and nothing to compute while training.
        self.multipliers: list[float] = np.interp(places, np.arange(len(points)), points).tolist()
        super().__init__(optimizer, last_epoch)

    def multiplier(self, step: int) -> float:
        """The factor on every group's initial rate at step ``step``, counted from 0."""
        return self.multipliers[min(step, self.total_steps)]


class GradNormRecorder:
    r"""Records the norm of the whole gradient at every step of an optimizer, for `refine_schedule`.

    It hooks into ``optimizer.step()`` and takes the gradients as they stand when the step ends: after clipping, and after the
    closure, where there is one. Norms stay on the device until they are asked for, so that training does not wait for them.
    Gradients in half precision are added up in float32. A step without any gradient is not recorded.

    Args:
        optimizer: any torch optimizer; sharded (DTensor) and sparse gradients count whole.
        norm: ``l2`` or ``l1``, over all entries of all gradients.

    Raises:
        ValueError: ``norm`` is none of the two.
        TypeError: ``optimizer`` is no optimizer.

    Example:
        >>> import torch
        >>> from corollary.optim import GradNormRecorder
        >>> p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = torch.optim.SGD([p], lr=0.25)
        >>> with GradNormRecorder(optimizer) as recorder:
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         (p**2).sum().backward()
        ...         optimizer.step()
        >>> recorder.norms
        tensor([10.0000,  5.0000,  2.5000], dtype=torch.float64)
    """

    def __init__(self, optimizer: Optimizer, norm: Norm = "l2") -> None:
        if norm not in _ORDERS:
            raise ValueError(f"'norm' is {norm!r}; allowed: {', '.join(_ORDERS)}")
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"'optimizer' must be a torch optimizer, not {type(optimizer).__name__}")
        self.norm = norm
        self._recorded: list[Tensor] = []
        self._hook = optimizer.register_step_post_hook(self._record)

    def _record(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            self._recorded.append(_total_norm(gradients, _ORDERS[self.norm]))

    @property
    def norms(self) -> Tensor:
        """The norms so far, one for each step: (steps,) float64 on the CPU."""
        if not self._recorded:
            return torch.empty(0, dtype=torch.float64)
        return torch.stack([n.to("cpu", torch.float64) for n in self._recorded])

    def remove(self) -> None:
        """Stop recording; what was recorded stays."""
        self._hook.remove()

    def __enter__(self) -> GradNormRecorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    def state_dict(self) -> dict[str, Any]:
        """The norms so far and their kind: a tensor and a text."""
        return {"norm": self.norm, "norms": self.norms}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on after the norms of ``state_dict``; raises ``ValueError`` where they are of the other kind."""
        if state_dict["norm"] != self.norm:
            raise ValueError(f"'state_dict' holds {state_dict['norm']} norms; this recorder takes {self.norm}")
        self._recorded = list(torch.as_tensor(state_dict["norms"], dtype=torch.float64).clone().unbind())


@torch.no_grad()
def _total_norm(gradients: Sequence[Tensor], order: int) -> Tensor:
    """The norm over all entries: that of the tensors' own norms, taken together for each device and dtype."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        entries = gradient.coalesce().values() if gradient.is_sparse else gradient
        kinds.setdefault((entries.device, entries.dtype), []).append(entries)
    parts: list[Tensor] = []
    for (_, dtype), members in kinds.items():
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else None
        norms = torch._foreach_norm(members, order, dtype=wide)
        part: Tensor = torch.linalg.vector_norm(torch.stack(norms), order)
        parts.append(part.full_tensor() if hasattr(part, "full_tensor") else part)
    if len(parts) == 1:
        return parts[0]
    dtype = reduce(torch.promote_types, (part.dtype for part in parts))
    total: Tensor = torch.linalg.vector_norm(torch.stack([part.to(parts[0].device, dtype) for part in parts]), order)
    return total

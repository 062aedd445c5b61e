"""Composite stochastic mirror descent, and the step sizes with which its last iterate is as good as an average."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from corollary.optim.multiplier_lr import MultiplierLR

COMPOSITES: Mapping[str, tuple[str | None, ...]] = {
    "euclidean": (None, "l1", "mirror", "box", "ball", "simplex"),
    "p_norm": (None, "l1", "mirror"),
    "power": (None, "l1", "mirror", "ball"),
    "entropy": (None, "mirror"),
}
_ELEMENTWISE = (None, "l1", "mirror", "box")  # with the euclidean mirror these treat every entry by itself


class CompositeMirrorDescent(Optimizer):
    r"""Stochastic mirror descent for f + h: the gradient of f is followed, the simple term h is minimized exactly.

    .. math::
        x_{t+1} = \operatorname{argmin}_x \; h(x) + \langle g_t, x \rangle + \frac{1}{η_t} D_ψ(x, x_t), \qquad
        D_ψ(x, y) = ψ(x) - ψ(y) - \langle ∇ψ(y), x - y \rangle

    All combinations below have a closed form: a step :math:`z = ∇ψ(x_t) - η_t g_t` in the dual, there the shrinkage of ``l1`` or
    ``mirror``, the way back by :math:`∇ψ^*`, and here the projection onto a set.

    =============  ===============================================  =========================================
    ``mirror``     ψ(x)                                             ``composite`` h
    =============  ===============================================  =========================================
    ``euclidean``  ‖x‖² / 2                                         none, l1, mirror, box, ball, simplex
    ``p_norm``     ‖x‖ₚ² / (2 (p - 1)), 1 < p = ``order`` ≤ 2       none, l1, mirror
    ``power``      2^(q-2) ‖x‖^q / q, q = ``order`` ≥ 2             none, l1, mirror, ball
    ``entropy``    Σ xᵢ log xᵢ on the probability simplex           none, mirror
    =============  ===============================================  =========================================

    ``l1`` is λ‖x‖₁, ``mirror`` is λψ(x) (ridge for ``euclidean``), ``box`` the set low ≤ x ≤ high, ``ball`` ‖x‖ ≤ ``radius``,
    ``simplex`` x ≥ 0 with sum ``radius``. With noise of finite p-th moment, 1 < p ≤ 2, the theorems ask for a ψ that is uniformly
    convex of degree q = p / (p - 1), which ``power`` is: :math:`D_ψ(x, y) \ge \|x - y\|^q / q`.

    With the step sizes of `LastIterateLR` the last iterate itself, without averaging, reaches the rate of the average.

    Args:
        params: parameters or groups, real and floating; with ``entropy`` each a positive point whose entries add up to 1.
        lr: step size η.
        mirror: ψ, by name. Each parameter is one point with its own ψ; the entropy, norms and sets run over all its entries.
        order: p of ``p_norm`` (default 1.5), q of ``power`` (default 3).
        composite: h, by name, or None.
        weight: λ ≥ 0 of ``l1`` and ``mirror``.
        low, high: of ``box``.
        radius: of ``ball`` and ``simplex``.
        batch_dims: so many leading dimensions of each parameter count independent problems, which then run side by side.
        foreach: update all parameters together where h and ψ treat entries one by one; None means yes.

    Without state: a run resumed with its step sizes goes on bit by bit. Half precision is computed in float32.

    Raises:
        ValueError: an option out of range or a pair that has no closed form; a start off the simplex; a parameter without
            entries where a norm or a sum runs over them.
        TypeError: complex parameters; a DTensor where norms or sums run over a parameter.
        RuntimeError: a sparse gradient.

    When not to use it: on networks, whose loss is not convex; where λ of ``l1`` should act through Adam's scaling.

    Example:
        >>> import torch
        >>> target = torch.tensor([0.7, 0.2, 0.1, 0.0])
        >>> x = torch.nn.Parameter(torch.full((4,), 0.25))
        >>> optimizer = CompositeMirrorDescent([x], lr=2.0, mirror="entropy")
        >>> schedule = LastIterateLR(optimizer, total_steps=200)
        >>> for _ in range(200):
        ...     optimizer.zero_grad()
        ...     (x - target).abs().sum().backward()
        ...     optimizer.step()
        ...     schedule.step()
        >>> bool((x - target).abs().max() < 0.02), round(x.sum().item(), 5)
        (True, 1.0)

    Reference:
        Liu, Zhou, "Revisiting the Last-Iterate Convergence of Stochastic Gradient Methods", arXiv 2312.08531, Algorithm 1.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.1,
        *,
        mirror: str = "euclidean",
        order: float | None = None,
        composite: str | None = None,
        weight: float = 0.0,
        low: float = -1.0,
        high: float = 1.0,
        radius: float = 1.0,
        batch_dims: int = 0,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "mirror": mirror,
            "order": order,
            "composite": composite,
            "weight": weight,
            "low": low,
            "high": high,
            "radius": radius,
            "batch_dims": batch_dims,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as ``torch.optim.Optimizer`` does, checking its parameters and options."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if group["order"] is None:
                group["order"] = {"p_norm": 1.5, "power": 3.0}.get(group["mirror"], 2.0)
            _check_options(group)
            for i, param in enumerate(group["params"]):
                _check_param(f"params[{i}]", param, group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; gives what ``closure`` returned, or None.

        Args:
            closure: computes the loss f and its gradients, without h, and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            gradients = [_dense(p.grad) for p in params]
            if not params:
                continue
            half = [p.dtype in (torch.float16, torch.bfloat16) for p in params]
            wide = [p.float() if h else p for p, h in zip(params, half, strict=True)]
            gradients = [g.float() if h else g for g, h in zip(gradients, half, strict=True)]
            if _is_elementwise(group) and group["foreach"] is not False:
                _euclidean(wide, gradients, group)
            else:
                for point, gradient in zip(wide, gradients, strict=True):
                    if _is_elementwise(group):
                        _euclidean([point], [gradient], group)
                    elif point.numel():
                        point.copy_(_mirror_step(point, gradient, group))
            for param, point, h in zip(params, wide, half, strict=True):
                if h:
                    param.copy_(point)
        return loss

    def composite_value(self) -> Tensor:
        """h at the present parameters, added up over all of them, with its gradient; sets count as 0.

        Example:
            >>> import torch
            >>> x = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
            >>> CompositeMirrorDescent([x], composite="l1", weight=0.5).composite_value().item()
            1.5
        """
        first = self.param_groups[0]["params"][0]
        total = torch.zeros((), dtype=first.dtype, device=first.device)
        for group in self.param_groups:
            for param in group["params"]:
                if group["composite"] == "l1":
                    total = total + group["weight"] * param.abs().sum()
                elif group["composite"] == "mirror":
                    total = total + group["weight"] * _psi(_points(param, group), group).sum()
        return total


def _is_elementwise(group: Mapping[str, Any]) -> bool:
    return group["mirror"] == "euclidean" and group["composite"] in _ELEMENTWISE


def _euclidean(points: Sequence[Tensor], gradients: Sequence[Tensor], group: Mapping[str, Any]) -> None:
    """The step in place where every entry goes its own way."""
    lr, shrink = float(group["lr"]), float(group["lr"]) * group["weight"]
    points = list(points)
    torch._foreach_add_(points, list(gradients), alpha=-lr)
    if group["composite"] == "l1":
        cut = torch._foreach_clamp_min(points, -shrink)
        torch._foreach_clamp_max_(cut, shrink)
        torch._foreach_sub_(points, cut)
    elif group["composite"] == "mirror":
        torch._foreach_div_(points, 1 + shrink)
    elif group["composite"] == "box":
        torch._foreach_clamp_min_(points, group["low"])
        torch._foreach_clamp_max_(points, group["high"])


def _points(tensor: Tensor, group: Mapping[str, Any]) -> Tensor:
    """(problems, entries of a problem)."""
    return tensor.reshape(math.prod(tensor.shape[: group["batch_dims"]]), -1)


def _mirror_step(param: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
    lr, composite = float(group["lr"]), group["composite"]
    x = _points(param, group)
    dual = _to_dual(x, group) - lr * _points(gradient, group)
    if composite == "l1":
        dual = dual - dual.clamp(-lr * group["weight"], lr * group["weight"])
    elif composite == "mirror":
        dual = dual / (1 + lr * group["weight"])
    new = _to_primal(dual, group)
    if composite == "ball":
        norm = torch.linalg.vector_norm(new, dim=1, keepdim=True)
        new = new * (group["radius"] / norm.clamp_min(group["radius"]))
    elif composite == "simplex":
        new = _onto_simplex(new, group["radius"])
    return new.view(param.shape)


def _psi(x: Tensor, group: Mapping[str, Any]) -> Tensor:
    mirror, order = group["mirror"], float(group["order"])
    if mirror == "entropy":
        return torch.xlogy(x, x).sum(1)
    if mirror == "p_norm":
        norm: Tensor = torch.linalg.vector_norm(x, order, dim=1)
        return norm.square() / (2 * (order - 1))
    norm = torch.linalg.vector_norm(x, dim=1)
    return norm**2 / 2 if mirror == "euclidean" else norm.pow(order) * (math.pow(2, order - 2) / order)


def _to_dual(x: Tensor, group: Mapping[str, Any]) -> Tensor:
    """∇ψ; of the entropy without its constant 1, which the normalization takes out again."""
    mirror, order = group["mirror"], float(group["order"])
    if mirror == "euclidean":
        return x
    if mirror == "entropy":
        return x.log()
    if mirror == "p_norm":
        return _p_norm_map(x, order) / (order - 1)
    norm: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x * (2 * norm).pow(order - 2)


def _to_primal(z: Tensor, group: Mapping[str, Any]) -> Tensor:
    """∇ψ*, the inverse of `_to_dual`."""
    mirror, order = group["mirror"], float(group["order"])
    if mirror == "euclidean":
        return z
    if mirror == "entropy":
        return torch.softmax(z, dim=1)
    if mirror == "p_norm":
        return _p_norm_map(z * (order - 1), order / (order - 1))
    norm: Tensor = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    length = (norm / math.pow(2, order - 2)).pow(1 / (order - 1))
    return z * (length / norm.clamp_min(torch.finfo(z.dtype).tiny))


def _p_norm_map(x: Tensor, p: float) -> Tensor:
    """Gradient of ‖x‖ₚ² / 2, entries first divided by the norm, for their powers not to overflow."""
    norm: Tensor = torch.linalg.vector_norm(x, p, dim=1, keepdim=True)
    unit = x / norm.clamp_min(torch.finfo(x.dtype).tiny)
    return unit.sign() * unit.abs().pow(p - 1) * norm


def _onto_simplex(x: Tensor, total: float) -> Tensor:
    """Euclidean projection of each row onto {y >= 0, sum y = total}, by sorting."""
    ordered = x.sort(dim=1, descending=True).values
    excess = ordered.cumsum(1) - total
    count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)
    last = (ordered * count > excess).sum(1, keepdim=True).clamp_min(1)
    return (x - excess.gather(1, last - 1) / last).clamp_min(0)


def _dense(gradient: Tensor) -> Tensor:
    if gradient.layout is not torch.strided:
        raise RuntimeError(
            f"CompositeMirrorDescent needs dense gradients, not {gradient.layout}: use nn.Embedding(sparse=False)"
        )
    return gradient


def _check_options(group: Mapping[str, Any]) -> None:
    mirror, composite, order = group["mirror"], group["composite"], group["order"]
    if mirror not in COMPOSITES:
        raise ValueError(f"'mirror' must be one of {', '.join(COMPOSITES)}, not {mirror!r}")
    if composite not in COMPOSITES[mirror]:
        raise ValueError(f"'composite' with mirror '{mirror}' must be one of {COMPOSITES[mirror]}, not {composite!r}")
    good = {"p_norm": 1 < order <= 2, "power": 2 <= order < math.inf}.get(mirror, order == 2)
    allowed = {"p_norm": "in (1, 2]", "power": "at least 2 and finite"}.get(mirror, f"left out with mirror '{mirror}'")
    for name, value, fine, what in (
        ("lr", group["lr"], group["lr"] >= 0, "at least 0"),
        ("order", order, good, allowed),
        ("weight", group["weight"], 0 <= group["weight"] < math.inf, "at least 0 and finite"),
        ("high", group["high"], group["low"] <= group["high"], f"at least 'low' = {group['low']}"),
        ("radius", group["radius"], 0 < group["radius"] < math.inf, "above 0 and finite"),
        ("batch_dims", group["batch_dims"], group["batch_dims"] >= 0, "at least 0"),
    ):
        if not fine:
            raise ValueError(f"'{name}' must be {what}, not {value}")


def _check_param(name: str, param: Tensor, group: Mapping[str, Any]) -> None:
    if param.is_complex():
        raise TypeError(f"'{name}' is {param.dtype}; CompositeMirrorDescent takes real parameters (see torch.view_as_real)")
    if param.dim() < group["batch_dims"]:
        raise ValueError(f"'{name}' has {param.dim()} dimensions; 'batch_dims' asks for at least {group['batch_dims']}")
    if _is_elementwise(group):
        return
    if hasattr(param, "full_tensor"):
        raise TypeError(
            f"'{name}' is a DTensor; with mirror '{group['mirror']}' and composite {group['composite']!r} norms or sums run over "
            "the whole parameter, which must be undistributed"
        )
    if not param.numel():
        raise ValueError(f"'{name}' is empty, of shape {tuple(param.shape)}; mirror '{group['mirror']}' needs entries")
    if group["mirror"] == "entropy":
        points = _points(param.detach(), group).double()
        off = float((points.sum(1) - 1).abs().max())
        if not bool((points > 0).all()) or off > 1e-2:
            raise ValueError(
                f"'{name}' must start inside the probability simplex for mirror 'entropy': entries above 0 that add up to 1; "
                f"its smallest entry is {float(points.min()):.3g}, and a sum is off by {off:.3g}"
            )


class LastIterateLR(MultiplierLR):
    r"""Step sizes with which the last iterate of stochastic (mirror) descent converges at the rate of the average.

    With t = 1, 2, ..., the initial rate η of each group, and the horizon T:

    ======================  ================================  ==========================================================
    f + h                   T unknown                         T known
    ======================  ================================  ==========================================================
    convex                  :math:`η / \sqrt{t}`              ``linear``: :math:`η (T - t + 1) / T^{3/2}`;
                                                              ``constant``: :math:`η / \sqrt{T}`
    convex, finite moment   :math:`η / t^{1/p}`               ``linear``: :math:`η (T - t + 1) / T^{1 + 1/p}`;
                                                              ``constant``: :math:`η / T^{1/p}`
    strongly convex         :math:`2η / (μ (t + 1) + 4L)`     :math:`η / (μ + 2L)` for t ≤ τ = ⌈T/2⌉, then
                                                              :math:`2η / (μ (t - τ + 2) + 4L)`
    ======================  ================================  ==========================================================

    The middle row is for noise of finite p-th moment, 1 < p ≤ 2, the last for μ-strong convexity of f or h with respect to ψ.
    The convex ones are cut off at 1 / (2L) where f is L-smooth. The gap of the last iterate is then of order
    :math:`L/T + 1/\sqrt{T}`, :math:`T^{(1-p)/p}` and :math:`1/T`, the first two times log T unless T is known and the decay is
    ``linear``. For convex problems choose η near the distance to the solution over the size of the gradients and their noise;
    for strongly convex ones η = 1.

    Args:
        optimizer: `CompositeMirrorDescent`, ``torch.optim.SGD`` or any other.
        total_steps: T ≥ 1; None where it is not known. After step T the rates of ``linear`` are 0.
        strong_convexity: μ > 0, of f or of h with respect to ψ; 0 for convex problems.
        smoothness: L ≥ 0; 0 where f is only Lipschitz.
        tail_index: p in (1, 2].
        decay: ``linear`` or ``constant``, with known T.
        last_epoch: as in torch.

    Raises:
        ValueError: an option out of range; ``tail_index`` below 2 with strong convexity, for which there is no theorem.
        TypeError: ``optimizer`` is none.

    When not to use it: on problems that are not convex, for which these rates fall too fast.

    Deviation: the two strongly convex rows satisfy the conditions of the paper's main lemma (a rate of at most
    1 / (2L) and 1 / μ); the constants in its theorems could not be read.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=8.0)
        >>> schedule = LastIterateLR(optimizer, total_steps=4)
        >>> rates = []
        >>> for _ in range(5):
        ...     rates += schedule.get_last_lr()
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [4.0, 3.0, 2.0, 1.0, 0.0]

    Reference:
        Liu, Zhou, arXiv 2312.08531, Theorems 3.1 to 3.4 and 5.1; the linear decay is that of Zamani, Glineur,
        arXiv 2307.11134.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        *,
        strong_convexity: float = 0.0,
        smoothness: float = 0.0,
        tail_index: float = 2.0,
        decay: str = "linear",
        last_epoch: int = -1,
    ) -> None:
        for name, value, good, allowed in (
            ("total_steps", total_steps, total_steps is None or _is_count(total_steps), "an integer of at least 1, or None"),
            ("strong_convexity", strong_convexity, 0 <= strong_convexity < math.inf, "at least 0 and finite"),
            ("smoothness", smoothness, 0 <= smoothness < math.inf, "at least 0 and finite"),
            ("tail_index", tail_index, 1 < tail_index <= 2, "in (1, 2]"),
            ("tail_index", tail_index, tail_index == 2 or not strong_convexity, "2 where 'strong_convexity' is above 0"),
            ("decay", decay, decay in ("linear", "constant"), "'linear' or 'constant'"),
        ):
            if not good:
                raise ValueError(f"'{name}' must be {allowed}, not {value!r}")
        self.total_steps = total_steps
        self.strong_convexity = float(strong_convexity)
        self.smoothness = float(smoothness)
        self.tail_index = float(tail_index)
        self.decay = decay
        super().__init__(optimizer, last_epoch)

    def multiplier(self, step: int) -> float:
        """η_t / η before the cut at 1 / (2L), for t = ``step`` + 1."""
        t, total, mu = step + 1, self.total_steps, self.strong_convexity
        if mu:
            if total is None:
                return 2 / (mu * (t + 1) + 4 * self.smoothness)
            half = -(-total // 2)
            if t <= half:
                return 1 / (mu + 2 * self.smoothness)
            return 2 / (mu * (t - half + 2) + 4 * self.smoothness)
        power = 1 / self.tail_index
        if total is None:
            return float(t**-power)
        if self.decay == "constant":
            return float(total**-power)
        return float(max(total - t + 1, 0) / total ** (1 + power))

    def get_lr(self) -> list[float | Tensor]:
        """The rates of step ``last_epoch``."""
        rates = super().get_lr()
        if self.strong_convexity or not self.smoothness:
            return rates
        largest = 1 / (2 * self.smoothness)
        return [rate.clamp(max=largest) if isinstance(rate, Tensor) else min(rate, largest) for rate in rates]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1

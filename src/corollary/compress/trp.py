"""Trained rank pruning: training that passes through low-rank weights, so that factorizing them afterwards costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from corollary.compress.splitting import check_scheme, fold_weight, splittable, unfold_weight

TOGETHER = 2**14
"""weights of no more entries are decomposed in one call with others of their shape"""


def energy_truncation(matrix: Tensor, energy: float) -> tuple[Tensor, Tensor]:
    r"""The shortest truncation of the singular value decomposition that keeps a share of the energy, and its nuclear direction.

    With :math:`A = U \Sigma V^\top` and r the least rank with :math:`\sum_{i \le r} \sigma_i^2 \ge e \sum_i \sigma_i^2`,

    .. math:: T = U_r \Sigma_r V_r^\top, \qquad N = U_r V_r^\top,

    where N is a sub-gradient of the nuclear norm at T.

    Args:
        matrix: shape (..., m, n), floating and finite; half precision is decomposed in float32.
        energy: share e of the squared Frobenius norm to keep, in (0, 1].

    Returns:
        T and N, shape and dtype of ``matrix``.

    Example:
        >>> t, n = energy_truncation(torch.diag(torch.tensor([3.0, 1.0])), 0.8)
        >>> t.diagonal(), n.diagonal()
        (tensor([3., 0.]), tensor([1., 0.]))
    """
    wide = matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix
    u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    squares = s.square()
    # A direction stays if those before it fall short of the share: so the least sufficient rank is kept.
    before = squares.cumsum(-1) - squares
    keep = (before < energy * squares.sum(-1, keepdim=True)) & (s > 0)
    rank = int(keep.sum(-1).max()) if keep.numel() else 0
    u, s, vh, kept = u[..., :rank], s[..., :rank], vh[..., :rank, :], keep[..., :rank].to(s.dtype)
    truncated: Tensor = (u * (s * kept).unsqueeze(-2)) @ vh
    direction: Tensor = (u * kept.unsqueeze(-2)) @ vh
    return truncated.to(matrix.dtype), direction.to(matrix.dtype)


def rank_pruning_groups(
    model: nn.Module, *, scheme: str = "channel", skip: Sequence[str] = (), smallest: int = 2
) -> list[dict[str, Any]]:
    """Parameter groups for `TrainedRankPruning`: weights that a factorization will split, and the rest.

    Args:
        model: its ``nn.Linear`` and its ungrouped ``nn.Conv2d`` with kernels above 1 × 1 are split; embeddings, also tied ones,
            never are.
        scheme: 'channel' or 'spatial', for the convolutions.
        skip: patterns of module names that stay whole, such as ``("head", "stem")``; a pattern without a match is an error.
        smallest: a weight with fewer rows or columns stays whole.

    Returns:
        Two groups (the second without a ``scheme``), to which options may be added.

    Raises:
        ValueError: an unknown scheme, a pattern that matches nothing, or a model in which nothing is left to split.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8, 4))
        >>> [len(group["params"]) for group in rank_pruning_groups(model, skip=["2"])]
        [1, 3]
    """
    check_scheme(scheme)
    chosen: dict[int, Tensor] = {}
    for _, layer in splittable(model, skip):
        pointwise = isinstance(layer, nn.Conv2d) and max(layer.kernel_size) == 1
        if not pointwise and min(unfold_weight(layer.weight, scheme).shape) >= smallest:
            chosen[id(layer.weight)] = layer.weight
    if not chosen:
        raise ValueError("'model' has no linear layer or convolution that may be split")
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [{"params": list(chosen.values()), "scheme": scheme}, {"params": rest, "scheme": None}]


class TrainedRankPruning(Optimizer):
    r"""A base optimizer whose weights are cut back to low rank every few steps, with a nuclear-norm sub-gradient from there.

    Once in ``period`` steps a weight's matrix W (see `unfold_weight`) is replaced by the truncation T of `energy_truncation`, and
    the next step's gradient is taken there, with the sub-gradient of the nuclear norm added:

    .. math::
        T = \mathrm{trunc}_e(W), \qquad W \leftarrow \mathrm{base}\big(T, \nabla L(T) + \lambda\, U_r V_r^\top\big);

    all other steps are the base optimizer's own. The model keeps its layers and capacity; at the end its weights are so near to
    low rank that splitting them (`corollary.compress.factorize`) changes little.

    Args:
        params: parameters or groups, best from `rank_pruning_groups`, or a made optimizer, which is wrapped as it is. Parameters
            of two or four dimensions in a group whose ``scheme`` is not None are treated.
        base_optimizer: class of the optimizer that takes the steps; None where ``params`` is an optimizer.
        period: steps between two truncations, m in the paper.
        energy: share e of a matrix's squared norm that a truncation keeps, in (0, 1].
        nuclear_weight: λ.
        scheme: how convolutions are unfolded, 'channel' or 'spatial'; None leaves a group alone.
        base_options: given to ``base_optimizer``: ``lr`` and the like.

    ``param_groups``, ``state`` and ``state_dict()`` are the base optimizer's; each group counts its steps in ``trp_steps``. State
    of a treated weight holds one more tensor of its size for the step that follows a truncation.

    Raises:
        TypeError: no ``base_optimizer``, a complex parameter or a DTensor.
        ValueError: an option out of range, or a base that needs a closure.
        RuntimeError: a sparse gradient.

    Deviations: a truncation comes at the end of every ``period``-th step, which is the start of the next one, as the authors' code
    has it, but for the first: wrapping a model does not change it. A weight that is not finite, has no gradient in the step, or
    stands in a group with ``lr`` 0 is left as it is.

    When not to use it: where a trained checkpoint is all there is (compress it in the metric of its inputs instead), or where a
    decomposition of every weight each ``period`` steps costs more than the steps.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 6))
        >>> optimizer = TrainedRankPruning(rank_pruning_groups(model), torch.optim.SGD, lr=0.1, period=5, energy=0.5)
        >>> for _ in range(5):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(32, 8)).square().mean().backward()
        ...     optimizer.step()
        >>> int(torch.linalg.matrix_rank(model[0].weight.detach())) < 6
        True

    Reference:
        Xu et al., "Trained Rank Pruning for Efficient Deep Neural Networks", arXiv 1812.02402; the authors' ``cifar-TRP.py``.
    """

    base_optimizer: Optimizer

    def __init__(
        self,
        params: ParamsT | Optimizer,
        base_optimizer: Callable[..., Optimizer] | None = None,
        *,
        period: int = 20,
        energy: float = 0.9,
        nuclear_weight: float = 3e-4,
        scheme: str | None = "channel",
        **base_options: Any,
    ) -> None:
        if isinstance(params, Optimizer):
            if base_optimizer is not None or base_options:
                given = ["base_optimizer"] if base_optimizer is not None else list(base_options)
                raise TypeError(f"'params' is an optimizer, which is wrapped as it is; leave out {', '.join(given)}")
            base = params
        else:
            if not callable(base_optimizer):
                raise TypeError(
                    f"'base_optimizer' must be an optimizer class such as torch.optim.SGD, not {base_optimizer!r} "
                    "(or give a made optimizer in place of 'params')"
                )
            base = base_optimizer(params, **base_options)
        if isinstance(base, torch.optim.LBFGS):
            raise ValueError("'base_optimizer' must take one gradient a step, which LBFGS does not")
        self._own = {
            "period": period,
            "energy": energy,
            "nuclear_weight": nuclear_weight,
            "scheme": scheme,
            "trp_steps": 0,
        }
        # Optimizer.__init__ would make groups of its own; __setstate__ sets up hooks alone, as after unpickling.
        self.__setstate__({"defaults": {**base.defaults, **self._own}, "base_optimizer": base, "_own": self._own})
        for group in self.param_groups:
            self._adopt(group)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("defaults", "base_optimizer", "_own")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state

    def _adopt(self, group: dict[str, Any]) -> None:
        for option, value in self._own.items():
            group.setdefault(option, value)
        if group["scheme"] is not None:
            check_scheme(group["scheme"])
        if isinstance(group["period"], bool) or not isinstance(group["period"], int) or group["period"] < 1:
            raise ValueError(f"'period' must be a whole number of at least 1, not {group['period']!r}")
        if not 0 < group["energy"] <= 1:
            raise ValueError(f"'energy' must be in (0, 1], not {group['energy']}")
        if not group["nuclear_weight"] >= 0:
            raise ValueError(f"'nuclear_weight' must be at least 0, not {group['nuclear_weight']}")
        for i, param in enumerate(group["params"]):
            if param.is_complex():
                raise TypeError(f"'params[{i}]' is {param.dtype}; TrainedRankPruning takes real parameters, not complex ones")
            if hasattr(param, "device_mesh"):
                raise TypeError(f"'params[{i}]' is a DTensor; TrainedRankPruning decomposes whole matrices")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer, with this method's options where the group has none."""
        self.base_optimizer.add_param_group(param_group)
        try:
            self._adopt(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state; this method's options and counts stand in the groups."""
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` gave."""
        self.base_optimizer.load_state_dict(dict(state_dict))
        self._share()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients."""
        self.base_optimizer.zero_grad(set_to_none)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # decompositions cannot be traced
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; gives what ``closure``, which computes the loss and its gradients, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        treated = [_treated(group) for group in self.param_groups]
        for group, params in zip(self.param_groups, treated, strict=True):
            for p in params:
                assert p.grad is not None
                if p.grad.layout is not torch.strided:
                    raise RuntimeError(f"TrainedRankPruning needs dense gradients, not {p.grad.layout} ones")
                direction = self.state[p].pop("nuclear_direction", None) if p in self.state else None
                if direction is not None:
                    # Not in place: the gradient stays what backward left there.
                    p.grad = p.grad.add(direction, alpha=group["nuclear_weight"])
        self.base_optimizer.step()
        for group, params in zip(self.param_groups, treated, strict=True):
            if not params:
                continue
            group["trp_steps"] += 1
            if group["trp_steps"] % group["period"] == 0 and group.get("lr") != 0:
                self._truncate(group, params)
        return loss

    def _truncate(self, group: Mapping[str, Any], params: Sequence[Tensor]) -> None:
        """Replace the weights by their truncations, small ones of one shape together, and keep the nuclear directions."""
        shapes: dict[tuple[Any, ...], list[Tensor]] = {}
        for i, p in enumerate(params):
            if bool(p.isfinite().all()):
                # Together large ones would take their number's memory and save no time.
                shapes.setdefault((p.shape, p.dtype, p.device, None if p.numel() <= TOGETHER else i), []).append(p)
        for members in shapes.values():
            stacked = torch.stack([unfold_weight(p, group["scheme"]) for p in members])
            truncated, directions = energy_truncation(stacked, group["energy"])
            for p, cut, direction in zip(members, truncated, directions, strict=True):
                p.copy_(fold_weight(cut, p.shape, group["scheme"]))
                if group["nuclear_weight"]:
                    self.state[p]["nuclear_direction"] = fold_weight(direction, p.shape, group["scheme"]).contiguous()


def _treated(group: Mapping[str, Any]) -> list[Tensor]:
    if group["scheme"] is None:
        return []
    return [p for p in group["params"] if p.grad is not None and p.dim() in (2, 4) and p.numel()]

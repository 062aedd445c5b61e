"""Riemannian SGD with momentum, for parameters on any manifold and ordinary ones beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from corollary.linalg.manifolds import Manifold, manifold_of


class RiemannianSGD(Optimizer):
    r"""Stochastic gradient descent along geodesics, with momentum carried from tangent space to tangent space.

    A parameter :math:`S` on a manifold moves, from its Euclidean gradient :math:`D`, by

    .. math::
        M &\leftarrow \mu\,M + \operatorname{grad}_S(D), \\
        S' &\leftarrow \operatorname{Retr}_S(-\eta M), \\
        M &\leftarrow \operatorname{Transp}_{S \to S'}(M).

    On `Grassmann` with its geodesic retraction this is the paper's algorithm, term for term: the gradient is
    :math:`(I - SS^\top)D`, the transport is the projection :math:`(I - S'S'^\top)M`, and the retraction is the closed-form
    geodesic. A parameter without a manifold gets ``torch.optim.SGD``.

    Args:
        params: parameters or groups. A parameter is on a manifold if it carries one (`ManifoldParameter`) or if its group has
            the key ``manifold``, which is then put on the group's parameters.
        lr: step size :math:`\eta`; on a manifold the step is :math:`\eta \|M\|` long, an angle in radians on `Grassmann`.
        momentum: :math:`\mu`, from 0 to below 1.
        weight_decay: L2 penalty of the ordinary parameters; points on a manifold are never decayed.
        maximize: ascend instead.

    Raises:
        ValueError: a hyperparameter out of range, a parameter whose shape is none of the manifold's, or whose starting point
            is off the manifold.
        RuntimeError: a sparse gradient.

    Deviations: the authors' code keeps the Euclidean gradients in the momentum buffer and projects only the step, so the buffer
    is never transported; here the paper's algorithm is followed. Their code repairs the frame every few steps by a QR whose
    signs LAPACK leaves open, which can turn columns against the buffer; here the manifold keeps its points (see `Grassmann`).

    Not for: parameters that happen to be orthogonal without being constrained, and manifolds whose metric should adapt to the
    scale of the gradients (there is no Adam-like scaling here).

    Example:
        >>> import torch
        >>> from corollary.linalg.manifolds import Grassmann, ManifoldParameter
        >>> lines = Grassmann(3, 1)
        >>> line = ManifoldParameter(lines.random_point(generator=torch.Generator().manual_seed(0)), lines)
        >>> optimizer = RiemannianSGD([line], lr=0.1, momentum=0.9, maximize=True)
        >>> for _ in range(200):
        ...     optimizer.zero_grad()
        ...     (torch.tensor([0.0, 3.0, 1.0]) @ line.square()).sum().backward()  # the leading eigenvector is e_1
        ...     optimizer.step()
        >>> line.detach().abs().round(decimals=3).flatten()
        tensor([0., 1., 0.])

    Source: Wang, Li and Zhang, "Get the Best of Both Worlds: Improving Accuracy and Transferability by Grassmann Class
    Representation", arXiv 2308.01547, Algorithm 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        if not float(lr) >= 0:
            raise ValueError(f"lr must be at least 0, got {lr}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "maximize": maximize})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its key ``manifold``, if any, goes to its parameters, so that ``state_dict`` stays plain data."""
        group = dict(param_group)
        manifold = group.pop("manifold", None)
        if manifold is not None and not isinstance(manifold, Manifold):
            raise TypeError(f"manifold must be a Manifold, got {type(manifold).__name__}")
        super().add_param_group(group)
        for p in self.param_groups[-1]["params"]:
            carried = manifold_of(p)
            if manifold is not None:
                if carried not in (None, manifold):
                    raise ValueError(f"the group's manifold is {manifold}, but a parameter of it carries {carried}")
                p.manifold = carried = manifold
            if carried is not None:
                carried.check_point(p, name="a parameter on a manifold")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; ``closure``, if given, recomputes the loss with gradients and is called once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            plain: list[Tensor] = []
            for p in group["params"]:
                if p.grad is None or p.numel() == 0:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError("RiemannianSGD does not take sparse gradients; use dense embeddings")
                manifold = manifold_of(p)
                if manifold is None:
                    plain.append(p)
                else:
                    self._step_on(manifold, p, group)
            if plain:
                self._step_plain(plain, group)
        return loss

    def _step_on(self, manifold: Manifold, p: Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        # A frame in half precision is orthonormal to three decimals only: compute in float32, round once.
        work = torch.float32 if p.dtype in (torch.float16, torch.bfloat16) else p.dtype
        x, state = p.to(work), self.state[p]
        move = manifold.gradient(x, p.grad.to(work))
        if "momentum_buffer" in state:
            move = torch.add(move, state["momentum_buffer"].to(work), alpha=group["momentum"])
        lr = group["lr"]
        # A step of length zero is no step: a retraction would move the point by its rounding.
        still = not isinstance(lr, Tensor) and lr == 0
        y = x if still else manifold.retract(x, move * (lr if group["maximize"] else -lr))
        if group["momentum"]:
            # `move` may be the gradient itself on a flat manifold, so the buffer is always a copy.
            state["momentum_buffer"] = manifold.transport(x, y, move).to(p.dtype, copy=True)
        p.copy_(y)

    def _step_plain(self, params: list[Tensor], group: dict[str, Any]) -> None:
        moves = [p.grad for p in params if p.grad is not None]
        if group["weight_decay"]:
            decay = -group["weight_decay"] if group["maximize"] else group["weight_decay"]
            moves = list(torch._foreach_add(moves, params, alpha=decay))
        if group["momentum"]:
            states = [self.state[p] for p in params]
            old = [i for i, state in enumerate(states) if "momentum_buffer" in state]
            if old:
                buffers = [states[i]["momentum_buffer"] for i in old]
                torch._foreach_mul_(buffers, group["momentum"])
                torch._foreach_add_(buffers, [moves[i] for i in old])
            for state, move in zip(states, moves, strict=True):
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = move.clone()
            moves = [state["momentum_buffer"] for state in states]
        scale = group["lr"] if group["maximize"] else -group["lr"]
        torch._foreach_add_(params, list(torch._foreach_mul(moves, scale)))

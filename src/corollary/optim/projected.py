"""One AdamW for all low-rank methods: a projector says where state is kept, a residual rule what the rest becomes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from corollary.optim._checks import check_options, keep_dtypes, refuse_params, refuse_sparse, saved_states
from corollary.optim.int8_weight import Int8Weight
from corollary.optim.projectors import NAMED as PROJECTORS
from corollary.optim.projectors import Projector, Site
from corollary.optim.residuals import NAMED as RESIDUALS
from corollary.optim.residuals import Residual, Step
from corollary.optim.subspaces import Subspace

_MOMENTS = ("keep", "reset", "rotate")


class ProjectedAdamW(Optimizer):
    r"""AdamW whose moments live in a low-dimensional subspace of each gradient matrix.

    With G the gradient of a matrix W, P its subspace's projection and E the way back, every step does

    .. math::
        L &= P(G), \quad m \leftarrow \beta_1 m + (1-\beta_1) L, \quad v \leftarrow \beta_2 v + (1-\beta_2) L^2, \\
        W &\leftarrow (1 - \eta\lambda) W - \eta\, s \left[ E\!\left(\frac{\hat m}{\sqrt{\hat v} + \epsilon}\right)
        + \rho\bigl(G - E L\bigr) \right],

    and every ``update_proj_gap`` steps the *projector* chooses the subspace anew. The *residual* rule ρ says what becomes of the
    part that keeps no state. GaLore, Fira, FRUGAL, BAdam, Q-GaLore and DCT-AdamW are choices of the two; any pair works.

    Parameters with fewer than two dimensions, and groups with ``rank=None``, get AdamW itself. Convolution kernels are taken as
    matrices of shape (out, in · kernel). `low_rank_groups` makes the two groups for a model.

    Args:
        params: parameters or groups; a group may have its own ``lr``, ``rank``, ``update_proj_gap``, ``scale`` and so on.
        lr: learning rate η.
        betas: decay rates β of the moments.
        eps: ε, added after bias correction as in `torch.optim.AdamW`.
        weight_decay: decoupled decay λ.
        rank: dimension of the subspace (int) or its share of the shorter side (float in (0, 1]); None for AdamW itself. For
            ``Blocks`` it is the number, or the share, of active parameters.
        update_proj_gap: steps between two choices of the subspace.
        scale: s, a factor on the learning rate of the projected parameters.
        projector: a `corollary.optim.projectors.Projector`, or 'svd', 'randomized', 'dct', 'random', 'columns', 'blocks'.
        residual: a `corollary.optim.residuals.Residual`, or 'drop', 'sign', 'sgd', 'norm'.
        moments: what a new subspace does to m and v: 'keep' them as they are, 'reset' them to zero, or 'rotate' them into it.
        lazy_threshold: similarity of successive subspaces, 0 to 1, from which on a parameter's gap grows; None keeps it.
        lazy_window: refreshes whose mean similarity is compared with the threshold.
        lazy_factor: what the gap is multiplied by, at least 1.
        seed: of random projectors; None draws one.
        foreach: False loops over parameters instead of batching elementwise work; the result is the same.

    State of a projected parameter: ``step``, ``refreshes``, the moments ``exp_avg`` and ``exp_avg_sq`` in the shape of L, the
    projector's tensors, the residual rule's numbers; with lazy refresh also ``gap`` and ``similarities``. All in the parameter's
    dtype but codes and indices. `state_bytes` counts them.

    Raises:
        ValueError: an option out of range, a rank above a matrix's shorter side, a NaN or infinite gradient when a subspace is
            chosen from it, or a loaded state of another shape or projector.
        TypeError: a complex parameter, or a DTensor (the subspace needs the whole gradient).
        RuntimeError: a sparse gradient.

    A NaN gradient between two refreshes passes into its parameter, as in AdamW.

    An `Int8Weight` is brought to its dtype, one parameter at a time, and written back with stochastic rounding whose randomness
    depends on ``seed``, the parameter's place and its step alone. A NaN or infinite gradient of one raises ValueError before its
    group moves: no code stands for NaN.

    When not to use it: when optimizer state is no bottleneck; full AdamW is simpler and at least as good a step for step.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> optimizer = ProjectedAdamW(low_rank_groups(model, rank=4), lr=1e-2, projector="randomized", residual="norm")
        >>> model(torch.randn(16, 32)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.state[model[0].weight]["exp_avg"].shape
        torch.Size([64, 4])

    Reference:
        The common form of GaLore (arXiv 2403.03507, Algorithm 2), Fira (2410.01623), FRUGAL (2411.07837), Q-GaLore (2407.08296)
        and DCT-AdamW (2505.17967).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: float | None = 128,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        projector: str | Projector = "svd",
        residual: str | Residual = "drop",
        moments: str = "keep",
        lazy_threshold: float | None = None,
        lazy_window: int = 5,
        lazy_factor: int = 2,
        seed: int | None = None,
        foreach: bool | None = None,
    ) -> None:
        self.projector: Projector = _named(projector, PROJECTORS, Projector, "projector")
        self.residual: Residual = _named(residual, RESIDUALS, Residual, "residual")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "moments": moments,
            "lazy_threshold": lazy_threshold,
            "lazy_window": lazy_window,
            "lazy_factor": lazy_factor,
            "seed": int(torch.randint(2**31, ())) if seed is None else seed,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as ``torch.optim.Optimizer`` does, checking its parameters and options."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state, keeping the dtypes it was saved in; the next step equals that of the saved run bit by bit.

        Raises:
            ValueError: moments of another shape than the parameter and rank ask for, or the state of another projector.
        """
        for number, (param, saved) in enumerate(saved_states(self, state_dict)):
            self._check_state(number, param, saved, state_dict["param_groups"])
        super().load_state_dict(dict(state_dict))
        keep_dtypes(self, state_dict)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # decompositions and data-dependent refreshes cannot be traced
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; gives what ``closure`` returned, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            refuse_sparse(group["params"], type(self).__name__)
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = []
        lows: list[Tensor] = []
        spaces: list[Subspace | None] = []
        _need_finite_gradients(group["params"])
        sites = self._sites(group)
        for param in group["params"]:
            if param.grad is None:
                continue
            site = sites.get(param)
            if site is None:
                space, low = None, param.grad
            else:
                gradient = param.grad.flatten(1)
                space = self._space(gradient, self.state[param], site, group)
                low = space.project(gradient)
            params.append(param)
            lows.append(low)
            spaces.append(space)
        if not params:
            return
        updates, steps = self._adam(params, lows, group)
        lr = float(group["lr"])
        decay = 1 - lr * group["weight_decay"]
        floating = [param for param in params if not isinstance(param, Int8Weight)]
        if group["weight_decay"] and floating:
            _batched(torch._foreach_mul_, group, floating, decay)
        beta1, beta2 = group["betas"]
        corrections = [math.sqrt(1 - beta2**t) / (1 - beta1**t) for t in steps]
        whole = [i for i, space in enumerate(spaces) if space is None]
        if whole:
            moves = [updates[i] for i in whole]
            _batched(torch._foreach_mul_, group, moves, [-lr * corrections[i] for i in whole])
            dense = [(params[i], move) for i, move in zip(whole, moves, strict=True) if not isinstance(params[i], Int8Weight)]
            if dense:
                _batched(torch._foreach_add_, group, *map(list, zip(*dense, strict=True)))
        for i, space in enumerate(spaces):
            param, held = params[i], None
            if isinstance(param, Int8Weight):
                held, param = param, param.dequantize()
                if group["weight_decay"]:
                    param.mul_(decay)
                if space is None:
                    param.add_(updates[i])
            if space is not None:
                matrix, gradient = param.flatten(1), params[i].grad
                assert gradient is not None
                rate = lr * group["scale"]
                state, size = self.state[params[i]], rate * corrections[i]
                self.residual.apply_(matrix, Step(gradient.flatten(1), lows[i], updates[i], space, state, rate, size))
                if matrix.data_ptr() != param.data_ptr():  # a layout that cannot be viewed as a matrix, such as channels_last
                    param.copy_(matrix.view_as(param))
            if held is not None:
                held.write_(param, generator=self._rounding(held, group))

    def _rounding(self, param: Tensor, group: Mapping[str, Any]) -> torch.Generator:
        """Randomness of one write: seed, place of the parameter and its step, so that a resumed run rounds as the whole one."""
        number = next(i for i, other in enumerate(self.param_groups) if other is group)
        place = next(i for i, other in enumerate(group["params"]) if other is param)
        state = self.state[param]
        # The step starts again where moments are reset; with the count of refreshes it never comes twice.
        key = (group["seed"], number + 1, place, state.get("refreshes", 0), state["step"])
        generator = torch.Generator(param.device)
        return generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

    def _space(self, gradient: Tensor, state: dict[str, Any], site: Site, group: dict[str, Any]) -> Subspace:
        """The subspace in force at this step, chosen anew where it is due."""
        fresh = not state
        if fresh:
            state["step"] = 0
        elif state["step"] % state.get("gap", group["update_proj_gap"]):
            return self.projector.subspace(state, site)
        compared = group["moments"] == "rotate" or group["lazy_threshold"] is not None
        before = self.projector.subspace(state, site) if compared and not fresh else None
        if not bool(gradient.isfinite().all()):
            if fresh:
                state.clear()
            raise ValueError(
                f"the gradient of a parameter of shape {site.shape} holds NaN or infinity, and no subspace can be chosen from it: "
                "skip this step, or clip the gradients"
            )
        self.projector.refresh(gradient, state, site)
        state["refreshes"] = site.refreshes + 1
        space = self.projector.subspace(state, site)
        shape = self.projector.low_shape(state, site)
        if fresh or state["exp_avg"].shape != shape:
            state["step"] = 0
            state["exp_avg"] = gradient.new_zeros(shape)
            state["exp_avg_sq"] = gradient.new_zeros(shape)
        elif group["moments"] == "reset":
            state["step"] = 0
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
        elif group["moments"] == "rotate" and before is not None:
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = space.carry(state[key], before)
            state["exp_avg_sq"].abs_()  # a rotation does not keep squares positive
        if group["lazy_threshold"] is not None:
            _grow_gap(state, before, space, group)
        return space

    def _adam(self, params: Sequence[Tensor], lows: Sequence[Tensor], group: dict[str, Any]) -> tuple[list[Tensor], list[int]]:
        """Adam's direction m / (√v + ε √(1 - β₂ᵗ)) in coordinates, before its bias correction, and each t."""
        beta1, beta2 = group["betas"]
        for param, low in zip(params, lows, strict=True):
            state = self.state[param]
            if "exp_avg" not in state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(low, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(low, memory_format=torch.preserve_format)
            state["step"] += 1
        states = [self.state[param] for param in params]
        means, squares = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        steps = [s["step"] for s in states]
        _batched(torch._foreach_lerp_, group, means, lows, 1 - beta1)
        _batched(torch._foreach_mul_, group, squares, beta2)
        _batched(torch._foreach_addcmul_, group, squares, lows, lows, 1 - beta2)
        denominators = _gathered(torch._foreach_sqrt, group, squares)
        _batched(torch._foreach_add_, group, denominators, [group["eps"] * math.sqrt(1 - beta2**t) for t in steps])
        return _gathered(torch._foreach_div, group, means, denominators), steps

    def _sites(self, group: Mapping[str, Any]) -> dict[Tensor, Site]:
        """The projected parameters of a group, each with its place."""
        matrices = _matrices(group)
        before = 0
        for other in self.param_groups:
            if other is group:
                break
            before += len(_matrices(other))
        sites = {}
        for index, param in enumerate(matrices):
            shape = (param.shape[0], param.numel() // param.shape[0])
            sites[param] = Site(
                shape=shape,
                dtype=param.dtype,
                rank=self.projector.dimension(group["rank"], shape, len(matrices)),
                index=index,
                place=before + index,
                members=len(matrices),
                refreshes=self.state[param].get("refreshes", 0) if param in self.state else 0,
                seed=group["seed"],
            )
        return sites

    def _check_group(self, group: Mapping[str, Any]) -> None:
        refuse_params(group["params"], type(self).__name__, distributed="a subspace is chosen from the whole gradient")
        beta1, beta2 = group["betas"]
        rank, gap = group["rank"], group["update_proj_gap"]
        check_options(
            (
                ("lr", group["lr"], group["lr"] >= 0, "at least 0"),
                ("betas[0]", beta1, 0 <= beta1 < 1, "in [0, 1)"),
                ("betas[1]", beta2, 0 <= beta2 < 1, "in [0, 1)"),
                ("eps", group["eps"], group["eps"] >= 0, "at least 0"),
                ("weight_decay", group["weight_decay"], group["weight_decay"] >= 0, "at least 0"),
                (
                    "rank",
                    rank,
                    rank is None or (0 < rank <= 1 if isinstance(rank, float) else rank >= 1),
                    "None, an integer of at least 1, or a share in (0, 1]",
                ),
                ("update_proj_gap", gap, isinstance(gap, int) and gap >= 1, "an integer of at least 1"),
                ("scale", group["scale"], group["scale"] > 0, "above 0"),
                ("moments", group["moments"], group["moments"] in _MOMENTS, f"one of {', '.join(_MOMENTS)}"),
                (
                    "lazy_threshold",
                    group["lazy_threshold"],
                    group["lazy_threshold"] is None or 0 <= group["lazy_threshold"] <= 1,
                    "None or in [0, 1]",
                ),
                ("lazy_window", group["lazy_window"], group["lazy_window"] >= 1, "at least 1"),
                ("lazy_factor", group["lazy_factor"], group["lazy_factor"] >= 1, "at least 1"),
                ("seed", group["seed"], 0 <= group["seed"] < 2**31, "in [0, 2**31)"),
            )
        )
        self._sites(group)  # raises where a rank exceeds its matrix

    def _check_state(self, number: int, param: Tensor, saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
        if "exp_avg" not in saved:
            return
        owner = next(i for i, group in enumerate(self.param_groups) if any(p is param for p in group["params"]))
        site = self._sites({**self.param_groups[owner], "rank": groups[owner].get("rank")}).get(param)
        wanted = tuple(param.shape)
        if site is not None:
            missing = [key for key in self.projector.keys if key not in saved]
            if missing:
                raise ValueError(
                    f"the state of parameter {number} has no {missing[0]!r}, which {type(self.projector).__name__} needs: it was "
                    "saved with another projector"
                )
            wanted = self.projector.low_shape(dict(saved), site)
        if tuple(saved["exp_avg"].shape) != wanted:
            raise ValueError(
                f"the state of parameter {number} has 'exp_avg' of shape {tuple(saved['exp_avg'].shape)}; a parameter of shape "
                f"{tuple(param.shape)} needs {wanted} here"
            )


def low_rank_groups(
    model: torch.nn.Module, *, rank: float, targets: Sequence[str] | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Two parameter groups of a model: the weights to project, and the rest for AdamW itself.

    Args:
        model: any module.
        rank: of the projected group, as in `ProjectedAdamW`.
        targets: parts of module names, such as "attention" or "q_proj"; only weights of linear and convolution layers whose name
            holds one of them are projected. None takes every such layer whose shorter side exceeds an integer rank.
        options: further options of the projected group, such as ``update_proj_gap``.

    Returns:
        ``[{"params": weights, "rank": rank, **options}, {"params": rest, "rank": None}]``, without empty groups.

    Raises:
        ValueError: nothing is left to project.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 16), torch.nn.Linear(16, 16), torch.nn.LayerNorm(16))
        >>> [len(group["params"]) for group in low_rank_groups(model, rank=4)]
        [1, 4]
    """
    chosen: dict[Tensor, None] = {}
    layers = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() < 2 or not weight.requires_grad:
            continue
        if targets is None:
            side = min(weight.shape[0], weight.numel() // weight.shape[0])
            wanted = isinstance(module, layers) and (not isinstance(rank, int) or side > rank)
        else:
            wanted = isinstance(module, layers) and any(target in name for target in targets)
        if wanted:
            chosen[weight] = None
    if not chosen:
        raise ValueError(f"no layer of the model can be projected: 'rank' is {rank}, 'targets' {targets}")
    rest = [p for p in model.parameters() if p.requires_grad and p not in chosen]
    groups: list[dict[str, Any]] = [{"params": list(chosen), "rank": rank, **options}]
    if rest:
        groups.append({"params": rest, "rank": None})
    return groups


def _matrices(group: Mapping[str, Any]) -> list[Tensor]:
    """The parameters of a group that are projected."""
    return [] if group["rank"] is None else [p for p in group["params"] if p.dim() > 1 and p.numel()]


def _need_finite_gradients(params: Sequence[Tensor]) -> None:
    """Refuse what cannot be written back into 8 bits before anything moves."""
    for param in params:
        if not isinstance(param, Int8Weight) or param.grad is None:
            continue
        # A sum is finite only if every entry is, and on a CPU it is far cheaper than a test of each.
        wide = torch.float32 if param.dtype in (torch.float16, torch.bfloat16) else None
        if not math.isfinite(float(param.grad.sum(dtype=wide))):
            raise ValueError(
                f"the gradient of an Int8Weight of shape {tuple(param.shape)} holds NaN or infinity, which 8 bits cannot hold: skip "
                "this step, or clip the gradients"
            )


def _grow_gap(state: dict[str, Any], before: Subspace | None, space: Subspace, group: Mapping[str, Any]) -> None:
    """Record how much of the subspace was kept, and wait longer where it hardly changes."""
    state.setdefault("gap", group["update_proj_gap"])
    if "similarities" not in state:
        state["similarities"] = state["exp_avg"].new_full((group["lazy_window"],), math.nan)
    if before is None:
        return
    state["similarities"] = torch.cat([state["similarities"][1:], state["similarities"].new_tensor([space.similarity(before)])])
    if float(state["similarities"].mean()) >= group["lazy_threshold"]:  # NaN, never true, until the window is full
        state["gap"] = int(state["gap"] * group["lazy_factor"])


def _named(value: Any, named: Mapping[str, Any], kind: type, argument: str) -> Any:
    if isinstance(value, kind):
        return value
    if isinstance(value, str) and value in named:
        return named[value]
    raise ValueError(f"'{argument}' must be a {kind.__name__} or one of {', '.join(map(repr, named))}, not {value!r}")


def _batched(operation: Callable[..., Any], group: Mapping[str, Any], *arguments: Any) -> None:
    """Run an in-place foreach operation on all tensors at once, or, with foreach=False, on one after the other."""
    if group["foreach"] is not False:
        operation(*arguments)
        return
    for i in range(len(arguments[0])):
        operation(*([a[i]] if isinstance(a, list | tuple) else a for a in arguments))


def _gathered(operation: Callable[..., Any], group: Mapping[str, Any], *arguments: Any) -> list[Tensor]:
    """As `_batched`, for an operation that gives new tensors."""
    if group["foreach"] is not False:
        return list(operation(*arguments))
    return [operation(*([a[i]] for a in arguments))[0] for i in range(len(arguments[0]))]

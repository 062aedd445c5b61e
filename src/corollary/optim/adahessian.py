"""AdaHessian: Adam with the squared gradient replaced by the squared diagonal of the Hessian."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from corollary.linalg.curvature import hessian_vector_product
from corollary.linalg.hutchinson import rademacher_like

_SHARED = ("n_samples", "hessian_interval", "seed")
_COUNTERS = ("step", "hessian_step")


class AdaHessian(Optimizer):
    r"""Adam whose second moment is the Hessian's diagonal, estimated with one Hessian-vector product a step.

    With a Rademacher probe z, the step's estimate of the diagonal is D = z ⊙ H z (Hutchinson), averaged in magnitude over
    blocks of parameters to D⁽ˢ⁾. Then, with powers and divisions taken entry by entry,

    .. math::
        m_t = β_1 m_{t-1} + (1-β_1) g_t, \quad
        v_t = β_2 v_{t-1} + (1-β_2) D^{(s)}_t ⊙ D^{(s)}_t, \quad
        θ_t = θ_{t-1} - η \left( \frac{m_t / (1-β_1^t)}{(v_t / (1-β_2^t))^{k/2} + ε} + λ θ_{t-1} \right)

    The product needs the gradient's graph. Three ways to give it::

        optimizer.backward(loss); optimizer.step()                  # leaves no graph behind; graph built only when it is due
        loss.backward(create_graph=True); optimizer.step()          # as in the authors' code; step() cuts the graph off
        optimizer.step(closure)                                     # the closure does either of the two

    Args:
        params: parameters or parameter groups: real, floating, dense, undistributed.
        lr: step size η. It does not transfer from Adam: Adam divides by the size of the gradient, this by the curvature.
        betas: decay rates (β₁, β₂) of the gradient's mean and of the squared diagonal's mean.
        eps: ε, added after the Hessian power is taken.
        weight_decay: λ, decoupled as in AdamW.
        hessian_power: k in (0, 1]; smaller values move from Newton's step towards gradient descent.
        average_conv_kernel: average a convolution's kernel (every dimension from the third on) into one value.
        block_size: average this many consecutive entries of each matrix, read row by row (a last shorter block by itself);
            1 averages none. The authors take 32 for translation.
        signed: average D itself, as the paper writes it, instead of \|D\|, as the authors' code does.
        n_samples: probes a step; each costs another backward pass.
        hessian_interval: refresh v every so many steps. Its bias correction counts the refreshes. A parameter that first
            gets a gradient between two refreshes waits for the next.
        seed: of the probes; None draws one from torch's global generator. The probe is a function of seed and step, so that
            a run resumed from ``state_dict()`` repeats the uninterrupted one bit by bit.
        foreach: update all parameters of a dtype and device together; None means yes.

    State, for each parameter: ``step``, ``hessian_step`` (counters), ``exp_avg`` and ``exp_hessian_diag_sq`` (m and v, in the
    parameter's dtype, or float32 for half precision, where β₂ = 0.999 would round to no decay at all).

    A NaN in a gradient makes its own parameter's entry NaN for good, as in ``torch.optim.Adam``. A NaN in the Hessian-vector
    product spreads as far as the averaging block.

    Raises:
        ValueError: a hyperparameter out of range, or ``n_samples``, ``hessian_interval`` or ``seed`` differing between groups.
        TypeError: a complex parameter, or a DTensor: ``fully_shard`` reduces gradients outside the autograd graph, so that
            there is nothing to differentiate a second time.
        RuntimeError: a sparse gradient, or gradients without a graph on a step that refreshes the Hessian.

    When not to use it: under DistributedDataParallel or FSDP; with operations that lack a second derivative (fused
    attention, torch.compile's own backward); where a step's cost of two to three of SGD's is not paid back.

    Deviations from the paper: magnitudes are averaged, not signed values (``signed=True`` gives the paper's);
    ``hessian_interval`` decays v once a refresh, not once a step.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1)
        >>> x, y = torch.randn(64, 3), torch.randn(64, 1)
        >>> optimizer = AdaHessian(model.parameters(), lr=0.1, seed=0)
        >>> losses = []
        >>> for _ in range(50):
        ...     loss = torch.nn.functional.mse_loss(model(x), y)
        ...     optimizer.zero_grad()
        ...     optimizer.backward(loss)
        ...     optimizer.step()
        ...     losses.append(loss.item())
        >>> losses[-1] < losses[0]
        True

    Reference:
        Yao, Gholami, Shen, Mustafa, Keutzer, Mahoney, "ADAHESSIAN: An Adaptive Second Order Optimizer for Machine Learning",
        arXiv 2006.00719, Algorithm 1.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        *,
        hessian_power: float = 1.0,
        average_conv_kernel: bool = True,
        block_size: int = 1,
        signed: bool = False,
        n_samples: int = 1,
        hessian_interval: int = 1,
        seed: int | None = None,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "hessian_power": hessian_power,
            "average_conv_kernel": average_conv_kernel,
            "block_size": block_size,
            "signed": signed,
            "n_samples": n_samples,
            "hessian_interval": hessian_interval,
            "seed": int(torch.randint(2**31, ())) if seed is None else seed,
            "foreach": foreach,
            "iteration": 0,  # steps taken, kept here to be saved; the probes and the refreshes count by it
        }
        self._curvature: dict[Tensor, Tensor] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as ``torch.optim.Optimizer`` does, checking its parameters and options."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group, self.param_groups[0])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._curvature = {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state, keeping the dtypes it was saved in; the next step equals that of the saved run bit by bit."""
        super().load_state_dict(dict(state_dict))
        self._curvature.clear()
        # The base class casts state to each parameter's dtype, which would round the float32 state of half precision.
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for saved_id, param in zip(saved_ids, self._params(), strict=True):
            for key, value in state_dict["state"].get(saved_id, {}).items():
                device = torch.device("cpu") if key in _COUNTERS else param.device
                self.state[param][key] = torch.as_tensor(value).to(device, copy=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and the curvature that `backward` gathered."""
        super().zero_grad(set_to_none)
        self._curvature.clear()

    @property
    def hessian_due(self) -> bool:
        """Whether the next `step` refreshes the Hessian, so that its gradients need ``create_graph=True``."""
        return int(self.param_groups[0]["iteration"]) % int(self.param_groups[0]["hessian_interval"]) == 0

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients to ``.grad`` and, on a step that refreshes the Hessian, gather its curvature.

        Use it in place of ``loss.backward(create_graph=True)``: the graph is built only when it is due and is freed on return,
        so no reference cycle between parameter and gradient is left. Several calls before a step add up, as gradients do.
        """
        params = [p for p in self._params() if p.requires_grad]
        if not self.hessian_due:
            loss.backward(inputs=params)  # type: ignore[no-untyped-call]
            return
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
        used = [(p, g) for p, g in zip(params, gradients, strict=True) if g is not None]
        self._gather_curvature(used)
        for param, gradient in used:
            if param.grad is None:
                param.grad = gradient.detach().clone()
            else:
                param.grad = param.grad.detach() + gradient.detach()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a second backward pass cannot be traced
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; gives what ``closure`` returned, or None.

        Args:
            closure: computes the loss and its gradients (with their graph, see the class) and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        due = self.hessian_due
        params = [p for p in self._params() if p.grad is not None]
        if due and not self._curvature and params:
            if not any(p.grad.requires_grad for p in params if p.grad is not None):
                raise RuntimeError(
                    "AdaHessian differentiates the gradients once more, but they carry no graph: call "
                    "optimizer.backward(loss) or loss.backward(create_graph=True) before step()"
                )
            self._gather_curvature([(p, p.grad) for p in params if p.grad is not None])
        for param in params:
            if param.grad is not None and param.grad.requires_grad:
                param.grad = param.grad.detach()  # a gradient with a graph holds its parameter, which holds it: a leak
        for group in self.param_groups:
            self._update(group, due)
            if params:
                group["iteration"] += 1
        self._curvature.clear()
        return loss

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _gather_curvature(self, used: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Add this graph's mean of z ⊙ H z to what earlier losses of the same step gave."""
        for _, gradient in used:
            if gradient.layout is not torch.strided:
                raise RuntimeError(f"AdaHessian needs dense gradients, not {gradient.layout}: use nn.Embedding(sparse=False)")
        if not used:
            return
        params, gradients = zip(*used, strict=True)
        everyone = [p for p in self._params() if p.requires_grad]
        n_samples, seed, iteration = (self.param_groups[0][key] for key in ("n_samples", "seed", "iteration"))
        for sample in range(n_samples):
            # One draw for all parameters, used or not: every loss of a step meets the same probe, and so their products add.
            drawn = rademacher_like(everyone, seed=(seed << 32) + (iteration << 8) + sample)
            probe = dict(zip(everyone, drawn, strict=True))
            z = [probe[p] for p in params]
            with torch.enable_grad():
                products = hessian_vector_product(gradients, params, z, retain_graph=sample < n_samples - 1)
            with torch.no_grad():
                diagonals = torch._foreach_mul(products, z)
                if n_samples > 1:
                    torch._foreach_div_(diagonals, n_samples)
                for param, diagonal in zip(params, diagonals, strict=True):
                    earlier = self._curvature.get(param)
                    self._curvature[param] = diagonal if earlier is None else earlier.add_(diagonal)

    def _update(self, group: dict[str, Any], due: bool) -> None:
        members: list[tuple[Tensor, dict[str, Any]]] = []
        for param in group["params"]:
            if param.grad is None:
                continue
            state = self.state[param]
            if not state:
                if param not in self._curvature:
                    del self.state[param]  # first seen between two refreshes: it has no scale yet
                    continue
                dtype = torch.float32 if param.dtype in (torch.float16, torch.bfloat16) else param.dtype
                state["step"] = torch.zeros(())
                state["hessian_step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
                state["exp_hessian_diag_sq"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
            members.append((param, state))
        if group["foreach"] is False:
            batches = [[member] for member in members]
        else:
            kinds: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, dict[str, Any]]]] = {}
            for param, state in members:
                kinds.setdefault((param.device, param.dtype), []).append((param, state))
            batches = list(kinds.values())
        for batch in batches:
            params, states = zip(*batch, strict=True)
            self._update_batch(group, params, states, due)

    def _update_batch(
        self, group: dict[str, Any], params: Sequence[Tensor], states: Sequence[dict[str, Any]], due: bool
    ) -> None:
        beta1, beta2 = group["betas"]
        power, lr = group["hessian_power"], float(group["lr"])
        means = [s["exp_avg"] for s in states]
        squares = [s["exp_hessian_diag_sq"] for s in states]
        half = params[0].dtype != means[0].dtype  # a batch has one dtype
        gradients = [p.grad for p in params if p.grad is not None]
        if half:
            gradients = [g.to(m.dtype) for g, m in zip(gradients, means, strict=True)]

        torch._foreach_add_([s["step"] for s in states], 1)
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        fresh = [(p, s) for p, s in zip(params, states, strict=True) if due and p in self._curvature]
        if fresh:
            moved = [s["exp_hessian_diag_sq"] for _, s in fresh]
            diagonals = [_average(self._curvature[p].to(v.dtype), group) for (p, _), v in zip(fresh, moved, strict=True)]
            torch._foreach_add_([s["hessian_step"] for _, s in fresh], 1)
            torch._foreach_mul_(moved, beta2)
            torch._foreach_addcmul_(moved, diagonals, diagonals, 1 - beta2)

        denominators = torch._foreach_div(squares, [1 - beta2 ** float(s["hessian_step"]) for s in states])
        if power == 1:
            torch._foreach_sqrt_(denominators)
        else:
            torch._foreach_pow_(denominators, power / 2)
        torch._foreach_add_(denominators, group["eps"])

        wide = [p.to(m.dtype) for p, m in zip(params, means, strict=True)] if half else list(params)
        if group["weight_decay"]:
            torch._foreach_mul_(wide, 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(wide, means, denominators, [-lr / (1 - beta1 ** float(s["step"])) for s in states])
        if half:
            torch._foreach_copy_(list(params), wide)


def _average(diagonal: Tensor, group: Mapping[str, Any]) -> Tensor:
    """The block average D⁽ˢ⁾ of a parameter's diagonal, spread back to the parameter's shape."""
    size = group["block_size"]
    kernel = diagonal.dim() > 2 and group["average_conv_kernel"]
    blocks = diagonal.dim() == 2 and size > 1
    if not group["signed"]:
        diagonal = diagonal.abs()
    if not diagonal.numel() or not (kernel or blocks):
        return diagonal
    if kernel:
        return diagonal.mean(dim=tuple(range(2, diagonal.dim())), keepdim=True).expand_as(diagonal).contiguous()
    flat = diagonal.reshape(-1)
    whole = flat.numel() - flat.numel() % size
    parts = [flat[:whole].view(-1, size).mean(1, keepdim=True).expand(-1, size).reshape(-1)]
    if whole < flat.numel():
        parts.append(flat[whole:].mean().expand(flat.numel() - whole))
    return torch.cat(parts).view(diagonal.shape)


def _check_group(group: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    for i, param in enumerate(group["params"]):
        if param.is_complex():
            raise TypeError(f"'params[{i}]' is {param.dtype}; AdaHessian takes real parameters (see torch.view_as_real)")
        if _is_distributed(param):
            raise TypeError(
                f"'params[{i}]' is a DTensor; AdaHessian takes undistributed parameters, because fully_shard reduces gradients "
                "outside the autograd graph and they cannot be differentiated again"
            )
    beta1, beta2 = group["betas"]
    for name, value, good, allowed in (
        ("lr", group["lr"], group["lr"] >= 0, "at least 0"),
        ("betas[0]", beta1, 0 <= beta1 < 1, "in [0, 1)"),
        ("betas[1]", beta2, 0 <= beta2 < 1, "in [0, 1)"),
        ("eps", group["eps"], group["eps"] >= 0, "at least 0"),
        ("weight_decay", group["weight_decay"], group["weight_decay"] >= 0, "at least 0"),
        ("hessian_power", group["hessian_power"], 0 < group["hessian_power"] <= 1, "in (0, 1]"),
        ("block_size", group["block_size"], group["block_size"] >= 1, "at least 1"),
        ("n_samples", group["n_samples"], 1 <= group["n_samples"] <= 256, "from 1 to 256"),
        ("hessian_interval", group["hessian_interval"], group["hessian_interval"] >= 1, "at least 1"),
        ("seed", group["seed"], 0 <= group["seed"] < 2**31, "in [0, 2**31)"),
    ):
        if not good:
            raise ValueError(f"'{name}' must be {allowed}, not {value}")
    for name in _SHARED:
        if group[name] != first[name]:
            raise ValueError(
                f"'{name}' must be the same in every group, because one probe covers all parameters; "
                f"the first group has {first[name]}, this one {group[name]}"
            )


def _is_distributed(param: Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(param, DTensor)

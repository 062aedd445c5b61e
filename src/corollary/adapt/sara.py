"""SaRA: training only a layer's smallest weights, as one vector, with a penalty on the rank of what they form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corollary.adapt.base import Adapter, AdapterConfig, need_finite
from corollary.adapt.base import cast as cast_input
from corollary.adapt.inject import layers_of, weight_of
from corollary.adapt.site import Site


def _scatter(values: Tensor, index: Tensor, site: Site) -> Tensor:
    """The matrix (out, in) with these values at these flat positions and zeros elsewhere."""
    flat = values.new_zeros(site.out_features * site.in_features)
    return flat.scatter_(0, index.long(), values).view(site.out_features, site.in_features)


class _SparseProduct(torch.autograd.Function):
    """The product of a sparse ΔM with a layer's input, of which the graph keeps no dense matrix.

    ΔM and the dense gradient of one layer stand only while that layer is computed: autograd's own way would keep every layer's ΔM
    until the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, index: Tensor, active: Tensor, site: Site, padding: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, values, index, active)
        ctx.site, ctx.padding = site, padding
        matrix = _scatter(values, index, site)
        if site.kind == "linear":
            return F.linear(x, matrix)
        convolve = F.conv1d if site.kind == "conv1d" else F.conv2d
        return convolve(x, site.weight(matrix), None, site.stride, padding, site.dilation, site.groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, index, active = ctx.saved_tensors
        site: Site = ctx.site
        matrix = _scatter(values, index, site).to(grad.dtype) if ctx.needs_input_grad[0] else None
        seen = x.to(grad.dtype)  # under autocast they differ
        grad_x: Tensor | None = None
        if site.kind == "linear":
            if matrix is not None:
                grad_x = grad @ matrix
            dense = grad.reshape(-1, grad.shape[-1]).t() @ seen.reshape(-1, seen.shape[-1])
        else:
            kernel = seen.new_zeros(site.weight_shape) if matrix is None else site.weight(matrix)
            spatial = [0] * len(site.stride)
            grad_x, dense, _ = torch.ops.aten.convolution_backward(
                grad, seen, kernel, None, site.stride, ctx.padding, site.dilation, False, spatial, site.groups,
                [matrix is not None, True, False],
            )  # fmt: skip
        found = dense.reshape(-1).index_select(0, index).to(values.dtype) * active
        return None if grad_x is None else grad_x.to(x.dtype), found, None, None, None, None


class SaRAAdapter(Adapter):
    """ΔM with trained numbers where the frozen weight is smallest, and zeros elsewhere; see `SaRA`."""

    index: Tensor
    active: Tensor
    threshold: Tensor

    def __init__(self, site: Site, weight: Tensor, config: SaRA, threshold: Tensor | None, share: float) -> None:
        super().__init__(site)
        self.nuclear, self.share = config.nuclear, share
        size = site.matrix(weight.detach()).flatten().abs().float()
        if threshold is None:
            count = max(1, int(config.fraction * size.numel()))
            smallest, index = size.topk(count, largest=False)
            threshold, index = smallest.max(), index.sort().values
        else:
            index = (size <= threshold).nonzero().flatten()
        self.values = nn.Parameter(weight.new_zeros(len(index)))
        # Buffers, so that a saved adapter says by itself which weights it changes. Half of int64's bytes.
        self.register_buffer("index", index.to(torch.int32 if size.numel() < 2**31 else torch.int64))
        self.register_buffer("active", torch.ones_like(index, dtype=torch.bool))
        self.register_buffer("threshold", threshold.clone())

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        site = self.site
        none = (0,) * len(site.stride)
        if site.pad:
            return F.pad(x, site.pad, mode=site.padding_mode), none
        if not isinstance(site.padding, str):
            return x, site.padding
        if site.padding == "valid":
            return x, none
        total = [d * (k - 1) for d, k in zip(site.dilation, site.weight_shape[2:], strict=True)]
        if all(t % 2 == 0 for t in total):
            return x, tuple(t // 2 for t in total)
        return F.pad(x, [side for t in reversed(total) for side in (t // 2, t - t // 2)]), none

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        x, padding = self._padded(x)
        x = cast_input(x, self.values)
        change: Tensor = _SparseProduct.apply(x, self.values, self.index, self.active, self.site, padding)  # type: ignore[no-untyped-call]
        return out + change.to(out.dtype)

    def delta(self) -> Tensor:
        return _scatter(self.values, self.index, self.site)

    def trained(self, weight: Tensor) -> Tensor:
        """The values that the selected weights have now: (selected,)."""
        return self.site.matrix(weight.detach()).reshape(-1).index_select(0, self.index) + self.values

    def penalty(self, weight: Tensor) -> Tensor | None:
        if not self.nuclear or self.site.kind != "linear" or (self.share < 1 and float(torch.rand(())) >= self.share):
            return None
        matrix = _scatter(self.trained(weight) * self.active, self.index, self.site)
        tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.t()  # half the time of a wide one
        # The gradient of the sum of singular values is U Vᵀ, which needs no gap between them.
        norm: Tensor = torch.linalg.svdvals(tall.to(torch.promote_types(matrix.dtype, torch.float32))).sum()
        return self.nuclear * norm

    @torch.no_grad()
    def settle(self, weight: Tensor) -> int:
        """Stop training what has grown past the threshold; gives how many weights go on."""
        self.active &= self.trained(weight).abs().float() <= self.threshold
        return int(self.active.sum())


def _smallest(weights: Sequence[Tensor], fraction: float) -> Tensor:
    """The magnitude below which this share of all numbers lies, exactly, without a copy of them.

    Magnitudes of float32 are in the order of their bits, so the answer is found by halving an interval of whole numbers.
    """
    count = max(1, int(fraction * sum(w.numel() for w in weights)))
    low, high = -1, 0x7F7FFFFF  # bits of the largest finite number
    while high - low > 1:
        middle = (low + high) // 2
        held = sum(int((w.detach().abs().float().view(torch.int32) <= middle).sum()) for w in weights)
        low, high = (low, middle) if held >= count else (middle, high)
    return torch.tensor(high, dtype=torch.int32, device=weights[0].device).view(torch.float32)


@dataclass(frozen=True)
class SaRA(AdapterConfig):
    r"""SaRA: the smallest weights of a pretrained model do little, so let them alone learn the new task.

    .. math:: \Delta W_{ij} = v_{ij}\, M_{ij}, \quad M = [\,|W| \le \theta\,], \qquad
        L = L_\text{task} + \lambda \left\| (W + \Delta W) \odot M \right\|_*

    θ is such that a ``fraction`` of the weights lies below it. What trains is the vector of the selected entries, so gradients and
    the optimizer's state have its length. The nuclear norm keeps what they form of low rank. Give it to `adapt`, add
    `adapter_penalty` to the loss, and call `ProgressiveAdjustment` between steps.

    Args:
        fraction: share of the weights that trains; the paper takes 0.1 to 0.2 at most.
        nuclear: λ. One step penalizes each of n layers with probability 1/n, drawn from torch's generator: in expectation the
            authors' choice of one layer in each step. 0 for none.
        scope: ``"model"``, one θ for all adapted layers, as in the paper; or ``"layer"``, the same share of each.

    Trains ``fraction`` m n numbers, on average or in each layer.

    Raises:
        ValueError, TypeError: where a field is out of range.

    Deviations: v begins at 0, so that the model begins as it was, and weight decay draws towards the pretrained weights; the
    authors' optimizer trains the weights' own values, decays them, and in its first forward pass holds their magnitudes. Magnitudes
    are compared in float32; of equal ones at θ the scope ``"model"`` takes all. The penalty is on linear layers alone, of any size;
    theirs is on matrices with both sides above 64.

    When not to use it: where a forward pass counts during training: a sparse ΔW costs a product as large as the layer's own. Merged,
    it costs nothing.

    Example:
        >>> import torch
        >>> from corollary.adapt import SaRA, adapt
        >>> model = adapt(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)), SaRA(fraction=0.2))
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        16

    Reference:
        Hu, Zhang, Yi, Huang, Wang, Ma, "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank
        Adaptation", arXiv 2409.06633; details from the authors' code.
    """

    supports: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv2d"})

    fraction: float = 0.1
    nuclear: float = 5e-4
    scope: str = "model"

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"'fraction' must be above 0 and at most 1, not {self.fraction}")
        need_finite("nuclear", self.nuclear)
        if self.nuclear < 0:
            raise ValueError(f"'nuclear' must be at least 0, not {self.nuclear}")
        if self.scope not in ("model", "layer"):
            raise ValueError(f"'scope' must be 'model' or 'layer', not {self.scope!r}")

    def prepare(self, sites: Mapping[str, tuple[Site, Tensor]], calibration: Any = None) -> Mapping[str, Any]:
        weights = [weight for _, weight in sites.values()]
        threshold = _smallest(weights, self.fraction) if self.scope == "model" else None
        share = 1 / max(1, sum(site.kind == "linear" for site, _ in sites.values()))
        return dict.fromkeys(sites, (threshold, share))

    def build(self, site: Site, weight: Tensor, extra: Any = None) -> SaRAAdapter:
        threshold, share = extra or (None, 1.0)
        return SaRAAdapter(site, weight, self, None if threshold is None else threshold.to(weight.device), share)


class ProgressiveAdjustment:
    r"""Leaves alone, from one step on, the weights that training has made large: call ``step()`` after each step of the optimizer.

    After ``at`` steps only the selected weights with :math:`|W + \Delta W| \le \theta` go on training, so that those that still do
    little get to learn; the others stay where they are to the bit, whatever momentum the optimizer holds for them.

    Args:
        model: adapted with `SaRA`.
        at: steps of the first phase; the authors take half of the training.
        optimizer: whose state for the adapter's parameters begins anew at that point, as in the authors' memory-saving code; None
            keeps it, as in their other version.
        name: of the adapter.

    Raises:
        ValueError: where ``at`` is below 1 or the adapter is of another method.

    Deviation: the authors' code makes no update in the step in which it selects anew.

    Example:
        >>> import torch
        >>> from corollary.adapt import ProgressiveAdjustment, SaRA, adapt
        >>> model = adapt(torch.nn.Linear(8, 8), SaRA(fraction=0.25))
        >>> adjustment = ProgressiveAdjustment(model, at=1)
        >>> with torch.no_grad():
        ...     _ = model.adapters["default"].values[:4].fill_(1.0)
        >>> adjustment.step()
        >>> adjustment.training
        {'': 12}
    """

    def __init__(
        self, model: nn.Module, *, at: int, optimizer: torch.optim.Optimizer | None = None, name: str = "default"
    ) -> None:
        if isinstance(at, bool) or not isinstance(at, int) or at < 1:
            raise ValueError(f"'at' must be an int of at least 1, not {at!r}")
        self._layers: dict[str, tuple[nn.Module, SaRAAdapter]] = {}
        for site, layer, adapters in layers_of(model, name):
            adapter = adapters[name]
            if not isinstance(adapter, SaRAAdapter):
                raise ValueError(f"'model': adapter '{name}' is not of SaRA")
            self._layers[site] = (layer, adapter)
        self.at, self.optimizer, self.count = at, optimizer, 0
        self._held: dict[str, Tensor] = {}

    @property
    def training(self) -> dict[str, int]:
        """Layer's name to how many of its weights train now."""
        return {site: int(adapter.active.sum()) for site, (_, adapter) in self._layers.items()}

    @torch.no_grad()
    def _hold(self) -> None:
        self._held = {site: adapter.values[~adapter.active].clone() for site, (_, adapter) in self._layers.items()}

    @torch.no_grad()
    def step(self) -> None:
        """Count one step of training; select anew where that is due, and afterwards put back what must not move."""
        self.count += 1
        if self.count == self.at:
            for layer, adapter in self._layers.values():
                adapter.settle(weight_of(layer))
                if self.optimizer is not None:
                    self.optimizer.state.pop(adapter.values, None)
            self._hold()
        elif self._held:
            for site, (_, adapter) in self._layers.items():
                adapter.values[~adapter.active] = self._held[site]

    def state_dict(self) -> dict[str, Any]:
        """The count of steps; what trains is in the adapter's own state."""
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; load the adapter first."""
        self.count = cast(int, state["count"])
        if self.count >= self.at:
            self._hold()
        else:
            self._held = {}

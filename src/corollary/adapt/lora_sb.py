"""LoRA-SB: a trained core between frozen bases that come from the first step of full fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from corollary.adapt._svd import leading_triplets
from corollary.adapt.base import (
    AdapterConfig,
    LowRankAdapter,
    cast,
    need_finite,
    need_fitting_rank,
    need_probability,
    need_rank,
)
from corollary.adapt.site import Site


class LoRASBAdapter(LowRankAdapter):
    """ΔM = B R A with orthonormal frozen bases and R alone trained; see `LoRASB`."""

    lora_A: Tensor
    lora_B: Tensor

    def __init__(self, site: Site, left: Tensor, core: Tensor, right: Tensor, dropout: float = 0.0) -> None:
        super().__init__(site, dropout)
        # The bases come from data, so unlike those of LoRA-XS they are saved.
        self.register_buffer("lora_B", left)
        self.register_buffer("lora_A", right)
        self.lora_R = nn.Parameter(core)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_B @ self.lora_R, self.lora_A

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        a = self.lora_A
        h = self.site.mix(self.site.reduce(cast(self.inner(x), a), a), self.lora_R)
        return self.site.expand_add(out, h, self.lora_B)


@dataclass(frozen=True)
class LoRASB(AdapterConfig):
    r"""LoRA-SB: LoRA-XS with bases and core from the best rank-r approximation of full fine-tuning's first step.

    .. math::
        \Delta W_1 = -\eta\, \mathrm{sign}(G), \qquad \Delta W_1 \approx U_r \Sigma_r V_r^\top, \qquad
        W x + U_r\, R\, V_r^\top x,\quad R_0 = \Sigma_r

    where G is the gradient of the loss in W over some batches and :math:`-\eta\,\mathrm{sign}(G)` is AdamW's first step. With
    orthonormal bases B and A the gradient of R is :math:`B^\top G A^\top`, so that a step on R is the best approximation within the
    subspace of the step on W, and no scaling factor needs tuning. Give it to `adapt` with ``calibration``: the gradient of each
    target's weight by the name of the layer, as `mean_gradients` gives them.

    Args:
        rank: r, at most the layer's shorter side.
        lr: η, the size of the first step; about the rate at which training begins. 0 starts as the base model, in the same bases.
        step: ``"sign"``, AdamW's first step, or ``"gradient"``, plain gradient descent's: :math:`\Delta W_1 = -\eta G`.
        dropout: of the layer's input on its way into A, in training.

    Trains r² numbers a layer. The model starts one approximated step away from where it was.

    Raises:
        ValueError, TypeError: where a field is out of range, ``rank`` exceeds a layer's shorter side, ``calibration`` has no gradient
            for a layer or one of another shape, or a gradient is zero or not finite.

    Deviations: one SVD of each layer in float32 at least; the authors use a randomized one.

    When not to use it: where the first batches are not like those to come; the subspace is fixed by them.

    Example:
        >>> import torch
        >>> from corollary.adapt import LoRASB, adapt, mean_gradients
        >>> model = torch.nn.Linear(16, 8)
        >>> x, y = torch.randn(32, 16), torch.randn(32, 8)
        >>> gradients = mean_gradients(model, lambda xy: torch.nn.functional.mse_loss(model(xy[0]), xy[1]), [(x, y)])
        >>> model = adapt(model, LoRASB(rank=4), calibration=gradients)
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        16

    Reference:
        Ponkshe et al., "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning",
        arXiv 2411.19557, Algorithm 1; theorems 2 to 4.
    """

    rank: int = 16
    lr: float = 1e-3
    step: str = "sign"
    dropout: float = 0.0
    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        need_rank(self.rank)
        need_finite("lr", self.lr)
        need_probability("dropout", self.dropout)
        if self.step not in ("sign", "gradient"):
            raise ValueError(f"'step' must be 'sign' or 'gradient', not '{self.step}'")

    def prepare(self, sites: Mapping[str, tuple[Site, Tensor]], calibration: Any = None) -> Mapping[str, Any]:
        if calibration is None:
            return {}
        if not isinstance(calibration, Mapping):
            raise TypeError(f"'calibration' must map layers' names to gradients, not {type(calibration).__name__}")
        for name, (_, weight) in sites.items():
            if name not in calibration:
                raise ValueError(f"'calibration' has no gradient for '{name}'")
            gradient = calibration[name]
            if gradient.shape != weight.shape:
                raise ValueError(f"'calibration': '{name}' is {tuple(gradient.shape)}, its weight is {tuple(weight.shape)}")
            if not bool(gradient.isfinite().all()) or not bool(gradient.any()):
                raise ValueError(f"'calibration': the gradient of '{name}' is zero or not finite")
        return {name: calibration[name] for name in sites}

    def build(self, site: Site, weight: Tensor, extra: Any = None) -> LoRASBAdapter:
        need_fitting_rank(self.rank, site)
        if extra is None:  # a saved adapter, whose tensors come after
            left, right = weight.new_zeros(site.out_features, self.rank), weight.new_zeros(self.rank, site.in_features)
            return LoRASBAdapter(site, left, weight.new_zeros(self.rank, self.rank), right, self.dropout)
        gradient = site.matrix(extra.detach().to(weight.device))
        direction = gradient.sign() if self.step == "sign" else gradient
        left, sigma, right = leading_triplets(-direction.to(torch.promote_types(weight.dtype, torch.float32)), self.rank)
        core = (self.lr * sigma).diag()
        return LoRASBAdapter(site, left.to(weight.dtype), core.to(weight.dtype), right.to(weight.dtype), self.dropout)


@contextmanager
def _trained(parameters: Iterable[nn.Parameter]) -> Any:
    kept = list(parameters)
    before = [(p.requires_grad, p.grad) for p in kept]
    try:
        for parameter in kept:
            parameter.requires_grad_(True)
            parameter.grad = None
        yield
    finally:
        for parameter, (required, gradient) in zip(kept, before, strict=True):
            parameter.requires_grad_(required)
            parameter.grad = gradient


def mean_gradients(model: nn.Module, loss: Any, batches: Iterable[Any], targets: Any = None) -> dict[str, Tensor]:
    """The gradient of a loss in the weights of layers, averaged over batches: what `LoRASB` starts from.

    Args:
        model: before `adapt`; its own gradients and ``requires_grad`` are left as they were.
        loss: ``loss(batch)`` gives a scalar tensor.
        batches: at least one. Memory holds one gradient for each target, whatever their number.
        targets: layers, as in `adapt`.

    Returns:
        Layer's name to the gradient, in the shape and dtype of its weight.

    Raises:
        ValueError: where there is no batch, no target, or a target takes no part in the loss.
    """
    from corollary.adapt.inject import find_targets, weight_of

    layers = {name: weight_of(layer) for name, layer in find_targets(model, targets).items()}
    count = 0
    with _trained(layers.values()):
        for batch in batches:
            value = loss(batch)
            value.backward(inputs=list(layers.values()))
            count += 1
        if not count:
            raise ValueError("'batches' is empty")
        missing = [name for name, weight in layers.items() if weight.grad is None]
        if missing:
            raise ValueError(f"'targets': '{missing[0]}' takes no part in the loss")
        return {name: weight.grad.detach() / count for name, weight in layers.items() if weight.grad is not None}

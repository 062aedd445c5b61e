"""Learned step size quantization: layers whose weights and inputs are rounded while they train, with steps that are trained too."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corollary.compress.splitting import splittable

_SMALLEST = torch.finfo(torch.float32).eps  # a step below this in size quantizes as this


class _RoundToStep(torch.autograd.Function):
    """s · clip(round(x / s), low, high), with the straight-through gradient in x and LSQ's in s."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, factor: float) -> Tensor:
        step = scale.clamp_min(_SMALLEST)
        out = (x / step).round_().clamp_(low, high).mul_(step)
        ctx.save_for_backward(x, step, out)
        ctx.low, ctx.high, ctx.factor = low, high, factor
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None, None]:
        (grad,) = grads
        x, step, out = ctx.saved_tensors
        inside = (x > ctx.low * step) & (x < ctx.high * step)
        # Inside the range the slope in s is round(x / s) - x / s, outside it is the bound itself: both are (out - inside x) / s.
        slope = torch.where(inside, x, 0).neg_().add_(out).mul_(grad)
        return grad * inside, slope.sum() * (ctx.factor / step), None, None, None


def lsq_quantize(x: Tensor, scale: Tensor, low: int, high: int, gradient_factor: float = 1.0) -> Tensor:
    r"""Round to the nearest of the levels :math:`s\,\{Q_N, …, Q_P\}`, with a gradient for the step s.

    .. math::
        \hat x = s\,\mathrm{clip}\big(\mathrm{round}(x / s), Q_N, Q_P\big), \qquad
        \frac{∂\hat x}{∂s} = g · \begin{cases} \mathrm{round}(x / s) - x / s & Q_N < x / s < Q_P \\ Q_N & x / s \le Q_N \\
        Q_P & x / s \ge Q_P \end{cases}

    and :math:`∂\hat x / ∂x` is 1 strictly inside the range and 0 elsewhere (straight through). Halves round to even.

    Args:
        x: any shape, floating.
        scale: s, one number in the dtype of ``x``. Of a negative one the size counts, so that a step which overshoots 0 is a step
            still, and no smaller one than 1.2e-7 is taken.
        low, high: :math:`Q_N ≤ 0 < Q_P`, the integers of the lowest and the highest level.
        gradient_factor: g; the paper's is :math:`1 / \sqrt{N Q_P}`, N being the size of what is quantized.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        TypeError: an input that is not floating.
        ValueError: a scale of more than one number, or bounds that are none.

    When not to use it: for second derivatives, which are not those of anything (the gradient is straight-through).

    Example:
        >>> lsq_quantize(torch.tensor([-3.0, 0.2, 0.6, 9.0]), torch.tensor(0.5), -4, 3)
        tensor([-2.0000,  0.0000,  0.5000,  1.5000])

    Source: Esser et al., "Learned Step Size Quantization", arXiv 1902.08153, equations 1, 2, 3 and 5.
    """
    if not x.is_floating_point():
        raise TypeError(f"'x' must be floating, not {x.dtype}")
    if scale.numel() != 1:
        raise ValueError(f"'scale' must be one number, not of shape {tuple(scale.shape)}")
    if not low <= 0 < high:
        raise ValueError(f"'low' and 'high' must satisfy low <= 0 < high, not {low} and {high}")
    out: Tensor = _RoundToStep.apply(x, scale.abs(), low, high, gradient_factor)  # type: ignore[no-untyped-call]
    return out


class LSQQuantizer(nn.Module):
    r"""One tensor's quantizer: its number of bits, its range and its learned step ``scale``, a parameter of shape ().

    Levels run from :math:`-2^{b-1}` to :math:`2^{b-1} - 1`, or from 0 to :math:`2^b - 1` where ``signed`` is False. The step's
    gradient is scaled by :math:`1 / \sqrt{N Q_P}`, N being the size of the weight, or of one sample of the inputs.

    Args:
        bits: b, 2 to 8.
        signed: whether there are levels below 0.
        sample_dims: trailing dimensions that make one sample; None for a weight, all of whose entries count.
        device, dtype: of the step.

    Raises:
        ValueError: ``bits`` out of range.

    Example:
        >>> quantizer = LSQQuantizer(bits=3)
        >>> quantizer.start(torch.tensor([-1.0, 0.5, 1.5]))
        >>> quantizer.codes(torch.tensor([-1.0, 0.5, 9.0]))
        tensor([-1,  0,  3], dtype=torch.int8)

    Source: Esser et al., arXiv 1902.08153, sections 2 and 2.1.
    """

    def __init__(
        self,
        bits: int,
        signed: bool = True,
        sample_dims: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_bits("bits", bits)
        self.bits, self.signed, self.sample_dims = bits, signed, sample_dims
        self.low: int = -(2 ** (bits - 1)) if signed else 0
        self.high: int = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        self.scale = nn.Parameter(torch.ones((), device=device, dtype=dtype))

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        r"""Set the step to :math:`2 \langle |x| \rangle / \sqrt{Q_P}`."""
        if not x.numel():
            raise ValueError(f"'x' is empty, of shape {tuple(x.shape)}; a step starts from what it is to quantize")
        self.scale.copy_((2 * x.abs().mean() / math.sqrt(self.high)).clamp_min(_SMALLEST))

    def forward(self, x: Tensor) -> Tensor:
        """The nearest levels, in the shape of ``x``."""
        shape = x.shape if self.sample_dims is None else x.shape[x.dim() - self.sample_dims :]
        return lsq_quantize(x, self.scale, self.low, self.high, 1 / math.sqrt(max(1, math.prod(shape)) * self.high))

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The levels' integers, int8 (uint8 where unsigned): the levels are these times the size of ``scale``."""
        integers = (x / self.scale.abs().clamp_min(_SMALLEST)).round_().clamp_(self.low, self.high)
        return integers.to(torch.int8 if self.signed else torch.uint8)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}"


class LSQLinear(nn.Linear):
    r"""A linear layer on quantized inputs with a quantized weight: :math:`y = \hat W \hat x + b`.

    Args:
        in_features, out_features, bias: as in ``nn.Linear``.
        bits: of weight and inputs.
        signed_input: whether inputs may be below 0; False after a ReLU gives one bit more.
        device, dtype: of the parameters.

    Shape: (..., in_features) to (..., out_features). The full-precision ``weight`` is what the optimizer trains.

    Raises:
        ValueError: ``bits`` out of range, or an input of another width.
        TypeError: an input that is not floating.

    When not to use it: for speed as it stands, since levels are kept in floating point; it is for training what will be packed.

    Example:
        >>> layer = LSQLinear(6, 4, bits=3)
        >>> layer.weight_quantizer(layer.weight).unique().numel() <= 8
        True

    Source: Esser et al., arXiv 1902.08153, Figure 1.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, bits: int = 4, signed_input: bool = True, **made: Any
    ) -> None:
        super().__init__(in_features, out_features, bias, **made)
        self.input_quantizer = LSQQuantizer(bits, signed_input, 1, **made)
        self.weight_quantizer = LSQQuantizer(bits, **made)
        self.weight_quantizer.start(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"'x' has shape {tuple(x.shape)}; allowed: (..., {self.in_features})")
        return F.linear(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)


class LSQConv2d(nn.Conv2d):
    r"""A convolution of quantized inputs with a quantized kernel; see `LSQLinear`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in ``nn.Conv2d``, zero-padded.
        bits: of weight and inputs.
        signed_input: whether inputs may be below 0.
        device, dtype: of the parameters.

    Shape: (N, in_channels, H, W), or without N, as ``nn.Conv2d``.

    Raises:
        ValueError: ``bits`` out of range, or an input of another shape.
        TypeError: an input that is not floating.

    When not to use it: as `LSQLinear`.

    Example:
        >>> LSQConv2d(3, 8, 3, padding=1, bits=4)(torch.randn(2, 3, 6, 6)).shape
        torch.Size([2, 8, 6, 6])

    Source: Esser et al., arXiv 1902.08153, Figure 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        bits: int = 4,
        signed_input: bool = True,
        **made: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **made)
        self.input_quantizer = LSQQuantizer(bits, signed_input, 3, **made)
        self.weight_quantizer = LSQQuantizer(bits, **made)
        self.weight_quantizer.start(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H', W')."""
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(f"'x' has shape {tuple(x.shape)}; allowed: (N, {self.in_channels}, H, W)")
        out: Tensor = self._conv_forward(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)
        return out


@dataclass(frozen=True)
class LSQConfig:
    """How a model is made quantization-aware.

    Args:
        bits: of weights and inputs of every layer between the first and the last.
        first_last_bits: of the first and the last layer, in the order in which the model holds them.
        skip: patterns of module names that stay in full precision.
    """

    bits: int = 4
    first_last_bits: int = 8
    skip: Sequence[str] = ()

    def __post_init__(self) -> None:
        _check_bits("bits", self.bits)
        _check_bits("first_last_bits", self.first_last_bits)


def lsq_layers(model: nn.Module) -> dict[str, LSQLinear | LSQConv2d]:
    """The model's quantized layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (LSQLinear, LSQConv2d))}


@torch.no_grad()
def quantize_aware(model: nn.Module, config: LSQConfig, calibration: Iterable[Tensor] | Tensor) -> nn.Module:
    r"""Put a quantized layer in the place of every linear layer and ungrouped convolution, with the same weights.

    One pass over ``calibration`` says of each layer's inputs whether they are ever below 0 and how large they are; the steps start
    at :math:`2 \langle |v| \rangle / \sqrt{Q_P}`.

    Args:
        model: changed in place; its mode, weights, biases and batch norms stay as they are.
        config: bits, and what is left out. Tied weights always are.
        calibration: a batch as the model takes it, or an iterable of such.

    Returns:
        The model, which trains as before; `lsq_layers` finds the new layers.

    Raises:
        ValueError: a pattern that matches nothing, a model with nothing to quantize, no batch, or a layer that no batch reaches.

    When not to use it: on a model that is not to be trained further; `round_to_nearest` and `gptq` need no training.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> _ = quantize_aware(model, LSQConfig(bits=3), torch.randn(32, 8))
        >>> [(layer.weight_quantizer.bits, layer.input_quantizer.signed) for layer in lsq_layers(model).values()]
        [(8, True), (3, False), (8, False)]

    Source: Esser et al., arXiv 1902.08153, sections 2 and 3 (8 bits in the first and the last layer).
    """
    found = list(splittable(model, config.skip))
    if not found:
        raise ValueError("'model' has no linear layer or ungrouped convolution to quantize")
    seen: dict[str, list[tuple[float, float, int]]] = {name: [] for name, _ in found}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            if x.numel():
                seen[name].append((float(x.amin()), float(x.abs().double().sum()), x.numel()))

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in found]
    was, batches = model.training, 0
    model.eval()
    try:
        for batch in [calibration] if isinstance(calibration, Tensor) else calibration:
            model(batch)
            batches += 1
    finally:
        model.train(was)
        for handle in handles:
            handle.remove()
    missed = [name for name, values in seen.items() if not values]
    if missed:
        what = f"reaches no input of {', '.join(missed)}; leave them out by 'skip'" if batches else "holds no batch"
        raise ValueError(f"'calibration' {what}")
    for place, (name, layer) in enumerate(found):
        bits = config.first_last_bits if place in (0, len(found) - 1) else config.bits
        signed = min(low for low, _, _ in seen[name]) < 0
        made: dict[str, Any] = {"bias": layer.bias is not None, "bits": bits, "signed_input": signed}
        made |= {"device": layer.weight.device, "dtype": layer.weight.dtype}
        new: LSQLinear | LSQConv2d
        if isinstance(layer, nn.Linear):
            new = LSQLinear(layer.in_features, layer.out_features, **made)
        else:
            shape: Any = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
            new = LSQConv2d(*shape, **made)
        new.weight = layer.weight
        new.bias = layer.bias
        new.weight_quantizer.start(new.weight)
        size = sum(total for _, total, _ in seen[name]) / sum(count for _, _, count in seen[name])
        new.input_quantizer.start(new.weight.new_tensor([size]))
        model.set_submodule(name, new.train(layer.training))
    return model


def _check_bits(name: str, bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"'{name}' must be an integer from 2 to 8, not {bits!r}")

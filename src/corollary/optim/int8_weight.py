"""Weights held in 8 bits while they train: a tensor of codes that looks like a floating parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from corollary.linalg.quantize import Quantized, dequantize, quantize

aten = torch.ops.aten


class Int8Weight(Tensor):
    r"""A floating tensor stored as one byte an entry, with a step and a zero point for each group of consecutive entries.

    An entry with code q reads as s (q - z). It has a shape, a floating dtype and ordinary dense gradients, so that any layer, loss
    or optimizer can use it as a parameter; ``F.linear`` keeps only the codes for the backward pass. Every write, by `write_` or by
    any in-place operation of torch, quantizes anew: with stochastic rounding, whose expected value is exactly what was written,

    .. math:: q = \lfloor x / s + u \rfloor + z, \qquad u \sim U[0, 1), \qquad \mathbb{E}[s (q - z)] = x,

    so that updates smaller than a step add up on average instead of being lost. In-place operations draw u from torch's global
    generator; `write_` takes another.

    Args:
        stored: codes, steps and zero points, as `corollary.linalg.quantize` gives them for 8 bits.
        shape: of the tensor.
        group_size: entries that share a step.
        stochastic: False rounds writes to nearest, which loses updates below half a step.

    Its dtype is that of the steps. ``clone``, ``detach``, ``.to`` and ``copy.deepcopy`` keep it in codes. Other operations see its
    values and give plain tensors.

    Raises:
        ValueError: codes or steps that do not fit the shape, or a value to write that is NaN or infinite.

    Deviations: where rounding is stochastic, the step is 1/254 of the group's range instead of 1/255, so that no code has to be
    clipped; clipping, as in the authors' code, pulls the extremes of each group inwards.

    When not to use it: where weights are written through views (``weight[0] = 1`` changes a copy and not the weight); under
    DistributedDataParallel or FSDP.

    Example:
        >>> import torch
        >>> weight = Int8Weight.from_float(torch.linspace(-1, 1, 512).view(2, 256))
        >>> weight.codes.dtype, weight.dtype, weight.nbytes_stored
        (torch.uint8, torch.float32, 522)
        >>> bool((weight - torch.linspace(-1, 1, 512).view(2, 256)).abs().max() < 1 / 255)
        True

    Source: Zhang et al., "Q-GaLore", arXiv 2407.08296, sections 3.1 and 3.4.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group_size: int
    stochastic: bool

    @staticmethod
    def __new__(cls, stored: Quantized, shape: Sequence[int], *, group_size: int = 256, stochastic: bool = True) -> Int8Weight:
        made: Int8Weight = Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=stored.scale.dtype, device=stored.codes.device
        )
        return made

    def __init__(self, stored: Quantized, shape: Sequence[int], *, group_size: int = 256, stochastic: bool = True) -> None:
        groups = -(-self.numel() // group_size)
        if stored.codes.numel() != self.numel() or stored.scale.numel() != groups or stored.zero.numel() != groups:
            raise ValueError(
                f"shape {tuple(shape)} needs {self.numel()} codes and {groups} steps and zero points for groups of {group_size}, "
                f"not {stored.codes.numel()}, {stored.scale.numel()} and {stored.zero.numel()}"
            )
        self.codes, self.scale, self.zero = stored
        self.group_size, self.stochastic = group_size, stochastic

    @classmethod
    def from_float(cls, values: Tensor, *, group_size: int = 256, stochastic: bool = True) -> Int8Weight:
        """The nearest codes for ``values``.

        Args:
            values: floating and finite, any shape.
            group_size: entries that share a step.
            stochastic: how later writes are rounded.

        Raises:
            TypeError, ValueError: as `corollary.linalg.quantize`.
        """
        return cls(quantize(values, 8, group_size=group_size), values.shape, group_size=group_size, stochastic=stochastic)

    @property
    def stored(self) -> Quantized:
        """Codes, steps and zero points."""
        return Quantized(self.codes, self.scale, self.zero)

    @property
    def nbytes_stored(self) -> int:
        """Bytes of codes, steps and zero points."""
        return self.codes.nbytes + self.scale.nbytes + self.zero.nbytes

    def dequantize(self) -> Tensor:
        """Its values as a plain tensor of its dtype; gradients pass through to it."""
        values: Tensor = _Dequantize.apply(self)  # type: ignore[no-untyped-call]
        return values

    @torch.no_grad()
    def write_(self, values: Tensor, *, generator: torch.Generator | None = None) -> Int8Weight:
        """Store ``values``, rounded at random or, where ``stochastic`` is False, to nearest.

        Args:
            values: its shape, floating and finite.
            generator: of the rounding, on its device; None takes torch's global one.

        Raises:
            ValueError: another shape, or values that are not finite; nothing is written then.
        """
        if values.shape != self.shape:
            raise ValueError(f"'values' must have shape {tuple(self.shape)}, not {tuple(values.shape)}")
        new = quantize(values.to(self.dtype), 8, group_size=self.group_size, stochastic=self.stochastic, generator=generator)
        for held, fresh in zip(self.stored, new, strict=True):
            held.copy_(fresh)  # in place: what is detached from it shares these tensors
        increment_version(self)  # a backward pass that still needs the old values is told so
        return self

    def _like(self, stored: Quantized) -> Int8Weight:
        return Int8Weight(stored, self.shape, group_size=self.group_size, stochastic=self.stochastic)

    def _values(self) -> Tensor:
        return dequantize(self.stored, self.shape, group_size=self.group_size)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Int8Weight(shape={tuple(self.shape)}, dtype={self.dtype}, group_size={self.group_size}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], tuple[int, bool]]:
        return ["codes", "scale", "zero"], (self.group_size, self.stochastic)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: tuple[int, bool], shape: Sequence[int], stride: Sequence[int]
    ) -> Int8Weight:
        stored = Quantized(inner["codes"], inner["scale"], inner["zero"])
        return Int8Weight(stored, shape, group_size=context[0], stochastic=context[1])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _IN_CODES.get(func)
        if handler is not None:
            done = handler(*args, **kwargs)
            if done is not NotImplemented:
                return done
        return _on_values(func, args, kwargs)


class _Dequantize(torch.autograd.Function):
    """The values of an `Int8Weight`; to autograd, the identity."""

    @staticmethod
    def forward(ctx: Any, weight: Int8Weight) -> Tensor:
        return weight._values()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Linear(torch.autograd.Function):
    """x Wᵀ + b that keeps the codes for the backward pass, not the values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight._values().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            grad @ weight.dequantize().to(grad.dtype) if need_x else None,
            (rows.T @ x.reshape(-1, x.shape[-1]).to(grad.dtype)).to(weight.dtype) if need_weight else None,
            rows.sum(0) if need_bias else None,
        )


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, Int8Weight):
        assert isinstance(input, Int8Weight)
        return F.linear(input.dequantize(), weight, bias)
    if not input.is_floating_point():
        raise TypeError(f"'input' must be floating, not {input.dtype}")
    if weight.dim() != 2 or not input.dim() or input.shape[-1] != weight.shape[1]:
        raise ValueError(f"'input' of shape {tuple(input.shape)} does not fit a weight of shape {tuple(weight.shape)}")
    out: Tensor = _Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]
    return out


def _on_values(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on the values, and store what it wrote into any of them."""
    held: dict[int, tuple[Int8Weight, Tensor]] = {}

    def values(x: Any) -> Any:
        if not isinstance(x, Int8Weight):
            return x
        if id(x) not in held:
            held[id(x)] = (x, x._values())
        return held[id(x)][1]

    out = func(*tree_map(values, args), **tree_map(values, kwargs))
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False), **kwargs)
    originals: dict[int, Int8Weight] = {}
    for argument in func._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            for leaf in tree_leaves(given.get(argument.name)):
                if isinstance(leaf, Int8Weight):
                    weight, written = held[id(leaf)]
                    weight.write_(written)
                    originals[id(written)] = weight
    return tree_map(lambda x: originals.get(id(x), x), out)


def _detach(weight: Int8Weight) -> Int8Weight:
    return weight._like(weight.stored)


def _clone(weight: Int8Weight, *, memory_format: Any = None) -> Int8Weight:
    return weight._like(Quantized(*(part.clone() for part in weight.stored)))


def _to_copy(
    weight: Int8Weight, *, dtype: torch.dtype | None = None, device: Any = None, non_blocking: bool = False, **kwargs: Any
) -> Any:
    dtype = weight.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        return NotImplemented
    codes, zero = (part.to(device=device, copy=True, non_blocking=non_blocking) for part in (weight.codes, weight.zero))
    scale = weight.scale.to(device=device, dtype=dtype, copy=True, non_blocking=non_blocking)
    return weight._like(Quantized(codes, scale, zero))


def _copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Any:
    if not (isinstance(target, Int8Weight) and isinstance(source, Int8Weight)):
        return NotImplemented
    if target.group_size != source.group_size or target.shape != source.shape:
        return NotImplemented
    for held, fresh in zip(target.stored, source.stored, strict=True):
        held.copy_(fresh)
    return target


_IN_CODES: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _detach,
    aten.alias.default: _detach,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy_,
}
"""operations that work on the codes; all others work on the values"""

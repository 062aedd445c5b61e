"""Round to nearest, and at random, onto a few bits: one scale and one zero point for each group of entries."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Quantized(NamedTuple):
    """Codes of ``bits`` bits, two to a byte where bits is 4, and each group's step and zero point.

    The value of an entry with code q in a group with step s and zero point z is s (q - z).
    """

    codes: Tensor
    """uint8: shape (entries,) for 8 bits, (⌈entries / 2⌉,) for 4."""
    scale: Tensor
    """floating, shape (groups,): the step s."""
    zero: Tensor
    """uint8, shape (groups,): the zero point z."""


def quantize(
    x: Tensor,
    bits: int = 8,
    *,
    group_size: int = 256,
    stochastic: bool = False,
    generator: torch.Generator | None = None,
) -> Quantized:
    r"""Asymmetric uniform quantization of groups of consecutive entries.

    For a group of values from a to b (the range is widened to hold 0), with :math:`Q = 2^{bits} - 1`:

    .. math:: s = (b - a) / Q, \qquad z = \mathrm{round}(-a / s), \qquad q = \mathrm{clip}(\mathrm{round}(x / s) + z, 0, Q).

    With ``stochastic`` the rounding of x / s goes up with a probability equal to its fraction, so that its expected value is
    x / s: small changes survive on average, where rounding to nearest would lose them every time. There s = (b - a) / (Q - 1) and
    z = -floor(a / s), a step to spare, so that no code has to be clipped and the expected value is exact at the extremes too.

    Args:
        x: floating tensor of any shape with entries, finite.
        bits: 4 or 8.
        group_size: entries that share a step; the last group may be shorter.
        stochastic: round at random instead of to nearest.
        generator: source of randomness, on the device of ``x``.

    Returns:
        `Quantized`: ``bits``/8 bytes an entry, and for each group one value in the dtype of ``x`` and one byte.

    Raises:
        TypeError: ``x`` is not a floating tensor.
        ValueError: ``bits`` is neither 4 nor 8, ``group_size`` below 1, or ``x`` empty, NaN or infinite.

    Deviations: where all values of a group have one sign, the range is widened to 0, so that the zero point fits its byte; the
    authors' code clips the zero point instead, which shifts such groups. It also floors the range at 1e-5, which loses small
    groups; here only a group of zeros is special.

    Example:
        >>> x = torch.tensor([-1.0, 0.0, 0.5, 1.0])
        >>> dequantize(quantize(x, 8), (4,)).round(decimals=1)
        tensor([-1.0000,  0.0000,  0.5000,  1.0000])

    Source: Zhang et al., "Q-GaLore", arXiv 2407.08296, section 3.1.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"'x' must be a floating tensor, not {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if bits not in (4, 8):
        raise ValueError(f"'bits' must be 4 or 8, not {bits}")
    if group_size < 1:
        raise ValueError(f"'group_size' must be at least 1, not {group_size}")
    if not x.numel():
        raise ValueError(f"'x' must have entries; its shape is {tuple(x.shape)}")
    top = 2**bits - 1
    groups = _grouped(x.detach().reshape(-1), group_size)
    wide = groups.float() if x.dtype in (torch.float16, torch.bfloat16) else groups
    low, high = wide.amin(1), wide.amax(1)  # on a CPU far faster than aminmax
    if not bool((high - low).isfinite().all()):  # a NaN anywhere in a group is in its extremes
        raise ValueError("'x' must be finite, and so must the range of each group; NaN or infinity came")
    low, high = low.clamp_(max=0), high.clamp_(min=0)
    # The step is rounded to its stored dtype first: codes must fit the step that they will be read with.
    scale = ((high - low) / (top - stochastic)).to(x.dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a group of zeros needs some step
    steps = scale.to(wide.dtype)
    place = -low / steps
    zero = (place.ceil_() if stochastic else place.round_()).clamp_(0, top)
    level = wide / steps[:, None]
    if stochastic:
        noise = torch.rand(level.shape, generator=generator, dtype=level.dtype, device=level.device)
        level = level.add_(noise).floor_()
    else:
        level = level.round_()
    codes = level.add_(zero[:, None]).clamp_(0, top).to(torch.uint8).reshape(-1)[: x.numel()]
    if bits == 4:
        if codes.numel() % 2:
            codes = torch.cat([codes, codes.new_zeros(1)])
        codes = codes[::2] | (codes[1::2] << 4)
    # A slice would keep the padded storage alive: the codes take the bytes that they say.
    return Quantized(codes.clone(), scale, zero.to(torch.uint8))


def dequantize(stored: Quantized, shape: tuple[int, ...] | torch.Size, bits: int = 8, *, group_size: int = 256) -> Tensor:
    """The values that the codes stand for.

    Args:
        stored: what `quantize` gave.
        shape: of the original.
        bits: as given to `quantize`.
        group_size: as given to `quantize`.

    Returns:
        Tensor of that shape, in the dtype of the scales.

    Raises:
        ValueError: the codes or scales are too few or too many for the shape.

    Example:
        >>> x = torch.linspace(-1, 1, 6).view(2, 3)
        >>> bool((dequantize(quantize(x, 4), (2, 3), 4) - x).abs().max() <= 1 / 15)
        True
    """
    n = 1
    for side in shape:
        n *= side
    held, groups = stored.codes.numel() * (2 if bits == 4 else 1), -(-n // group_size)
    if held not in ((n, n + n % 2) if bits == 4 else (n,)) or stored.scale.numel() != groups:
        raise ValueError(
            f"shape {tuple(shape)} needs {n} codes in {groups} groups of {group_size}; "
            f"{held} codes and {stored.scale.numel()} scales are stored"
        )
    wide = torch.float32 if stored.scale.dtype in (torch.float16, torch.bfloat16) else stored.scale.dtype
    if bits == 4:
        pairs = stored.codes.new_empty((stored.codes.numel(), 2), dtype=wide)
        pairs[:, 0], pairs[:, 1] = stored.codes & 15, stored.codes >> 4
        levels = pairs.view(-1)[:n]
    else:
        levels = stored.codes.to(wide)
    levels = _grouped(levels, group_size)
    values = levels.sub_(stored.zero.to(wide)[:, None]).mul_(stored.scale.to(wide)[:, None])  # levels are a copy
    return values.reshape(-1)[:n].reshape(shape).to(stored.scale.dtype)


def _grouped(flat: Tensor, group_size: int) -> Tensor:
    """Rows of ``group_size``; the last is filled up by its own last entry, which changes no group's range."""
    missing = -flat.numel() % group_size
    if missing:
        flat = torch.cat([flat, flat[-1:].expand(missing)])
    return flat.view(-1, group_size)

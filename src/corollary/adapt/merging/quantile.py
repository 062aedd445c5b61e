"""The exact k-th smallest magnitude of numbers that are too many to hold: a radix search over passes of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_CHUNK = 1 << 22
"""elements looked at together: bounds the memory of a pass to some tens of megabytes"""
_DIGIT = 1 << 16


def kth_magnitude(passes: Callable[[], Iterable[Tensor]], k: int, dtype: torch.dtype) -> float:
    r"""The k-th smallest absolute value of all numbers together.

    The bits of a float without its sign, read as a whole number, sort as the float does. Each pass counts one digit of 16 bits
    among the numbers whose higher digits are settled: two passes settle float32, four float64.

    Args:
        passes: gives the tensors anew each time it is called.
        k: from 1 to the count of numbers.
        dtype: float32 or float64: what the tensors are.

    Returns:
        The value, exactly one of the magnitudes.

    Example:
        >>> import torch
        >>> from corollary.adapt.merging.quantile import kth_magnitude
        >>> kth_magnitude(lambda: [torch.tensor([-3.0, 1.0]), torch.tensor([2.0])], 2, torch.float32)
        2.0
    """
    whole, shift = (torch.int32, 16) if dtype == torch.float32 else (torch.int64, 48)
    prefix = 0
    while shift >= 0:
        counts = torch.zeros(_DIGIT, dtype=torch.int64)
        for tensor in passes():
            for piece in torch.split(tensor.detach().reshape(-1), _CHUNK):
                bits = piece.abs().view(whole)
                settled = bits if shift + 16 >= 8 * dtype.itemsize else bits[(bits >> (shift + 16)) == prefix]
                counts += torch.bincount((settled >> shift) & (_DIGIT - 1), minlength=_DIGIT).cpu()
        upto = counts.cumsum(0)
        digit = int(torch.searchsorted(upto, k))
        k -= int(upto[digit - 1]) if digit else 0
        prefix = prefix << 16 | digit
        shift -= 16
    return float(torch.tensor(prefix, dtype=whole).view(dtype))

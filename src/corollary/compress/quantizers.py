"""Quantizers and sparsity for weights: what compensation makes up for, and what low rank is measured against."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from corollary.linalg import Quantized, dequantize, quantize


def quantize_rows(weight: Tensor, bits: int, group_size: int) -> tuple[Quantized, tuple[int, int]]:
    """Codes of a matrix whose rows are cut into groups, each row by itself; the last group of a row is filled up by its last entry.

    Args:
        weight: (m, n), floating and finite.
        bits: 4 or 8.
        group_size: entries that share a step.

    Returns:
        The codes and the filled-up shape (m, ⌈n / group_size⌉ · group_size), which `dequantize_rows` needs.
    """
    m, n = weight.shape
    missing = -n % group_size
    full = F.pad(weight[None], (0, missing), mode="replicate")[0] if missing else weight
    return quantize(full, bits, group_size=group_size), (m, n + missing)


def dequantize_rows(stored: Quantized, shape: tuple[int, int], bits: int, group_size: int, columns: int) -> Tensor:
    """The matrix (m, columns) that the codes of `quantize_rows` stand for."""
    return dequantize(stored, shape, bits, group_size=group_size)[:, :columns]


def round_to_nearest(weight: Tensor, bits: int = 4, group_size: int = 64) -> Tensor:
    r"""A weight rounded to 2^bits evenly spaced levels in each group of a row's entries.

    Args:
        weight: (m, n), floating and finite.
        bits: 4 or 8.
        group_size: entries of a row that share step and zero point; the last group of a row may be shorter.

    Returns:
        (m, n) in the dtype of ``weight``.

    Raises:
        TypeError, ValueError: as `corollary.linalg.quantize`, or a weight that is no matrix.

    Example:
        >>> round_to_nearest(torch.tensor([[0.0, 0.1, 0.9, 1.5]])).round(decimals=4)
        tensor([[0.0000, 0.1000, 0.9000, 1.5000]])

    Source: the baseline of Frantar et al., "GPTQ", arXiv 2210.17323, section 2.
    """
    _check_matrix(weight)
    stored, shape = quantize_rows(weight, bits, group_size)
    return dequantize_rows(stored, shape, bits, group_size, weight.shape[1])


def two_four_mask(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    r"""Which entries stay under 2:4 sparsity: in every four neighbours of a row the two with the largest :math:`|w|\, s`.

    Args:
        weight: (m, n), n a multiple of 4.
        scale: s, (n,): the root mean square of each input makes it Wanda's rule; None is the plain magnitude.

    Returns:
        Bool (m, n), two True in every four. Ties go to the earlier entry.

    Raises:
        TypeError, ValueError: a weight that is no floating matrix of 4 k columns, or a scale of another length.

    Example:
        >>> two_four_mask(torch.tensor([[3.0, -4.0, 1.0, 2.0]]))
        tensor([[ True,  True, False, False]])

    Sources: Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv 2104.08378; Sun et al., "Wanda", arXiv 2306.11695.
    """
    _check_matrix(weight)
    m, n = weight.shape
    if n % 4:
        raise ValueError(f"2:4 sparsity needs a multiple of 4 columns, not {n}")
    size = weight.abs()
    if scale is not None:
        if scale.shape != (n,):
            raise ValueError(f"'scale' must have shape ({n},), not {tuple(scale.shape)}")
        size = size * scale.to(weight)
    order = size.view(m, n // 4, 4).sort(dim=2, descending=True, stable=True).indices[..., :2]
    mask = torch.zeros(m, n // 4, 4, dtype=torch.bool, device=weight.device).scatter_(2, order, True)
    return mask.view(m, n)


def two_four(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """A weight with two zeros in every four neighbours of a row, see `two_four_mask`."""
    return weight * two_four_mask(weight, scale)


def gptq(weight: Tensor, inputs: Tensor, bits: int = 4, group_size: int = 64, *, damping: float = 0.01) -> Tensor:
    r"""Rounding in which every column makes up for the errors of those before it, in the metric of the inputs.

    With H the inputs' second moment and U the upper Cholesky factor of its inverse, for each column j in turn

    .. math:: q_j = \mathrm{round}(w_j), \qquad e_j = (w_j - q_j) / U_{jj}, \qquad W_{:, k} \leftarrow W_{:, k} - e_j U_{jk},\; k > j.

    Step and zero point of a group are those of its entries when its first column is reached.

    Args:
        weight: (m, n), floating and finite.
        inputs: H, (n, n).
        bits, group_size: as in `round_to_nearest`.
        damping: share of the mean of H's diagonal that is added to it.

    Returns:
        (m, n) in the dtype of ``weight``: values that `round_to_nearest` with the same settings need not map to themselves, because
        its groups' ranges are their own.

    Raises:
        TypeError, ValueError: as `round_to_nearest`; ``inputs`` of another shape, or not positive definite after damping.

    Deviations: columns in their own order (the authors' ``act_order`` is off by default too); no blocks of columns, which change
    speed alone; the authors' dead columns (inputs that are always 0) are covered by damping.

    When not to use it: on matrices with many thousands of columns, where the loop over columns wants blocks and a GPU.

    Example:
        >>> x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)) @ torch.ones(8, 8).tril()
        >>> w = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
        >>> error = lambda q: float(((w - q) @ x.T).norm())
        >>> error(gptq(w, x.T @ x / 200, group_size=8)) < error(round_to_nearest(w, group_size=8))
        True

    Source: Frantar et al., "GPTQ", arXiv 2210.17323, Algorithm 1.
    """
    stored, shape = gptq_rows(weight, inputs, bits, group_size, damping)
    return dequantize_rows(stored, shape, bits, group_size, weight.shape[1])


def gptq_rows(
    weight: Tensor, inputs: Tensor, bits: int, group_size: int, damping: float = 0.01
) -> tuple[Quantized, tuple[int, int]]:
    """The codes that `gptq` chooses, laid out as `quantize_rows` does."""
    _check_matrix(weight)
    if bits not in (4, 8) or group_size < 1:
        raise ValueError(f"'bits' must be 4 or 8 and 'group_size' at least 1, not {bits} and {group_size}")
    m, n = weight.shape
    if inputs.shape != (n, n):
        raise ValueError(f"'inputs' must have shape ({n}, {n}), not {tuple(inputs.shape)}")
    hessian = inputs.detach().to(weight.device, torch.float64)
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(n, dtype=hessian.dtype, device=hessian.device)
    lower, info = torch.linalg.cholesky_ex(hessian)
    if int(info):
        raise ValueError("'inputs' is not positive definite; raise 'damping'")
    factor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    work, top = weight.detach().to(torch.float64, copy=True), 2**bits - 1
    groups = -(-n // group_size)
    codes = torch.zeros(m, groups * group_size, dtype=torch.uint8, device=work.device)
    scales, zeros = work.new_empty(m, groups), codes.new_empty(m, groups)
    for g, begin in enumerate(range(0, n, group_size)):
        end = min(begin + group_size, n)
        group = work[:, begin:end]
        low, high = group.amin(1).clamp_(max=0), group.amax(1).clamp_(min=0)
        # The step is rounded to its stored dtype first: codes must fit the step that they will be read with.
        scale = ((high - low) / top).to(weight.dtype)
        step = torch.where(scale > 0, scale, torch.ones_like(scale)).to(work.dtype)
        zero = (-low / step).round().clamp_(0, top)
        scales[:, g], zeros[:, g] = step, zero.to(torch.uint8)
        for j in range(begin, end):
            column = work[:, j]
            level = ((column / step).round() + zero).clamp_(0, top)
            codes[:, j] = level.to(torch.uint8)
            error = (column - (level - zero) * step) / factor[j, j]
            work[:, j + 1 :].addr_(error, factor[j, j + 1 :], alpha=-1)
    flat = codes.view(-1)
    if bits == 4:
        if flat.numel() % 2:
            flat = F.pad(flat, (0, 1))
        flat = flat[::2] | (flat[1::2] << 4)
    stored = Quantized(flat.clone(), scales.to(weight.dtype).view(-1), zeros.view(-1))
    return stored, (m, groups * group_size)


def _check_matrix(weight: Tensor) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(
            f"'weight' must be a floating tensor, not {weight.dtype if isinstance(weight, Tensor) else type(weight).__name__}"
        )
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(f"'weight' must have shape (m, n), m, n >= 1, not {tuple(weight.shape)}")

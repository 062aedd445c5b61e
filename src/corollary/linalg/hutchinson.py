"""Hutchinson's estimator: the diagonal of a matrix that is known by its products alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from corollary.linalg.curvature import SymmetricOperator

PROBES = ("rademacher", "gaussian")


def rademacher_like(tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Independent ±1 with equal chance in the shape, dtype and device of each tensor.

    The draw depends on the seed and on the tensors' shapes, dtypes, devices and order, and on nothing else: no generator
    has to be carried along for it to be repeated. One draw serves all tensors of a dtype and device.

    Example:
        >>> import torch
        >>> [probe] = rademacher_like([torch.zeros(3, 4)], seed=0)
        >>> probe.shape, probe.abs().unique()
        (torch.Size([3, 4]), tensor([1.]))
    """
    probes: list[Tensor] = [torch.empty(0)] * len(tensors)
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(i)
    for number, ((device, dtype), indices) in enumerate(kinds.items()):
        generator = torch.Generator(device).manual_seed(_mix(seed + number))
        sizes = [tensors[i].numel() for i in indices]
        signs = _random_bits(sum(sizes), generator).to(dtype).mul_(2).sub_(1)
        for i, part in zip(indices, torch.split(signs, sizes), strict=True):
            probes[i] = part.view(tensors[i].shape)
    return probes


def hutchinson_diagonal(
    operator: SymmetricOperator,
    samples: int,
    *,
    probe: str = "rademacher",
    generator: torch.Generator | None = None,
    chunk: int = 64,
) -> Tensor:
    r"""Estimate the diagonal of a symmetric matrix A from its products with random vectors.

    For independent entries of mean 0 and variance 1, E[z ⊙ A z] = diag(A), and the estimate is the mean over ``samples``
    probes. With Rademacher probes the i-th entry has variance Σ_{j≠i} A_ij² / samples: a diagonal matrix needs one probe.
    Gaussian probes add 2 A_ii² / samples to it.

    Args:
        operator: a square tensor, a `HessianOperator`, or anything with ``shape``, ``dtype``, ``device`` and ``@``.
        samples: number of probes.
        probe: 'rademacher' or 'gaussian'.
        generator: source of the probes, on the operator's device; torch's global one by default.
        chunk: how many probes are held and multiplied at once.

    Returns:
        The estimate (n,), in the operator's dtype and on its device.

    Raises:
        ValueError: the operator is not square, ``samples`` or ``chunk`` is below 1, or ``probe`` is unknown.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> hutchinson_diagonal(matrix, 4000, generator=torch.Generator().manual_seed(0)).round(decimals=1)
        tensor([2., 3.])

    Reference:
        Bekas, Kokiopoulou, Saad, "An estimator for the diagonal of a matrix", 2007; the form that
        AdaHessian uses, arXiv 2006.00719.
    """
    shape = tuple(operator.shape)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"'operator' must be square, not of shape {shape}")
    if samples < 1 or chunk < 1:
        raise ValueError(f"'samples' and 'chunk' must be at least 1, not {samples} and {chunk}")
    if probe not in PROBES:
        raise ValueError(f"'probe' is '{probe}'; allowed: {', '.join(PROBES)}")
    total = torch.zeros(shape[0], dtype=operator.dtype, device=operator.device)
    for begin in range(0, samples, chunk):
        z = torch.empty(shape[0], min(chunk, samples - begin), dtype=operator.dtype, device=operator.device)
        if probe == "rademacher":
            z.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
        else:
            z.normal_(generator=generator)
        total += (z * (operator @ z)).sum(dim=1)
    return total / samples


def _random_bits(n: int, generator: torch.Generator) -> Tensor:
    """n fair bits as uint8 (n,), 64 from each random word: a fortieth of the time of a draw for each."""
    words = torch.empty((n + 63) // 64, dtype=torch.int64, device=generator.device).random_(-(2**63), None, generator=generator)
    shifts = torch.arange(8, dtype=torch.uint8, device=generator.device)
    return (words.view(torch.uint8)[:, None] >> shifts).bitwise_and_(1).view(-1)[:n]


def _mix(seed: int) -> int:
    """Spread a seed over 64 bits (splitmix64): torch's CPU generator reads the low 32, and near seeds must not correlate."""
    mask = (1 << 64) - 1
    x = (seed + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return (x ^ (x >> 31)) >> 1

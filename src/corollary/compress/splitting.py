"""A layer as two: which layers of a model can be split, what the two look like, and splitting a whole model by energy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from typing import cast

import torch
from torch import Tensor, nn

from corollary.compress.factors import record_split, spatial_pair
from corollary.compress.layers import factored, set_factors

SCHEMES = ("channel", "spatial")


def check_scheme(scheme: str) -> None:
    """Raise ``ValueError`` for a scheme other than 'channel' and 'spatial'."""
    if scheme not in SCHEMES:
        raise ValueError(f"'scheme' is {scheme!r}; allowed: {', '.join(SCHEMES)}")


def unfold_weight(weight: Tensor, scheme: str = "channel") -> Tensor:
    r"""The matrix whose rank counts when a layer's weight is split in two.

    A linear layer's weight is its own matrix. A convolution's, of shape (N, C, h, w), becomes N × (C h w) for the channel-wise
    split (h × w, then 1 × 1), or (C h) × (N w) for the spatial one (h × 1, then 1 × w).

    Args:
        weight: shape (out, in) or (N, C, h, w).
        scheme: 'channel' or 'spatial'.

    Returns:
        A matrix of the same entries.

    Raises:
        ValueError: another shape or scheme.

    Example:
        >>> unfold_weight(torch.zeros(8, 4, 3, 5)).shape, unfold_weight(torch.zeros(8, 4, 3, 5), "spatial").shape
        (torch.Size([8, 60]), torch.Size([12, 40]))
    """
    check_scheme(scheme)
    if weight.dim() == 2:
        return weight
    if weight.dim() != 4:
        raise ValueError(f"'weight' must have shape (out, in) or (N, C, h, w), not {tuple(weight.shape)}")
    n, c, h, w = weight.shape
    return weight.reshape(n, c * h * w) if scheme == "channel" else weight.permute(1, 2, 0, 3).reshape(c * h, n * w)


def fold_weight(matrix: Tensor, shape: Sequence[int], scheme: str = "channel") -> Tensor:
    """The weight of the given shape that `unfold_weight` makes this matrix of.

    Args:
        matrix: as `unfold_weight` gave it.
        shape: of the weight, (out, in) or (N, C, h, w).
        scheme: 'channel' or 'spatial'.

    Raises:
        ValueError: another scheme.

    Example:
        >>> weight = torch.arange(2.0 * 3 * 4 * 5).view(2, 3, 4, 5)
        >>> bool((fold_weight(unfold_weight(weight, "spatial"), weight.shape, "spatial") == weight).all())
        True
    """
    check_scheme(scheme)
    if len(shape) == 2 or scheme == "channel":
        return matrix.reshape(*shape)
    n, c, h, w = shape
    return matrix.reshape(c, h, n, w).permute(2, 0, 1, 3)


def splittable(model: nn.Module, skip: Sequence[str] = ()) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Names and layers that two layers could replace: linear ones and ungrouped, zero-padded convolutions.

    A layer whose weight is an embedding's too is left out, and so is a subclass, of which nothing is known.

    Args:
        model: any module.
        skip: patterns of module names to leave out, such as ``("head", "blocks.0.*")``.

    Raises:
        ValueError: a pattern that matches no module.

    Example:
        >>> [name for name, _ in splittable(nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Linear(8, 4)), skip=["2"])]
        ['0']
    """
    modules = {name: module for name, module in model.named_modules() if name}
    for pattern in skip:
        if not any(fnmatch(name, pattern) for name in modules):
            raise ValueError(f"'skip' has the pattern {pattern!r}, which matches no module; there are: {', '.join(modules)}")
    tables = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    for name, module in modules.items():
        if type(module) not in (nn.Linear, nn.Conv2d) or any(fnmatch(name, pattern) for pattern in skip):
            continue
        if isinstance(module, nn.Conv2d):
            plain = module.groups == 1 and module.padding_mode == "zeros"
        else:
            plain = id(module.weight) not in tables
        if plain:
            yield name, module


@torch.no_grad()
def split_layer(layer: nn.Linear | nn.Conv2d, left: Tensor, right: Tensor, scheme: str = "channel") -> nn.Sequential:
    r"""Two ordinary layers that together have the weight ``left @ right``, as `unfold_weight` orders it.

    Args:
        layer: gives shapes, stride, padding, dilation, bias, dtype, device and mode; its weight is not looked at.
        left: shape (m, r), of the unfolded weight's m rows.
        right: shape (r, n), of its n columns.
        scheme: for a convolution, 'channel' (h × w to r channels, then 1 × 1) or 'spatial' (h × 1 to r channels, then 1 × w).

    Returns:
        An ``nn.Sequential`` of two ordinary layers, a `Factored` unless the split is spatial; the bias is the second one's.

    Raises:
        ValueError: factors that do not fit the layer.

    Example:
        >>> layer = nn.Linear(6, 4)
        >>> pair = split_layer(layer, torch.eye(4), layer.weight)
        >>> x = torch.randn(3, 6)
        >>> bool((pair(x) - layer(x)).abs().max() < 1e-6)
        True
    """
    m, n = unfold_weight(layer.weight, scheme).shape
    rank = left.shape[-1]
    if left.shape != (m, rank) or right.shape != (rank, n):
        raise ValueError(
            f"'left' and 'right' must have shapes ({m}, r) and (r, {n}), not {tuple(left.shape)} and {tuple(right.shape)}"
        )
    if isinstance(layer, nn.Linear) or scheme == "channel":
        return set_factors(factored(layer, rank), left, right, layer.bias)
    pair = spatial_pair(layer, rank)
    first, second = cast(nn.Conv2d, pair[0]), cast(nn.Conv2d, pair[1])
    into, out, (h, w) = layer.in_channels, layer.out_channels, layer.kernel_size
    first.weight.copy_(left.view(into, h, rank).permute(2, 0, 1)[..., None])
    second.weight.copy_(right.view(rank, out, w).transpose(0, 1)[:, :, None])
    if layer.bias is not None and second.bias is not None:
        second.bias.copy_(layer.bias)
    return pair


@torch.no_grad()
def factorize(
    model: nn.Module,
    *,
    energy: float = 0.99,
    scheme: str = "channel",
    skip: Sequence[str] = (),
    ranks: Mapping[str, int] | None = None,
) -> dict[str, int]:
    r"""Split every layer into two by its singular value decomposition, where that saves weights.

    A layer's m × n matrix gets the least rank r that keeps the share ``energy`` of :math:`\sum_i \sigma_i^2`, and is split where
    r (m + n) < m n; both halves get the singular values' square roots.

    Args:
        model: changed in place.
        energy: share to keep, in (0, 1]; not used for layers that ``ranks`` names.
        scheme: 'channel' or 'spatial', for convolutions.
        skip: patterns of module names that stay whole.
        ranks: ranks by module name, in place of those that the energy asks for.

    Returns:
        The rank of each layer that was split, by its name.

    Raises:
        ValueError: an energy out of range, an unknown scheme, a pattern or name that matches nothing, a rank below 1.

    When not to use it: on a model trained without regard to it, weights' energy says little about the loss; decompose in the
    metric of the layers' inputs then, or train with `TrainedRankPruning`.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = nn.init.ones_(model[0].weight)
        >>> factorize(model)
        {'0': 1}
        >>> model[0]
        Factored(
          (down): Linear(in_features=8, out_features=1, bias=False)
          (up): Linear(in_features=1, out_features=8, bias=False)
        )
    """
    if not 0 < energy <= 1:
        raise ValueError(f"'energy' must be in (0, 1], not {energy}")
    check_scheme(scheme)
    layers = dict(splittable(model, skip))
    for name, rank in (ranks or {}).items():
        if name not in layers:
            raise ValueError(f"'ranks' names {name!r}, which cannot be split; there are: {', '.join(layers)}")
        if rank < 1:
            raise ValueError(f"'ranks' gives {name!r} the rank {rank}; allowed: at least 1")
    split: dict[str, int] = {}
    schemes: dict[str, str] = {}
    for name, layer in layers.items():
        matrix = unfold_weight(layer.weight, scheme)
        wide = matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix
        u, s, vh = torch.linalg.svd(wide, full_matrices=False)
        rank = ranks[name] if ranks and name in ranks else energy_rank(s, energy)
        if rank * sum(matrix.shape) >= matrix.numel():
            continue
        root = s[:rank].sqrt()
        model.set_submodule(name, split_layer(layer, u[:, :rank] * root, root[:, None] * vh[:rank], scheme))
        split[name] = rank
        schemes[name] = "spatial" if scheme == "spatial" and isinstance(layer, nn.Conv2d) else "channel"
    for kind in ("channel", "spatial"):
        record_split(model, {name: rank for name, rank in split.items() if schemes[name] == kind}, kind)
    return split


def energy_rank(singular_values: Tensor, energy: float) -> int:
    """The least rank, 1 or more, whose share of the squared singular values (falling) reaches ``energy``.

    Example:
        >>> energy_rank(torch.tensor([3.0, 1.0, 0.5]), 0.9)
        2
    """
    squares = singular_values.double().square()
    before = squares.cumsum(0) - squares
    return max(1, int((before < energy * squares.sum()).sum()))

"""Maestro: layers trained as products whose components are ordered by importance, so that they can be cut at any rank."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corollary.compress.factors import record_split
from corollary.compress.splitting import split_layer, splittable


class OrderedLowRank(nn.Module):
    r"""What the two layers share: factors U and V whose first columns are the ones that are kept.

    ``weight_out`` is U, shape (out, R), ``weight_in`` is Vᵀ, shape (R, in). The first ``rank`` columns are in use (all at the
    start, fewer after `shrink`); while a `RankSampler` has its hand on the layer, only the first ``sampled`` of them.
    """

    kept: Tensor
    weight_in: nn.Parameter
    weight_out: nn.Parameter

    def __init__(self, out_features: int, in_features: int, rank: int | None, device: Any, dtype: Any) -> None:
        super().__init__()
        full = min(out_features, in_features)
        if rank is None:
            rank = full
        if not 1 <= rank <= full:
            raise ValueError(f"'rank' must be in 1..{full} for a weight of {out_features} x {in_features}, not {rank}")
        self.max_rank = self.rank = rank
        self.sampled: int | None = None
        self.weight_in = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.weight_out = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.register_buffer("kept", torch.tensor(rank, device=device))
        self.register_load_state_dict_post_hook(_take_rank)  # type: ignore[no-untyped-call]

    @property
    def active_rank(self) -> int:
        """How many components a forward pass uses now."""
        return self.rank if self.sampled is None else min(self.sampled, self.rank)

    def reset_parameters(self) -> None:
        """Begin with the decomposition of a weight that is drawn as ``nn.Linear`` draws its own."""
        weight = torch.empty(self.weight_out.shape[0], self.weight_in.shape[1], device=self.weight_in.device)
        nn.init.kaiming_uniform_(weight, a=5**0.5)
        self.set_weight(weight)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        r"""Take U = U_s Σ^{1/2} and V = V_s Σ^{1/2} from the leading part of the decomposition of this (out, in) matrix."""
        wide = weight.detach().double() if weight.dtype == torch.float64 else weight.detach().float()
        u, s, vh = torch.linalg.svd(wide, full_matrices=False)
        root = s[: self.max_rank].sqrt()
        self.weight_out.copy_(u[:, : self.max_rank] * root)
        self.weight_in.copy_(root[:, None] * vh[: self.max_rank])

    def truncated_weight(self, rank: int | None = None) -> Tensor:
        """The (out, in) matrix of the first ``rank`` components; all that are in use by default."""
        rank = self.rank if rank is None else rank
        return self.weight_out[:, :rank] @ self.weight_in[:rank]

    def tail_norms(self) -> tuple[Tensor, Tensor]:
        r"""Norms :math:`\|U_{:,i:}\|_F` and :math:`\|V_{:,i:}\|_F` of all that follows i, for every i in use: falling numbers."""
        squares = (self.weight_out[:, : self.rank].square().sum(0), self.weight_in[: self.rank].square().sum(1))
        tails = [s.flip(0).cumsum(0).flip(0) for s in squares]
        # The square root has no slope at 0: there the norm is left out of the graph, which is a sub-gradient of it.
        out, into = (torch.where(t > 0, t, 1).sqrt() * (t > 0) for t in tails)
        return out, into

    @torch.no_grad()
    def importance(self) -> Tensor:
        r"""The product :math:`\|U_{:,i:}\|_F \|V_{:,i:}\|_F` for every component i in use."""
        out, into = self.tail_norms()
        return out * into

    def set_rank(self, rank: int) -> None:
        """Use the first ``rank`` components alone, 0 to as many as are in use."""
        if not 0 <= rank <= self.rank:
            raise ValueError(f"'rank' must be in 0..{self.rank}, which are in use, not {rank}")
        self.rank = rank
        self.kept.fill_(rank)

    def dense_like(self) -> nn.Linear | nn.Conv2d:
        """An ordinary layer of the same shape and bias, whose weight is still to be set."""
        raise NotImplementedError

    def _factors(self) -> tuple[Tensor, Tensor]:
        rank = self.active_rank
        if rank == 0:  # one component times nothing: no kernel takes an empty inner dimension everywhere
            return self.weight_in[:1], self.weight_out[:, :1] * 0
        return self.weight_in[:rank], self.weight_out[:, :rank]


def _take_rank(module: nn.Module, _: Any) -> None:
    assert isinstance(module, OrderedLowRank)
    module.rank = int(module.kept)


class MaestroLinear(OrderedLowRank):
    r"""A linear layer :math:`y = U_{:,:r} V_{:,:r}^\top x + b` that is trained so that every r is the best of its rank.

    Drawing r at random in training (`RankSampler`) makes the minimum of the mean loss a nested one: for a linear map on uniform
    data the first r components are the truncated singular value decomposition, for a linear autoencoder the first r principal
    components.

    Args:
        in_features, out_features: widths.
        bias: whether there is one.
        rank: R, the most components there can be; min(in, out) by default.
        device, dtype: of the parameters.

    Shape: (..., in_features) to (..., out_features).

    Raises:
        ValueError: a ``rank`` out of range, or an input of another width.
        TypeError: an input that is not floating.

    When not to use it: at full rank it costs (in + out) R products, more than a dense layer's in · out, until it is shrunk.

    Example:
        >>> layer = MaestroLinear(6, 4)
        >>> layer.set_rank(2)
        >>> layer(torch.randn(5, 6)).shape, int(torch.linalg.matrix_rank(layer.truncated_weight()))
        (torch.Size([5, 4]), 2)

    Reference:
        Horváth et al., "Maestro: Uncovering Low-Rank Structures via Trainable Decomposition", arXiv 2308.14929, section 3; the
        authors' ``maestro/layers/linear.py``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        rank: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features, rank, device, dtype)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(in_features**-0.5), in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features) through the components in use."""
        _check_floating(x)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"'x' has shape {tuple(x.shape)}; allowed: (..., {self.in_features})")
        into, out = self._factors()
        return F.linear(F.linear(x, into), out, self.bias)

    def dense_like(self) -> nn.Linear:
        """An ``nn.Linear`` of the same shape and bias, whose weight is still to be set."""
        made: Any = {"device": self.weight_in.device, "dtype": self.weight_in.dtype}
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, **made)
        dense.bias = self.bias  # type: ignore[assignment]
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank} of {self.max_rank}, bias={self.bias is not None}"


class MaestroConv2d(OrderedLowRank):
    r"""A convolution as a k × k one to r channels and a 1 × 1 one from them, trained so that every r is the best of its rank.

    The weight's matrix is (out_channels, in_channels k k); see `MaestroLinear`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias: as in ``nn.Conv2d``.
        rank: R; min(out_channels, in_channels k k) by default.
        device, dtype: of the parameters.

    Shape: (N, in_channels, H, W), or without N, as ``nn.Conv2d``.

    Raises:
        ValueError: a ``rank`` out of range, or an input of another shape.
        TypeError: an input that is not floating.

    When not to use it: for 1 × 1 or grouped convolutions, where there is little to share.

    Example:
        >>> layer = MaestroConv2d(3, 8, 3, padding=1)
        >>> layer.set_rank(2)
        >>> layer(torch.randn(5, 3, 6, 6)).shape
        torch.Size([5, 8, 6, 6])

    Reference:
        Horváth et al., arXiv 2308.14929, section 3; the authors' ``maestro/layers/conv.py``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        rank: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self_kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        fan_in = in_channels * self_kernel[0] * self_kernel[1]
        super().__init__(out_channels, fan_in, rank, device, dtype)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, self_kernel
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(fan_in**-0.5), fan_in**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H', W') through the components in use."""
        _check_floating(x)
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(f"'x' has shape {tuple(x.shape)}; allowed: (N, {self.in_channels}, H, W)")
        into, out = self._factors()
        kernels = into.view(-1, self.in_channels, *self.kernel_size)
        hidden = F.conv2d(x, kernels, None, self.stride, self.padding, self.dilation)
        return F.conv2d(hidden, out[:, :, None, None], self.bias)

    def dense_like(self) -> nn.Conv2d:
        """An ``nn.Conv2d`` of the same shape and bias, whose weight is still to be set."""
        made: Any = {"device": self.weight_in.device, "dtype": self.weight_in.dtype, "bias": self.bias is not None}
        shape: Any = (self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation)
        dense = nn.Conv2d(*shape, **made)
        dense.bias = self.bias
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"rank={self.rank} of {self.max_rank}, bias={self.bias is not None}"
        )


def _check_floating(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"'x' must be floating, not {x.dtype}")


def maestro_layers(model: nn.Module) -> dict[str, OrderedLowRank]:
    """The model's ordered layers by name.

    Raises:
        ValueError: there is none.
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, OrderedLowRank)}
    if not found:
        raise ValueError("'model' has no Maestro layer; make some with 'decompose'")
    return found


def decompose(model: nn.Module, *, skip: Sequence[str] = ()) -> nn.Module:
    """Put a Maestro layer in the place of every linear layer and ungrouped convolution, starting from its own weights.

    Args:
        model: changed in place; what it computes stays the same.
        skip: patterns of module names that stay as they are. Tied weights (an output layer sharing its embedding's) always do.

    Returns:
        The model.

    Raises:
        ValueError: a pattern that matches nothing, or a model with nothing to decompose.

    Example:
        >>> model = decompose(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), skip=["2"])
        >>> type(model[0]).__name__, type(model[2]).__name__
        ('MaestroLinear', 'Linear')
    """
    replaced = 0
    for name, module in list(splittable(model, skip)):
        made: dict[str, Any] = {
            "bias": module.bias is not None,
            "device": module.weight.device,
            "dtype": module.weight.dtype,
        }
        layer: MaestroLinear | MaestroConv2d
        if isinstance(module, nn.Linear):
            layer = MaestroLinear(module.in_features, module.out_features, **made)
        else:
            shape: Any = (
                module.in_channels,
                module.out_channels,
                module.kernel_size,
                module.stride,
                module.padding,
                module.dilation,
            )
            layer = MaestroConv2d(*shape, **made)
        layer.set_weight(module.weight.flatten(1))
        layer.bias = module.bias  # type: ignore[assignment]
        layer.train(module.training)
        model.set_submodule(name, layer)
        replaced += 1
    if not replaced:
        raise ValueError("'model' has no linear layer or ungrouped convolution to decompose")
    return model


class RankSampler:
    r"""Ordered dropout: for one forward pass, one layer at a time is cut to a rank drawn from all that it has.

    Every pair of a layer and a rank 1..r comes up once, in random order, before any comes up again; layers are cut one at a time, so
    that a cut meets the rest of the model whole.

    Args:
        model: whose Maestro layers are sampled.
        seed: of the order.

    Example:
        >>> model = nn.Sequential(MaestroLinear(4, 3), MaestroLinear(3, 2))
        >>> sampler = RankSampler(model, seed=0)
        >>> with sampler:
        ...     [layer.active_rank for layer in model]  # one of them is cut, or drawn at its whole rank
        [3, 1]
        >>> [layer.active_rank for layer in model]
        [3, 2]

    Source: Horváth et al., arXiv 2308.14929, section 3.2; the authors' ``SingleLayerSampler``.
    """

    def __init__(self, model: nn.Module, seed: int = 0) -> None:
        self.layers = list(maestro_layers(model).values())
        self._random = random.Random(seed)
        self._waiting: list[tuple[OrderedLowRank, int]] = []
        self._current: OrderedLowRank | None = None

    def draw(self) -> tuple[OrderedLowRank, int]:
        """The next layer and rank; ranks that have been shrunk away meanwhile are passed over."""
        for _ in range(2):
            while self._waiting:
                layer, rank = self._waiting.pop()
                if rank <= layer.rank:
                    return layer, rank
            self._waiting = [(layer, r) for layer in self.layers for r in range(1, layer.rank + 1)]
            self._random.shuffle(self._waiting)
        raise ValueError("every Maestro layer has been shrunk to rank 0: there is no rank left to draw")

    def __enter__(self) -> RankSampler:
        self._current, rank = self.draw()
        self._current.sampled = rank
        return self

    def __exit__(self, *_: object) -> None:
        assert self._current is not None
        self._current.sampled = None


def hierarchical_group_lasso(model: nn.Module) -> Tensor:
    r"""The penalty that pushes the last components to zero first.

    .. math:: \sum_{\text{layers}} \sum_{i=1}^{r} \big(\|U_{:,i:}\|_F + \|V_{:,i:}\|_F\big)

    Args:
        model: with Maestro layers; components that are shrunk away do not count.

    Returns:
        A scalar, to be added to the loss with a weight.

    Example:
        >>> layer = MaestroLinear(3, 3)
        >>> with torch.no_grad():
        ...     _ = layer.weight_in.copy_(torch.eye(3)), layer.weight_out.copy_(torch.eye(3))
        >>> round(hierarchical_group_lasso(layer).item(), 3)  # 2 (√3 + √2 + 1)
        8.293

    Source: Horváth et al., arXiv 2308.14929, section 3.3.
    """
    parts = [torch.stack(layer.tail_norms()).sum() for layer in maestro_layers(model).values()]
    return torch.stack(parts).sum()


def shrink(model: nn.Module, threshold: float = 1e-5) -> dict[str, int]:
    """Progressive shrinking: from now on, leave out the components whose importance, with all that follow, is below a threshold.

    Args:
        model: with Maestro layers; call it between epochs.
        threshold: of `OrderedLowRank.importance`.

    Returns:
        The rank of every layer by name.

    Raises:
        ValueError: a negative threshold.

    Example:
        >>> layer = nn.Sequential(MaestroLinear(3, 3))
        >>> with torch.no_grad():
        ...     _ = layer[0].weight_in[2].zero_()
        >>> shrink(layer, 1e-6)
        {'0': 2}

    Source: Horváth et al., arXiv 2308.14929, section 3.3.
    """
    if not threshold >= 0:
        raise ValueError(f"'threshold' must be at least 0, not {threshold}")
    ranks = {}
    for name, layer in maestro_layers(model).items():
        # Tail norms fall with i: what is above the threshold is a prefix.
        layer.set_rank(int((layer.importance() >= threshold).sum()))
        ranks[name] = layer.rank
    return ranks


@contextmanager
def ranks_set(model: nn.Module, ranks: Mapping[str, int]) -> Iterator[nn.Module]:
    """Within it, the layers named are cut to these ranks: to look at a rank before deciding for it.

    Example:
        >>> model = nn.Sequential(MaestroLinear(4, 3))
        >>> with ranks_set(model, {"0": 1}):
        ...     model[0].active_rank
        1
        >>> model[0].active_rank
        3
    """
    layers = maestro_layers(model)
    try:
        for name, rank in ranks.items():
            if name not in layers:
                raise ValueError(f"'ranks' names {name!r}, which is no Maestro layer; there are: {', '.join(layers)}")
            layers[name].sampled = rank
        yield model
    finally:
        for name in ranks:
            if name in layers:
                layers[name].sampled = None


@torch.no_grad()
def deploy(model: nn.Module, ranks: Mapping[str, int] | None = None) -> nn.Module:
    """Put ordinary layers in the place of Maestro's: two of them at the rank in use, or a dense one where that is smaller.

    Args:
        model: changed in place.
        ranks: ranks by layer name to cut to first; layers that are not named keep the rank in use.

    Returns:
        The model, which computes what it did at these ranks. A layer of rank 0 becomes two layers of rank 1 that are zero.

    Raises:
        ValueError: a name that is no Maestro layer, or a rank above the one in use.

    Example:
        >>> model = deploy(nn.Sequential(MaestroLinear(8, 8)), {"0": 2})
        >>> [tuple(layer.weight.shape) for layer in model[0]]
        [(2, 8), (8, 2)]
    """
    layers = maestro_layers(model)
    for name in ranks or {}:
        if name not in layers:
            raise ValueError(f"'ranks' names {name!r}, which is no Maestro layer; there are: {', '.join(layers)}")
    split: dict[str, int] = {}
    for name, layer in layers.items():
        layer.set_rank((ranks or {}).get(name, layer.rank))
        into, out = layer._factors()
        dense = layer.dense_like()
        if into.numel() + out.numel() < dense.weight.numel():
            model.set_submodule(name, split_layer(dense, out, into))
            split[name] = into.shape[0]
        else:
            dense.weight.copy_((out @ into).view_as(dense.weight))
            model.set_submodule(name, dense)
    record_split(model, split, "channel")
    return model

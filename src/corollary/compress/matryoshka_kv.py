"""MatryoshkaKV: keys and values cached in an orthogonal basis of each head, whose leading coordinates alone are kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corollary.compress.kv_cache import MatryoshkaCache
from corollary.models.gpt import GPT, CausalSelfAttention, apply_rope


def cayley(skew: Tensor) -> Tensor:
    r"""The rotation :math:`(I - A/2)^{-1} (I + A/2)` of A = X - Xᵀ.

    Args:
        skew: X, floating (..., d, d). Solved in at least float32.

    Returns:
        (..., d, d) of ``skew``'s dtype, orthogonal with determinant 1; differentiable.

    Source: the authors' code of arXiv 2410.14731, ``orthogonal_``.

    Example:
        >>> import torch
        >>> q = cayley(torch.randn(3, 4, 4, dtype=torch.float64))
        >>> torch.allclose(q @ q.mT, torch.eye(4, dtype=torch.float64))
        True
    """
    x = skew.to(torch.promote_types(skew.dtype, torch.float32))
    half = (x - x.mT) / 2
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return torch.linalg.solve(identity - half, identity + half).to(skew.dtype)  # type: ignore[no-any-return]


def inverse_cayley(rotation: Tensor) -> Tensor:
    """X whose `cayley` is a given basis, up to the signs of its columns.

    A rotation by half a turn has no inverse under Cayley's map. Columns of a basis have no sign that counts: those that point backwards are
    turned round first, and the last one once more where the determinant asks for it.

    Args:
        rotation: orthogonal, floating (..., d, d).

    Returns:
        (..., d, d) of its dtype.

    Source: the authors' code of arXiv 2410.14731, ``inverse_orthogonal_`` and ``make_unitary_transform_det_1``.

    Example:
        >>> import torch
        >>> q = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
        >>> torch.allclose((cayley(inverse_cayley(q)).T @ q).abs(), torch.eye(5, dtype=torch.float64), atol=1e-4)
        True
    """
    q = rotation.double()
    q = q * torch.where(q.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[..., None, :]
    reflected = torch.linalg.det(q) < 0  # one column back again: the last, which is cut off first
    q[..., -1] = torch.where(reflected[..., None], -q[..., -1], q[..., -1])
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    # A sum that is near singular belongs to half a turn: a little damping keeps the parameters finite.
    skew = 2 * torch.linalg.solve(identity + q + 1e-6 * identity, q - identity, left=False)
    return ((skew - skew.mT) / 4).to(rotation.dtype)  # type: ignore[no-any-return]


class MatryoshkaAttention(nn.Module):
    r"""Causal attention that keeps r coordinates of every key and s of every value, in a basis that trains.

    With orthogonal :math:`U_h, V_h` of head h and means :math:`\mu_h, \nu_h`, a key k (behind its rotary turn) and a value v are cached as

    .. math:: a = U_{h,:r}^\top (k - \mu_h), \qquad b = V_{h,:s}^\top (v - \nu_h),

    and used as :math:`q^\top k \approx (U_{h,:r}^\top q)^\top a + q^\top \mu_h` and :math:`v \approx V_{h,:s}\, b + \nu_h`.

    Made by `matryoshka_kv`; `set_kv_ranks` and `drawn_kv_ranks` cut it. At full ranks it is the attention that it was made from.

    Args:
        attention: its projections become this module's own, frozen.
        key_moments, value_moments: means (heads, d) and covariances (heads, d, d) of what is cached: the bases start as their
            principal components.

    Attributes:
        key_skew, value_skew: (heads, d, d), whose `cayley` are U and V.
        key_mean, value_mean: (heads, d).
        ranks: int64 (2, heads), of keys and values; a buffer.

    Raises:
        ValueError, TypeError: inputs of another shape or dtype, or tokens behind the last position that there is.

    When not to use it: by itself; `matryoshka_kv` makes it with moments of real inputs.

    Example:
        >>> import torch
        >>> from corollary.models.gpt import CausalSelfAttention
        >>> moments = torch.zeros(2, 4), torch.eye(4).expand(2, 4, 4)
        >>> layer = MatryoshkaAttention(CausalSelfAttention(8, 2, 6), moments, moments)
        >>> _ = layer.ranks.copy_(torch.tensor([[2, 4], [3, 1]]))
        >>> layer(torch.randn(1, 5, 8)).shape
        torch.Size([1, 5, 8])

    Source: Lin et al., "MatryoshkaKV: Adaptive KV Compression via Trainable Orthogonal Projection", arXiv 2410.14731; the authors' code.
    """

    ranks: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(
        self, attention: CausalSelfAttention, key_moments: tuple[Tensor, Tensor], value_moments: tuple[Tensor, Tensor]
    ) -> None:
        super().__init__()
        self.heads = attention.heads
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj
        self.requires_grad_(False)
        self.head_dim = attention.q_proj.out_features // attention.heads
        self.register_buffer("cos", attention.cos, persistent=False)
        self.register_buffer("sin", attention.sin, persistent=False)
        like = attention.q_proj.weight
        for name, (mean, covariance) in (("key", key_moments), ("value", value_moments)):
            basis = torch.linalg.eigh(covariance.double()).eigenvectors.flip(-1)
            setattr(self, f"{name}_skew", nn.Parameter(inverse_cayley(basis).to(like)))
            setattr(self, f"{name}_mean", nn.Parameter(mean.to(like)))
        self.register_buffer("ranks", torch.full((2, self.heads), self.head_dim))

    key_skew: nn.Parameter
    key_mean: nn.Parameter
    value_skew: nn.Parameter
    value_mean: nn.Parameter

    def coordinates(self, x: Tensor, offset: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, and the coordinates of keys and values cut to their ranks: (batch, heads, tokens, d) each; and V (heads, d, d)."""
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = self.cos[offset:], self.sin[offset:]
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        u, w = cayley(self.key_skew), cayley(self.value_skew)
        kept = torch.arange(self.head_dim, device=x.device) < self.ranks[..., None]
        a = (k - self.key_mean[:, None]) @ u * kept[0][:, None]
        b = (v - self.value_mean[:, None]) @ w * kept[1][:, None]
        # The bias of a query's products with the mean is the same for all keys of a head: softmax does not see it.
        return q @ u, a, b, w

    def forward(self, x: Tensor, cache: MatryoshkaCache | None = None, layer: int = 0) -> Tensor:
        """(batch, tokens, dim) to the same; with a cache the tokens come behind those in it."""
        width, like = self.q_proj.in_features, self.q_proj.weight.dtype
        if x.ndim != 3 or x.shape[-1] != width or not x.is_floating_point():
            raise ValueError(f"'x' must be floating of shape (batch, tokens, {width}), not {x.dtype} {tuple(x.shape)}")
        if x.dtype != like and not torch.is_autocast_enabled():
            raise TypeError(f"'x' is {x.dtype} and the weights are {like}; they must be alike")
        offset = 0 if cache is None else cache.get_seq_length(layer)
        if offset + x.shape[1] > len(self.cos):
            raise ValueError(f"'x' ends at token {offset + x.shape[1]}; allowed: up to {len(self.cos)}")
        q, a, b, w = self.coordinates(x, offset)
        if cache is not None:
            a, b = cache.update(a, b, layer)
        scores = q[..., : a.shape[-1]] @ a.mT / math.sqrt(self.head_dim)
        tokens, seen = scores.shape[-2:]
        future = torch.ones(tokens, seen, dtype=torch.bool, device=x.device).triu(1 + seen - tokens)
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ b @ w[..., : b.shape[-1]].mT + self.value_mean[:, None]
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


def _layers(model: nn.Module) -> list[MatryoshkaAttention]:
    found = [module for module in model.modules() if isinstance(module, MatryoshkaAttention)]
    if not found:
        raise ValueError("'model' has no MatryoshkaAttention; take what matryoshka_kv(model, calibration) gives")
    return found


class _Moments:
    """Means and second moments of one layer's keys and values by head, in float64, over batches."""

    def __init__(self, attention: CausalSelfAttention) -> None:
        self.attention, self.count = attention, 0
        self.sums: list[Tensor] = []
        self.seconds: list[Tensor] = []

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        own, x = self.attention, args[0]
        k, v = (p(x).unflatten(-1, (own.heads, -1)).transpose(1, 2) for p in (own.k_proj, own.v_proj))
        rows = [t.transpose(0, 1).flatten(1, 2).double() for t in (apply_rope(k, own.cos, own.sin), v)]
        self.count += rows[0].shape[1]
        sums, seconds = [r.sum(1) for r in rows], [r.mT @ r for r in rows]
        self.sums = sums if not self.sums else [a + b for a, b in zip(self.sums, sums, strict=True)]
        self.seconds = seconds if not self.seconds else [a + b for a, b in zip(self.seconds, seconds, strict=True)]

    def of(self, i: int) -> tuple[Tensor, Tensor]:
        mean = self.sums[i] / self.count
        return mean, self.seconds[i] / self.count - mean[:, :, None] * mean[:, None]


@torch.no_grad()
def matryoshka_kv(model: GPT, calibration: Iterable[Tensor]) -> GPT:
    """A copy of a model whose attention caches coordinates in trainable orthogonal bases, which start as principal components.

    Args:
        model: a trained `GPT`.
        calibration: batches of tokens (batch, tokens), whose keys and values the principal components are of. One pass; moments
            are kept in float64, whatever the number of batches.

    Returns:
        The copy, at full ranks, where it computes what the model does. Only bases and means train: 2 heads d (d + 1) numbers a layer.

    Raises:
        TypeError: the model is no GPT.
        ValueError: no batch.

    When not to use it: where the cache is no burden, on short rows and small batches: each step pays two products more a head. Keys
    are cached behind their rotary turn, so their principal components are those of turned keys.

    Example:
        >>> import torch
        >>> from corollary.compress import matryoshka_kv, set_kv_ranks
        >>> from corollary.models import GPT
        >>> model = GPT(256, dim=32, depth=2, heads=2, context=16)
        >>> tokens = torch.randint(256, (4, 16))
        >>> small = matryoshka_kv(model, [tokens])
        >>> torch.allclose(small(tokens), model(tokens), atol=1e-5)
        True
        >>> set_kv_ranks(small, 6)
        >>> small(tokens).shape
        torch.Size([4, 16, 256])

    Deviations: batches of tokens for a plain GPT only; grouped queries, which the authors' code spreads over all heads, are not handled.
    The products of queries with the keys' mean are left out: they are the same for all keys, and softmax does not see them. So that
    the inverse of Cayley's map exists the authors turn one column where the determinant is negative; here also those that point
    backwards.

    Source: Lin et al., arXiv 2410.14731; the authors' code.
    """
    if not isinstance(model, GPT):
        raise TypeError(f"'model' must be a corollary.models.GPT, not {type(model).__name__}")
    made = copy.deepcopy(model).requires_grad_(False)
    seen = [_Moments(cast(CausalSelfAttention, block.attn)) for block in made.blocks]
    handles = [one.attention.register_forward_pre_hook(one) for one in seen]
    try:
        for batch in calibration:
            made(batch)
    finally:
        for handle in handles:
            handle.remove()
    if not seen[0].count:
        raise ValueError("'calibration' has no batch")
    for block, one in zip(made.blocks, seen, strict=True):
        block.attn = MatryoshkaAttention(one.attention, one.of(0), one.of(1))
    return made


def kv_ranks(model: nn.Module) -> Tensor:
    """The ranks in use.

    Args:
        model: as `matryoshka_kv` made it.

    Returns:
        int64 (layers, 2, heads), keys before values.

    Raises:
        ValueError: a model without `MatryoshkaAttention`.
    """
    return torch.stack([layer.ranks for layer in _layers(model)])


def set_kv_ranks(model: nn.Module, ranks: int | Tensor) -> None:
    """Cut every head's keys and values to these ranks.

    Args:
        model: as `matryoshka_kv` made it; changed in place.
        ranks: one number for all, or int64 (layers, 2, heads), keys before values.

    Raises:
        ValueError: another shape, or a rank below 0 or above the heads' width.
    """
    layers = _layers(model)
    shape, width = (len(layers), 2, layers[0].heads), layers[0].head_dim
    given = torch.as_tensor(ranks, dtype=torch.int64)
    if given.ndim and tuple(given.shape) != shape:
        raise ValueError(
            f"'ranks' has shape {tuple(given.shape)}; allowed: one number, or {shape} (layers, keys and values, heads)"
        )
    if bool((given < 0).any()) or bool((given > width).any()):
        raise ValueError(f"'ranks' lie from {int(given.min())} to {int(given.max())}; allowed: 0 to {width}")
    for layer, own in zip(layers, given.expand(shape), strict=True):
        layer.ranks.copy_(own)


@contextmanager
def drawn_kv_ranks(model: nn.Module, generator: torch.Generator, levels: int = 8) -> Iterator[Tensor]:
    """Within it every head of every layer has ranks of its own for keys and for values, drawn from ``levels`` equal steps up to all.

    So each leading part of each basis is trained to do what it can: the Matryoshka. It gives the ranks, int64 (layers, 2, heads); those
    from before come back at the end.

    Args:
        model: as `matryoshka_kv` made it.
        generator: on the CPU.
        levels: from 1 to the heads' width; the authors take 8.

    Source: the authors' code of arXiv 2410.14731, ``PcaLlamaDistillationTrainer.compute_loss``.
    """
    layers = _layers(model)
    width = layers[0].head_dim
    if not 1 <= levels <= width:
        raise ValueError(f"'levels' must be from 1 to the heads' width {width}, not {levels}")
    before = kv_ranks(model)
    drawn = torch.randint(1, levels + 1, before.shape, generator=generator) * width // levels
    set_kv_ranks(model, drawn)
    try:
        yield drawn
    finally:
        set_kv_ranks(model, before)


def kv_distillation_loss(logits: Tensor, teacher: Tensor, targets: Tensor, weight: float = 0.25) -> Tensor:
    r"""What the bases train on: :math:`w\, \mathrm{KL}(p_{\text{teacher}} \| p) + (1 - w)` cross-entropy, in nats a token.

    Args:
        logits, teacher: (batch, tokens, vocabulary).
        targets: int64 (batch, tokens).
        weight: w, 0.25 in the authors' code.

    Returns:
        A scalar, in nats a token.

    Raises:
        ValueError: a weight outside [0, 1].

    Source: the authors' code of arXiv 2410.14731, ``PcaLlamaDistillationTrainer.compute_loss``.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 2, 4)
        >>> round(kv_distillation_loss(logits, logits, torch.zeros(1, 2, dtype=torch.int64)).item(), 4)  # 0.75 log 4
        1.0397
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"'weight' must be from 0 to 1, not {weight}")
    log_p, log_t = logits.log_softmax(-1), teacher.log_softmax(-1)
    divergence = (log_t.exp() * (log_t - log_p)).sum(-1).mean()
    return weight * divergence + (1 - weight) * F.nll_loss(log_p.flatten(0, 1), targets.flatten())


@torch.no_grad()
def search_kv_ranks(model: nn.Module, error: Callable[[], float], budget: float, *, step: int = 1) -> Tensor:
    """Ranks under a budget: from all, the cut that costs least is made again and again, until the cache is small enough.

    Args:
        model: which the ranks found are set on.
        error: gives the model's error on data for this, at the ranks that are set.
        budget: share of the cache's numbers that may be kept, in (0, 1].
        step: coordinates cut at once.

    Returns:
        int64 (layers, 2, heads).

    The cuts' costs are taken anew after each one for those that could be the least: a cost that was above the least new one is not
    looked at again before it comes first (lazy greedy). Cuts mostly cost more the more is gone, and then nothing is missed.

    Raises:
        ValueError: a budget or step out of range.

    Source: arXiv 2410.14731, abstract: compression rates are searched for layers and heads under a budget; the search itself is ours.

    Example:
        >>> import torch
        >>> from corollary.compress import matryoshka_kv, search_kv_ranks
        >>> from corollary.models import GPT
        >>> tokens = torch.randint(256, (4, 16))
        >>> teacher = GPT(256, dim=32, depth=1, heads=2, context=16)
        >>> small = matryoshka_kv(teacher, [tokens])
        >>> ranks = search_kv_ranks(small, lambda: float((small(tokens) - teacher(tokens)).square().mean()), 0.5, step=4)
        >>> int(ranks.sum()) <= 0.5 * 4 * 16
        True
    """
    width = _layers(model)[0].head_dim
    if not 0 < budget <= 1:
        raise ValueError(f"'budget' must be in (0, 1], not {budget}")
    if not 1 <= step <= width:
        raise ValueError(f"'step' must be from 1 to the heads' width {width}, not {step}")
    ranks = torch.full_like(kv_ranks(model), width).flatten()
    most = math.floor(budget * width * len(ranks) + 1e-9)

    def at(changed: Tensor) -> float:
        set_kv_ranks(model, changed.view_as(kv_ranks(model)))
        return error()

    def cut(place: int) -> Tensor:
        changed = ranks.clone()
        changed[place] = max(0, int(changed[place]) - step)
        return changed

    now = at(ranks)
    costs = {place: at(cut(place)) - now for place in range(len(ranks))}
    while int(ranks.sum()) > most:
        fresh: set[int] = set()
        while True:
            # Per coordinate: a last cut may be of fewer than ``step``.
            place = min(costs, key=lambda p: costs[p] / min(step, int(ranks[p])))
            if place in fresh:
                break
            costs[place] = at(cut(place)) - now
            fresh.add(place)
        ranks = cut(place)
        now += costs[place]
        if int(ranks[place]) == 0:
            del costs[place]
    found = ranks.view_as(kv_ranks(model))
    set_kv_ranks(model, found)
    return found


def decode(model: GPT, tokens: Tensor, cache: MatryoshkaCache) -> Tensor:
    """Logits of tokens that come behind those in the cache, which takes them in.

    Args:
        model: as `matryoshka_kv` made it.
        tokens: int64 (batch, tokens).
        cache: made with the model's `kv_ranks`.

    Returns:
        (batch, tokens, vocabulary).

    Raises:
        ValueError: a model without `MatryoshkaAttention`, or more rows or tokens than the cache has room for.

    Example:
        >>> import torch
        >>> from corollary.compress import MatryoshkaCache, decode, kv_ranks, matryoshka_kv, set_kv_ranks
        >>> from corollary.models import GPT
        >>> tokens = torch.randint(256, (2, 16))
        >>> small = matryoshka_kv(GPT(256, dim=32, depth=2, heads=2, context=16), [tokens])
        >>> set_kv_ranks(small, 6)
        >>> cache = MatryoshkaCache(kv_ranks(small), max_batch_size=2, max_cache_len=16)
        >>> with torch.no_grad():
        ...     parts = torch.cat([decode(small, tokens[:, :10], cache), decode(small, tokens[:, 10:], cache)], 1)
        >>> torch.allclose(parts, small(tokens), atol=1e-5)
        True
    """
    _layers(model)
    x: Tensor = model.embed(tokens)
    for i, block in enumerate(model.blocks):
        x = x + block.attn(block.attn_norm(x), cache, i)  # type: ignore[operator]
        x = x + block.mlp(block.mlp_norm(x))  # type: ignore[operator]
    out: Tensor = model.head(model.norm(x))
    return out

"""Sparse spectral training: linear layers trained as their singular value decomposition, a few directions at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from corollary.adapt.base import need_rank
from corollary.adapt.inject import Target, find_targets
from corollary.adapt.restarts import PeriodicRestart


class _SpectralProduct(torch.autograd.Function):
    """U diag(σ) Vᵀ x, of which some directions and all of σ train; the directions' gradients are without σ where asked for."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sigma: Tensor, u: Tensor, v: Tensor, fixed_u: Tensor, fixed_v: Tensor, plain: bool
    ) -> Tensor:
        rank = u.shape[1]
        h, fixed_h = x @ v, x @ fixed_v
        ctx.save_for_backward(x, sigma, u, v, fixed_u, fixed_v, h, fixed_h)
        ctx.plain = plain
        return torch.addmm((fixed_h * sigma[rank:]) @ fixed_u.t(), h * sigma[:rank], u.t())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, sigma, u, v, fixed_u, fixed_v, h, fixed_h = ctx.saved_tensors
        rank = u.shape[1]
        g, fixed_g = grad @ u, grad @ fixed_u
        grads: list[Tensor | None] = [None] * 7
        if ctx.needs_input_grad[0]:
            grads[0] = torch.addmm((fixed_g * sigma[rank:]) @ fixed_v.t(), g * sigma[:rank], v.t())
        if ctx.needs_input_grad[1]:
            grads[1] = torch.cat([(g * h).sum(0), (fixed_g * fixed_h).sum(0)])
        # What would be multiplied by sigma is not, unless plain: a small singular value does not silence its direction.
        scale = sigma[:rank] if ctx.plain else 1
        if ctx.needs_input_grad[2]:
            grads[2] = grad.t() @ h * scale
        if ctx.needs_input_grad[3]:
            grads[3] = x.t() @ g * scale
        return tuple(grads)


class SSTLinear(nn.Module):
    r"""A linear layer kept as its singular value decomposition: all singular values train, and ``rank`` pairs of their vectors.

    .. math:: y = U \operatorname{diag}(\sigma) V^\top x + b, \qquad U \in \mathbb{R}^{m \times k},\ V \in \mathbb{R}^{n \times k},\
        k = \min(m, n)

    with the enhanced gradients of the vectors that train, which are independent of their singular value: for
    :math:`G = \partial \mathcal{L} / \partial W`

    .. math:: \tilde\nabla U_{\cdot i} = G V_{\cdot i}, \qquad \tilde\nabla V_{\cdot i} = G^\top U_{\cdot i}, \qquad
        \nabla \sigma_i = U_{\cdot i}^\top G V_{\cdot i}.

    `SparseSpectralTraining` keeps the vectors at length 1, chooses those that train, and decomposes anew.

    Args:
        in_features, out_features: n and m.
        bias: whether there is one.
        rank: how many directions train at a time, 1 to k.
        enhanced: whether directions get the gradients above; otherwise the derivatives, which have the factor :math:`\sigma_i`.
        device, dtype: of the parameters.

    Shape: (..., in_features) to (..., out_features).

    Parameters are ``sigma`` (k,), of which the first ``rank`` belong to what trains, ``u`` (m, rank), ``v`` (n, rank) and ``bias``;
    buffers ``fixed_u`` (m, k - rank) and ``fixed_v`` (n, k - rank) need neither gradients nor optimizer state.

    Raises:
        ValueError: a ``rank`` out of range, or an input of another width.
        TypeError: an input that is not floating.

    When not to use it: where a step's time counts more than its memory (all k directions take part in the forward pass and in the
    gradient of σ, so that a step takes half as long again as a square dense layer's, and what is kept of the forward pass is k wide),
    and where second derivatives are needed, which the enhanced gradients do not have. Convolutions are not covered.

    Example:
        >>> import torch
        >>> from corollary.adapt import SSTLinear
        >>> layer = SSTLinear(16, 8, rank=2)
        >>> layer(torch.randn(5, 16)).shape, layer.weight.shape
        (torch.Size([5, 8]), torch.Size([8, 16]))
        >>> {name: p.numel() for name, p in layer.named_parameters()}
        {'sigma': 8, 'u': 16, 'v': 32, 'bias': 8}

    Reference:
        Zhao et al., "Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks", arXiv 2405.15481,
        section 4.
    """

    fixed_u: Tensor
    fixed_v: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int,
        enhanced: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        need_rank(rank)
        full = min(in_features, out_features)
        if rank > full:
            raise ValueError(f"'rank' must be in 1..{full} for a weight of {out_features} x {in_features}, not {rank}")
        self.in_features, self.out_features, self.rank, self.enhanced = in_features, out_features, rank, enhanced
        made: Any = {"device": device, "dtype": dtype}
        self.sigma = nn.Parameter(torch.empty(full, **made))
        self.u = nn.Parameter(torch.empty(out_features, rank, **made))
        self.v = nn.Parameter(torch.empty(in_features, rank, **made))
        self.register_buffer("fixed_u", torch.empty(out_features, full - rank, **made))
        self.register_buffer("fixed_v", torch.empty(in_features, full - rank, **made))
        self.bias = nn.Parameter(torch.empty(out_features, **made)) if bias else None
        if self.sigma.device.type != "meta":
            dense = nn.Linear(in_features, out_features, bias, **made)
            self.set_weight(dense.weight)
            if self.bias is not None:
                self.bias.data.copy_(dense.bias.data)

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int, *, enhanced: bool = True) -> SSTLinear:
        """The decomposition of a linear layer, on its device and in its dtype, with its bias."""
        made: Any = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, rank=rank, enhanced=enhanced, **made)
        layer.set_weight(linear.weight)
        if linear.bias is not None:
            layer.bias = linear.bias
        return layer.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """W (out, in) as one matrix."""
        u, v = self.vectors()
        return (u * self.sigma) @ v.t()

    def vectors(self) -> tuple[Tensor, Tensor]:
        """U (out, k) and V (in, k), with the directions that train first."""
        return torch.cat([self.u, self.fixed_u], 1), torch.cat([self.v, self.fixed_v], 1)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Take the singular value decomposition of this matrix (out, in); its leading directions train."""
        wide = weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
        u, s, vh = torch.linalg.svd(wide, full_matrices=False)
        self._place(u, s, vh.t())

    @torch.no_grad()
    def choose(self, chosen: Tensor) -> Tensor:
        """Let these of the k directions train and no others; gives the order, old place by new, in which all of them now stand."""
        keep = torch.ones(len(self.sigma), dtype=torch.bool, device=self.sigma.device)
        keep[chosen] = False
        order = torch.cat([chosen, keep.nonzero().flatten()])
        u, v = self.vectors()
        self._place(u[:, order], self.sigma[order], v[:, order])
        return order

    def _place(self, u: Tensor, s: Tensor, v: Tensor) -> None:
        self.sigma.copy_(s)
        for own, fixed, full in ((self.u, self.fixed_u, u), (self.v, self.fixed_v, v)):
            own.copy_(full[:, : self.rank])
            fixed.copy_(full[:, self.rank :])

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features); the weight is never formed."""
        if not x.is_floating_point():
            raise TypeError(f"'x' must be floating, not {x.dtype}")
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"'x' has shape {tuple(x.shape)}; allowed: (..., {self.in_features})")
        given = (x.reshape(-1, self.in_features), self.sigma, self.u, self.v, self.fixed_u, self.fixed_v)
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            given = tuple(t.to(torch.get_autocast_dtype(kind)) for t in given)  # type: ignore[assignment]
        with torch.autocast(kind, enabled=False):
            out: Tensor = _SpectralProduct.apply(*given, not self.enhanced)  # type: ignore[no-untyped-call]
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """An ``nn.Linear`` of the same weight and bias."""
        made: Any = {"device": self.sigma.device, "dtype": self.sigma.dtype}
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, **made)
        dense.weight.copy_(self.weight)
        if self.bias is not None:
            dense.bias = self.bias
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, rank={self.rank} of {len(self.sigma)}"


def _exchange(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    if not name:
        return module
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
    return model


def to_sst(
    model: nn.Module, rank: int, targets: Target | Sequence[Target] | None = None, *, enhanced: bool = True
) -> nn.Module:
    """Put an `SSTLinear` in the place of linear layers, in place; the model's function stays what it was.

    Args:
        model: any module. A linear layer that is the model itself is returned as another one.
        rank: directions of each layer that train at a time; a layer with fewer in all trains them all.
        targets: names, patterns or types as in `adapt`; None takes every ``nn.Linear``. Subclasses, of which nothing is known, and
            layers that share their weight are left as they are.
        enhanced: see `SSTLinear`.

    Returns:
        The model.

    Raises:
        ValueError: ``targets`` match no layer that can be decomposed, or a rank below 1.

    Example:
        >>> import torch
        >>> from corollary.adapt import to_sst
        >>> to_sst(torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU()), rank=2)[0]
        SSTLinear(8, 4, bias=True, rank=2 of 4)

    Reference: see `SSTLinear`.
    """
    need_rank(rank)
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found = {
        name: module
        for name, module in find_targets(model, nn.Linear if targets is None else targets).items()
        if type(module) is nn.Linear and owners[id(module.weight)] == 1
    }
    if not found:
        raise ValueError("'targets' match no nn.Linear with a weight of its own")
    for name, module in found.items():
        smaller = min(rank, module.in_features, module.out_features)
        model = _exchange(model, name, SSTLinear.from_linear(module, smaller, enhanced=enhanced))
    return model


def from_sst(model: nn.Module) -> nn.Module:
    """Put an ordinary linear layer in the place of every `SSTLinear`, in place, for inference; returns the model.

    Raises:
        ValueError: there is none.

    Example:
        >>> import torch
        >>> from corollary.adapt import from_sst, to_sst
        >>> from_sst(to_sst(torch.nn.Sequential(torch.nn.Linear(8, 4)), rank=2))[0]
        Linear(in_features=8, out_features=4, bias=True)
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, SSTLinear)}
    if not found:
        raise ValueError("'model' has no SSTLinear")
    for name, module in found.items():
        model = _exchange(model, name, module.to_linear())
    return model


class SparseSpectralTraining(PeriodicRestart):
    r"""Keeps singular vectors at length 1, chooses which train, and decomposes anew: call ``step()`` after ``optimizer.step()``.

    After every step

    .. math:: \sigma \leftarrow \max(\sigma, 0), \qquad U_{\cdot i} \leftarrow U_{\cdot i} / \|U_{\cdot i}\|, \qquad
        V_{\cdot i} \leftarrow V_{\cdot i} / \|V_{\cdot i}\|.

    Every ``interval`` steps each layer draws ``rank`` of its k directions, without replacement, with probabilities

    .. math:: p_i = \frac{1}{2} \left( \frac{1}{k} + \frac{\sigma_i}{\sum_j \sigma_j} \right),

    and what the optimizer remembers of the directions before is dropped. After ⌈k / rank⌉ such draws, a round, the layer's product
    is decomposed anew first. Neither changes the model's function.

    Args:
        model: has layers of `SSTLinear`.
        optimizer: of the model; any whose state of ``sigma`` has its shape or none.
        interval: steps between two draws.
        warmup: steps after each draw over which ``factor`` rises to 1; give that to a scheduler.
        seed: of the draws; a draw depends on the seed, the count of steps and the layer's place alone, so that training resumes
            exactly.

    Raises:
        ValueError: an argument out of range, or no layer of this kind.

    Deviations: what the optimizer remembers of σ follows the directions in a draw, and is dropped when the layer is decomposed anew.
    Vectors that have trained are not orthogonal to each other until the round ends, as in the paper.

    When not to use it: with an optimizer whose steps depend on the scale of the weights, since directions have length 1.

    Example:
        >>> import torch
        >>> from corollary.adapt import SparseSpectralTraining, from_sst, to_sst
        >>> model = to_sst(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)), rank=2)
        >>> optimizer = torch.optim.Adam(model.parameters(), 0.01)
        >>> sst = SparseSpectralTraining(model, optimizer, interval=5, warmup=2)
        >>> scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, sst.factor)
        >>> for _ in range(40):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(16, 8)).square().mean().backward()
        ...     optimizer.step()
        ...     sst.step()
        ...     scheduler.step()
        >>> model = from_sst(model)

    Reference:
        Zhao et al., arXiv 2405.15481, section 4 and Algorithm 1.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, interval: int = 200, warmup: int = 0, seed: int = 0) -> None:
        super().__init__(optimizer, interval=interval, warmup=warmup)
        self.layers = [module for module in model.modules() if isinstance(module, SSTLinear)]
        if not self.layers:
            raise ValueError("'model' has no SSTLinear; use to_sst(model, rank)")
        self.seed = seed

    @torch.no_grad()
    def after_step(self) -> None:
        """Singular values at least 0, vectors of length 1."""
        torch._foreach_clamp_min_([layer.sigma for layer in self.layers], 0.0)
        for layer in self.layers:
            for vectors in (layer.u, layer.v):
                vectors.div_(torch.linalg.vector_norm(vectors, dim=0).clamp_min(torch.finfo(vectors.dtype).tiny))

    @torch.no_grad()
    def restart(self) -> None:
        """Draw the directions of each layer that train next; decompose first where its round is over."""
        draw = self.count // self.interval
        for place, layer in enumerate(self.layers):
            if draw % -(-len(layer.sigma) // layer.rank) == 0:
                layer.set_weight(layer.weight)
                self.forget((layer.sigma,))
            order = layer.choose(self.sample(layer, place))
            self.forget((layer.u, layer.v))
            for key, value in self.optimizer.state.get(layer.sigma, {}).items():
                if isinstance(value, Tensor) and value.shape == layer.sigma.shape:
                    self.optimizer.state[layer.sigma][key] = value[order]

    def sample(self, layer: SSTLinear, place: int) -> Tensor:
        """``rank`` distinct directions of one layer, drawn by the probabilities above."""
        sigma = layer.sigma.detach().double().cpu()
        p = 0.5 * (1 / len(sigma) + sigma / sigma.sum().clamp_min(torch.finfo(sigma.dtype).tiny))
        source = np.random.SeedSequence((self.seed, self.count, place)).generate_state(1)[0]
        chosen = torch.multinomial(p, layer.rank, generator=torch.Generator().manual_seed(int(source)))
        return chosen.to(layer.sigma.device)

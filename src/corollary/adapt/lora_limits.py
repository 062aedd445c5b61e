"""The norm threshold of attention, and LoRA's gradient of one head in nearly linear time below it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from corollary.adapt._monomials import degree_for, entry_error
from corollary.adapt.polynomial_attention import centred, check_attention, logit_bound, polynomial_attention


@dataclass(frozen=True)
class NormThreshold:
    """How far attention is below the norm threshold; made by `norm_threshold`.

    Args:
        length: L, the number of keys.
        largest_entry: Γ, the largest absolute entry of queries and keys.
        root_log_length: √(log L). The theory has almost linear algorithms for Γ = o(√log L), and none above, if SETH holds.
        logit_bound: R, a bound on the absolute logits, from the largest norms of the queries and of the centred keys.
        tolerance: what was asked for.
        degree: the least one that guarantees the tolerance; None where 60 is too little.
        features: columns of the low-rank factors at this degree; None likewise.
        error: the guaranteed η, with :math:`|\\tilde f_{ij} - f_{ij}| \\le \\eta f_{ij}`; None likewise.
    """

    length: int
    largest_entry: float
    root_log_length: float
    logit_bound: float
    tolerance: float
    degree: int | None
    features: int | None
    error: float | None

    @property
    def within(self) -> bool:
        """Whether fewer features than tokens are enough: the factors then cost less than the matrix that they replace."""
        return self.features is not None and self.features < self.length

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "within": self.within}


def norm_threshold(query: Tensor, key: Tensor, *, tolerance: float = 1e-3, scale: float | None = None) -> NormThreshold:
    r"""Measure the norms that decide whether attention and its LoRA gradient can be had in less than quadratic time.

    With R the largest logit that the norms allow, the Chebyshev series of exp cut at degree g errs by at most
    :math:`\varepsilon = e^{R} \sum_{n>g} 2 I_n(R)` relative to exp, and each entry of the attention matrix by
    :math:`\eta = 2\varepsilon / (1 - \varepsilon)`. It takes :math:`\binom{d+g}{g}` features.

    Args:
        query, key: shapes (..., L, d), as in `polynomial_attention`.
        tolerance: relative error allowed for each entry of the attention matrix.
        scale: factor of the logits; default 1/√d.

    Raises:
        TypeError, ValueError: as `polynomial_attention`.

    Example:
        >>> q, k = torch.randn(2, 4096, 8, generator=torch.Generator().manual_seed(0))
        >>> norm_threshold(0.3 * q, 0.3 * k).within, norm_threshold(3 * q, 3 * k).within
        (True, False)

    Reference:
        Hu et al., "Computational Limits of Low-Rank Adaptation (LoRA) for Transformer-Based Models", arXiv 2406.03136: the shared
        bound on the norms of X, W and αBA/r. The degree is that of Aggarwal and Alman (2022), with its constants.
    """
    check_attention(query, key)
    if not tolerance > 0:
        raise ValueError(f"'tolerance' must be above 0, not {tolerance}")
    bound = logit_bound(query, centred(key), query.shape[-1] ** -0.5 if scale is None else scale)
    degree = degree_for(bound, tolerance)
    return NormThreshold(
        length=key.shape[-2],
        largest_entry=float(torch.stack([query.detach().abs().amax(), key.detach().abs().amax()]).amax()),
        root_log_length=math.sqrt(math.log(max(key.shape[-2], 1))),
        logit_bound=bound,
        tolerance=tolerance,
        degree=degree,
        features=None if degree is None else math.comb(query.shape[-1] + degree, degree),
        error=None if degree is None else entry_error(bound, degree),
    )


class LoRAGradient(NamedTuple):
    """Loss and gradients that `lora_attention_gradient` gives."""

    loss: Tensor
    factors: dict[str, tuple[Tensor, Tensor]]


def lora_attention_gradient(
    x: Tensor,
    target: Tensor,
    weights: Mapping[str, Tensor],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    *,
    alpha: float = 1.0,
    tolerance: float = 1e-3,
    degree: int | None = None,
    scale: float | None = None,
    max_features: int = 20_000,
) -> LoRAGradient:
    r"""Loss of one attention head and its gradient in the LoRA factors, in nearly linear time.

    .. math:: \tfrac12 \big\| \operatorname{softmax}(\beta\, X W_Q^\top W_K X^\top)\, X W_V^\top - Y \big\|_F^2, \qquad
        W = W^\star + \tfrac{\alpha}{r} B A.

    Args:
        x: X, shape (..., L, D).
        target: Y, shape (..., L, e).
        weights: frozen :math:`W^\star` under 'query', 'key' and 'value', shapes (d, D), (d, D) and (e, D).
        factors: (A, B), shapes (r, D) and (out, r), of those projections that are adapted: all three, or only 'query' and 'value', ...
        alpha: LoRA's α; B A is multiplied by α/r.
        tolerance, degree, scale, max_features: as in `polynomial_attention`; scale is β.

    Returns:
        ``loss``, a scalar, and ``factors``, the gradients in (A, B) under the names of ``factors``.

    Raises:
        TypeError, ValueError: as `polynomial_attention`; names or shapes that do not fit.

    When not to use it: to train a model: put `polynomial_attention` in the place of its attention, and any adapter's gradient comes
    from autograd.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x, y = torch.randn(2, 500, 4, generator=g) / 2
        >>> weights = {name: torch.eye(4) for name in ("query", "key", "value")}
        >>> factors = {"query": (torch.randn(2, 4, generator=g), torch.zeros(4, 2))}
        >>> [tuple(grad.shape) for grad in lora_attention_gradient(x, y, weights, factors).factors["query"]]
        [(2, 4), (4, 2)]

    Reference:
        Hu et al., arXiv 2406.03136: the approximate LoRA gradient computation problem, partial and full adaptation.
    """
    names = ("query", "key", "value")
    if set(weights) != set(names) or not factors or not set(factors) <= set(names):
        raise ValueError(
            f"'weights' has {sorted(weights)} and 'factors' {sorted(factors)}; allowed: weights query, key and value, "
            "and factors for at least one of them"
        )
    named = [("'x'", x), ("'target'", target), *((f"weight of '{name}'", w) for name, w in weights.items())]
    for what, m in (*named, *((f"a factor of '{name}'", m) for name, pair in factors.items() for m in pair)):
        if not isinstance(m, Tensor) or not m.is_floating_point():
            raise TypeError(f"{what} must be a floating tensor, not {m.dtype if isinstance(m, Tensor) else type(m).__name__}")
    for name in names:
        given = [weights[name], *factors.get(name, ())]
        shapes = [tuple(m.shape) for m in given]
        out, rank = shapes[0][:1], shapes[-1][-1:]
        if shapes != [(*out, x.shape[-1]), (*rank, x.shape[-1]), (*out, *rank)][: len(shapes)]:
            came = ", ".join(map(str, shapes))
            raise ValueError(
                f"weight and factors of '{name}' are {came}; allowed: (out, {x.shape[-1]}), (r, {x.shape[-1]}), (out, r)"
            )
    leaves = {name: (a.detach().requires_grad_(), b.detach().requires_grad_()) for name, (a, b) in factors.items()}
    with torch.enable_grad():  # also where the caller has gradients turned off
        projected = {name: x.detach() @ weights[name].detach().mT for name in names}
        for name, (a, b) in leaves.items():
            projected[name] = projected[name] + alpha / a.shape[0] * (x.detach() @ a.mT @ b.mT)
        out = polynomial_attention(  # type: ignore[assignment]
            *(projected[name] for name in names), tolerance=tolerance, degree=degree, scale=scale, max_features=max_features
        )
        if target.shape != out.shape:  # type: ignore[attr-defined]
            raise ValueError(f"'target' has shape {tuple(target.shape)}; allowed: {tuple(out.shape)}, as the output")  # type: ignore[attr-defined]
        loss = (out - target).square().sum() / 2  # type: ignore[operator]
    grads = torch.autograd.grad(loss, [m for pair in leaves.values() for m in pair])
    return LoRAGradient(loss.detach(), {name: (grads[2 * i], grads[2 * i + 1]) for i, name in enumerate(leaves)})

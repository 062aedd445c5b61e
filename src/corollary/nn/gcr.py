"""The Grassmann class representation: a classification head whose classes are subspaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corollary.linalg.manifolds import Grassmann, ManifoldParameter, Transposed, manifold_of


class _Norm(torch.autograd.Function):
    """Norm over the last dimension whose derivatives, of every order, are zero where the norm is.

    ``torch.linalg.vector_norm`` has the zero subgradient too, but its second derivative at zero is NaN.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(x, dim=-1)
        return norm

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, norm = ctx.saved_tensors
        slope: Tensor = x * (grad / norm.masked_fill(norm == 0, torch.inf)).unsqueeze(-1)
        return slope


class GrassmannLinear(nn.Module):
    r"""Classification head whose class i is a subspace :math:`S_i` and whose logit is the norm of the projection onto it.

    .. math:: \ell_i = \gamma \left\| S_i^\top \frac{x}{\|x\|} \right\|_2, \qquad S_i \in \mathrm{Gr}(k, n).

    It takes the place of the last ``nn.Linear`` under cross-entropy. With subspaces of more than one dimension a feature may
    vary within its class at no loss, so that features keep more than the label. The weight lives on the Grassmannian: train
    it with `corollary.optim.RiemannianSGD` (the authors: rate 0.1, momentum 0.9) beside any optimizer for the rest, see
    `corollary.optim.JointOptimizer`. An ordinary optimizer on it would leave the manifold, and its logits would lose their
    meaning.

    Args:
        in_features: n, length of a feature.
        num_classes: number of classes.
        dim: k, dimension of each class's subspace, from 1 to ``in_features``; 8 is the authors' choice for 2048 features.
        gamma: scale of the logits; features are unit vectors, so it bounds every logit.
        retraction: how `RiemannianSGD` moves the weight: ``"geodesic"``, ``"qr"`` or ``"polar"`` (see `Grassmann`).
        device, dtype: of the weight.

    Shape:
        - input: ``(..., in_features)``, floating point
        - output: ``(..., num_classes)``, each in ``[0, gamma]``
        - ``weight``: ``(num_classes, dim, in_features)``, orthonormal rows in each class, drawn uniformly

    Raises:
        ValueError: a size out of range, or an input whose last dimension is not ``in_features``.
        TypeError: an input that is not floating point.

    Gradients: at a feature of norm zero, and where a projection vanishes, the norm has no derivative; the zero subgradient
    is taken, so every order of derivative stays finite there.

    Deviations: one ``dim`` for all classes; the paper also allows one for each class, though its experiments use one.

    Not for: heads whose logits must be negative or unbounded (regression, sigmoid outputs), or ``dim * num_classes`` so large
    that the features, of only ``in_features`` dimensions, cannot hold subspaces that differ.

    Example:
        >>> import torch
        >>> head = GrassmannLinear(in_features=16, num_classes=3, dim=2)
        >>> logits = head(torch.randn(5, 16))
        >>> logits.shape, bool((logits <= 25).all())
        (torch.Size([5, 3]), True)

    Source: Wang, Li and Zhang, "Get the Best of Both Worlds: Improving Accuracy and Transferability by Grassmann Class
    Representation", arXiv 2308.01547: the definition of the logit, with the features normalized and scaled by gamma.
    """

    weight: ManifoldParameter

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        dim: int,
        gamma: float = 25.0,
        *,
        retraction: str = "geodesic",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("num_classes", num_classes), ("dim", dim)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if dim > in_features:
            raise ValueError(f"dim must be at most in_features = {in_features}, got {dim}")
        if not 0 < gamma < float("inf"):
            raise ValueError(f"gamma must be above 0 and finite, got {gamma}")
        self.in_features, self.num_classes, self.dim, self.gamma = in_features, num_classes, dim, gamma
        # Stored as rows, so that all projections are one matrix product with nothing copied.
        manifold = Transposed(Grassmann(in_features, dim, retraction))
        self.weight = ManifoldParameter(torch.empty(num_classes, dim, in_features, device=device, dtype=dtype), manifold)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every class's subspace uniformly: the span of a Gaussian matrix."""
        with torch.no_grad():
            drawn = self.weight.manifold.random_point(self.num_classes, dtype=self.weight.dtype, device=self.weight.device)
            self.weight.copy_(drawn)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GrassmannLinear:
        manifold = self.weight.manifold
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Moves between kinds of tensor (``to_empty`` from the meta device) put a new, ordinary parameter in place.
        if manifold_of(self.weight) is None:
            self.weight = ManifoldParameter(self.weight.detach(), manifold, self.weight.requires_grad)
        return self

    def forward(self, input: Tensor) -> Tensor:
        """Logits ``(..., num_classes)`` of features ``(..., in_features)``."""
        if not input.is_floating_point():
            raise TypeError(f"input must be floating point, got {input.dtype}")
        if input.ndim == 0 or input.shape[-1] != self.in_features:
            raise ValueError(f"input must have shape (..., {self.in_features}), got {tuple(input.shape)}")
        norm: Tensor = _Norm.apply(input)  # type: ignore[no-untyped-call]
        unit = input / norm.clamp_min(torch.finfo(norm.dtype).tiny).unsqueeze(-1)
        rows = F.linear(unit, self.weight.flatten(0, 1))
        projected = rows.reshape(*rows.shape[:-1], self.num_classes, self.dim)
        logits: Tensor = _Norm.apply(projected)  # type: ignore[no-untyped-call]
        return self.gamma * logits

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_classes={self.num_classes}, dim={self.dim}, gamma={self.gamma}"

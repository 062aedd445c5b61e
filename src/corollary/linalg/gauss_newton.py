"""Matrix-free Gauss-Newton and Fisher matrices: a model's Jacobian around a small curvature in the space of its outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

LIKELIHOODS = ("categorical", "bernoulli", "gaussian")


class _Sandwich(ABC):
    """Jᵀ C J with J the outputs' Jacobian in the parameters and C symmetric, known by its products."""

    def __init__(self, outputs: Tensor | Sequence[Tensor], params: Iterable[Tensor], chunk: int) -> None:
        self.outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        self.params = tuple(params)
        for name, tensors in (("outputs", self.outputs), ("params", self.params)):
            if not tensors:
                raise ValueError(f"'{name}' is empty; give at least one tensor")
        kinds = {(t.dtype, t.device) for t in (*self.params, *self.outputs)}
        if len(kinds) > 1:
            names = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
            raise ValueError(f"'params' and 'outputs' must share one dtype and device; they are {names}")
        if not any(t.requires_grad for t in self.outputs):
            raise ValueError("'outputs' carry no graph; compute them from 'params' with gradients enabled")
        if chunk < 1:
            raise ValueError(f"'chunk' must be at least 1, not {chunk}")
        self.chunk = chunk
        self._sizes = [p.numel() for p in self.params]
        # Jᵀw is linear in w, so that J v is its derivative in w along v: two backward passes in place of a forward mode,
        # which not every operation has.
        with torch.enable_grad():
            self._dummies = tuple(torch.zeros_like(t, requires_grad=True) for t in self.outputs)
            given = [(t, w) for t, w in zip(self.outputs, self._dummies, strict=True) if t.requires_grad]
            self._pulled = torch.autograd.grad(
                [t for t, _ in given], self.params, [w for _, w in given], create_graph=True, materialize_grads=True
            )

    @property
    def shape(self) -> torch.Size:
        """(n, n)."""
        return torch.Size((sum(self._sizes),) * 2)

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return self.params[0].dtype

    @property
    def device(self) -> torch.device:
        """The parameters' device."""
        return self.params[0].device

    def __matmul__(self, vectors: Tensor, /) -> Tensor:
        """Jᵀ C J v for one vector (n,), or for the columns of a matrix (n, k), ``chunk`` of them in one batched pass."""
        n = self.shape[0]
        if vectors.dim() not in (1, 2) or vectors.shape[0] != n:
            raise ValueError(f"'vectors' must be ({n},) or ({n}, k), not {tuple(vectors.shape)}")
        vectors = vectors.to(device=self.device, dtype=self.dtype)
        if vectors.dim() == 1:
            return self._product(vectors, None)
        if not vectors.shape[1]:
            return torch.zeros_like(vectors)
        parts = [self._product(columns.T, columns.shape[1]) for columns in torch.split(vectors, self.chunk, dim=1)]
        return torch.cat(parts).T.contiguous()

    def dense(self) -> Tensor:
        """The whole matrix (n, n), by n products: for checks on small problems."""
        return self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)

    def _product(self, rows: Tensor, batch: int | None) -> Tensor:
        lead = () if batch is None else (batch,)
        blocks = [v.reshape(*lead, *p.shape) for v, p in zip(torch.split(rows, self._sizes, dim=-1), self.params, strict=True)]
        pushed = _pull(self._pulled, self._dummies, blocks, batch)
        curved = self._curve(pushed, batch)
        pulled = _pull(self.outputs, self.params, curved, batch)
        return torch.cat([b.reshape(*lead, -1) for b in pulled], dim=-1)

    @abstractmethod
    def _curve(self, tangents: list[Tensor], batch: int | None) -> list[Tensor]:
        """C times the outputs' tangents, each of its output's shape, or (batch, *shape)."""


class GaussNewtonOperator(_Sandwich):
    r"""The Gauss-Newton matrix :math:`J^\top \nabla^2 \ell(z) J` of a loss ℓ of a model's outputs z, never formed.

    J is the Jacobian of z in the parameters, read as one vector as in `HessianOperator`. It is the Hessian without the
    curvature of the model itself: equal to it for a model that is linear in its parameters, and positive semidefinite for
    every ℓ that is convex in z. For the mean cross-entropy of logits it is the Fisher matrix too.

    Args:
        loss_fn: ℓ, a function of the outputs (as many arguments as there are) that gives a scalar.
        outputs: z, one tensor or several, with their graph. A parameter may stand among them, for a penalty on it.
        params: leaf tensors that the outputs depend on, all of one dtype and one device, and the outputs' too.
        chunk: how many vectors of a matrix are multiplied at once; memory grows with it.

    A product costs two backward passes through the model and one through the gradient of ℓ.

    Raises:
        ValueError: nothing to differentiate, several dtypes or devices, or a loss that is no scalar.

    Example:
        >>> import torch
        >>> x, y = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2)
        >>> weight = torch.ones(2, requires_grad=True)
        >>> matrix = GaussNewtonOperator(lambda z: ((z - y) ** 2).sum() / 2, x @ weight, [weight])
        >>> torch.equal(matrix.dense(), x.T @ x)
        True

    Reference:
        Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", 2002.
    """

    def __init__(
        self,
        loss_fn: Callable[..., Tensor],
        outputs: Tensor | Sequence[Tensor],
        params: Iterable[Tensor],
        *,
        chunk: int = 32,
    ) -> None:
        super().__init__(outputs, params, chunk)
        with torch.enable_grad():
            self._leaves = tuple(t.detach().requires_grad_() for t in self.outputs)
            loss = loss_fn(*self._leaves)
            if loss.numel() != 1:
                raise ValueError(f"'loss_fn' must give a scalar, not a tensor of shape {tuple(loss.shape)}")
            self._slopes = torch.autograd.grad(loss, self._leaves, create_graph=True, materialize_grads=True)

    def _curve(self, tangents: list[Tensor], batch: int | None) -> list[Tensor]:
        return _pull(self._slopes, self._leaves, tangents, batch)


class FisherOperator(_Sandwich):
    r"""The Fisher matrix :math:`J^\top F_z J` of the distribution that a model's outputs z stand for, never formed.

    The expectation over labels is taken over the model's own distribution and in closed form, so that no label enters:
    F_z is diag(p) - p pᵀ with p = softmax(z) for 'categorical' (classes last), p(1 - p) with p = sigmoid(z) for 'bernoulli',
    and 1 for 'gaussian' of unit variance. It is positive semidefinite whatever the model.

    Args:
        outputs: z, one tensor with its graph: (..., classes) for 'categorical', of any shape else.
        params: leaf tensors that the outputs depend on, all of one dtype and one device, and the outputs' too.
        likelihood: 'categorical', 'bernoulli' or 'gaussian'.
        reduction: 'mean' over what has a distribution of its own (all entries; rows for 'categorical'), or 'sum'.
        chunk: how many vectors of a matrix are multiplied at once; memory grows with it.

    Raises:
        ValueError: nothing to differentiate, several dtypes or devices, or an unknown likelihood or reduction.

    When not to use it: where the matrix of the labels' own gradients is wanted, the empirical Fisher.

    Example:
        >>> import torch
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> FisherOperator(logits * 2, [logits]).dense().mul(9 / 4).round()
        tensor([[ 2., -1., -1.],
                [-1.,  2., -1.],
                [-1., -1.,  2.]])

    Reference:
        Martens, "New insights and perspectives on the natural gradient method", arXiv 1412.1193, section 9.
    """

    def __init__(
        self,
        outputs: Tensor,
        params: Iterable[Tensor],
        *,
        likelihood: str = "categorical",
        reduction: str = "mean",
        chunk: int = 32,
    ) -> None:
        for name, value, allowed in (("likelihood", likelihood, LIKELIHOODS), ("reduction", reduction, ("mean", "sum"))):
            if value not in allowed:
                raise ValueError(f"'{name}' is '{value}'; allowed: {', '.join(allowed)}")
        super().__init__(outputs, params, chunk)
        if likelihood == "categorical" and outputs.dim() < 1:
            raise ValueError("'outputs' must be (..., classes) for 'categorical', not a scalar")
        self.likelihood = likelihood
        z = outputs.detach()
        count = z.numel() // z.shape[-1] if likelihood == "categorical" else z.numel()
        self._weight = 1 / count if reduction == "mean" else 1.0
        self._p = z.softmax(-1) if likelihood == "categorical" else z.sigmoid()

    def _curve(self, tangents: list[Tensor], batch: int | None) -> list[Tensor]:
        [v] = tangents
        if self.likelihood == "categorical":
            v = self._p * (v - (self._p * v).sum(-1, keepdim=True))
        elif self.likelihood == "bernoulli":
            v = self._p * (1 - self._p) * v
        return [v * self._weight]


def _pull(outputs: Sequence[Tensor], inputs: Sequence[Tensor], seeds: Sequence[Tensor], batch: int | None) -> list[Tensor]:
    """Vector-Jacobian products; outputs without a graph are constants and count as zero."""
    live = [(t, s) for t, s in zip(outputs, seeds, strict=True) if t.requires_grad]
    lead = () if batch is None else (batch,)
    if not live:
        return [torch.zeros(*lead, *t.shape, dtype=t.dtype, device=t.device) for t in inputs]
    tensors, cotangents = zip(*live, strict=True)
    pulled = torch.autograd.grad(
        tensors, inputs, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=batch is not None
    )
    return [
        torch.zeros(*lead, *t.shape, dtype=t.dtype, device=t.device) if g is None else g.detach()
        for t, g in zip(inputs, pulled, strict=True)
    ]

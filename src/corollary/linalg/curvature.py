"""Matrix-free curvature: products with the Hessian of a loss, from which diagonals, traces and spectra are estimated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class SymmetricOperator(Protocol):
    """A symmetric linear map known by its products alone; a square tensor is one, and so is `HessianOperator`."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def __matmul__(self, vectors: Tensor, /) -> Tensor: ...


def hessian_vector_product(
    gradients: Sequence[Tensor],
    params: Sequence[Tensor],
    vectors: Sequence[Tensor],
    *,
    retain_graph: bool = False,
) -> list[Tensor]:
    r"""Hessian of a loss times a vector, from gradients that still carry their graph.

    With g = ∇f(θ), the product is H v = ∂⟨g, v⟩/∂θ: one more backward pass, without forming H (Pearlmutter, 1994).

    Args:
        gradients: gradients of one loss, made with ``create_graph=True``, one for each parameter.
        params: the parameters that they belong to.
        vectors: the blocks of v, each of its parameter's shape, dtype and device.
        retain_graph: keep the graph for another product.

    Returns:
        The blocks of H v, in the order of ``params``. A parameter in which the loss is linear gets zeros.

    Raises:
        ValueError: the three sequences differ in length, or a vector's shape is not its parameter's.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> gradients = torch.autograd.grad((x**3).sum(), [x], create_graph=True)
        >>> hessian_vector_product(gradients, [x], [torch.ones(2)])
        [tensor([ 6., 12.])]
    """
    if not len(gradients) == len(params) == len(vectors):
        raise ValueError(
            "'gradients', 'params' and 'vectors' must have one tensor for each parameter, "
            f"not {len(gradients)}, {len(params)} and {len(vectors)}"
        )
    for i, (param, vector) in enumerate(zip(params, vectors, strict=True)):
        if vector.shape != param.shape:
            raise ValueError(f"'vectors[{i}]' has shape {tuple(vector.shape)}; its parameter has {tuple(param.shape)}")
    # A gradient without a graph is constant: its rows of H are zero, and autograd would refuse it as an output.
    curved = [(g, v) for g, v in zip(gradients, vectors, strict=True) if g.requires_grad]
    if not curved:
        return [torch.zeros_like(p) for p in params]
    outputs, seeds = zip(*curved, strict=True)
    return list(torch.autograd.grad(outputs, params, seeds, retain_graph=retain_graph, materialize_grads=True))


class HessianOperator:
    r"""The Hessian of a loss at its parameters' present values, as a matrix that is never formed.

    The parameters are read as one vector of length n, in the order given, each flattened row by row. Multiplying keeps the
    loss's graph alive for as long as the operator lives; the values of the parameters must not change meanwhile.

    Args:
        loss: a scalar with a graph that can be differentiated twice.
        params: leaf or intermediate tensors that the loss depends on, all of one dtype and one device. Those that the loss
            does not depend on have zero rows.
        chunk: how many vectors of a matrix are multiplied at once; memory grows with it.

    Raises:
        ValueError: the loss is no scalar, there is no parameter, or dtypes or devices differ.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian = HessianOperator((x[0] ** 2 * x[1]), [x])
        >>> hessian @ torch.tensor([1.0, 0.0])
        tensor([4., 2.])
        >>> hessian.dense()
        tensor([[4., 2.],
                [2., 0.]])
    """

    def __init__(self, loss: Tensor, params: Iterable[Tensor], *, chunk: int = 32) -> None:
        self.params = tuple(params)
        if not self.params:
            raise ValueError("'params' is empty; give at least one tensor")
        if loss.numel() != 1:
            raise ValueError(f"'loss' must be a scalar, not of shape {tuple(loss.shape)}")
        if chunk < 1:
            raise ValueError(f"'chunk' must be at least 1, not {chunk}")
        kinds = {(p.dtype, p.device) for p in self.params}
        if len(kinds) > 1:
            names = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
            raise ValueError(f"'params' must share one dtype and device, because they form one vector; they are {names}")
        self.chunk = chunk
        with torch.enable_grad():
            self._gradients = torch.autograd.grad(loss, self.params, create_graph=True, materialize_grads=True)
        self._sizes = [p.numel() for p in self.params]

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

    def gradient(self) -> Tensor:
        """The gradient (n,), which the operator has anyway."""
        return self._flatten(self._gradients)

    def __matmul__(self, vectors: Tensor, /) -> Tensor:
        """H v for one vector (n,), or H V for the columns of a matrix (n, k), ``chunk`` of them in one batched pass."""
        n = self.shape[0]
        if vectors.dim() not in (1, 2) or vectors.shape[0] != n:
            raise ValueError(f"'vectors' must be ({n},) or ({n}, k), not {tuple(vectors.shape)}")
        vectors = vectors.to(device=self.device, dtype=self.dtype)
        if vectors.dim() == 1:
            blocks = [v.view_as(p) for v, p in zip(torch.split(vectors, self._sizes), self.params, strict=True)]
            return self._flatten(hessian_vector_product(self._gradients, self.params, blocks, retain_graph=True))
        curved = [i for i, g in enumerate(self._gradients) if g.requires_grad]
        if not curved or not vectors.shape[1]:
            return torch.zeros_like(vectors)
        products = []
        for columns in torch.split(vectors, self.chunk, dim=1):
            blocks = [
                v.reshape(-1, *p.shape) for v, p in zip(torch.split(columns.T, self._sizes, dim=1), self.params, strict=True)
            ]
            batch = torch.autograd.grad(
                [self._gradients[i] for i in curved],
                self.params,
                [blocks[i] for i in curved],
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=True,
            )
            k = columns.shape[1]
            rows = [
                torch.zeros(k, size, dtype=self.dtype, device=self.device) if b is None else b.reshape(k, size)
                for b, size in zip(batch, self._sizes, strict=True)
            ]
            products.append(torch.cat(rows, dim=1))
        return torch.cat(products).T.contiguous()

    def dense(self) -> Tensor:
        """The whole matrix (n, n), by n products: for checks on small problems."""
        return self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)

    def _flatten(self, blocks: Iterable[Tensor]) -> Tensor:
        return torch.cat([b.detach().reshape(-1) for b in blocks])

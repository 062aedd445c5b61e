"""The empirical Fisher matrix: gradients of single samples or batches, products with it, and what its inverse is made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

_CHUNK_BYTES = 16 * 2**20  # of a matrix that is widened to float64 at once: it stays near the processor, and small beside G


class EmpiricalFisherOperator:
    r"""The empirical Fisher matrix of m gradients, plus a multiple of the identity, as a matrix that is never formed.

    .. math::
        F = λ I + \frac{1}{m} \sum_{i=1}^m g_i g_i^\top

    Args:
        gradients: the gᵢ as rows (m, n), floating: one flattened gradient for each sample, or for each batch.
        damp: λ, at least 0.

    Raises:
        TypeError: ``gradients`` is not floating.
        ValueError: ``gradients`` is not a matrix with at least one row, or ``damp`` is negative.

    Example:
        >>> import torch
        >>> fisher = EmpiricalFisherOperator(torch.tensor([[1.0, 1.0], [0.0, 2.0]]), damp=1.0)
        >>> fisher @ torch.tensor([1.0, 0.0])
        tensor([1.5000, 0.5000])
        >>> fisher.dense()
        tensor([[1.5000, 0.5000],
                [0.5000, 3.5000]])
    """

    def __init__(self, gradients: Tensor, *, damp: float = 0.0) -> None:
        check_gradient_rows(gradients)
        if not 0 <= damp < float("inf"):
            raise ValueError(f"'damp' must be at least 0 and finite, not {damp}")
        self.gradients = gradients
        self.damp = float(damp)

    @property
    def shape(self) -> torch.Size:
        """(n, n)."""
        return torch.Size((self.gradients.shape[1],) * 2)

    @property
    def dtype(self) -> torch.dtype:
        """The gradients' dtype."""
        return self.gradients.dtype

    @property
    def device(self) -> torch.device:
        """The gradients' device."""
        return self.gradients.device

    def __matmul__(self, vectors: Tensor, /) -> Tensor:
        """F v for one vector (n,), or F V for the columns of a matrix (n, k), with 4 m n k operations."""
        n = self.shape[0]
        if vectors.dim() not in (1, 2) or vectors.shape[0] != n:
            raise ValueError(f"'vectors' must be ({n},) or ({n}, k), not {tuple(vectors.shape)}")
        vectors = vectors.to(device=self.device, dtype=self.dtype)
        products = self.gradients.T @ ((self.gradients @ vectors) / len(self.gradients))
        return products.add_(vectors, alpha=self.damp) if self.damp else products

    def diagonal(self) -> Tensor:
        """The diagonal (n,): the mean of the squared gradients, plus λ."""
        parts = [block.square().mean(0) for _, block in column_chunks(self.gradients)]
        return torch.cat(parts).add_(self.damp).to(self.dtype)

    def dense(self) -> Tensor:
        """The whole matrix (n, n): for checks on small problems."""
        return self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)


def per_sample_gradients(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    *,
    params: Mapping[str, Tensor] | None = None,
    chunk: int = 64,
) -> Tensor:
    r"""The gradient of every sample's loss by itself, as rows: what the empirical Fisher matrix is made from.

    The samples of a chunk go through one vectorized backward pass (``torch.func``); the model must treat them apart from each
    other, so put batch normalization in eval mode or take group normalization. ``.grad`` and the model stay as they are.

    Args:
        model: any module that ``torch.func.vmap`` can map.
        loss: ``loss(outputs, targets)`` gives a scalar; it is called with a batch of one sample.
        inputs: (n, ...).
        targets: (n, ...).
        params: name to parameter of the model, those to differentiate; None takes all that require gradients.
        chunk: how many samples at once; memory grows with it.

    Returns:
        (n, d), in the parameters' dtype, each row the flattened gradients in the order of ``params``.

    Raises:
        ValueError: no samples, inputs and targets that differ in number, no parameter, or ``chunk`` below 1.

    Example:
        >>> import torch
        >>> from torch.nn.functional import mse_loss
        >>> model, x, y = torch.nn.Linear(3, 1), torch.randn(5, 3), torch.randn(5, 1)
        >>> rows = per_sample_gradients(model, mse_loss, x, y)
        >>> mse_loss(model(x), y).backward()
        >>> rows.shape, torch.allclose(rows.mean(0)[:3], model.weight.grad[0], atol=1e-6)
        (torch.Size([5, 4]), True)
    """
    if len(inputs) != len(targets) or not len(inputs):
        raise ValueError(
            f"'inputs' and 'targets' must have as many samples, at least one, not {len(inputs)} and {len(targets)}"
        )
    if chunk < 1:
        raise ValueError(f"'chunk' must be at least 1, not {chunk}")
    chosen = dict(params) if params is not None else {k: p for k, p in model.named_parameters() if p.requires_grad}
    if not chosen:
        raise ValueError("'params' is empty; give at least one parameter")
    chosen = {name: p.detach() for name, p in chosen.items()}
    rest = {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers()) if name not in chosen}

    def sample_loss(free: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(torch.func.functional_call(model, {**rest, **free}, (x.unsqueeze(0),)), y.unsqueeze(0))

    gradient = torch.func.vmap(torch.func.grad(sample_loss), in_dims=(None, 0, 0), randomness="different")
    first = next(iter(chosen.values()))
    rows = torch.empty(len(inputs), sum(p.numel() for p in chosen.values()), dtype=first.dtype, device=first.device)
    for start in range(0, len(inputs), chunk):
        part = slice(start, start + chunk)
        batch = gradient(chosen, inputs[part], targets[part])
        torch.cat([batch[name].flatten(1) for name in chosen], dim=1, out=rows[part])
    return rows


def check_gradient_rows(gradients: Tensor) -> None:
    """Refuse what is no matrix of real floating gradients, in the words of whoever has an argument ``gradients``."""
    if not isinstance(gradients, Tensor) or not gradients.is_floating_point():
        kind = gradients.dtype if isinstance(gradients, Tensor) else type(gradients).__name__
        raise TypeError(f"'gradients' must be a real floating tensor, not {kind}")
    if gradients.dim() != 2 or 0 in gradients.shape:
        raise ValueError(f"'gradients' must be (m, d) with a gradient in each row, not empty, not {tuple(gradients.shape)}")


def column_chunks(matrix: Tensor, multiple: int = 1) -> Iterator[tuple[slice, Tensor]]:
    """The columns of a matrix (m, d), some megabytes at a time: the slice of columns, and a copy in at least float64.

    Sums of products over many columns keep their digits in float64, at a cost that does not depend on d in memory.

    Args:
        matrix: (m, d).
        multiple: no chunk but the last ends inside a block of so many columns.
    """
    wide = wide_dtype(matrix.device)
    width = max(1, _CHUNK_BYTES // (8 * max(1, len(matrix)) * multiple)) * multiple
    for start in range(0, matrix.shape[1], width):
        columns = slice(start, min(start + width, matrix.shape[1]))
        yield columns, matrix[:, columns].to(wide, copy=True)


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def gram_matrix(rows: Tensor) -> Tensor:
    """All scalar products of the rows of a matrix (m, d), summed in float64: (m, m).

    Example:
        >>> import torch
        >>> gram_matrix(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
        tensor([[5., 6.],
                [6., 9.]], dtype=torch.float64)
    """
    gram = torch.zeros(len(rows), len(rows), dtype=wide_dtype(rows.device), device=rows.device)
    for _, block in column_chunks(rows):
        gram.addmm_(block, block.T)
    return gram


def damped_cholesky(gram: Tensor, shift: float) -> Tensor:
    r"""The lower triangular L with :math:`L L^\top = S + s I`, for a Gram matrix S that rounding may have left indefinite.

    Args:
        gram: S, (m, m) or (batch, m, m), positive semidefinite but for rounding.
        shift: s > 0.

    Raises:
        ValueError: S is not finite, or so large beside s that S + s I is singular in its dtype.

    Example:
        >>> import torch
        >>> damped_cholesky(torch.tensor([[3.0]]), 1.0)
        tensor([[2.]])
    """

    def shifted(matrix: Tensor) -> Tensor:
        moved = matrix.clone()
        moved.diagonal(dim1=-2, dim2=-1).add_(shift)
        return moved

    largest = gram.diagonal(dim1=-2, dim2=-1).max()
    if not gram.isfinite().all():
        raise ValueError("the scalar products of the gradients are not finite: a gradient holds NaN or infinite entries")
    if not shift > torch.finfo(gram.dtype).eps * largest:
        raise ValueError(
            f"'damp' is too small beside gradients of squared norm {float(largest):.3g}: {shift:.3g} vanishes in the rounding of "
            "their scalar products"
        )
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(shifted(gram))
    if info.any():
        # Scalar products of float32 gradients carry float32's rounding, which can push a zero eigenvalue below -s.
        values, vectors = torch.linalg.eigh(gram)
        repaired = (vectors * values.clamp_min(0).unsqueeze(-2)) @ vectors.mT
        # Above the rounding of the repair itself, which is that of the largest eigenvalue.
        shift = max(shift, 8 * torch.finfo(gram.dtype).eps * float(values.max()) * gram.shape[-1])
        factor = torch.linalg.cholesky(shifted((repaired + repaired.mT) / 2))
    return factor

"""Matrix Nuclear-Norm of hidden states: how far a model compresses a text, without a singular value decomposition."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from corollary.analysis._hidden_states import MeanOverTexts, check_hidden_states, check_result, column_squares, token_counts


def matrix_nuclear_norm(hidden_states: Tensor, mask: Tensor | None = None, *, top: int | None = None) -> Tensor:
    r"""Matrix Nuclear-Norm: the sum of the D largest column norms of the normalized hidden states, over the text's length.

    For the hidden states :math:`x_1, \dots, x_L \in \mathbb{R}^d` of one text with mean :math:`\mu`,

    .. math::
        z_i = \frac{x_i - \mu}{\lVert x_i - \mu \rVert_2}, \qquad
        \mathrm{MNN} = \frac{1}{L} \sum_{j=1}^{D} \lVert Z_{:,[j]} \rVert_2, \qquad D = \min(L, d),

    where :math:`[j]` is the column with the j-th largest norm. The sum is the :math:`L_{1,2}` norm cut to D columns. It stands
    in for the nuclear norm :math:`\lVert Z \rVert_* = \sum_j \sigma_j` and equals it where the columns of Z are orthogonal and
    at most D of them are not zero. In general, by the triangle inequality and that of Cauchy and Schwarz,

    .. math:: \tfrac{D}{d} \lVert Z \rVert_* \le L \cdot \mathrm{MNN} \le \sqrt{D}\, \lVert Z \rVert_F = \sqrt{D L}.

    Lower is said to mean better compression. Time is O(Ld), plus the sort where L < d; memory is a cache's worth of rows
    on a CPU, elsewhere one copy of the input.

    Args:
        hidden_states: (..., L, d), floating; one text or a batch of them. float16 and bfloat16 are computed in float32.
        mask: (..., L), bool or integer; nonzero marks a token, zero padding, as a tokenizer's ``attention_mask``. Padding may
            hold anything. None: every row is a token.
        top: D, from 1 to d; None takes min(L, d) of each text.

    Returns:
        One score for each text, shape (...), between 0 and sqrt(D / L); float64 for float64 input, otherwise float32. It is
        differentiable.

    Raises:
        TypeError: hidden states that are not a floating tensor, or a mask that is not bool or integer.
        ValueError: fewer than two dimensions, no rows or columns, a mask of another shape, a text without tokens, NaN or
            infinity.

    When not to use it: to compare representations of one width, layers of one model for example. There it may order them
    against `matrix_entropy`: with L < d a text whose energy sits in few columns scores higher, not lower. It depends on the
    basis of the features, and its ceiling sqrt(min(L, d) / L) falls once a text is longer than d. Compare models on the same
    texts, and texts no longer than d.

    Deviations: a token equal to the mean (to rounding) counts as a zero row; the authors' code divides by zero there and
    later drops the whole text. A text of one token therefore scores 0 here; the `MatrixNuclearNorm` metric drops it as they do.

    Example:
        >>> import torch
        >>> hidden_states = torch.randn(2, 10, 64, generator=torch.Generator().manual_seed(0))
        >>> matrix_nuclear_norm(hidden_states).shape
        torch.Size([2])
        >>> aligned = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])  # one direction: L * MNN = sqrt(L)
        >>> float(matrix_nuclear_norm(aligned))
        0.5

    Source: Li, Xia, Wu and Chang, "Large Language Model Evaluation via Matrix Nuclear-Norm", arXiv:2410.10672, Algorithm 1 and
    Equation 11.
    """
    mask = check_hidden_states(hidden_states, mask)
    features = hidden_states.shape[-1]
    if top is not None and not 1 <= top <= features:
        raise ValueError(f"'top' is {top}; allowed: 1 to the number of features, {features}")
    squares = column_squares(hidden_states, mask)
    counts = token_counts(hidden_states, mask)
    columns = _column_norms(squares)
    return check_result(_sum_of_largest(columns, counts, top) / counts)


def _column_norms(squares: Tensor) -> Tensor:
    if not squares.requires_grad:
        return squares.sqrt()
    # The clamp keeps the gradient of a column of zeros finite, the product its value and gradient at zero.
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt() * (squares != 0)


def _sum_of_largest(columns: Tensor, counts: Tensor | int, top: int | None) -> Tensor:
    features = columns.shape[-1]
    if top is None and isinstance(counts, int):
        top = min(counts, features)
    if top == features:
        return columns.sum(-1)
    if top is not None:
        return columns.topk(top, dim=-1, sorted=False).values.sum(-1)
    assert isinstance(counts, Tensor)
    last = counts.clamp(1, features) - 1
    return columns.sort(dim=-1, descending=True).values.cumsum(-1).gather(-1, last.unsqueeze(-1)).squeeze(-1)


class MatrixNuclearNorm(MeanOverTexts):
    """Mean `matrix_nuclear_norm` over the texts of a data set, in constant memory.

    Each text is scored by itself and the scores are averaged, as the paper does over a data set. Texts of fewer than two tokens
    have no defined score; they are counted in ``skipped`` and left out. The state is five scalars in ``state_dict()``: it can
    be saved, loaded, moved and merged, and the split into batches or shards does not change the result.

    Args:
        top: as for `matrix_nuclear_norm`.

    Example:
        >>> import torch
        >>> metric = MatrixNuclearNorm()
        >>> for seed in range(3):  # batches of hidden states
        ...     metric.update(torch.randn(4, 12, 32, generator=torch.Generator().manual_seed(seed)))
        >>> int(metric.texts), int(metric.tokens), round(float(metric.compute()), 2)
        (12, 144, 0.73)

    Source: arXiv:2410.10672, Algorithm 1 and the authors' evaluation script.
    """

    def __init__(self, top: int | None = None) -> None:
        super().__init__()
        self.top = top

    def score(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        return matrix_nuclear_norm(hidden_states, mask, top=self.top)


class MatrixNuclearNormStream(nn.Module):
    r"""`matrix_nuclear_norm` of one matrix whose rows arrive in chunks and never fit in memory at once: exact, in O(d) memory.

    What can be streamed: the column norms are square roots of sums over rows, so one pass is enough once the mean is known.
    The mean itself cannot be folded into that pass, because each row is divided by its own distance to the mean. So either

    - give the rows twice, first to `observe` (which averages them) and then to `update`; or
    - give ``mean``, known from elsewhere, and the rows once to `update`; without either, rows are taken as centered already.

    Sums are kept in float64. `merge` joins shards of the same pass.

    Args:
        features: d, the number of columns.
        mean: (d,), the rows' mean where it is known beforehand.

    Example:
        >>> import torch
        >>> rows = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
        >>> stream = MatrixNuclearNormStream(16)
        >>> for chunk in rows.split(64):
        ...     stream.observe(chunk)
        >>> for chunk in rows.split(64):
        ...     stream.update(chunk)
        >>> bool(torch.isclose(stream.compute(), matrix_nuclear_norm(rows.double())))
        True
    """

    observed: Tensor
    mean: Tensor
    rows: Tensor
    squares: Tensor

    def __init__(self, features: int, mean: Tensor | None = None) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"'features' is {features}; allowed: at least 1")
        if mean is not None and tuple(mean.shape) != (features,):
            raise ValueError(f"'mean' has shape {tuple(mean.shape)}; allowed: ({features},)")
        start = torch.zeros(features, dtype=torch.float64) if mean is None else mean.detach().to(torch.float64, copy=True)
        self.register_buffer("observed", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", start)
        self.register_buffer("rows", torch.zeros((), dtype=torch.int64))
        self.register_buffer("squares", torch.zeros(features, dtype=torch.float64))

    def _check(self, rows: Tensor) -> None:
        check_hidden_states(rows, None, name="rows", allow_empty=True)
        if rows.ndim != 2 or rows.shape[1] != len(self.mean):
            raise ValueError(f"'rows' has shape {tuple(rows.shape)}; allowed: (n, {len(self.mean)})")

    @torch.no_grad()
    def observe(self, rows: Tensor) -> None:
        """First pass: take rows (n, d) into the mean."""
        self._check(rows)
        if int(self.rows):
            raise ValueError("observe came after update: the mean must be complete before the second pass; call reset first")
        if len(rows):
            self.observed += len(rows)
            self.mean += (rows.to(self.mean).mean(0) - self.mean) * (len(rows) / int(self.observed))

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Second pass: take rows (n, d) into the column sums."""
        self._check(rows)
        if len(rows):
            self.squares += column_squares(rows.to(self.mean), mean=self.mean)
            self.rows += len(rows)

    def compute(self, top: int | None = None) -> Tensor:
        """The score of all rows so far, a float64 scalar; raises ``ValueError`` before the first row."""
        if not int(self.rows):
            raise ValueError("no rows were given to update yet")
        if int(self.observed) and int(self.observed) != int(self.rows):
            raise ValueError(f"observe saw {int(self.observed)} rows and update {int(self.rows)}; both need the same rows")
        if top is not None and not 1 <= top <= len(self.mean):
            raise ValueError(f"'top' is {top}; allowed: 1 to the number of features, {len(self.mean)}")
        return check_result(_sum_of_largest(_column_norms(self.squares), int(self.rows), top) / self.rows, name="rows")

    def reset(self) -> None:
        """Forget all rows, and the mean as well."""
        for buffer in self.buffers():
            buffer.zero_()

    @torch.no_grad()
    def merge(self, other: MatrixNuclearNormStream) -> None:
        """Add the rows of another stream: both in the first pass, or both in the second with the same mean."""
        if not isinstance(other, MatrixNuclearNormStream):
            raise TypeError(f"'other' is {type(other).__name__}; allowed: MatrixNuclearNormStream")
        if len(other.mean) != len(self.mean):
            raise ValueError(f"'other' has {len(other.mean)} features; allowed: {len(self.mean)}")
        if int(self.rows) or int(other.rows):
            if not torch.equal(self.mean, other.mean.to(self.mean)):
                raise ValueError("the streams' means differ; merge them after the first pass and give both the merged mean")
            self.rows += other.rows.to(self.rows)
            self.squares += other.squares.to(self.squares)
        elif int(other.observed):
            total = self.observed + other.observed.to(self.observed)
            self.mean += (other.mean.to(self.mean) - self.mean) * (other.observed.to(self.mean) / total)
            self.observed.copy_(total)

    def extra_repr(self) -> str:
        return f"features={len(self.mean)}"

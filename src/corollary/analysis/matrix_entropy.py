"""Matrix entropy and exact nuclear norm of hidden states: the spectral measures that the Matrix Nuclear-Norm stands in for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from corollary.analysis._hidden_states import MeanOverTexts, center, check_hidden_states, check_result, token_counts


def matrix_entropy(hidden_states: Tensor, mask: Tensor | None = None, *, normalized: bool = True) -> Tensor:
    r"""Matrix entropy: von Neumann entropy of the normalized covariance of hidden states, over log d.

    With the rows :math:`z_i` normalized as for `matrix_nuclear_norm` and the covariance
    :math:`\Sigma = \frac1L \sum_i z_i z_i^\top`, scaled to trace 1 with eigenvalues :math:`\lambda_j`,

    .. math:: H = -\frac{1}{\log d} \sum_j \lambda_j \log \lambda_j.

    It lies between 0 (all rows on one line) and :math:`\log \min(L - 1, d) / \log d`. Lower means stronger compression, and
    :math:`\exp(H \log d)` is the effective rank, whose fall from an untrained to a trained model is Diff-eRank. The eigenvalues
    are those of the smaller of the d-by-d covariance and the L-by-L Gram matrix: O(min(L, d)^2 max(L, d)) time.

    Args:
        hidden_states: (..., L, d), floating; one text or a batch of them. float16 and bfloat16 are computed in float32.
        mask: (..., L), bool or integer; nonzero marks a token. None: every row is a token.
        normalized: divide by log d; False gives H in nats, whose exponential is the effective rank.

    Returns:
        One entropy for each text, shape (...); float64 for float64 input, otherwise float32, where it is good to about 1e-4.

    Raises:
        TypeError, ValueError: as `matrix_nuclear_norm`; also one feature with ``normalized``, because log d is then 0.

    Deviations: a text whose tokens are all equal has no covariance to scale; it gives 0, where the authors' code
    gives NaN. They take the singular values of the d-by-d covariance at every length.

    When not to use it: on many long texts of wide models, where the eigenvalues cost more than the model itself.

    Example:
        >>> import torch
        >>> corners = torch.cat([torch.eye(4), -torch.eye(4)])  # energy spread evenly over all 4 features
        >>> round(float(matrix_entropy(corners)), 4), round(float(matrix_entropy(corners, normalized=False).exp()), 4)
        (1.0, 4.0)

    Source: Wei, Tan, Li, Wang and Huang, "Large Language Model Evaluation via Matrix Entropy" (Diff-eRank), arXiv:2401.17139;
    its use as baseline in arXiv:2410.10672, Equation 14.
    """
    mask = check_hidden_states(hidden_states, mask)
    features = hidden_states.shape[-1]
    if normalized and features == 1:
        raise ValueError("'hidden_states' has one feature and log 1 = 0; allowed: two or more, or normalized=False")
    rows, trace = center(hidden_states, mask)
    gram = rows @ rows.mT if rows.shape[-2] < features else rows.mT @ rows
    gram = gram / trace.clamp_min(1).to(gram.dtype)[..., None, None]  # each row that is not zero adds exactly 1 to the trace
    check_result(gram.sum((-2, -1)))  # LAPACK would fail on NaN with a message about convergence
    spectrum = torch.linalg.eigvalsh(gram).clamp_min(0)
    entropy: Tensor = torch.special.entr(spectrum).sum(-1)
    return entropy / math.log(features) if normalized else entropy


def nuclear_norm(hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Exact nuclear norm of the normalized hidden states over the text's length: what `matrix_nuclear_norm` approximates.

    .. math:: \frac{1}{L} \lVert Z \rVert_* = \frac{1}{L} \sum_j \sigma_j(Z),

    with Z normalized as for `matrix_nuclear_norm`. It takes a singular value decomposition, O(min(L, d)^2 max(L, d)) time, and
    does not depend on the basis of the features.

    Args:
        hidden_states: (..., L, d), floating; one text or a batch of them. float16 and bfloat16 are computed in float32.
        mask: (..., L), bool or integer; nonzero marks a token. None: every row is a token.

    Returns:
        One score for each text, shape (...), between 0 and sqrt(min(L, d) / L).

    Raises:
        TypeError, ValueError: as `matrix_nuclear_norm`.

    Example:
        >>> import torch
        >>> float(nuclear_norm(torch.tensor([[3.0, 4.0], [-3.0, -4.0]])))  # one direction: sqrt(L) / L
        0.7071...

    Source: arXiv:2410.10672, Section 3.3.
    """
    mask = check_hidden_states(hidden_states, mask)
    rows, _ = center(hidden_states, mask)
    check_result(rows.sum((-2, -1)))
    total: Tensor = torch.linalg.svdvals(rows).sum(-1)
    return total / token_counts(hidden_states, mask)


class MatrixEntropy(MeanOverTexts):
    """Mean `matrix_entropy` over the texts of a data set, in constant memory; kept, merged and saved as `MatrixNuclearNorm`.

    Args:
        normalized: as for `matrix_entropy`.

    Example:
        >>> import torch
        >>> metric = MatrixEntropy()
        >>> metric.update(torch.randn(8, 12, 32, generator=torch.Generator().manual_seed(0)))
        >>> round(float(metric.compute()), 2)
        0.65

    Source: arXiv:2401.17139; arXiv:2410.10672, Equation 14.
    """

    def __init__(self, normalized: bool = True) -> None:
        super().__init__()
        self.normalized = normalized

    def score(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        return matrix_entropy(hidden_states, mask, normalized=self.normalized)

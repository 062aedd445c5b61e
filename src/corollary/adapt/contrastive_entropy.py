"""The contrastive entropy loss: each masked text should be like few of the unmasked ones, whichever they are."""

from __future__ import annotations

import torch
from torch import Tensor


def contrastive_entropy(queries: Tensor, keys: Tensor) -> Tensor:
    r"""Mean entropy of how each query's similarity spreads over the keys.

    .. math:: -\frac1n \sum_{i} \sum_{j} p_{ij} \log p_{ij}, \qquad p_{ij} = \frac{\exp(q_i^\top k_j)}{\sum_m \exp(q_i^\top k_m)}

    with q a batch of masked texts in the encoder that trains and k the same texts unmasked in the frozen one. Unlike InfoNCE it
    names no pair as the right one: it is least, 0, where each query is like one key only, and log n where it is like all. O3 sums
    it over the layers of its detector: give the layers as a leading dimension and sum the result.

    Args:
        queries: (..., n, width), floating.
        keys: (..., m, width) in the same dtype, with the same leading dimensions; give it detached.

    Returns:
        (...), differentiable, in nats.

    Raises:
        TypeError: a tensor is not floating, or the dtypes differ.
        ValueError: shapes do not fit or are empty.

    When not to use it: alone, on an encoder that can collapse: the same key for all queries is a minimum too. O3 adds the loss of a
    masked language model, which holds the encoder up. Products are not scaled: with wide features the softmax saturates and the
    gradient vanishes; scale the queries by a temperature then.

    Example:
        >>> import torch
        >>> from corollary.adapt import contrastive_entropy
        >>> contrastive_entropy(torch.zeros(3, 4), torch.randn(5, 4)) - torch.tensor(5.0).log()
        tensor(0.)

    Reference:
        Gao et al., arXiv 2407.10223, equation 7; the authors' code, which takes plain products and every layer's mean over tokens.
    """
    for name, x in (("queries", queries), ("keys", keys)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"'{name}' must be a floating tensor, not {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
        if x.ndim < 2 or not x.numel():
            raise ValueError(f"'{name}' has shape {tuple(x.shape)}; allowed: (..., rows, width), none of them 0")
    if queries.dtype != keys.dtype:
        raise TypeError(f"'queries' is {queries.dtype} and 'keys' {keys.dtype}; they must be alike")
    if queries.shape[:-2] != keys.shape[:-2] or queries.shape[-1] != keys.shape[-1]:
        raise ValueError(
            f"'queries' has shape {tuple(queries.shape)} and 'keys' {tuple(keys.shape)}; all but their rows must be alike"
        )
    logp = torch.log_softmax(queries @ keys.mT, dim=-1)
    return -(logp.exp() * logp).sum(-1).mean(-1)

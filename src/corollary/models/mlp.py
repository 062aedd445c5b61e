"""A multilayer perceptron."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from corollary.models._checks import need_positive


class MLP(nn.Module):
    r"""Linear layers with an activation between them: :math:`h_{l+1} = \phi(W_l h_l + b_l)`.

    Args:
        in_features: numbers in one sample; images are flattened.
        hidden: width of each hidden layer; empty gives a linear model.
        out_features: numbers that come out.
        activation: makes the activation, called once for each hidden layer.

    Attributes:
        head: the last ``nn.Linear``.
        num_features: what goes into it.

    Raises:
        ValueError: where a width is below 1, or an input's sample does not have ``in_features`` numbers.

    Example:
        >>> import torch
        >>> from corollary.models import MLP
        >>> MLP(64, [32, 16], 10)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self, in_features: int, hidden: Sequence[int], out_features: int, activation: Callable[[], nn.Module] = nn.ReLU
    ) -> None:
        super().__init__()
        need_positive(in_features=in_features, out_features=out_features)
        widths = [in_features, *hidden]
        layers: list[nn.Module] = []
        for i, (wide, narrow) in enumerate(pairwise(widths)):
            need_positive(**{f"hidden[{i}]": narrow})
            layers += [nn.Linear(wide, narrow), activation()]
        self.in_features = in_features
        self.num_features = widths[-1]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(self.num_features, out_features)

    def features(self, x: Tensor) -> Tensor:
        """The last hidden layer: (batch, num_features)."""
        if x.dim() < 2 or math.prod(x.shape[1:]) != self.in_features:
            raise ValueError(f"'x' has shape {tuple(x.shape)}; allowed: (batch, ...) with {self.in_features} numbers a sample")
        hidden: Tensor = self.body(x.flatten(1))
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (batch, out_features) of inputs (batch, ...)."""
        out: Tensor = self.head(self.features(x))
        return out

"""A small residual network for small images."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from corollary.models._checks import need_positive


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        return nn.GroupNorm(math.gcd(8, channels), channels)
    raise ValueError(f"'norm' is {kind!r}; allowed: batch, group")


class BasicBlock(nn.Module):
    r"""Two 3×3 convolutions beside a shortcut: :math:`\mathrm{relu}(f(x) + P x)`, with a 1×1 :math:`P` where shapes change."""

    def __init__(self, in_channels: int, channels: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm1 = _norm(norm, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = _norm(norm, channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), _norm(norm, channels))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network of basic blocks with a 3×3 stem, for images from 8 pixels up.

    Each stage after the first halves the resolution and doubles the channels; the mean over the last map feeds the head.

    Args:
        in_channels: channels of the images.
        num_classes: outputs.
        width: channels of the first stage.
        blocks: basic blocks in each stage.
        norm: ``batch`` or ``group``. Group normalization treats each sample alone: choose it for per-sample gradients and
            Hessian-vector products that must not depend on the batch.

    Attributes:
        head: the last ``nn.Linear``.
        num_features: what goes into it, ``width * 2 ** (len(blocks) - 1)``.

    Raises:
        ValueError: on an unknown ``norm``, a count below 1, or images that are not (batch, in_channels, height, width).

    Source: He et al., Deep Residual Learning for Image Recognition, arXiv 1512.03385, figure 5 and section 4.2. Deviations:
    shortcuts that change shape have a 1×1 convolution (option B), and the stages' number and width are free.

    Example:
        >>> import torch
        >>> from corollary.models import ResNet
        >>> net = ResNet(1, 10, width=8)
        >>> images = torch.zeros(2, 1, 8, 8)
        >>> net(images).shape, net.features(images).shape
        (torch.Size([2, 10]), torch.Size([2, 32]))
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        width: int = 16,
        blocks: Sequence[int] = (1, 1, 1),
        norm: str = "batch",
    ) -> None:
        super().__init__()
        need_positive(in_channels=in_channels, num_classes=num_classes, width=width)
        if not blocks:
            raise ValueError("'blocks' is empty; give the number of blocks of each stage, as in (1, 1, 1)")
        self.in_channels = in_channels
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.norm = _norm(norm, width)
        stages: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(blocks):
            need_positive(**{f"blocks[{stage}]": count})
            wider = width * 2**stage
            for i in range(count):
                stages.append(BasicBlock(channels, wider, stride=2 if stage and i == 0 else 1, norm=norm))
                channels = wider
        self.stages = nn.Sequential(*stages)
        self.num_features = channels
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Tensor) -> Tensor:
        """The mean over the last map: (batch, num_features)."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"'x' has shape {tuple(x.shape)}; allowed: (batch, {self.in_channels}, height, width)")
        hidden: Tensor = self.stages(F.relu(self.norm(self.stem(x))))
        return hidden.mean((-2, -1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, in_channels, height, width)."""
        out: Tensor = self.head(self.features(x))
        return out

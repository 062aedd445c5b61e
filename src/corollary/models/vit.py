"""A small vision Transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corollary.models._checks import need_divisible, need_positive
from corollary.models.attention import attention


class SelfAttention(nn.Module):
    """Multi-head attention in which every patch sees every other."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class EncoderBlock(nn.Module):
    """Attention and a GELU perceptron, each behind its own norm and added to what came in."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return out


class ViT(nn.Module):
    """A vision Transformer: an image is a row of patches with learned positions; the mean over patches feeds the head.

    Args:
        image_size: height and width of the images.
        patch_size: height and width of a patch; must divide ``image_size``.
        in_channels: channels of the images.
        num_classes: outputs.
        dim: width.
        depth: number of blocks.
        heads: attention heads; must divide ``dim``.

    Attributes:
        head: the last ``nn.Linear``.
        num_features: what goes into it, ``dim``.

    Raises:
        ValueError: where sizes do not fit together, or images are not (batch, in_channels, image_size, image_size).

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words, arXiv 2010.11929, section 3.1. Deviations: mean pooling in place
    of the class token (their appendix D.3 finds them equal), no dropout.

    Example:
        >>> import torch
        >>> from corollary.models import ViT
        >>> net = ViT(8, 2, 1, 10, dim=16, depth=2, heads=2)
        >>> images = torch.zeros(3, 1, 8, 8)
        >>> net(images).shape, net.features(images).shape
        (torch.Size([3, 10]), torch.Size([3, 16]))
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        in_channels: int,
        num_classes: int,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
    ) -> None:
        super().__init__()
        need_positive(image_size=image_size, patch_size=patch_size, in_channels=in_channels, num_classes=num_classes)
        need_positive(dim=dim, depth=depth, heads=heads)
        need_divisible("image_size", image_size, "patch_size", patch_size)
        need_divisible("dim", dim, "heads", heads)
        self.image_shape = (in_channels, image_size, image_size)
        self.num_features = dim
        self.patch_embed = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.positions = nn.Parameter(torch.empty((image_size // patch_size) ** 2, dim))
        self.blocks = nn.ModuleList(EncoderBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def features(self, x: Tensor) -> Tensor:
        """The mean over the last patches, normalized: (batch, num_features)."""
        if x.shape[1:] != self.image_shape:
            raise ValueError(f"'x' has shape {tuple(x.shape)}; allowed: (batch, {', '.join(map(str, self.image_shape))})")
        hidden: Tensor = self.patch_embed(x).flatten(2).mT + self.positions
        for block in self.blocks:
            hidden = block(hidden)
        out: Tensor = self.norm(hidden).mean(1)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, in_channels, image_size, image_size)."""
        out: Tensor = self.head(self.features(x))
        return out

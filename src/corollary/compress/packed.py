"""A linear layer whose weight is stored in few bits or with two zeros in four, and what low-rank factors add to it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corollary.compress.quantizers import dequantize_rows, gptq_rows, quantize_rows, two_four_mask
from corollary.linalg import Quantized


class PackedLinear(nn.Module):
    r"""A linear layer that stores its weight packed, with an optional low-rank path beside it: :math:`y = \hat W x + B A x + b`.

    Under 2:4 sparsity two of every four neighbours are kept, with a byte for the places of two such quadruples; with ``bits`` what is
    kept is stored as codes with a step and zero point for each group. The buffers are what a saved file holds. The dense weight is
    unpacked at every call: this saves memory and files, not time, which takes kernels made for it.

    Args:
        in_features, out_features: as in ``nn.Linear``.
        bits: 4, 8, or None for values in the layer's dtype.
        group_size: stored entries of a row that share a step; at most a row.
        sparse: whether two in four are zero.
        rank: of the low-rank path; 0 for none.
        bias: whether there is a bias.
        device, dtype: of the floating tensors.

    Attributes:
        down, up: the low-rank path's two layers, where there is one.

    Example:
        >>> import torch
        >>> layer = PackedLinear(64, 32, bits=4, sparse=True)
        >>> _ = layer.pack(torch.randn(32, 64))
        >>> sum(b.nbytes for b in layer.buffers()), (layer.dense() == 0).float().mean().item() >= 0.5
        (928, True)
    """

    codes: Tensor
    values: Tensor
    scale: Tensor
    zero: Tensor
    places: Tensor
    down: nn.Linear
    up: nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int | None = 4,
        group_size: int = 64,
        sparse: bool = False,
        rank: int = 0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if sparse and in_features % 4:
            raise ValueError(f"2:4 sparsity needs a multiple of 4 inputs, not {in_features}")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.bits, self.sparse = bits, sparse
        kept = self.kept_columns
        self.group_size = group_size = min(group_size, kept)
        if bits is None:
            self.register_buffer("values", torch.zeros(out_features, kept, device=device, dtype=dtype))
        else:
            groups = -(-kept // group_size)
            count = out_features * groups * group_size
            self.register_buffer("codes", torch.zeros(-(-count * bits // 8), device=device, dtype=torch.uint8))
            self.register_buffer("scale", torch.ones(out_features * groups, device=device, dtype=dtype))
            self.register_buffer("zero", torch.zeros(out_features * groups, device=device, dtype=torch.uint8))
        if sparse:
            count = out_features * in_features // 4
            self.register_buffer("places", torch.zeros(-(-count // 2), device=device, dtype=torch.uint8))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        if rank:
            with torch.random.fork_rng(devices=[]):  # the start that torch draws is thrown away
                self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
                self.up = nn.Linear(rank, out_features, bias=False, device=device, dtype=dtype)

    @property
    def kept_columns(self) -> int:
        """Stored entries of a row."""
        return self.in_features // 2 if self.sparse else self.in_features

    def number_of_parameters(self) -> int:
        """Stored entries of the weight, and the bias; not the low-rank path's."""
        return self.out_features * self.kept_columns + (0 if self.bias is None else self.out_features)

    @torch.no_grad()
    def pack(self, weight: Tensor, *, inputs: Tensor | None = None, scale: Tensor | None = None) -> PackedLinear:
        """Store a weight (out, in).

        Args:
            weight: floating and finite.
            inputs: the inputs' second moment: codes are then chosen by `gptq`, which takes no sparse weight; None rounds to nearest.
            scale: of the inputs, for the choice of what is kept, see `two_four_mask`.
        """
        kept = weight.detach()
        if self.sparse:
            mask = two_four_mask(weight, scale)
            quads = mask.view(self.out_features, -1, 4)
            pairs = quads.to(torch.uint8).argsort(dim=2, descending=True, stable=True)[..., :2].sort(dim=2).values
            nibbles = (pairs[..., 0] | (pairs[..., 1] << 2)).to(torch.uint8).view(-1)
            if nibbles.numel() % 2:
                nibbles = F.pad(nibbles, (0, 1))
            self.places.copy_(nibbles[::2] | (nibbles[1::2] << 4))
            kept = weight.view(self.out_features, -1, 4).gather(2, pairs).reshape(self.out_features, -1)
        if self.bits is None:
            self.values.copy_(kept)
            return self
        kept = kept.to(self.scale.dtype)
        stored, _ = (
            quantize_rows(kept, self.bits, self.group_size)
            if inputs is None
            else gptq_rows(kept, inputs, self.bits, self.group_size)
        )
        self.codes.copy_(stored.codes)
        self.scale.copy_(stored.scale)
        self.zero.copy_(stored.zero)
        return self

    def dense(self) -> Tensor:
        """The stored weight (out, in), without the low-rank path."""
        kept = self.kept_columns
        if self.bits is None:
            values = self.values
        else:
            full = -(-kept // self.group_size) * self.group_size
            stored = Quantized(self.codes, self.scale, self.zero)
            values = dequantize_rows(stored, (self.out_features, full), self.bits, self.group_size, kept)
        if not self.sparse:
            return values
        nibbles = torch.stack([self.places & 15, self.places >> 4], dim=1).view(-1)[: self.out_features * self.in_features // 4]
        pairs = torch.stack([nibbles & 3, nibbles >> 2], dim=1).view(self.out_features, -1, 2).to(torch.int64)
        dense = values.new_zeros(self.out_features, self.in_features // 4, 4)
        return dense.scatter(2, pairs, values.reshape(self.out_features, -1, 2)).view(self.out_features, self.in_features)

    def matrix(self) -> Tensor:
        """The whole dense matrix (out, in), the low-rank path included."""
        return self.dense() + self.up.weight @ self.down.weight if self.rank else self.dense()

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.dense(), self.bias)
        return out + self.up(self.down(x)) if self.rank else out

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, group_size={self.group_size}, "
            f"sparse={self.sparse}, rank={self.rank}, bias={self.bias is not None}"
        )

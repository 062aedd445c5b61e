"""What compression did to each layer, and what the model costs now."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Args:
        layer: its name.
        kind: linear, conv1d, conv2d or embedding.
        method: what was done, such as ``LoRD``; ``dense`` where the layer was left as it was.
        shape: rows and columns of its matrix.
        rank: of the factors, or of the compensation; None without.
        parameters, parameters_before: numbers of the layer, bias included. Codes of a few bits count as one number each.
        bytes, bytes_before: of its tensors, as they are saved.
        macs, macs_before: multiplications for one input: a token, or a patch of a convolution; an embedding's lookup has none.
        error: squared error over squared size of the layer's output, in the method's own metric; None where it was not measured.
    """

    layer: str
    kind: str
    method: str
    shape: tuple[int, int]
    rank: int | None
    parameters: int
    parameters_before: int
    bytes: int
    bytes_before: int
    macs: int
    macs_before: int
    error: float | None


@dataclass(frozen=True)
class CompressionReport:
    """What `compress` did.

    Args:
        layers: one row a layer that it was asked to compress.
        parameters, parameters_before: of the whole model.
        bytes, bytes_before: of the whole model's parameters and buffers, shared ones counted once.
        seconds: what it took.
    """

    layers: tuple[LayerReport, ...]
    parameters: int
    parameters_before: int
    bytes: int
    bytes_before: int
    seconds: float

    @property
    def ratio(self) -> float:
        """Bytes of the compressed layers over those of the same layers before."""
        return sum(row.bytes for row in self.layers) / max(1, sum(row.bytes_before for row in self.layers))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self) | {"ratio": self.ratio}

    def __str__(self) -> str:
        lines = [
            f"{self.parameters_before:,} parameters are {self.parameters:,}, {self.bytes_before:,} bytes are {self.bytes:,}; "
            f"the compressed layers take {100 * self.ratio:.3g}% of their bytes"
        ]
        for row in self.layers:
            rank = "" if row.rank is None else f", rank {row.rank}"
            error = "" if row.error is None else f", error {row.error:.2e}"
            lines.append(
                f"  {row.layer or '(the model)'}: {row.method}{rank}, {row.bytes_before:,} bytes are {row.bytes:,}{error}"
            )
        return "\n".join(lines)

"""Layers, heads and equivariant operations as ``nn.Module``."""

from corollary.nn.grassmann import GrassmannLinear

__all__ = ["GrassmannLinear"]

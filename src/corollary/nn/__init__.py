"""Layers, heads and equivariant operations as ``nn.Module``."""

from corollary.nn.gaunt import GauntConvolution, GauntManyBody, GauntTensorProduct
from corollary.nn.gcr import GrassmannLinear

__all__ = ["GauntTensorProduct", "GauntConvolution", "GauntManyBody", "GrassmannLinear"]

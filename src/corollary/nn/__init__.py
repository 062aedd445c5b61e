"""Layers, heads and equivariant operations as ``nn.Module``."""

from corollary.nn.gaunt import GauntConvolution, GauntManyBody, GauntTensorProduct
from corollary.nn.gcr import GrassmannLinear
from corollary.nn.lorentz import LorentzLinear, lorentz_inner, lorentz_lift, lorentz_mean

__all__ = [
    "GauntTensorProduct",
    "GauntConvolution",
    "GauntManyBody",
    "GrassmannLinear",
    "LorentzLinear",
    "lorentz_inner",
    "lorentz_lift",
    "lorentz_mean",
]

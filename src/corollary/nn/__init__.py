"""Layers, heads and equivariant operations as ``nn.Module``."""

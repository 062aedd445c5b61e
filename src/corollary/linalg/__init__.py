"""Numerics that everything stands on: matrix-free operators, sketches, manifolds."""

from corollary.linalg.manifolds import Euclidean, Grassmann, Manifold, ManifoldParameter, Transposed, manifold_of

__all__ = ["Manifold", "Euclidean", "Grassmann", "Transposed", "ManifoldParameter", "manifold_of"]

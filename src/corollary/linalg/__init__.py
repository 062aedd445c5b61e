"""Numerics that everything stands on: matrix-free operators, sketches, manifolds."""

from corollary.linalg.curvature import HessianOperator, SymmetricOperator, hessian_vector_product
from corollary.linalg.hutchinson import hutchinson_diagonal, rademacher_like
from corollary.linalg.manifolds import Euclidean, Grassmann, Manifold, ManifoldParameter, Transposed, manifold_of
from corollary.linalg.sketch import count_sketch, gaussian_sketch, srht

__all__ = [
    "HessianOperator",
    "SymmetricOperator",
    "hessian_vector_product",
    "hutchinson_diagonal",
    "rademacher_like",
    "Manifold",
    "Euclidean",
    "Grassmann",
    "Transposed",
    "ManifoldParameter",
    "manifold_of",
    "count_sketch",
    "gaussian_sketch",
    "srht",
]

"""Numerics that everything stands on: matrix-free operators, sketches, manifolds."""

from corollary.linalg.cg import CGResult, conjugate_gradient
from corollary.linalg.curvature import HessianOperator, SymmetricOperator, hessian_vector_product
from corollary.linalg.dct import dct, dct_columns
from corollary.linalg.fisher import EmpiricalFisherOperator, per_sample_gradients
from corollary.linalg.gauss_newton import FisherOperator, GaussNewtonOperator
from corollary.linalg.hutchinson import hutchinson_diagonal, rademacher_like
from corollary.linalg.lanczos import Extremes, Tridiagonal, extreme_eigenvalues, lanczos
from corollary.linalg.lowrank import leading_right_vectors, randomized_right_vectors
from corollary.linalg.manifolds import Euclidean, Grassmann, Manifold, ManifoldParameter, Transposed, manifold_of
from corollary.linalg.quantize import Quantized, dequantize, quantize
from corollary.linalg.sketch import count_sketch, gaussian_sketch, srht
from corollary.linalg.slq import SpectralDensity, TraceEstimate, spectral_density
from corollary.linalg.weighted_lowrank import LowRankSolution, weighted_low_rank

__all__ = [
    "EmpiricalFisherOperator",
    "HessianOperator",
    "SymmetricOperator",
    "hessian_vector_product",
    "GaussNewtonOperator",
    "FisherOperator",
    "conjugate_gradient",
    "CGResult",
    "hutchinson_diagonal",
    "per_sample_gradients",
    "rademacher_like",
    "lanczos",
    "Tridiagonal",
    "extreme_eigenvalues",
    "Extremes",
    "spectral_density",
    "SpectralDensity",
    "TraceEstimate",
    "Manifold",
    "Euclidean",
    "Grassmann",
    "Transposed",
    "ManifoldParameter",
    "manifold_of",
    "leading_right_vectors",
    "randomized_right_vectors",
    "weighted_low_rank",
    "LowRankSolution",
    "dct",
    "dct_columns",
    "Quantized",
    "quantize",
    "dequantize",
    "count_sketch",
    "gaussian_sketch",
    "srht",
]

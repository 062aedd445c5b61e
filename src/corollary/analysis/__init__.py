"""Diagnostics of models, representations and training."""

from corollary.analysis.compression import CompressionReport, evaluate_compression
from corollary.analysis.matrix_entropy import MatrixEntropy, matrix_entropy, nuclear_norm
from corollary.analysis.matrix_nuclear_norm import MatrixNuclearNorm, MatrixNuclearNormStream, matrix_nuclear_norm

__all__ = [
    "matrix_nuclear_norm",
    "MatrixNuclearNorm",
    "MatrixNuclearNormStream",
    "matrix_entropy",
    "MatrixEntropy",
    "nuclear_norm",
    "CompressionReport",
    "evaluate_compression",
]

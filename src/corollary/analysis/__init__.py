"""Diagnostics of models, representations and training."""

from corollary.analysis.compression import CompressionReport, evaluate_compression
from corollary.analysis.diff_tensors import CheckpointDiff, TensorDiff, diff_checkpoints, diff_tensors
from corollary.analysis.inspect_tensor import CheckpointReport, TensorReport, inspect_checkpoint, inspect_tensor
from corollary.analysis.lora_vs_full import IntruderReport, Intruders, intruder_dimensions
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
    "inspect_tensor",
    "inspect_checkpoint",
    "TensorReport",
    "CheckpointReport",
    "diff_tensors",
    "diff_checkpoints",
    "TensorDiff",
    "CheckpointDiff",
    "intruder_dimensions",
    "IntruderReport",
    "Intruders",
]

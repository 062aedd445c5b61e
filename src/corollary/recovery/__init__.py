"""Matrix and signal recovery as scikit-learn estimators."""

from corollary.recovery.matrix_completion import MatrixCompletion

__all__ = ["MatrixCompletion"]

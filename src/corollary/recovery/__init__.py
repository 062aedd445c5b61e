"""Matrix and signal recovery as scikit-learn estimators."""

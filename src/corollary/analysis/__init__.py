"""Diagnostics of models, representations and training."""

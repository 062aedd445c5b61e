"""Interleaved benchmarks of every component that has a peer: ``python -m benchmarks``."""

"""Numerics that everything stands on: matrix-free operators, sketches, manifolds."""

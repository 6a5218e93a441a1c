"""Orthogonal rotations built from Hadamard matrices."""

"""Torch arithmetic on formats: rounding, codes, packing and error measures."""

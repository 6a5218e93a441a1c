"""Tiny random transformers of diffusers' classes, and a call of each: what the adapters of model families are tried on.

Widths are such that rotations need factors of Paley's as well as Sylvester's.
"""

from tiny_transformers.cross_attention import CROSS_ATTENTION
from tiny_transformers.joint_attention import JOINT_ATTENTION
from tiny_transformers.one_stream import ONE_STREAM
from tiny_transformers.recipe import TEXT, TEXT_WIDTH, Noise, TinyTransformer

#: Name -> model, every class of every family.
TRANSFORMERS: dict[str, TinyTransformer] = {**CROSS_ATTENTION, **JOINT_ATTENTION, **ONE_STREAM}

__all__ = ["TEXT", "TEXT_WIDTH", "TRANSFORMERS", "Noise", "TinyTransformer"]

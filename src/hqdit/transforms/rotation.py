"""Random Hadamard rotations: R = diag(signs) H / sqrt(n), orthogonal, so that (x R)(W R)^T = x W^T.

| kind    | R                                    | online part                        | offline part                  |
|---------|--------------------------------------|------------------------------------|-------------------------------|
| none    | identity                             | nothing                            | nothing                       |
| full    | diag(s) H_n                          | all of it                          | W R                           |
| block   | diag(s) (I (x) H_B)                  | all of it                          | W R                           |
| heads   | diag(s) (H_heads (x) H_headdim)      | H_heads (x) I, across the heads    | W R; s and H_headdim into W_v |

The last row is for the attention output: its input is a weighted sum over tokens of value heads, (P V), and
(P V) (I (x) H) = P (V (I (x) H)), so the part within a head can be folded into the value projection.

Source: HQ-DiT (arXiv 2405.19751), section 3; QuaRot (arXiv 2404.00456) for the fold into W_v.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hqdit.errors import UsageError
from hqdit.randomness import random_stream
from hqdit.transforms.fwht import hadamard_transform
from hqdit.transforms.hadamard import HadamardFactors, hadamard_factors, require_factors, usable_blocks

ROTATION_KINDS = ("none", "full", "block", "heads")


@dataclass(frozen=True)
class RotationSpec:
    """Which rotation a layer's input gets; the random signs are data and live in the layer.

    Attributes:
        kind: one of `ROTATION_KINDS`.
        width: in_features of the layer.
        block: order of the (inner) Hadamard matrix: `width` for full, B for block, the head size for heads.
    """

    kind: str
    width: int
    block: int

    def __post_init__(self) -> None:
        is_whole = self.kind in ("none", "full")
        if (
            self.kind not in ROTATION_KINDS
            or self.block < 1
            or self.width % self.block
            or (is_whole and self.block != self.width)
        ):
            raise UsageError(
                f"rotation: found kind {self.kind!r} with blocks of {self.block} on width {self.width}, needed one of "
                f"{', '.join(ROTATION_KINDS)} with blocks that divide the width. Fix: use plan_rotation"
            )

    @property
    def is_identity(self) -> bool:
        """Whether nothing is rotated."""
        return self.kind == "none"

    @property
    def is_folded(self) -> bool:
        """Whether part of the rotation lives in the value projection."""
        return self.kind == "heads"

    @property
    def heads(self) -> int:
        """Number of blocks; the number of heads for kind heads."""
        return self.width // self.block

    def factors(self, where: str) -> HadamardFactors:
        """Factorization of the inner Hadamard matrix.

        Raises:
            NumericsError: there is none; the message names `where`.
        """
        return require_factors(self.block, where, self.width)

    def describe(self) -> str:
        """Kind and factorization in one word, as in "full 4*36(paley2)"."""
        if self.is_identity:
            return "none"
        inner = str(self.factors(self.kind))
        if self.kind == "heads":
            return f"heads {require_factors(self.heads, 'heads')} x {inner}"
        return f"full {inner}" if self.kind == "full" else f"block:{self.block} {inner}"

    def to_json(self) -> dict[str, Any]:
        """Plain values for the checkpoint."""
        if self.is_identity:
            return {"kind": "none"}
        return {"kind": self.kind, "block": self.block, "factors": self.describe()}

    @classmethod
    def from_json(cls, value: dict[str, Any], width: int) -> RotationSpec:
        """The inverse of `to_json` for a layer of `width` inputs."""
        kind = value["kind"]
        return cls(kind, width, width if kind == "none" else int(value["block"]))


def plan_rotation(rotation: str, width: int, where: str, head_dim: int | None = None) -> RotationSpec:
    """The rotation for one layer, checked before anything is changed.

    Args:
        rotation: "none", "full" or "block:B".
        width: in_features.
        where: layer name for the error message.
        head_dim: if given (and `rotation` is "full"), split into heads so that a part can be folded.

    Raises:
        UsageError: not one of these forms, or a block that does not divide the width or has no matrix.
        NumericsError: the full width has no Hadamard matrix.
    """
    if rotation == "none":
        return RotationSpec("none", width, width)
    if rotation == "full" and head_dim is not None:
        spec = RotationSpec("heads", width, head_dim)
        require_factors(spec.heads, f"{where} (across heads)")
    elif rotation == "full":
        spec = RotationSpec("full", width, width)
    else:
        block = parse_block(rotation)
        if width % block:
            raise UsageError(
                f"{where}: found --rotation {rotation} on width {width}, needed a block size that divides the "
                f"width. Fix: choose one of {usable_blocks(width)}"
            )
        spec = RotationSpec("block", width, block)
    spec.factors(where)
    return spec


def parse_block(rotation: str) -> int:
    """B of "block:B".

    Raises:
        UsageError: any other text, or an order without a matrix.
    """
    name, _, size = rotation.partition(":")
    if name != "block" or not (size.isascii() and size.isdecimal()) or int(size) < 2:
        raise UsageError(
            f"--rotation: found {rotation!r}, needed full, none or block:B with B a positive order. "
            "Fix: for example --rotation block:36"
        )
    if hadamard_factors(int(size)) is None:
        raise UsageError(
            f"--rotation: found {rotation!r}, but order {size} has no Hadamard matrix of the form 2^k * m (Paley I or "
            "II over a prime), needed one that has. Fix: for example --rotation block:36 or block:64"
        )
    return int(size)


def random_signs(width: int, seed: int, stream: str) -> Tensor:
    """Random +-1, float32 (width,); a function of `seed` and the name `stream` only."""
    bits = random_stream(seed, stream).integers(0, 2, width)
    return torch.from_numpy((1 - 2 * bits).astype(np.float32))


SIGNS_PER_BYTE = 8


def pack_signs(signs: Tensor) -> Tensor:
    """+-1 (n,) as bits, uint8 (ceil(n / 8),): bit i of byte j is set where element 8 j + i is -1."""
    bits = torch.nn.functional.pad((signs < 0).to(torch.uint8), (0, -len(signs) % SIGNS_PER_BYTE))
    weights = 2 ** torch.arange(SIGNS_PER_BYTE, dtype=torch.uint8, device=signs.device)
    return (bits.reshape(-1, SIGNS_PER_BYTE) * weights).sum(dim=1, dtype=torch.uint8)


def unpack_signs(packed: Tensor, count: int) -> Tensor:
    """The inverse of `pack_signs`: float32 (count,)."""
    bits = (packed.unsqueeze(1) >> torch.arange(SIGNS_PER_BYTE, dtype=torch.uint8, device=packed.device)) & 1
    return 1.0 - 2.0 * bits.flatten()[:count].to(torch.float32)


def _within_blocks(x: Tensor, block: int) -> Tensor:
    factors = require_factors(block, "rotation")
    rows = x.reshape(-1, block)
    return (hadamard_transform(rows, factors) * (1 / math.sqrt(block))).reshape(x.shape)


def _across_heads(x: Tensor, heads: int) -> Tensor:
    factors = require_factors(heads, "rotation across heads")
    by_head = x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads).transpose(-1, -2)
    mixed = hadamard_transform(by_head, factors) * (1 / math.sqrt(heads))
    return mixed.transpose(-1, -2).reshape(x.shape)


def rotate(x: Tensor, spec: RotationSpec, signs: Tensor | None) -> Tensor:
    """X R, the whole rotation: what the weight gets offline, and the activation unless a part is folded.

    Args:
        x: floating point (..., width).
        signs: +-1 (width,), or None where the rotation is the identity.

    Returns:
        Shape and dtype of `x`.

    Raises:
        ValueError: a rotation without its signs.
    """
    if spec.is_identity:
        return x
    if signs is None:
        raise ValueError(f"rotation {spec.kind} needs its signs")
    y = rotate_folded(x, spec, signs)
    return _across_heads(y, spec.heads) if spec.is_folded else y


def rotate_folded(x: Tensor, spec: RotationSpec, signs: Tensor) -> Tensor:
    """X diag(s) (I (x) H_headdim): the part of a `heads` rotation that lives in the value projection's output."""
    return _within_blocks(x * signs.to(x.dtype), spec.block)


def rotate_online(x: Tensor, spec: RotationSpec, signs: Tensor | None) -> Tensor:
    """The part of the rotation that is left for the forward pass (see the table above)."""
    return _across_heads(x, spec.heads) if spec.is_folded else rotate(x, spec, signs)


def unrotate(x: Tensor, spec: RotationSpec, signs: Tensor | None) -> Tensor:
    """X R^T, which takes a rotated weight back; a dense product in float64, because only dequantization needs it."""
    if spec.is_identity:
        return x
    identity = torch.eye(spec.width, dtype=torch.float64, device=x.device)
    return (x.to(torch.float64) @ rotate(identity, spec, signs).T).to(x.dtype)


def fold_into_value(
    weight: Tensor, bias: Tensor | None, spec: RotationSpec, signs: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Value projection whose output is already rotated within each head: diag(s) (I (x) H_headdim).

    Args:
        weight: (heads * head_dim, in_features) of W_v.
        bias: (heads * head_dim,) or None.
        spec: the `heads` rotation of the attention output.

    Returns:
        New weight and bias; v W' = (v W_v) diag(s) (I (x) H).
    """
    folded_bias = None if bias is None else rotate_folded(bias, spec, signs)
    return rotate_folded(weight.T, spec, signs).T.contiguous(), folded_bias

"""From a layer's input to levels: what is asked for, and its definition in plain torch.

The steps, in this order: a front (nothing, LayerNorm and modulation, GELU or SiLU), a static shift and scale per
channel, emphasised directions, the mean of each sample's tokens, the rotation, a static scale per channel after it, a
scale per token and group, rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from hqdit.kernels.activation import MEAN_SPEC, QuantizedActivation, quantize_activation, split_means
from hqdit.numerics.rounding import rung_tables
from hqdit.quantizers.emphasis import emphasise
from hqdit.quantizers.spec import ActivationSpec
from hqdit.transforms.hadamard import paley_matrix, require_factors
from hqdit.transforms.rotation import RotationSpec, rotate_online, unpack_signs

POINTWISE = ("gelu-tanh", "gelu-erf", "silu")


class LayerNormModulate(NamedTuple):
    """A front: LayerNorm(x) * (1 + scale) + shift, LayerNorm without weights. Source: DiT (arXiv 2212.09748), adaLN.

    Attributes:
        scale: float32 (samples, width); sample s holds for tokens s * T .. (s + 1) * T - 1, T = tokens / samples.
        shift: likewise.
        eps: added to the variance.
    """

    scale: Tensor
    shift: Tensor
    eps: float


class Pointwise(NamedTuple):
    """A front: one of `POINTWISE` applied to every element."""

    function: str


Front = LayerNormModulate | Pointwise | None


class InputTables(NamedTuple):
    """A layer's input in the words of a kernel: plain numbers, and small tensors on the CPU.

    Attributes:
        sylvester, paley: orders of the factors of the online Hadamard matrix; 1 and 1 without a rotation.
        inner: elements between neighbours of the transform; the head size for a transform across heads.
        paley_matrix: int8 (paley, paley), or None where paley = 1.
        thresholds: float32 (rungs - 1,); a number lies on the highest rung whose threshold is not above it.
        rung_levels: int8 (rungs,), ascending.
    """

    sylvester: int
    paley: int
    inner: int
    paley_matrix: Tensor | None
    thresholds: Tensor
    rung_levels: Tensor

    @property
    def normalization(self) -> float:
        """1 / sqrt of the order, which makes the Hadamard matrix orthogonal."""
        return 1 / math.sqrt(self.sylvester * self.paley)


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # the cache outlives the mode of the call that fills it
def input_tables(activation: ActivationSpec, rotation: RotationSpec) -> InputTables | None:
    """The tables of a layer's input, or None if its levels do not fit in int8."""
    if not activation.format.is_int8:
        return None
    sylvester, paley, inner, matrix = 1, 1, 1, None
    if not rotation.is_identity:
        order = rotation.heads if rotation.is_folded else rotation.block
        factors = require_factors(order, "rotation", rotation.width)
        sylvester, paley = factors.sylvester, factors.paley
        inner = rotation.block if rotation.is_folded else 1
        if paley > 1:
            matrix = torch.from_numpy(paley_matrix(paley, factors.construction).copy())
    thresholds, levels = rung_tables(activation.format, torch.device("cpu"))
    return InputTables(sylvester, paley, inner, matrix, thresholds, levels)


class InputPreparation(NamedTuple):
    """What a layer does to its input before the product.

    Attributes:
        activation: format, granularity and how scales are found.
        rotation: the rotation, of which the online part is done here.
        tables: `input_tables` of the two.
        rotation_signs: uint8 (ceil(width / 8),), see `transforms.rotation.pack_signs`; None without a rotation.
        channel_scale: float32 (width,): divides after the rotation; None for none.
        static_scale: float32 (1,) for granularity tensor.
        input_shift, input_scale: float32 (width,): (x - shift) * scale before the rotation; None for none.
        emphasis: bfloat16 (rank, width): directions that are stretched before the rotation (`quantizers.emphasis`).
        mean_tables: `input_tables` of `MEAN_SPEC` and the rotation, where means of samples are split off. They are made
            with the layer, because torch.compile cannot follow how.
    """

    activation: ActivationSpec
    rotation: RotationSpec
    tables: InputTables | None
    rotation_signs: Tensor | None = None
    channel_scale: Tensor | None = None
    static_scale: Tensor | None = None
    input_shift: Tensor | None = None
    input_scale: Tensor | None = None
    emphasis: Tensor | None = None
    mean_tables: InputTables | None = None

    @property
    def is_plain(self) -> bool:
        """Whether what precedes the rotation is a front, a static shift and a static scale, as kernels know it."""
        return self.emphasis is None and self.activation.centring != "sample"


def apply_front(x: Tensor, front: Front) -> Tensor:
    """The front's function of float32 tokens (tokens, width).

    Raises:
        ValueError: an unknown pointwise function.
    """
    if front is None:
        return x
    if isinstance(front, LayerNormModulate):
        by_sample = x.reshape(front.scale.shape[0], -1, x.shape[1])
        normal = torch.nn.functional.layer_norm(by_sample, (x.shape[1],), eps=front.eps)
        return (normal * (1 + front.scale.unsqueeze(1)) + front.shift.unsqueeze(1)).reshape(x.shape)
    return apply_pointwise(x, front.function)


def apply_pointwise(x: Tensor, function: str) -> Tensor:
    """`function` (one of `POINTWISE`) of every element.

    Raises:
        ValueError: another name.
    """
    if function == "silu":
        return torch.nn.functional.silu(x)
    if function not in POINTWISE:
        raise ValueError(f"found the function {function!r}, needed one of {', '.join(POINTWISE)}")
    return torch.nn.functional.gelu(x, approximate="tanh" if function == "gelu-tanh" else "none")


def before_rotation(x: Tensor, preparation: InputPreparation, front: Front = None) -> Tensor:
    """The steps up to the rotation, float32 (tokens, width); arguments as of `prepare_input`."""
    y = apply_front(x.to(torch.float32), front)
    if preparation.input_shift is not None:
        y = y - preparation.input_shift
    if preparation.input_scale is not None:
        y = y * preparation.input_scale
    return y if preparation.emphasis is None else emphasise(y, preparation.emphasis)


def in_parts(
    x: Tensor,
    preparation: InputPreparation,
    front: Front,
    samples: int,
    quantize: Callable[[Tensor, InputPreparation], QuantizedActivation],
) -> QuantizedActivation:
    """What precedes the rotation, means of samples split off if that is asked for, and `quantize` for the parts.

    Args:
        x: floating point (tokens, width).
        preparation: the layer's wishes.
        front: what comes before.
        samples: how many samples the tokens are of, equally many each.
        quantize: the rotation and what follows it.
    """
    y = before_rotation(x, preparation, front)
    spec = replace(preparation.activation, centring="none")
    of_rest = preparation._replace(activation=spec, input_shift=None, input_scale=None, emphasis=None)
    if preparation.activation.centring != "sample":
        return quantize(y, of_rest)
    mean, rest = split_means(y, samples)
    of_means = of_rest._replace(activation=MEAN_SPEC, tables=preparation.mean_tables)
    return quantize(rest, of_rest)._replace(mean=quantize(mean, of_means))


def prepare_input(
    x: Tensor, preparation: InputPreparation, front: Front = None, samples: int = 1
) -> QuantizedActivation:
    """The definition: every step by itself.

    Args:
        x: floating point (tokens, width).
        preparation: the layer's wishes.
        front: what comes before.
        samples: how many samples the tokens are of, equally many each; it matters where their means are split off.
    """
    return in_parts(x, preparation, front, samples, _rotate_and_round)


def _rotate_and_round(y: Tensor, preparation: InputPreparation) -> QuantizedActivation:
    """The rotation and what follows it; `y` float32 (tokens, width)."""
    bits = preparation.rotation_signs
    signs = None if bits is None else unpack_signs(bits, preparation.rotation.width)
    y = rotate_online(y, preparation.rotation, signs)
    if preparation.channel_scale is not None:
        y = y / preparation.channel_scale
    return quantize_activation(y, preparation.activation, preparation.static_scale)

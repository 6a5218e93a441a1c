"""The quantized linear operation: unpack the weight, multiply, rescale, and what may follow."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from hqdit.formats.number_format import NumberFormat
from hqdit.formats.packed_layout import codes_per_byte
from hqdit.kernels.activation import QuantizedActivation
from hqdit.kernels.preparation import apply_pointwise
from hqdit.numerics.codes import level_table, unpack_codes
from hqdit.quantizers.quantized_tensor import spread_scale


class PackedWeight(NamedTuple):
    """A weight as it lies in memory.

    Attributes:
        packed: uint8 (out_features, bytes per row); see `formats.packed_layout`.
        scale: float32 (1, 1), (out_features, 1) or (out_features, groups).
        format_index: uint8 (out_features,) into `formats`, or None.
        formats: the formats in use, of one storage size.
        level_tables: `packed_level_tables(formats)`.
        bias: floating point (out_features,) or None.
    """

    packed: Tensor
    scale: Tensor
    format_index: Tensor | None
    formats: tuple[NumberFormat, ...]
    level_tables: Tensor | None
    bias: Tensor | None = None


class Epilogue(NamedTuple):
    """What follows the bias, while the output is at hand: y = residual + gate * function(y).

    Attributes:
        function: one of `preparation.POINTWISE`, or None.
        gate: float32 (samples, out_features); sample s holds for tokens s * T .. (s + 1) * T - 1; None for none.
        residual: (tokens, out_features) in the dtype of the output; None for none.
    """

    function: str | None = None
    gate: Tensor | None = None
    residual: Tensor | None = None


NO_EPILOGUE = Epilogue()


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # the cache outlives the mode of the call that fills it
def packed_level_tables(formats: tuple[NumberFormat, ...]) -> Tensor | None:
    """Level of each of the 16 codes of 4-bit formats: int8 (formats, 16) on the CPU; None for wider formats."""
    if any(fmt.bits > 4 or not fmt.is_int8 for fmt in formats):
        return None
    codes = torch.arange(16)
    # Formats of fewer bits leave codes over, which checked files do not hold.
    return torch.stack([level_table(fmt, torch.device("cpu"))[codes % (1 << fmt.bits)] for fmt in formats])


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _levels_of_byte(fmt: NumberFormat, device: torch.device) -> Tensor:
    """The levels that each of the 256 bytes holds: (256, codes per byte)."""
    every_byte = torch.arange(256, dtype=torch.uint8, device=device).unsqueeze(1)
    codes = unpack_codes(every_byte, fmt)
    # A byte of a 6-bit format can hold numbers that are no code; decoding checked files never meets them.
    return level_table(fmt, device)[codes.long() % (1 << fmt.bits)]


def unpack_levels(weight: PackedWeight) -> Tensor:
    """Levels of a packed weight: int8 (float32 where they do not fit), (out_features, in_features)."""
    rows, row_bytes = weight.packed.shape
    tables = torch.stack([_levels_of_byte(fmt, weight.packed.device) for fmt in weight.formats])
    index = weight.packed.to(torch.int32)
    if weight.format_index is not None:
        index = index + 256 * weight.format_index.to(torch.int32).unsqueeze(1)
    levels = tables.flatten(0, 1).index_select(0, index.flatten())
    return levels.reshape(rows, row_bytes * codes_per_byte(weight.formats[0]))


def low_bit_linear(
    activation: QuantizedActivation, weight: PackedWeight, integer_product: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Y = sum over groups of scale_a * scale_w * (levels_a levels_w^T), plus bias.

    The order of the float32 operations is part of the definition: per group the int32 sum is converted to float32,
    multiplied by the token's scale, then by the weight's; groups are added in ascending order; the bias comes last.

    Args:
        activation: levels (tokens, in_features).
        weight: packed (out_features, ...).
        integer_product: A, W -> A W^T for int8 levels; formats that do not fit in int8 run dequantized in float32.

    Returns:
        float32 (tokens, out_features).
    """
    levels = unpack_levels(weight)
    in_features = levels.shape[1]
    if activation.levels.dtype == torch.int8 and levels.dtype == torch.int8:
        groups = max(activation.scale.shape[1], weight.scale.shape[1])
        size = in_features // groups
        output: Tensor | None = None
        for group in range(groups):
            columns = slice(group * size, (group + 1) * size)
            sums = integer_product(activation.levels[:, columns], levels[:, columns])
            token_scale = activation.scale[:, group if activation.scale.shape[1] > 1 else 0].unsqueeze(1)
            weight_scale = weight.scale[:, group if weight.scale.shape[1] > 1 else 0].unsqueeze(0)
            part = sums.to(torch.float32) * token_scale * weight_scale
            output = part if output is None else output + part
        assert output is not None  # a layer has at least one group
    else:
        dequantized = levels.to(torch.float32) * spread_scale(weight.scale, in_features)
        output = activation.dequantize() @ dequantized.T
    return output if weight.bias is None else output + weight.bias.to(torch.float32)


def apply_epilogue(output: Tensor, epilogue: Epilogue, dtype: torch.dtype) -> Tensor:
    """The definition of `Epilogue`, in float32, then rounded to `dtype`.

    Args:
        output: float32 (tokens, out_features), bias included.
        epilogue: what follows.
        dtype: of the result.
    """
    if epilogue.function is not None:
        output = apply_pointwise(output, epilogue.function)
    if epilogue.gate is not None:
        samples, width = epilogue.gate.shape
        output = (output.reshape(samples, -1, width) * epilogue.gate.unsqueeze(1)).reshape(output.shape)
    if epilogue.residual is not None:
        output = output + epilogue.residual.to(torch.float32)
    return output.to(dtype)

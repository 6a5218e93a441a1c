"""Rotation and rounding in Triton as a torch operation: checks before launch, the launch, shapes for tracing.

Formats travel by name and transforms by their orders, as in `product_operation`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from hqdit.formats.catalog import format_from_json
from hqdit.formats.number_format import NumberFormat
from hqdit.kernels.arguments import FLOAT32, require_one_device, require_tensor
from hqdit.kernels.preparation import POINTWISE
from hqdit.kernels.triton import tiles
from hqdit.kernels.triton.library import KERNEL_DTYPES, as_bits, require_device, shared_memory
from hqdit.numerics.rounding import rung_tables
from hqdit.quantizers.scaling import MIN_SCALE, absmax_divisor
from hqdit.quantizers.spec import ACTIVATION_SCALE_RULES
from hqdit.transforms.hadamard import hadamard_factors, paley_matrix

_library = torch.library.Library("hqdit", "FRAGMENT")
_library.define(
    "triton_rotate_quantize(Tensor x, Tensor? sign_bits, int sylvester, int paley, int inner, float normalization, "
    "Tensor? input_shift, Tensor? input_scale, Tensor? channel_scale, Tensor? static_scale, str scale_rule, "
    "float scale_factor, int group_size, str format, str? function, Tensor? mod_scale, Tensor? mod_shift, float eps) "
    "-> (Tensor, Tensor)"
)


# Tables live as long as the process: a CUDA graph may hold their addresses.
@functools.cache
@torch.inference_mode(False)
def _ladder(name: str, device: torch.device) -> tuple[NumberFormat, Tensor, Tensor]:
    """The format, its thresholds, float32, and its levels, int8."""
    fmt = format_from_json(name)
    if not fmt.is_int8:
        raise ValueError(f"hqdit::triton_rotate_quantize format: found {name}, needed one whose levels fit in int8")
    return (fmt, *rung_tables(fmt, device))


@functools.cache
@torch.inference_mode(False)
def _padded_paley(order: int, side: int, device: torch.device) -> Tensor:
    """The Paley factor of `order`, float32 (side, side), with zeros beyond it."""
    factors = hadamard_factors(order)
    if factors is None or factors.paley != order:
        raise ValueError(f"hqdit::triton_rotate_quantize paley: found {order}, needed the order of a Paley matrix")
    padded = torch.zeros(side, side)
    padded[:order, :order] = torch.from_numpy(paley_matrix(order, factors.construction).copy())
    return padded.to(device)


def _rotate_quantize(
    x: Tensor,
    sign_bits: Tensor | None,
    sylvester: int,
    paley: int,
    inner: int,
    normalization: float,
    input_shift: Tensor | None,
    input_scale: Tensor | None,
    channel_scale: Tensor | None,
    static_scale: Tensor | None,
    scale_rule: str,
    scale_factor: float,
    group_size: int,
    format: str,
    function: str | None,
    mod_scale: Tensor | None,
    mod_shift: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    op = "hqdit::triton_rotate_quantize"
    device = require_device(op, "x", x)
    require_tensor(f"{op} x", x, KERNEL_DTYPES, (None, None), device, rows=True)
    tokens, width = x.shape
    if (
        min(sylvester, paley, inner, group_size, width) < 1
        or sylvester & (sylvester - 1)
        or width % (sylvester * paley * inner)
        or width % group_size
    ):
        raise ValueError(
            f"{op}: found sylvester {sylvester}, paley {paley}, inner {inner} and groups of {group_size} on width "
            f"{width}, needed a power of two, and factors and groups that divide the width"
        )
    tile = tiles.token_tile(width, sylvester, paley, inner, group_size)
    if not tile.fits(shared_memory(device)):
        raise ValueError(
            f"{op}: found width {width}, which takes {tile.numbers} numbers with padding, more than one program can "
            "hold on this device. Fix: run this layer on another backend"
        )
    if function is not None and function not in POINTWISE:
        raise ValueError(f"{op}: found the function {function!r}, needed one of {', '.join(POINTWISE)} or None")
    if scale_rule not in ACTIVATION_SCALE_RULES or not 0 < scale_factor < math.inf:
        raise ValueError(
            f"{op}: found the scale rule {scale_rule!r} with factor {scale_factor}, needed one of "
            f"{', '.join(ACTIVATION_SCALE_RULES)} with a positive factor. Fix: run this layer on another backend"
        )
    if sign_bits is not None:
        require_tensor(f"{op} sign_bits", sign_bits, (torch.uint8,), (-(-width // 8),), device)
    for name, vector in (("input_shift", input_shift), ("input_scale", input_scale), ("channel_scale", channel_scale)):
        if vector is not None:
            require_tensor(f"{op} {name}", vector, FLOAT32, (width,), device)
    if static_scale is not None:
        require_tensor(f"{op} static_scale", static_scale, FLOAT32, (1,), device)
        if group_size != width or scale_rule != "absmax":
            raise ValueError(f"{op}: found a static scale with groups or another rule, needed it alone")
    if (mod_scale is None) != (mod_shift is None):
        raise ValueError(f"{op}: found one of mod_scale and mod_shift, needed both or neither")
    samples, front = 1, function
    if mod_scale is not None and mod_shift is not None:
        require_tensor(f"{op} mod_scale", mod_scale, FLOAT32, (None, width), device, rows=True)
        samples, front = mod_scale.shape[0], "layer-norm"
        require_tensor(f"{op} mod_shift", mod_shift, FLOAT32, (samples, width), device, rows=True)
        if function is not None or samples < 1 or tokens % samples:
            raise ValueError(
                f"{op}: found {samples} modulations for {tokens} tokens, needed a divisor of the tokens, and no "
                "pointwise function beside them"
            )
    fmt, thresholds, rung_levels = _ladder(format, device)

    levels = torch.empty((tokens, width), dtype=torch.int8, device=device)
    scale = torch.empty((tokens, width // group_size), dtype=torch.float32, device=device)
    if not tokens:
        return levels, scale
    from hqdit.kernels.triton.rotate_quantize import rotate_quantize_kernel

    unused = scale  # pointers that are not read still have to be pointers
    rule = scale_rule if static_scale is None else "static"
    rotate_quantize_kernel[(tokens,)](
        as_bits(x),
        levels if sign_bits is None else sign_bits,
        unused if paley == 1 else _padded_paley(paley, tile.paley, device),
        unused if input_shift is None else input_shift,
        unused if input_scale is None else input_scale,
        unused if channel_scale is None else channel_scale,
        unused if static_scale is None else static_scale,
        thresholds,
        rung_levels,
        unused if mod_scale is None else mod_scale,
        unused if mod_shift is None else mod_shift,
        levels,
        scale,
        x.stride(0),
        0 if mod_scale is None else mod_scale.stride(0),
        0 if mod_shift is None else mod_shift.stride(0),
        max(1, tokens // samples),
        eps,
        normalization,
        absmax_divisor(fmt.max_level, scale_factor),
        scale_factor,
        MIN_SCALE,
        WIDTH=width,
        IS_BFLOAT16=x.dtype == torch.bfloat16,
        FRONT=front,
        HAS_SHIFT=input_shift is not None,
        HAS_INPUT_SCALE=input_scale is not None,
        HAS_SIGNS=sign_bits is not None,
        HAS_CHANNEL_SCALE=channel_scale is not None,
        IS_ROTATED=sylvester * paley > 1,
        USED_ROWS=tile.used_rows,
        PALEY=paley,
        INNER=inner,
        ROWS=tile.rows,
        STAGES=sylvester.bit_length() - 1,
        PADDED_PALEY=tile.paley,
        PADDED_INNER=tile.inner,
        RULE=rule,
        IS_SIGNED=fmt.is_signed,
        GROUPS=width // group_size,
        GROUP_SIZE=group_size,
        PADDED_GROUPS=tile.groups,
        PADDED_GROUP_SIZE=tile.group_size,
        RUNGS=len(fmt.levels),
        STEPS=(len(fmt.levels) - 1).bit_length(),
        num_warps=tile.warps,
        enable_fp_fusion=False,
    )
    return levels, scale


def _rotate_quantize_shape(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    require_one_device("hqdit::triton_rotate_quantize", x, *(a for a in args if isinstance(a, Tensor)))
    scale = x.new_empty((x.shape[0], x.shape[1] // args[11]), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), scale


for _device in ("CPU", "CUDA"):
    _library.impl("triton_rotate_quantize", _rotate_quantize, _device)
torch.library.register_fake("hqdit::triton_rotate_quantize", _rotate_quantize_shape, lib=_library)

rotate_quantize = torch.ops.hqdit.triton_rotate_quantize

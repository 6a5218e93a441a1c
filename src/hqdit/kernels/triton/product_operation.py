"""The product in Triton as a torch operation: checks before launch, the launch, shapes for tracing.

Formats travel by name; the tables behind them are made on the device once. So a compiled graph holds tensors of one
device only, and nothing waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hqdit.formats.catalog import format_from_json
from hqdit.kernels.arguments import FLOAT32, require_one_device, require_tensor
from hqdit.kernels.linear import packed_level_tables
from hqdit.kernels.preparation import POINTWISE
from hqdit.kernels.triton import tiles
from hqdit.kernels.triton.library import KERNEL_DTYPES, as_bits, device_name, is_interpreted, require_device
from hqdit.quantizers.spec import INT32_MAX

LARGEST_INT8 = 128

_library = torch.library.Library("hqdit", "FRAGMENT")
_library.define(
    "triton_product(Tensor levels, Tensor token_scale, Tensor packed, str[] formats, Tensor? format_index, "
    "Tensor weight_scale, Tensor? bias, str? function, Tensor? gate, Tensor? residual, ScalarType dtype) -> Tensor"
)


# Tables live as long as the process: a CUDA graph may hold their addresses.
@functools.cache
@torch.inference_mode(False)
def _level_tables(formats: tuple[str, ...], device: torch.device) -> tuple[Tensor, int]:
    """int8 (formats, 16), and the largest magnitude in them."""
    tables = packed_level_tables(tuple(format_from_json(name) for name in formats)) if formats else None
    if tables is None:
        raise ValueError(
            f"hqdit::triton_product formats: found {', '.join(formats) or 'none'}, needed formats of at most 4 bits "
            "whose levels fit in int8"
        )
    return tables.to(device), int(tables.to(torch.int32).abs().max())


def _product(
    levels: Tensor,
    token_scale: Tensor,
    packed: Tensor,
    formats: Sequence[str],
    format_index: Tensor | None,
    weight_scale: Tensor,
    bias: Tensor | None,
    function: str | None,
    gate: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    op = "hqdit::triton_product"
    device = require_device(op, "levels", levels)
    require_tensor(f"{op} levels", levels, (torch.int8,), (None, None), device, rows=True)
    tokens, width = levels.shape
    require_tensor(f"{op} packed", packed, (torch.uint8,), (None, width // 2), device, rows=True)
    channels = packed.shape[0]
    require_tensor(f"{op} token_scale", token_scale, FLOAT32, (None, None), device)
    require_tensor(f"{op} weight_scale", weight_scale, FLOAT32, (None, None), device)
    groups = max(token_scale.shape[1], weight_scale.shape[1])
    for name, scale, rows in (("token_scale", token_scale, tokens), ("weight_scale", weight_scale, channels)):
        if scale.shape[0] not in (1, rows) or scale.shape[1] not in (1, groups):
            raise ValueError(
                f"{op} {name}: found {tuple(scale.shape)}, needed ({rows} or 1, {groups} or 1). Fix: give both sides "
                "the same groups"
            )
    if width < 2 or width % 2 or groups < 1 or width % groups or (groups > 1 and (width // groups) % 4):
        raise ValueError(
            f"{op}: found {groups} groups on width {width}, needed an even width and groups of a multiple of 4 that "
            "divide it. Fix: choose another group size"
        )
    if dtype not in KERNEL_DTYPES:
        raise TypeError(f"{op} dtype: found {dtype}, needed {' or '.join(map(str, KERNEL_DTYPES))}")
    if function is not None and function not in POINTWISE:
        raise ValueError(f"{op}: found the function {function!r}, needed one of {', '.join(POINTWISE)} or None")
    tables, largest = _level_tables(tuple(formats), device)
    if LARGEST_INT8 * largest * (width // groups) > INT32_MAX:
        raise ValueError(
            f"{op}: found weights up to {largest} in groups of {width // groups}, needed int32 sums of products with "
            f"levels up to {LARGEST_INT8}. Fix: use smaller groups"
        )
    if format_index is not None:
        require_tensor(f"{op} format_index", format_index, (torch.uint8,), (channels,), device)
    if bias is not None:
        require_tensor(f"{op} bias", bias, FLOAT32, (channels,), device)
    samples = 1
    if gate is not None:
        require_tensor(f"{op} gate", gate, FLOAT32, (None, channels), device, rows=True)
        samples = gate.shape[0]
        if samples < 1 or tokens % samples:
            raise ValueError(f"{op} gate: found {samples} rows for {tokens} tokens, needed a divisor")
    if residual is not None:
        require_tensor(f"{op} residual", residual, (dtype,), (tokens, channels), device, rows=True)

    out = torch.empty((tokens, channels), dtype=dtype, device=device)
    if not out.numel():
        return out
    # Triton is imported where a kernel runs.
    from hqdit.kernels.triton.product import product_kernel

    tile = tiles.product_tile(device_name(device), tokens, width, channels, groups)
    grid = (-(-tokens // tile.tokens) * -(-channels // tile.channels),)
    # Pointers that are not read still have to be pointers.
    product_kernel[grid](
        levels,
        packed,
        tables,
        packed if format_index is None else format_index,
        token_scale,
        weight_scale,
        token_scale if bias is None else bias,
        token_scale if gate is None else gate,
        as_bits(out if residual is None else residual),
        as_bits(out),
        tokens,
        channels,
        len(formats),
        levels.stride(0),
        packed.stride(0),
        token_scale.shape[1] if token_scale.shape[0] > 1 else 0,
        1 if token_scale.shape[1] > 1 else 0,
        weight_scale.shape[1] if weight_scale.shape[0] > 1 else 0,
        1 if weight_scale.shape[1] > 1 else 0,
        0 if gate is None else gate.stride(0),
        max(1, tokens // samples),
        0 if residual is None else residual.stride(0),
        GROUPS=groups,
        GROUP_SIZE=width // groups,
        HAS_INDEX=format_index is not None,
        HAS_BIAS=bias is not None,
        FUNCTION=function,
        HAS_GATE=gate is not None,
        HAS_RESIDUAL=residual is not None,
        IS_BFLOAT16=dtype == torch.bfloat16,
        BLOCK_M=tile.tokens,
        BLOCK_N=tile.channels,
        BLOCK_K=tile.depth,
        ROWS_TOGETHER=tile.rows_together,
        IS_COMPILED=not is_interpreted(),
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,
    )
    return out


def _product_shape(levels: Tensor, token_scale: Tensor, packed: Tensor, *args: Any) -> Tensor:
    require_one_device(
        "hqdit::triton_product", levels, token_scale, packed, *(a for a in args if isinstance(a, Tensor))
    )
    return levels.new_empty((levels.shape[0], packed.shape[0]), dtype=args[7])


for _device in ("CPU", "CUDA"):
    _library.impl("triton_product", _product, _device)
torch.library.register_fake("hqdit::triton_product", _product_shape, lib=_library)

product = torch.ops.hqdit.triton_product

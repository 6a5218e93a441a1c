"""The compiled kernels as torch operations (`torch.ops.hqdit`), with shapes for tracing and checks before pointers.

Every tensor is checked here for device, dtype, shape and strides; the compiled code checks nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hqdit.kernels import native_library as native
from hqdit.quantizers.scaling import absmax_divisor

_library = torch.library.Library("hqdit", "DEF")
_library.define(
    "rotate_quantize(Tensor x, Tensor? sign_bits, int sylvester, int paley, Tensor? paley_matrix, int inner, "
    "float normalization, Tensor? input_shift, Tensor? input_scale, Tensor? channel_scale, Tensor? static_scale, "
    "str scale_rule, float scale_factor, bool round_scales, int group_size, Tensor thresholds, Tensor rung_levels, "
    "str? function, Tensor? mod_scale, Tensor? mod_shift, float eps) -> (Tensor, Tensor)"
)
_library.define(
    "product(Tensor levels, Tensor token_scale, Tensor[] packed, Tensor[] level_tables, Tensor?[] format_index, "
    "Tensor[] weight_scale, Tensor?[] bias, str? function, Tensor? gate, Tensor? residual, ScalarType dtype) "
    "-> Tensor[]"
)
_library.define("attention(Tensor query, Tensor key, Tensor value) -> Tensor")


def _require(
    what: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: Sequence[int | None], rows: bool = False
) -> None:
    """Raise unless `tensor` is as the kernels need it.

    Args:
        what: operation and argument, for the message.
        tensor: to be looked at.
        dtypes: those allowed.
        shape: sizes; None for any.
        rows: rows may lie apart or overlap (a stride of 0), as long as each lies in one piece.

    Raises:
        TypeError: no tensor, another dtype or device.
        ValueError: another shape, strides that the kernels cannot follow, or an address between two elements.
    """
    if not isinstance(tensor, Tensor):  # torch lets None pass for a tensor
        raise TypeError(f"{what}: found {type(tensor).__name__}, needed a tensor")
    if tensor.device.type != "cpu":
        raise TypeError(f"{what}: found device {tensor.device}, needed cpu")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{what}: found {tensor.dtype}, needed {' or '.join(str(dtype) for dtype in dtypes)}")
    found = tuple(tensor.shape)
    if len(found) != len(shape) or any(w is not None and f != w for f, w in zip(found, shape, strict=True)):
        needed = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{what}: found shape {found}, needed ({needed})")
    in_one_piece = (tensor.shape[-1] <= 1 or tensor.stride(-1) == 1) if rows else tensor.is_contiguous()
    if tensor.numel() and not in_one_piece:
        raise ValueError(f"{what}: found strides {tensor.stride()}, needed elements that follow each other")
    if tensor.data_ptr() % tensor.element_size():
        raise ValueError(f"{what}: found an address that is no multiple of {tensor.element_size()}, needed one that is")


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


FLOAT32 = (torch.float32,)
KERNEL_DTYPES = tuple(native.ELEMENT)
LARGEST_HEAD = 256
INT32_MAX = 2**31 - 1


def _rotate_quantize(
    x: Tensor,
    sign_bits: Tensor | None,
    sylvester: int,
    paley: int,
    paley_matrix: Tensor | None,
    inner: int,
    normalization: float,
    input_shift: Tensor | None,
    input_scale: Tensor | None,
    channel_scale: Tensor | None,
    static_scale: Tensor | None,
    scale_rule: str,
    scale_factor: float,
    round_scales: bool,
    group_size: int,
    thresholds: Tensor,
    rung_levels: Tensor,
    function: str | None,
    mod_scale: Tensor | None,
    mod_shift: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    op = "hqdit::rotate_quantize"
    _require(f"{op} x", x, KERNEL_DTYPES, (None, None), rows=True)
    tokens, width = x.shape
    _require(f"{op} rung_levels", rung_levels, (torch.int8, torch.uint8), (None,))
    rungs = len(rung_levels)
    block = sylvester * paley * inner
    if (
        min(sylvester, paley, inner, group_size, width) < 1
        or sylvester & (sylvester - 1)
        or width % block
        or width % group_size
    ):
        raise ValueError(
            f"{op}: found sylvester {sylvester}, paley {paley}, inner {inner} and groups of {group_size} on width "
            f"{width}, needed a power of two, and factors and groups that divide the width"
        )
    if not 2 <= rungs <= 256:
        raise ValueError(f"{op} rung_levels: found {rungs} levels, needed 2 to 256")
    if function is not None and function not in native.FRONT_POINTWISE:
        raise ValueError(f"{op}: found the function {function!r}, needed one of {', '.join(native.FRONT_POINTWISE)}")
    if scale_rule not in native.SCALE_RULE or not 0 < scale_factor < math.inf:
        raise ValueError(
            f"{op}: found the scale rule {scale_rule!r} with factor {scale_factor}, needed one of "
            f"{', '.join(native.SCALE_RULE)} and a positive factor"
        )
    _require(f"{op} thresholds", thresholds, FLOAT32, (rungs - 1,))
    top = int(rung_levels[-1])
    if top < 1:
        raise ValueError(f"{op} rung_levels: found {top} as the largest level, needed a positive one")
    if (paley_matrix is None) != (paley == 1):
        raise ValueError(f"{op} paley_matrix: found {type(paley_matrix).__name__}, needed a matrix where paley > 1")
    if paley_matrix is not None:
        _require(f"{op} paley_matrix", paley_matrix, (torch.int8,), (paley, paley))
    if sign_bits is not None:
        _require(f"{op} sign_bits", sign_bits, (torch.uint8,), (-(-width // 8),))
    for name, vector in (("input_shift", input_shift), ("input_scale", input_scale), ("channel_scale", channel_scale)):
        if vector is not None:
            _require(f"{op} {name}", vector, FLOAT32, (width,))
    if static_scale is not None:
        _require(f"{op} static_scale", static_scale, FLOAT32, (1,))
        if group_size != width or round_scales or (scale_rule, scale_factor) != ("absmax", 1):
            raise ValueError(f"{op}: found a static scale with groups or another rule, needed it alone")
    args = native.RotateQuantizeArgs()
    args.front = native.FRONT_NONE if function is None else native.FRONT_POINTWISE[function]
    if mod_scale is not None and mod_shift is not None:
        _require(f"{op} mod_scale", mod_scale, FLOAT32, (None, width), rows=True)
        samples = mod_scale.shape[0]
        _require(f"{op} mod_shift", mod_shift, FLOAT32, (samples, width), rows=True)
        if function is not None or samples < 1 or tokens % samples:
            raise ValueError(
                f"{op}: found {samples} modulations for {tokens} tokens, needed a divisor of the tokens, and no "
                "pointwise function beside them"
            )
        if mod_scale.stride(0) != mod_shift.stride(0):  # the kernel knows one stride for both
            mod_scale, mod_shift = mod_scale.contiguous(), mod_shift.contiguous()
        args.front = native.FRONT_LAYER_NORM_MODULATE
        args.mod_scale, args.mod_shift = mod_scale.data_ptr(), mod_shift.data_ptr()
        args.mod_stride, args.tokens_per_mod = mod_scale.stride(0), max(1, tokens // samples)
    elif mod_scale is not None or mod_shift is not None:
        raise ValueError(f"{op}: found one of mod_scale and mod_shift, needed both or neither")

    levels = torch.empty((tokens, width), dtype=rung_levels.dtype)
    scale = torch.empty((tokens, width // group_size), dtype=torch.float32)
    args.x, args.x_stride, args.x_type = x.data_ptr(), x.stride(0), native.ELEMENT[x.dtype]
    args.tokens, args.width, args.layer_norm_eps = tokens, width, eps
    args.input_shift, args.input_scale = _address(input_shift), _address(input_scale)
    args.sign_bits, args.sylvester, args.paley = _address(sign_bits), sylvester, paley
    args.paley_matrix, args.inner, args.normalization = _address(paley_matrix), inner, normalization
    args.channel_scale, args.static_scale = _address(channel_scale), _address(static_scale)
    args.rule = native.SCALE_RULE[scale_rule] if static_scale is None else native.SCALE_STATIC
    args.round_scales, args.rms_factor, args.top = round_scales, scale_factor, absmax_divisor(top, scale_factor)
    args.group_size, args.rungs, args.thresholds = group_size, rungs, thresholds.data_ptr()
    args.rung_levels, args.levels_unsigned = rung_levels.data_ptr(), rung_levels.dtype == torch.uint8
    args.levels, args.levels_stride, args.scale = levels.data_ptr(), width, scale.data_ptr()
    native.call("hqdit_rotate_quantize", args)
    return levels, scale


def _product(
    levels: Tensor,
    token_scale: Tensor,
    packed: Sequence[Tensor],
    level_tables: Sequence[Tensor],
    format_index: Sequence[Tensor | None],
    weight_scale: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    function: str | None,
    gate: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    op = "hqdit::product"
    _require(f"{op} levels", levels, (torch.int8, torch.uint8), (None, None), rows=True)
    tokens, width = levels.shape
    _require(f"{op} token_scale", token_scale, FLOAT32, (None, None))
    if token_scale.shape[0] not in (1, tokens):
        raise ValueError(f"{op} token_scale: found {token_scale.shape[0]} rows, needed {tokens} or 1")
    if dtype not in native.ELEMENT:
        raise TypeError(f"{op} dtype: found {dtype}, needed {' or '.join(str(kind) for kind in native.ELEMENT)}")
    if function not in native.FUNCTION:
        raise ValueError(f"{op}: found the function {function!r}, needed gelu-tanh, gelu-erf or None")
    count = len(packed)
    if not count or {len(level_tables), len(format_index), len(weight_scale), len(bias)} != {count}:
        raise ValueError(f"{op}: found lists of different lengths, needed one entry for each of {count} weights")
    if (gate is not None or residual is not None) and count != 1:
        raise ValueError(f"{op}: found a gate or residual for {count} weights, needed one weight")
    if (gate is None) != (residual is None):
        raise ValueError(f"{op}: found a gate without a residual or the other way round, needed both or neither")
    for scale in weight_scale:
        _require(f"{op} weight_scale", scale, FLOAT32, (None, None))
    groups = max([token_scale.shape[1], *(scale.shape[1] for scale in weight_scale)])
    if width < 2 or width % 2 or groups < 1 or width % groups or (groups > 1 and (width // groups) % 4):
        raise ValueError(f"{op}: found {groups} groups on width {width}, needed groups of a multiple of 4 that fit it")

    outputs: list[Tensor] = []
    weights = (native.Weight * count)()
    for i, weight in enumerate(weights):
        _require(f"{op} packed", packed[i], (torch.uint8,), (None, width // 2), rows=True)
        rows = packed[i].shape[0]
        _require(f"{op} level_tables", level_tables[i], (torch.int8,), (None, 16))
        if not len(level_tables[i]):
            raise ValueError(f"{op} level_tables: found none, needed at least one")
        _require_sums_fit(op, levels, level_tables[i], width // groups)
        index = format_index[i]
        if index is not None:
            _require(f"{op} format_index", index, (torch.uint8,), (rows,))
            if rows and int(index.max()) >= level_tables[i].shape[0]:
                raise ValueError(
                    f"{op} format_index: found {int(index.max())}, needed less than {level_tables[i].shape[0]}"
                )
        scale, vector = weight_scale[i], bias[i]
        if scale.shape[0] not in (1, rows) or {scale.shape[1], token_scale.shape[1]} - {1, groups}:
            raise ValueError(
                f"{op} weight_scale: found {tuple(scale.shape)} beside {token_scale.shape[1]} token scales, needed "
                f"({rows} or 1, {groups} or 1)"
            )
        if vector is not None:
            _require(f"{op} bias", vector, FLOAT32, (rows,))
        output = torch.empty((tokens, rows), dtype=dtype)
        outputs.append(output)
        weight.packed, weight.row_bytes, weight.rows = packed[i].data_ptr(), packed[i].stride(0), rows
        weight.level_tables, weight.format_index = level_tables[i].data_ptr(), _address(index)
        weight.scale, weight.bias = scale.data_ptr(), _address(vector)
        weight.scale_row_stride = scale.stride(0) if scale.shape[0] > 1 else 0
        weight.scale_group_stride = 1 if scale.shape[1] > 1 else 0
        weight.out, weight.out_stride, weight.tokens_per_gate = output.data_ptr(), rows, 1
        if gate is not None and residual is not None:
            _require(f"{op} gate", gate, FLOAT32, (None, rows), rows=True)
            _require(f"{op} residual", residual, (dtype,), (tokens, rows), rows=True)
            samples = gate.shape[0]
            if samples < 1 or tokens % samples:
                raise ValueError(f"{op} gate: found {samples} rows for {tokens} tokens, needed a divisor")
            weight.gate, weight.gate_stride = gate.data_ptr(), gate.stride(0)
            weight.tokens_per_gate = max(1, tokens // samples)
            weight.residual, weight.residual_stride = residual.data_ptr(), residual.stride(0)

    args = native.ProductArgs()
    args.levels, args.levels_stride = levels.data_ptr(), levels.stride(0)
    args.levels_unsigned = levels.dtype == torch.uint8
    args.token_scale = token_scale.data_ptr()
    args.token_scale_stride = token_scale.shape[1] if token_scale.shape[0] > 1 else 0
    args.token_scale_group_stride = 1 if token_scale.shape[1] > 1 else 0
    args.tokens, args.width, args.group_size = tokens, width, width // groups
    args.weights, args.weight_count = weights, count
    args.activation, args.out_type = native.FUNCTION[function], native.ELEMENT[dtype]
    native.call("hqdit_product", args)
    return outputs


def _require_sums_fit(op: str, levels: Tensor, tables: Tensor, group_size: int) -> None:
    """Raise ValueError if a sum of `group_size` products could leave int32; any levels fit up to a width of 65,792."""
    if 255 * 128 * group_size <= INT32_MAX or not levels.numel():
        return
    largest = [max(abs(int(end)) for end in part.aminmax()) for part in (levels, tables)]
    if largest[0] * largest[1] * group_size > INT32_MAX:
        raise ValueError(
            f"{op}: found levels up to {largest[0]} and weights up to {largest[1]} in groups of {group_size}, needed "
            f"sums of at most {INT32_MAX}"
        )


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    op = "hqdit::attention"
    _require(f"{op} query", query, KERNEL_DTYPES, (None, None, None, None), rows=True)
    batch, tokens, heads, head_dim = query.shape
    _require(f"{op} key", key, (query.dtype,), (batch, None, heads, head_dim), rows=True)
    _require(f"{op} value", value, (query.dtype,), (batch, key.shape[1], heads, head_dim), rows=True)
    if not 1 <= head_dim <= LARGEST_HEAD or key.shape[1] < 1:
        raise ValueError(
            f"{op}: found head size {head_dim} and {key.shape[1]} keys, needed a head size of 1 to {LARGEST_HEAD} and "
            "at least one key"
        )
    out = torch.empty((batch, tokens, heads, head_dim), dtype=query.dtype)
    args = native.AttentionArgs()
    for name, tensor in (("q", query), ("k", key), ("v", value), ("out", out)):
        strides = tensor.stride()
        setattr(args, name, native.AttentionTensor(tensor.data_ptr(), *strides[:3]))
    args.type, args.batch, args.heads, args.head_dim = native.ELEMENT[query.dtype], batch, heads, head_dim
    args.query_tokens, args.key_tokens, args.softmax_scale = tokens, key.shape[1], head_dim**-0.5
    native.call("hqdit_attention", args)
    return out


def _require_one_device(op: str, *tensors: Tensor | Sequence[Tensor | None] | None) -> None:
    """Raise TypeError if tensors for tracing, which have no data, come together with others.

    torch asks for shapes alone as soon as one tensor is on the meta device, and would return memory without contents.
    """
    devices = set()
    for entry in tensors:
        parts = [entry] if isinstance(entry, Tensor) else entry or ()
        devices |= {part.device for part in parts if part is not None}
    if len(devices) > 1:
        raise TypeError(f"{op}: found devices {', '.join(sorted(map(str, devices)))}, needed one")


def _rotate_quantize_shape(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    group_size, rung_levels = args[13], args[15]
    _require_one_device("hqdit::rotate_quantize", x, *(entry for entry in args if isinstance(entry, Tensor)))
    levels = x.new_empty(x.shape, dtype=rung_levels.dtype)
    return levels, x.new_empty((x.shape[0], x.shape[1] // group_size), dtype=torch.float32)


def _product_shape(levels: Tensor, token_scale: Tensor, packed: Sequence[Tensor], *args: Any) -> list[Tensor]:
    lists, gate, residual, dtype = args[:4], args[5], args[6], args[7]
    _require_one_device("hqdit::product", levels, token_scale, packed, *lists, gate, residual)
    return [levels.new_empty((levels.shape[0], weight.shape[0]), dtype=dtype) for weight in packed]


def _attention_shape(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    _require_one_device("hqdit::attention", query, key, value)
    return query.new_empty(query.shape)


for _name, _kernel, _shape in (
    ("rotate_quantize", _rotate_quantize, _rotate_quantize_shape),
    ("product", _product, _product_shape),
    ("attention", _attention, _attention_shape),
):
    _library.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"hqdit::{_name}", _shape, lib=_library)

rotate_quantize = torch.ops.hqdit.rotate_quantize
product = torch.ops.hqdit.product
attention = torch.ops.hqdit.attention

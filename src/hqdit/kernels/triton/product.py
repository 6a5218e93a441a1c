"""The product on a GPU: packed codes to levels in registers, int8 products with int32 sums, scales and epilogue.

y = residual + gate * f(sum over groups of float(sum of levels_a * levels_w) * token scale * weight scale + bias), every
float32 operation rounded by itself and in the order of `kernels.linear.low_bit_linear` and `apply_epilogue`. Integer
sums are exact, so no tile shape changes a bit of the result; the functions are those of `elementwise`.
"""

import triton
import triton.language as tl

from hqdit.kernels.triton.elementwise import gelu_erf, gelu_tanh, load_float, silu, store_float


@triton.jit
def product_kernel(
    levels,  # int8 (M, K), rows `levels_stride` apart
    packed,  # uint8 (N, K / 2), rows `packed_stride` apart
    tables,  # int8 (formats, 16)
    format_index,  # uint8 (N,)
    token_scale,  # float32, strides token_stride and token_group_stride
    weight_scale,  # float32, strides weight_stride and weight_group_stride
    bias,  # float32 (N,)
    gate,  # float32 (samples, N)
    residual,  # as out
    out,  # (M, N)
    M,
    N,
    formats,
    levels_stride,
    packed_stride,
    token_stride,
    token_group_stride,
    weight_stride,
    weight_group_stride,
    gate_stride,
    tokens_per_gate,
    residual_stride,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FUNCTION: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_BFLOAT16: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS_TOGETHER: tl.constexpr,
):
    """One tile of `BLOCK_M` tokens by `BLOCK_N` output channels; a grid of one dimension."""
    # Tiles of a few rows of tiles side by side, column after column, so that both operands stay in the L2 cache.
    tile_rows, tile_columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile, in_band = tl.program_id(0), ROWS_TOGETHER * tile_columns
    first_row = tile // in_band * ROWS_TOGETHER
    band_rows = tl.minimum(tile_rows - first_row, ROWS_TOGETHER)
    m = (first_row + tile % in_band % band_rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % in_band // band_rows * BLOCK_N + tl.arange(0, BLOCK_N)
    is_token, is_channel = m < M, n < N

    level_rows = levels + m.to(tl.int64)[:, None] * levels_stride
    packed_rows = packed + n.to(tl.int64)[:, None] * packed_stride
    table_of_row = tl.zeros((BLOCK_N,), dtype=tl.int32)
    is_known = is_channel
    if HAS_INDEX:
        index = tl.load(format_index + n, mask=is_channel, other=0).to(tl.int32)
        is_known = index < formats
        table_of_row = tl.where(is_known, index, 0) * 16

    total = tl.full((BLOCK_M, BLOCK_N), 0.0, dtype=tl.float32)
    for group in range(GROUPS):
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        for start in range(0, GROUP_SIZE, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            pairs = start // 2 + tl.arange(0, BLOCK_K // 2)
            a = tl.load(
                level_rows + (group * GROUP_SIZE + k)[None, :],
                mask=is_token[:, None] & (k < GROUP_SIZE)[None, :],
                other=0,
            )
            codes = tl.load(
                packed_rows + (group * (GROUP_SIZE // 2) + pairs)[None, :],
                mask=is_channel[:, None] & (pairs < GROUP_SIZE // 2)[None, :],
                other=0,
            ).to(tl.int32)
            low = tl.load(tables + (table_of_row[:, None] + (codes & 15)))
            high = tl.load(tables + (table_of_row[:, None] + (codes >> 4)))
            b = tl.reshape(tl.join(low, high), (BLOCK_N, BLOCK_K))
            sums = tl.dot(a, tl.trans(b), acc=sums, out_dtype=tl.int32)
        ts = tl.load(token_scale + m.to(tl.int64) * token_stride + group * token_group_stride, mask=is_token, other=0.0)
        ws = tl.load(
            weight_scale + n.to(tl.int64) * weight_stride + group * weight_group_stride, mask=is_channel, other=0.0
        )
        part = sums.to(tl.float32) * ts[:, None] * ws[None, :]
        total = part if GROUPS == 1 else tl.where(group == 0, part, total + part)  # 0 + -0 would lose its sign

    if HAS_BIAS:
        total += tl.load(bias + n, mask=is_channel, other=0.0)[None, :]
    if FUNCTION == "gelu-tanh":
        total = gelu_tanh(total)
    elif FUNCTION == "gelu-erf":
        total = gelu_erf(total)
    elif FUNCTION == "silu":
        total = silu(total)
    inside = is_token[:, None] & is_channel[None, :]
    if HAS_GATE:
        samples = (m // tokens_per_gate).to(tl.int64)
        total *= tl.load(gate + samples[:, None] * gate_stride + n[None, :], mask=inside, other=0.0)
    if HAS_RESIDUAL:
        total += load_float(residual + m.to(tl.int64)[:, None] * residual_stride + n[None, :], inside, IS_BFLOAT16)
    if HAS_INDEX:
        # An index beyond the tables cannot be reported from here; it must not pass for a number either.
        total = tl.where(is_known[None, :], total, float("nan"))
    store_float(out + m.to(tl.int64)[:, None] * N + n[None, :], total, inside, IS_BFLOAT16)

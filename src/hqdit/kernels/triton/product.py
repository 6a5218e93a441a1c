"""The product on a GPU: packed codes to levels in registers, int8 products with int32 sums, scales and epilogue.

y = residual + gate * f(sum over groups of float(sum of levels_a * levels_w) * token scale * weight scale + bias), every
float32 operation rounded by itself and in the order of `kernels.linear.low_bit_linear` and `apply_epilogue`. Integer
sums are exact, so no tile shape changes a bit of the result; the functions are those of `elementwise`.
"""

import triton
import triton.language as tl

from hqdit.kernels.triton.elementwise import gelu_erf, gelu_tanh, load_float, silu, store_float

# Two levels of each packed byte, the low nibble's in the low byte. A table of 16 levels is four words of four. `prmt`
# picks four bytes out of two words by the lower three bits of four nibbles: once among levels 0 to 7, once among 8 to
# 15, and once more between the two, by bit 3 of each nibble. tests/kernels/test_triton_decode.py runs this text.

#: Four bytes $2 with one table $3, $7, $11, $15 (each word comes four times, once for each byte) to $0 and $1.
DECODE_FOUR_BYTES = tl.constexpr("""{
    .reg .b32 low, high, index, choice;
    and.b32 index, $2, 0x77777777;
    shr.u32 choice, $2, 1;
    and.b32 choice, choice, 0x44444444;
    or.b32 choice, choice, 0x32103210;
    prmt.b32 low, $3, $7, index;
    prmt.b32 high, $11, $15, index;
    prmt.b32 $0, low, high, choice;
    shr.u32 index, index, 16;
    shr.u32 choice, choice, 16;
    prmt.b32 low, $3, $7, index;
    prmt.b32 high, $11, $15, index;
    prmt.b32 $1, low, high, choice;
}""")
#: One byte $1 with its own table $2, $3, $4, $5 to $0.
DECODE_ONE_BYTE = tl.constexpr("""{
    .reg .b32 code, low, high, index, choice;
    cvt.u32.u8 code, $1;
    and.b32 index, code, 0x77;
    shr.u32 choice, code, 1;
    and.b32 choice, choice, 0x44;
    or.b32 choice, choice, 0x10;
    prmt.b32 low, $2, $3, index;
    prmt.b32 high, $4, $5, index;
    prmt.b32 low, low, high, choice;
    cvt.u16.u32 $0, low;
}""")


@triton.jit
def decode(codes, words_0, words_1, words_2, words_3, HAS_INDEX: tl.constexpr):
    """Levels of packed codes, in pairs: int16 of the shape of `codes`; with HAS_INDEX, words by row."""
    if HAS_INDEX:
        return tl.inline_asm_elementwise(
            DECODE_ONE_BYTE, "=h,h,r,r,r,r", [codes, words_0, words_1, words_2, words_3], tl.int16, is_pure=True, pack=1
        )
    return tl.inline_asm_elementwise(
        DECODE_FOUR_BYTES,
        "=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [codes, words_0, words_1, words_2, words_3],
        tl.int16,
        is_pure=True,
        pack=4,
    )


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
    IS_COMPILED: tl.constexpr,
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

    if IS_COMPILED:
        words = tables.to(tl.pointer_type(tl.int32))
        if HAS_INDEX:
            words += table_of_row[:, None] // 4
        words_0, words_1, words_2, words_3 = tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3)

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
            )
            if IS_COMPILED:
                pairs_of_levels = decode(codes, words_0, words_1, words_2, words_3, HAS_INDEX)
                low, high = pairs_of_levels.to(tl.int8), (pairs_of_levels >> 8).to(tl.int8)
            else:  # the interpreter has no assembly
                low = tl.load(tables + (table_of_row[:, None] + (codes.to(tl.int32) & 15)))
                high = tl.load(tables + (table_of_row[:, None] + (codes.to(tl.int32) >> 4)))
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

"""Rotation and rounding on a GPU: one program for each token, which it reads once and keeps in registers.

The steps are those of `kernels.preparation.prepare_input`, in float32, none fused with another. A token is seen as
(blocks, Sylvester order, Paley order, inner), as in docs/kernels.md, and the last two and the product of the first two
are padded to powers of two, which is what tiles are made of (`tiles.token_tile`). Padding holds zeros, and is masked
where it would count. The Sylvester factor is stages of sums and differences in the order of
`transforms.fwht.hadamard_transform`. The Paley factor is a product with a matrix of +-1 on tensor cores, in three
parts that keep float32 accuracy.
"""

import triton
import triton.language as tl

from hqdit.kernels.triton.elementwise import gelu_erf, gelu_tanh, load_float, silu


@triton.jit
def rotate(
    y, paley_matrix, ROWS: tl.constexpr, STAGES: tl.constexpr, PADDED_PALEY: tl.constexpr, PADDED_INNER: tl.constexpr
):
    """H y of each block of a padded token, float32 (ROWS * PADDED_PALEY * PADDED_INNER,), not normalised."""
    TILE: tl.constexpr = ROWS * PADDED_PALEY * PADDED_INNER
    if PADDED_PALEY > 1:
        order = tl.arange(0, PADDED_PALEY)
        matrix = tl.load(paley_matrix + order[:, None] * PADDED_PALEY + order[None, :])
        by_factor = tl.permute(tl.reshape(y, (ROWS, PADDED_PALEY, PADDED_INNER)), (0, 2, 1))
        rows = tl.reshape(by_factor, (ROWS * PADDED_INNER, PADDED_PALEY))
        # A float32 is the sum of two TF32 numbers up to 2^-22 of it, and +-1 is such a number.
        rows = tl.dot(rows, matrix, input_precision="tf32x3")
        y = tl.reshape(tl.permute(tl.reshape(rows, (ROWS, PADDED_INNER, PADDED_PALEY)), (0, 2, 1)), (TILE,))
    for stage in tl.static_range(STAGES):
        pairs = tl.reshape(y, ((ROWS >> stage) // 2, 2, (PADDED_PALEY * PADDED_INNER) << stage))
        low, high = tl.split(tl.permute(pairs, (0, 2, 1)))
        y = tl.reshape(tl.permute(tl.join(low + high, low - high), (0, 2, 1)), (TILE,))
    return y


@triton.jit
def rung_of(q, thresholds, RUNGS: tl.constexpr, STEPS: tl.constexpr):
    """Highest rung whose threshold is not above `q`: a binary search; a NaN gets rung 0."""
    rung = tl.full(q.shape, 0, dtype=tl.int32)
    for step in tl.static_range(STEPS):
        higher = rung + (1 << (STEPS - 1 - step))
        exists = higher < RUNGS
        threshold = tl.load(thresholds + higher - 1, mask=exists, other=float("inf"))
        rung = tl.where(exists & (q >= threshold), higher, rung)
    return rung


@triton.jit
def rotate_quantize_kernel(
    x,  # (tokens, WIDTH), rows `x_stride` apart
    sign_bits,  # uint8 (WIDTH / 8 rounded up,)
    paley_matrix,  # float32 (PADDED_PALEY, PADDED_PALEY), zeros in the padding
    input_shift,  # float32 (WIDTH,), as the next two
    input_scale,
    channel_scale,
    static_scale,  # float32 (1,)
    thresholds,  # float32 (RUNGS - 1,)
    rung_levels,  # int8 (RUNGS,)
    mod_scale,  # float32 (samples, WIDTH), rows `mod_scale_stride` apart
    mod_shift,
    levels,  # int8 (tokens, WIDTH)
    scale,  # float32 (tokens, GROUPS)
    x_stride,
    mod_scale_stride,
    mod_shift_stride,
    tokens_per_mod,
    eps,
    normalization,
    top,  # the largest level, as a float
    scale_factor,  # of rule rms
    min_scale,
    WIDTH: tl.constexpr,
    IS_BFLOAT16: tl.constexpr,
    FRONT: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_INPUT_SCALE: tl.constexpr,
    HAS_SIGNS: tl.constexpr,
    HAS_CHANNEL_SCALE: tl.constexpr,
    IS_ROTATED: tl.constexpr,
    USED_ROWS: tl.constexpr,  # blocks * Sylvester order
    PALEY: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    PADDED_PALEY: tl.constexpr,
    PADDED_INNER: tl.constexpr,
    RULE: tl.constexpr,
    IS_SIGNED: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    PADDED_GROUP_SIZE: tl.constexpr,
    RUNGS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Levels and scales of one token."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, ROWS * PADDED_PALEY * PADDED_INNER)
    inner, column, row = (
        place % PADDED_INNER,
        place // PADDED_INNER % PADDED_PALEY,
        place // (PADDED_INNER * PADDED_PALEY),
    )
    channel = (row * PALEY + column) * INNER + inner
    inside = (row < USED_ROWS) & (column < PALEY) & (inner < INNER)
    y = load_float(x + token * x_stride + channel, inside, IS_BFLOAT16)

    if FRONT == "layer-norm":
        sample = token // tokens_per_mod
        centred = tl.where(inside, y - tl.div_rn(tl.sum(y, axis=0), WIDTH * 1.0), 0.0)
        deviation = tl.sqrt_rn(tl.div_rn(tl.sum(centred * centred, axis=0), WIDTH * 1.0) + eps)
        stretch = tl.load(mod_scale + sample * mod_scale_stride + channel, mask=inside, other=0.0)
        offset = tl.load(mod_shift + sample * mod_shift_stride + channel, mask=inside, other=0.0)
        y = centred * tl.div_rn(1.0, deviation) * (1.0 + stretch) + offset
    elif FRONT == "gelu-tanh":
        y = gelu_tanh(y)
    elif FRONT == "gelu-erf":
        y = gelu_erf(y)
    elif FRONT == "silu":
        y = silu(y)
    if HAS_SHIFT:
        y -= tl.load(input_shift + channel, mask=inside, other=0.0)
    if HAS_INPUT_SCALE:
        y *= tl.load(input_scale + channel, mask=inside, other=0.0)
    if HAS_SIGNS:
        signs = tl.load(sign_bits + channel // 8, mask=inside, other=0).to(tl.int32)
        y = tl.where((signs >> (channel % 8)) & 1 != 0, -y, y)
    if IS_ROTATED:
        y = rotate(y, paley_matrix, ROWS, STAGES, PADDED_PALEY, PADDED_INNER) * normalization
    if HAS_CHANNEL_SCALE:
        y = tl.div_rn(y, tl.load(channel_scale + channel, mask=inside, other=1.0))

    # From here on a token is (groups, group size), padded likewise.
    if GROUPS > 1:
        place = tl.arange(0, PADDED_GROUPS * PADDED_GROUP_SIZE)
        group, within = place // PADDED_GROUP_SIZE, place % PADDED_GROUP_SIZE
        channel = group * GROUP_SIZE + within
        inside = (group < GROUPS) & (within < GROUP_SIZE)
        row, column, inner = channel // (INNER * PALEY), channel // INNER % PALEY, channel % INNER
        source = (row * PADDED_PALEY + column) * PADDED_INNER + inner
        y = tl.gather(y, tl.where(inside, source, 0), axis=0)
    shape: tl.constexpr = (PADDED_GROUPS, PADDED_GROUP_SIZE)
    y, inside, channel = tl.reshape(y, shape), tl.reshape(inside, shape), tl.reshape(channel, shape)
    y = tl.where(inside, y, 0.0)
    is_bad = tl.max(tl.max(tl.where(tl.abs(y) < float("inf"), 0, 1), axis=1), axis=0) != 0
    if RULE == "absmax":
        largest = tl.max(tl.abs(y) if IS_SIGNED else tl.maximum(y, 0.0), axis=1)
        unit = tl.maximum(tl.div_rn(largest, top), min_scale)
    elif RULE == "rms":
        unit = tl.sqrt_rn(tl.div_rn(tl.sum(y * y, axis=1), GROUP_SIZE * 1.0))
        unit = tl.maximum(unit * scale_factor, min_scale)
    else:
        unit = tl.full((PADDED_GROUPS,), 1.0, dtype=tl.float32) * tl.load(static_scale)
    rung = rung_of(tl.div_rn(y, unit[:, None]), thresholds, RUNGS, STEPS)
    tl.store(levels + token * WIDTH + channel, tl.load(rung_levels + rung), mask=inside)
    group = tl.arange(0, PADDED_GROUPS)
    # A token with one bad number is bad as a whole.
    tl.store(scale + token * GROUPS + group, tl.where(is_bad, float("nan"), unit), mask=group < GROUPS)

"""Numbers to and from memory, and the functions before and after a product, for the kernels beside this file.

bfloat16 travels as its bit pattern: the interpreter that runs these kernels on CPUs does not round to it as a GPU does.
"""

import triton
import triton.language as tl


@triton.jit
def load_float(pointers, mask, IS_BFLOAT16: tl.constexpr):
    """float32 numbers; pointers to float32, float16, or (IS_BFLOAT16) int16 bit patterns."""
    if IS_BFLOAT16:
        bits = tl.load(pointers, mask=mask, other=0).to(tl.uint16, bitcast=True)
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_float(pointers, y, mask, IS_BFLOAT16: tl.constexpr):
    """Store float32 `y`, rounded to nearest, ties to even; pointers as in `load_float`."""
    if IS_BFLOAT16:
        bits = y.to(tl.uint32, bitcast=True)
        # Half a unit of the last place that stays, less one bit where that place is even.
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(y == y, rounded, 0x7FC0)
        tl.store(pointers, rounded.to(tl.uint16).to(tl.int16, bitcast=True), mask=mask)
    else:
        tl.store(pointers, y.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def gelu_tanh(y):
    """GELU by tanh: y (1 + tanh u) / 2 = y / (1 + exp(-2 u)), u = sqrt(2 / pi) (y + 0.044715 y^3)."""
    u = 0.7978845608028654 * (y + 0.044715 * y * y * y)
    return y / (1.0 + tl.exp(-2.0 * u))


@triton.jit
def gelu_erf(y):
    """GELU: y (1 + erf(y / sqrt 2)) / 2."""
    return 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))


@triton.jit
def silu(y):
    """SiLU: y / (1 + exp(-y))."""
    return y / (1.0 + tl.exp(-y))

"""The product by itself on a GPU: floats, bare 8-bit products, the library route and ours, side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hqdit.benchmark.clock import Clock
from hqdit.formats.catalog import E2M1
from hqdit.kernels.activation import QuantizedActivation, quantize_activation
from hqdit.kernels.backend import CUDA_MIN_ROWS, CUDA_MULTIPLE, padded_int_mm
from hqdit.kernels.linear import PackedWeight, packed_level_tables
from hqdit.kernels.selection import BACKENDS
from hqdit.numerics.codes import pack_codes
from hqdit.quantizers.quantized_tensor import round_to_nearest, weight_scales
from hqdit.quantizers.spec import ActivationSpec, WeightSpec

#: (tokens, in_features, out_features). DiT-XL/2 at 256 x 256 pixels, batch 2 and 64: q, k and v together, attention's
#: output, the MLP; its adaLN; FLUX.1: q, k and v, the MLP, and the output of a block of one stream.
SHAPES = (
    *((tokens, k, n) for tokens in (512, 16384) for k, n in ((1152, 3456), (1152, 1152), (1152, 4608), (4608, 1152))),
    (2, 1152, 6912),
    (64, 1152, 6912),
    *((4608, k, n) for k, n in ((3072, 9216), (3072, 12288), (12288, 3072), (15360, 3072))),
)
#: Compute capability from which tensor cores multiply FP8.
FLOAT8_CAPABILITY = (8, 9)


@contextmanager
def float32_precision(precision: str) -> Iterator[None]:
    """Run the body with torch's float32 products "highest" (no TF32) or "high" (TF32)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def product_inputs(
    tokens: int, width: int, channels: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, QuantizedActivation, PackedWeight]:
    """Random tokens, weight and bias, float32, and the first two in E2M1, on `device`."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, width, generator=generator, device=device)
    weight = torch.randn(channels, width, generator=generator, device=device)
    bias = torch.randn(channels, generator=generator, device=device)
    spec = WeightSpec((E2M1,))
    rounded = round_to_nearest(weight, weight_scales(weight, spec, None, "absmax"), spec, None)
    codes = pack_codes(rounded.codes, E2M1)
    packed = PackedWeight(codes, rounded.scale, None, (E2M1,), packed_level_tables((E2M1,)), bias)
    return x, weight, bias, quantize_activation(x, ActivationSpec(E2M1)), packed


@torch.inference_mode()
def measure_gpu_product(
    tokens: int, width: int, channels: int, repeats: int, clock: Clock, backend: str, compiles: bool
) -> dict[str, Any]:
    """Seconds and ratios of one shape, bfloat16 outputs; larger ratios are better for ours.

    Args:
        tokens, width, channels: the shape.
        repeats: of every contender.
        clock: of the device.
        backend: ours.
        compiles: whether the library route goes through torch.compile.
    """
    x, weight, bias, activation, packed = product_inputs(tokens, width, channels, clock.device)
    runs = _contenders(x, weight, bias, activation, packed, backend, compiles)
    seconds = clock.turns(runs, repeats, f"product {tokens}x{width}x{channels}", has_head_start=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {f"vs_{name}": value / medians["ours"] for name, value in medians.items() if name != "ours"}
    return {
        "shape": f"{tokens}x{width}x{channels}",
        "vs_float8": None,
        **ratios,
        "giga_operations_per_second": 2e-9 * tokens * width * channels / medians["ours"],
        "seconds": seconds,
    }


def _contenders(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: QuantizedActivation,
    packed: PackedWeight,
    backend: str,
    compiles: bool,
) -> dict[str, Callable[[], object]]:
    x16, weight16, bias16 = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    integers = torch.randint(-12, 13, weight.shape, dtype=torch.int8, device=x.device)

    def float32(precision: str) -> Callable[[], object]:
        def run() -> Tensor:
            with float32_precision(precision):
                return torch.nn.functional.linear(x, weight, bias)

        return run

    def library() -> Tensor:
        return BACKENDS["torch"].linear(activation, [packed], dtype=torch.bfloat16)[0]

    runs: dict[str, Callable[[], object]] = {
        "float32": float32("highest"),
        "float32_tf32": float32("high"),
        "bfloat16": lambda: torch.nn.functional.linear(x16, weight16, bias16),
        "int_mm": lambda: padded_int_mm(activation.levels, integers, CUDA_MIN_ROWS, CUDA_MULTIPLE),
        "library": torch.compile(library) if compiles else library,
        "ours": lambda: BACKENDS[backend].linear(activation, [packed], dtype=torch.bfloat16),
    }
    is_cuda = x.device.type == "cuda"
    if is_cuda and torch.cuda.get_device_capability(x.device) >= FLOAT8_CAPABILITY:
        runs["float8"] = _float8(x, weight)
    return runs


def _float8(x: Tensor, weight: Tensor) -> Callable[[], object]:
    """The bare FP8 product with a scale for each row and column, which `torch._scaled_mm` applies."""
    top = torch.finfo(torch.float8_e4m3fn).max

    def rounded(matrix: Tensor) -> tuple[Tensor, Tensor]:
        scale = matrix.abs().amax(dim=1, keepdim=True) / top
        return (matrix / scale).to(torch.float8_e4m3fn), scale

    (left, left_scale), (right, right_scale) = rounded(x), rounded(weight)
    return lambda: torch._scaled_mm(left, right.T, left_scale, right_scale.T, out_dtype=torch.bfloat16)

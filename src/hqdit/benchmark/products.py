"""The product by itself: float32, torch's bare int8 product, and ours with scales and bias, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hqdit.formats.catalog import E2M1
from hqdit.kernels.activation import quantize_activation
from hqdit.kernels.linear import PackedWeight, packed_level_tables
from hqdit.kernels.selection import current_backend
from hqdit.numerics.codes import pack_codes
from hqdit.quantizers.quantized_tensor import round_to_nearest, weight_scales
from hqdit.quantizers.spec import ActivationSpec, WeightSpec

#: (tokens, in_features, out_features) of DiT-XL/2, batch 2: q, k and v together, attention's output, the MLP, adaLN.
SHAPES = ((512, 1152, 3456), (512, 1152, 1152), (512, 1152, 4608), (512, 4608, 1152), (2, 1152, 6912))


@torch.inference_mode()
def measure_product(tokens: int, width: int, out_features: int, repeats: int) -> dict[str, Any]:
    """Seconds and ratios of one shape; larger ratios are better for ours."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(out_features, width, generator=generator)
    bias = torch.randn(out_features, generator=generator)
    spec = WeightSpec((E2M1,))
    rounded = round_to_nearest(weight, weight_scales(weight, spec, None, "absmax"), spec, None)
    packed = PackedWeight(
        pack_codes(rounded.codes, E2M1), rounded.scale, None, (E2M1,), packed_level_tables((E2M1,)), bias
    )
    activation = quantize_activation(x, ActivationSpec(E2M1))
    integers = torch.randint(-12, 13, (out_features, width), dtype=torch.int8, generator=generator)
    backend = current_backend()
    runs: dict[str, Callable[[], object]] = {
        "float32": lambda: torch.nn.functional.linear(x, weight, bias),
        "int_mm": lambda: _int_mm(activation.levels, integers),
        "ours": lambda: backend.linear(activation, [packed]),
    }
    seconds = interleaved(runs, repeats)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "shape": f"{tokens}x{width}x{out_features}",
        "vs_float32": medians["float32"] / medians["ours"],
        "vs_int_mm": medians["int_mm"] / medians["ours"],
        "giga_operations_per_second": 2e-9 * tokens * width * out_features / medians["ours"],
        "seconds": seconds,
    }


def _int_mm(levels: Tensor, weight: Tensor) -> Tensor:
    return torch._int_mm(levels, weight.T)


def interleaved(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, taken in turns; every repeat lasts for a few milliseconds of calls."""
    calls = {}
    for name, run in runs.items():
        run()
        start = time.perf_counter()
        run()
        calls[name] = max(1, round(5e-3 / (time.perf_counter() - start)))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            seconds[name].append((time.perf_counter() - start) / calls[name])
    return seconds

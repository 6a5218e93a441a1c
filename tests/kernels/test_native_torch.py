"""The native operations inside torch: schemas, tracing and compiled graphs."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from native_cases import bits, needs_native
from tiny import BLOCKS, calibration, inputs_of, predicted, tiny_dit
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend

from hqdit.formats.catalog import E2M1, FP4_FORMATS, INT8
from hqdit.kernels import native_ops
from hqdit.kernels.selection import use_backend
from hqdit.layers.linear import HQLinear
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.quantize import quantize
from hqdit.quantizers.quantized_tensor import round_to_nearest, weight_scales
from hqdit.quantizers.spec import ActivationSpec, LinearSpec, WeightSpec
from hqdit.transforms.rotation import plan_rotation, random_signs, rotate

pytestmark = needs_native


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# Schemas and shapes


def rotate_quantize_calls() -> list[tuple[Any, ...]]:
    thresholds, levels = torch.tensor([-0.5, 0.5]), torch.tensor([-1, 0, 1], dtype=torch.int8)
    bare = (*(None,) * 4, "absmax", 1.0, False)
    signs, paley = torch.zeros(9, dtype=torch.uint8), torch.ones(12, 12, dtype=torch.int8)
    vectors, modulation = (numbers(72), numbers(72), numbers(72)), (numbers(3, 72), numbers(3, 72))
    rotated = (numbers(6, 72), signs, 2, 12, paley, 3, 0.2)
    plain = (numbers(4, 72).to(torch.bfloat16), None, 1, 1, None, 1, 1.0)
    return [
        (*plain, *bare, 72, thresholds, levels, "silu", None, None, 0.0),
        (
            *rotated,
            *vectors,
            None,
            "rms",
            0.3,
            True,
            12,
            thresholds,
            levels,
            None,
            *modulation,
            1e-6,
        ),
        (
            *plain,
            *(None,) * 3,
            torch.ones(1),
            "absmax",
            1.0,
            False,
            72,
            thresholds,
            levels.to(torch.uint8),
            *(None,) * 3,
            0.0,
        ),
    ]


def product_calls() -> list[tuple[Any, ...]]:
    def weight(rows: int, groups: int) -> list[Tensor]:
        packed = torch.ones(rows, 12, dtype=torch.uint8)
        return [packed, torch.ones(2, 16, dtype=torch.int8), torch.ones(rows, dtype=torch.uint8), numbers(rows, groups)]

    levels = torch.ones(6, 24, dtype=torch.int8)
    three = [list(part) for part in zip(*(weight(rows, 1) for rows in (5, 1, 8)), strict=True)]
    one = [[part] for part in weight(5, 3)]
    return [
        (levels, numbers(6, 1), *three, [None, numbers(1), None], None, None, None, torch.bfloat16),
        (levels, numbers(6, 3), *one, [None], "gelu-erf", numbers(2, 5), numbers(6, 5), torch.float32),
    ]


def attention_calls() -> list[tuple[Any, ...]]:
    fused = numbers(2, 5, 3, 4, 8).unbind(dim=2)
    return [fused, (numbers(1, 3, 2, 8), numbers(1, 7, 2, 8), numbers(1, 7, 2, 8))]


CALLS = [
    *((torch.ops.hqdit.rotate_quantize.default, call) for call in rotate_quantize_calls()),
    *((torch.ops.hqdit.product.default, call) for call in product_calls()),
    *((torch.ops.hqdit.attention.default, call) for call in attention_calls()),
]


@pytest.mark.parametrize(("operation", "arguments"), CALLS, ids=lambda value: str(value)[:30].partition("(")[0])
def test_schema_and_shapes_are_those_of_the_kernel(operation: Any, arguments: tuple[Any, ...]) -> None:
    # Autograd is not promised: quantized layers have no gradient.
    torch.library.opcheck(operation, arguments, test_utils=("test_schema", "test_faketensor"))


def test_shapes_without_data() -> None:
    query = torch.empty(2, 5, 3, 8, device="meta")
    assert native_ops.attention(query, query, query).device.type == "meta"


# Compiled graphs


def layer_of(weight: WeightSpec, activation: ActivationSpec, rotation: str, head_dim: int | None = None) -> HQLinear:
    width, out = 144, 11
    spec = LinearSpec("fc1", width, out, weight, activation, plan_rotation(rotation, width, "fc1", head_dim))
    signs = None if spec.rotation.is_identity else random_signs(width, 0, "fc1")
    rotated = rotate(numbers(out, width), spec.rotation, signs)
    index = torch.arange(out, dtype=torch.uint8) % len(weight.formats) if len(weight.formats) > 1 else None
    quantized = round_to_nearest(rotated, weight_scales(rotated, weight, index, "absmax"), weight, index)
    static = torch.tensor([0.3]) if activation.has_static_scale else None
    return HQLinear.from_quantized(spec, quantized, numbers(out, seed=1), signs, static_scale=static)


LAYERS = {
    "rotated": lambda: layer_of(WeightSpec((E2M1,)), ActivationSpec(E2M1), "full"),
    "several formats": lambda: layer_of(WeightSpec(FP4_FORMATS), ActivationSpec(INT8), "block:36"),
    "grouped": lambda: layer_of(WeightSpec((E2M1,), "group", 36), ActivationSpec(E2M1, "group", 36), "none"),
    "static": lambda: layer_of(WeightSpec((E2M1,), "tensor"), ActivationSpec(E2M1, "tensor"), "none"),
    "short scales": lambda: layer_of(
        WeightSpec((E2M1,), "group", 36, scale_format="e4m3"),
        ActivationSpec(E2M1, "group", 36, scale_rule="rms", scale_factor=0.2, scale_format="e4m3"),
        "full",
    ),
    "folded": lambda: layer_of(WeightSpec((E2M1,)), ActivationSpec(E2M1), "full", 36),
}


def check_layer(layer: HQLinear, compiler: str) -> None:
    with use_backend("native"), torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            torch.compiler.reset()
            compiled = torch.compile(layer, fullgraph=True, backend=compiler)
            x = numbers(2, 5, 144, seed=2).to(dtype)
            assert np.array_equal(bits(compiled(x)), bits(layer(x))), dtype


@pytest.mark.parametrize("name", LAYERS)
def test_compiled_layer_gives_the_same_bits(name: str) -> None:
    check_layer(LAYERS[name](), "aot_eager")


def test_compiled_layer_takes_any_number_of_tokens() -> None:
    layer = LAYERS["rotated"]()
    with use_backend("native"), torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
        for tokens in (2, 3, 64, 1, 0):
            x = numbers(tokens, 144, seed=tokens)
            assert np.array_equal(bits(compiled(x)), bits(layer(x))), tokens


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ and finds no compiler")
# torch 2.13's inductor imports a module that uses torch.jit.script_method, which torch 2.13 deprecates.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_layer_compiled_by_inductor_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    check_layer(LAYERS["rotated"](), "inductor")


@pytest.mark.parametrize(
    "config",
    [QuantizationConfig(gptq=False), QuantizationConfig(gptq=False, activation_granularity="tensor")],
    ids=["per token", "static"],
)
def test_compiled_model_gives_the_same_bits(config: QuantizationConfig) -> None:
    model: Any = quantize(tiny_dit(), config, calibration() if config.needs_calibration else None)
    fields, called = inputs_of(model), Counter[str]()

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        called.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return lookup_backend("aot_eager")(graph, inputs)

    with use_backend("native"):
        expected = predicted(model, **fields)
        compiled = torch.compile(model, fullgraph=True, backend=compiler)
        assert np.array_equal(bits(predicted(compiled, **fields)), bits(expected))
    # Per block: modulation, q k v, output, fc1 and fc2, each a rounding and a product, and one attention.
    assert {name: count for name, count in called.items() if name.startswith("hqdit.")} == {
        "hqdit.rotate_quantize": 5 * BLOCKS,
        "hqdit.product": 5 * BLOCKS,
        "hqdit.attention": BLOCKS,
    }

"""The Triton operations inside torch: schemas, tracing, compiled graphs, a whole model, and what they refuse."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny import BLOCKS, inputs_of, predicted, tiny_dit
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from triton_cases import DEVICE, SMALL_TILE, needs_triton

from hqdit.errors import EnvironmentUnavailable, UsageError
from hqdit.formats.catalog import E2M1, E3M0
from hqdit.kernels.activation import QuantizedActivation
from hqdit.kernels.linear import PackedWeight, packed_level_tables
from hqdit.kernels.preparation import InputPreparation, input_tables
from hqdit.kernels.selection import BACKENDS, default_backend, require_backend, use_backend
from hqdit.kernels.triton import library, product_operation, rotate_quantize_operation, tiles
from hqdit.kernels.triton.tiles import ProductTile, use_tile
from hqdit.numerics.error import sqnr_db
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.quantize import quantize
from hqdit.quantizers.spec import ActivationSpec
from hqdit.transforms.rotation import plan_rotation

pytestmark = needs_triton

Arguments = dict[str, Any]


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def ones(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.ones(shape, dtype=dtype, device=DEVICE)


def product_arguments() -> Arguments:
    """A valid call with every tensor given."""
    return {
        "levels": ones(6, 24, dtype=torch.int8),
        "token_scale": floats(6, 3),
        "packed": ones(5, 12),
        "formats": ["e2m1", "e3m0"],
        "format_index": ones(5),
        "weight_scale": floats(5, 3),
        "bias": floats(5),
        "function": "gelu-tanh",
        "gate": floats(2, 5),
        "residual": floats(6, 5),
        "dtype": torch.float32,
    }


def rotate_quantize_arguments() -> Arguments:
    """A valid call with every tensor given but the static scale, which excludes the groups."""
    return {
        "x": floats(6, 72),
        "sign_bits": ones(9),
        "sylvester": 2,
        "paley": 12,
        "inner": 3,
        "normalization": 0.2,
        "input_shift": floats(72),
        "input_scale": floats(72),
        "channel_scale": floats(72).abs() + 1,
        "static_scale": None,
        "scale_rule": "absmax",
        "scale_factor": 1.0,
        "group_size": 12,
        "format": "e2m1",
        "function": None,
        "mod_scale": floats(3, 72),
        "mod_shift": floats(3, 72),
        "eps": 1e-6,
    }


OPERATIONS: dict[str, tuple[Any, Callable[[], Arguments]]] = {
    "product": (product_operation.product, product_arguments),
    "rotate_quantize": (rotate_quantize_operation.rotate_quantize, rotate_quantize_arguments),
}


@pytest.fixture(autouse=True)
def _small_tile_and_fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    with use_tile(SMALL_TILE):
        yield
    torch.compiler.reset()


# Schemas, shapes, graphs


@pytest.mark.parametrize("name", OPERATIONS)
def test_schema_and_shapes_are_those_of_the_kernel(name: str) -> None:
    # Autograd is not promised: quantized layers have no gradient.
    operation, arguments = OPERATIONS[name]
    given = tuple(arguments().values())
    torch.library.opcheck(operation.default, given, test_utils=("test_schema", "test_faketensor"))


#: One program for each product of a tiny model: a program costs the interpreter more than what is in it.
ONE_PROGRAM = ProductTile(tokens=16, channels=512, depth=512, rows_together=1, warps=4, stages=2)


@pytest.fixture(scope="module")
def model() -> Any:
    return quantize(tiny_dit(), QuantizationConfig(gptq=False)).to(DEVICE)


def there(fields: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: field.to(DEVICE) for name, field in fields.items()}


def test_model_is_the_references_within_the_quantization_error(model: Any) -> None:
    fields = inputs_of(model, samples=1)
    exact = predicted(tiny_dit(), **fields)
    outputs = {}
    for name in ("reference", "triton"):
        with use_backend(name), use_tile(ONE_PROGRAM if DEVICE.type == "cpu" else SMALL_TILE):
            outputs[name] = predicted(model, **there(fields)).cpu()
    # 1 % of what quantization costs: 40 dB.
    assert sqnr_db(outputs["reference"], outputs["triton"]) >= sqnr_db(exact, outputs["reference"]) + 40


def compiled_calls(module: Any, run: Callable[[Any], Tensor]) -> Counter[str]:
    """The operations of one graph, whose results have the bits of the uncompiled module."""
    called = Counter[str]()

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        called.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return lookup_backend("aot_eager")(graph, inputs)

    with use_backend("triton"), use_tile(ONE_PROGRAM), torch.no_grad():
        assert torch.equal(run(torch.compile(module, fullgraph=True, backend=compiler)), run(module))
    return Counter({name: count for name, count in called.items() if name.startswith("hqdit.")})


def test_compiled_layer_gives_the_same_bits(model: Any) -> None:
    layer, x = model.transformer_blocks[0].attn1.to_out[0], floats(2, 72)
    for dtype in (torch.float32, torch.bfloat16):
        torch.compiler.reset()
        called = compiled_calls(layer, lambda run, dtype=dtype: run(x.to(dtype)))
        assert called == {"hqdit.triton_rotate_quantize": 1, "hqdit.triton_product": 1}


@pytest.mark.soak
def test_compiled_model_gives_the_same_bits(model: Any) -> None:
    fields = there(inputs_of(model, samples=1))
    # Per block: modulation, q, k and v as three products, output, fc1 and fc2, and five roundings.
    assert compiled_calls(model, lambda run: predicted(run, **fields)) == {
        "hqdit.triton_rotate_quantize": 5 * BLOCKS,
        "hqdit.triton_product": 7 * BLOCKS,
    }


@pytest.mark.gpu
def test_layer_in_a_cuda_graph() -> None:
    rng = torch.Generator().manual_seed(0)
    formats = (E2M1, E3M0)
    weight = PackedWeight(
        torch.randint(0, 256, (40, 36), dtype=torch.uint8, generator=rng).to(DEVICE), floats(40, 1),
        (torch.arange(40) % 2).to(torch.uint8).to(DEVICE), formats, packed_level_tables(formats),
    )  # fmt: skip
    levels = torch.randint(-12, 13, (70, 72), dtype=torch.int8, generator=rng).to(DEVICE)
    activation, backend = QuantizedActivation(levels, floats(70, 1).abs()), BACKENDS["triton"]
    (expected,) = backend.linear(activation, [weight])  # makes the tables, which a capture must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (captured,) = backend.linear(activation, [weight])
    graph.replay()
    assert torch.equal(captured, expected)


# Refused


FAULTS: dict[str, tuple[Callable[[Tensor], Any], type[Exception]]] = {
    "none": (lambda tensor: None, TypeError),
    "meta": (lambda tensor: tensor.to("meta"), TypeError),
    "float64": (lambda tensor: tensor.to(torch.float64), TypeError),
    "int32": (lambda tensor: tensor.to(torch.int32), TypeError),
    "one dimension more": (lambda tensor: tensor.unsqueeze(0), ValueError),
    "one column more": (lambda tensor: torch.cat([tensor, tensor[..., :1]], dim=-1), ValueError),
    "every other column": (lambda tensor: tensor.repeat_interleave(2, dim=-1)[..., ::2], ValueError),
}
OPTIONAL = {
    "format_index", "bias", "gate", "residual", "sign_bits", "input_shift", "input_scale", "channel_scale",
    "mod_scale", "mod_shift",
}  # fmt: skip


def faults() -> list[tuple[str, str, str]]:
    """(operation, argument, fault) for every tensor argument."""
    tensors = [
        (op, name) for op, (_, make) in OPERATIONS.items() for name, v in make().items() if isinstance(v, Tensor)
    ]
    return [(op, name, fault) for op, name in tensors for fault in FAULTS if fault != "none" or name not in OPTIONAL]


@pytest.mark.parametrize(("name", "argument", "fault"), faults())
def test_every_fault_of_a_tensor_is_named(name: str, argument: str, fault: str) -> None:
    operation, make = OPERATIONS[name]
    change, error = FAULTS[fault]
    arguments = make()
    arguments[argument] = change(arguments[argument])
    with pytest.raises((error, RuntimeError) if fault == "none" else error) as caught:
        operation(**arguments)
    if fault not in ("none", "meta"):
        assert re.search(rf"hqdit::triton_{name}.*found .*needed", str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("product", {"function": "relu"}, "'relu', needed one of"),
        ("product", {"dtype": torch.float64}, "found torch.float64"),
        ("product", {"formats": ["e2m3"]}, "e2m3, needed formats of at most 4 bits"),
        ("product", {"formats": []}, "found none"),
        ("product", {"token_scale": floats(5, 3)}, "(6 or 1, 3 or 1)"),
        ("product", {"token_scale": floats(6, 2)}, "(6 or 1, 3 or 1)"),
        ("product", {"token_scale": floats(6, 12), "weight_scale": floats(5, 12)}, "12 groups on width 24"),
        ("product", {"gate": floats(4, 5)}, "4 rows for 6 tokens"),
        ("product", {"levels": ones(6, 23, dtype=torch.int8), "packed": ones(5, 11)}, "on width 23"),
        ("rotate_quantize", {"sylvester": 3}, "sylvester 3"),
        ("rotate_quantize", {"sylvester": 1, "paley": 24}, "found 24, needed the order of a Paley matrix"),
        ("rotate_quantize", {"inner": 5}, "factors and groups that divide"),
        ("rotate_quantize", {"group_size": 7}, "groups of 7"),
        ("rotate_quantize", {"function": "silu"}, "no pointwise function"),
        ("rotate_quantize", {"function": "relu"}, "'relu', needed one of"),
        ("rotate_quantize", {"format": "e4m3"}, "found e4m3"),
        ("rotate_quantize", {"mod_shift": None}, "both or neither"),
        ("rotate_quantize", {"mod_scale": floats(4, 72), "mod_shift": floats(4, 72)}, "4 modulations for 6 tokens"),
        ("rotate_quantize", {"static_scale": floats(1)}, "needed it alone"),
        ("rotate_quantize", {"scale_rule": "mse"}, "'mse' with factor 1.0"),
        ("rotate_quantize", {"scale_rule": "rms", "scale_factor": 0.0}, "'rms' with factor 0.0"),
    ],
)
def test_arguments_that_do_not_go_together(name: str, changes: Arguments, message: str) -> None:
    operation, make = OPERATIONS[name]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        operation(**{**make(), **changes})


def test_sums_beyond_int32_are_refused() -> None:
    width = 2 * (2**31 // (128 * 128) // 2 + 1)
    arguments = {**product_arguments(), "levels": ones(1, width, dtype=torch.int8), "packed": ones(5, width // 2)}
    arguments |= {"token_scale": floats(1, 1), "weight_scale": floats(5, 1), "gate": None, "residual": None}
    arguments["formats"] = ["table:" + ",".join(map(str, (*range(-128, -113), 127)))]
    with pytest.raises(ValueError, match="int32 sums"):
        product_operation.product(**{**arguments, "format_index": None})


def test_token_too_long_for_a_program_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "LARGEST_TOKEN_TILE", 64)
    with pytest.raises(ValueError, match="found width 72, which takes"):
        rotate_quantize_operation.rotate_quantize(**rotate_quantize_arguments())


@dataclass(frozen=True)
class LaterSpec(ActivationSpec):
    """A specification with a field that the kernels do not know."""

    temperature: float = 0.0


def test_what_the_kernels_do_not_know_is_refused_and_not_left_out() -> None:
    rotation, x = plan_rotation("none", 24, "test"), floats(2, 24)
    for temperature in (0.0, 1.0):
        spec = LaterSpec(E2M1, temperature=temperature)
        preparation = InputPreparation(spec, rotation, input_tables(spec, rotation))
        if temperature:
            with pytest.raises(UsageError, match="found temperature 1.0 .* Fix: choose another backend"):
                BACKENDS["triton"].quantize_input(x, preparation)
        else:
            assert BACKENDS["triton"].quantize_input(x, preparation).levels.shape == (2, 24)


# Where it runs


def test_backend_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert require_backend("triton") is BACKENDS["triton"]
    assert default_backend() != "triton"
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentUnavailable, match="triton cannot run here .triton is not installed"):
        require_backend("triton")


@pytest.mark.parametrize("name", OPERATIONS)
def test_tensors_elsewhere_are_refused_with_what_is_needed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv(library.INTERPRETER_VARIABLE, raising=False)
    operation, make = OPERATIONS[name]
    given = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in make().items()}
    for has_device, found in ((False, "no CUDA device"), (True, "tensors on cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_device=has_device: has_device)
        with pytest.raises(EnvironmentUnavailable, match=f"found {found}.*needed .* CUDA device. Fix: .*INTERPRET=1"):
            operation(**given)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in (BACKENDS["triton"].unavailable_reason() or "")


def test_unknown_backend_names_this_one() -> None:
    with pytest.raises(UsageError, match="native, triton, torch, reference"):
        require_backend("cuda")

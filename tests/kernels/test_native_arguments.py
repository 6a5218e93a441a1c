"""What the native operations refuse: the compiled code checks nothing, so everything wrong must end in Python."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from native_cases import needs_native
from torch import Tensor

from hqdit.kernels import native_ops

pytestmark = needs_native

Arguments = dict[str, Any]
FLOATS = torch.Generator().manual_seed(0)


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=FLOATS)


def rotate_quantize_arguments() -> Arguments:
    """A valid call with every tensor given but the static scale, which excludes the groups."""
    return {
        "x": floats(6, 72),
        "sign_bits": torch.zeros(9, dtype=torch.uint8),
        "sylvester": 2,
        "paley": 12,
        "paley_matrix": torch.ones(12, 12, dtype=torch.int8),
        "inner": 3,
        "normalization": 0.5,
        "input_shift": floats(72),
        "input_scale": floats(72),
        "channel_scale": floats(72).abs() + 1,
        "static_scale": None,
        "scale_rule": "absmax",
        "scale_factor": 1.0,
        "round_scales": False,
        "group_size": 12,
        "thresholds": torch.tensor([-0.5, 0.5]),
        "rung_levels": torch.tensor([-1, 0, 1], dtype=torch.int8),
        "function": None,
        "mod_scale": floats(3, 72),
        "mod_shift": floats(3, 72),
        "eps": 1e-6,
    }


def static_arguments() -> Arguments:
    return {**rotate_quantize_arguments(), "static_scale": torch.ones(1), "group_size": 72}


def product_arguments() -> Arguments:
    """A valid call with every tensor given."""
    return {
        "levels": torch.ones(6, 24, dtype=torch.int8),
        "token_scale": floats(6, 3),
        "packed": [torch.ones(5, 12, dtype=torch.uint8)],
        "level_tables": [torch.ones(2, 16, dtype=torch.int8)],
        "format_index": [torch.ones(5, dtype=torch.uint8)],
        "weight_scale": [floats(5, 3)],
        "bias": [floats(5)],
        "function": "gelu-tanh",
        "gate": floats(2, 5),
        "residual": floats(6, 5),
        "dtype": torch.float32,
    }


def attention_arguments() -> Arguments:
    return {"query": floats(2, 5, 3, 8), "key": floats(2, 7, 3, 8), "value": floats(2, 7, 3, 8)}


CALLS: dict[str, tuple[Callable[..., Any], Callable[[], Arguments]]] = {
    "rotate_quantize": (native_ops.rotate_quantize, rotate_quantize_arguments),
    "rotate_quantize, static": (native_ops.rotate_quantize, static_arguments),
    "product": (native_ops.product, product_arguments),
    "attention": (native_ops.attention, attention_arguments),
}


def misaligned(tensor: Tensor) -> Tensor:
    """The same numbers one byte further in memory."""
    memory = bytearray(tensor.numel() * tensor.element_size() + 1)
    view = torch.frombuffer(memory, dtype=tensor.dtype, offset=1, count=tensor.numel()).reshape(tensor.shape)
    view.copy_(tensor)
    assert view.data_ptr() % tensor.element_size()
    return view


FAULTS: dict[str, tuple[Callable[[Tensor], Any], type[Exception]]] = {
    "none": (lambda tensor: None, TypeError),
    "meta": (lambda tensor: tensor.to("meta"), TypeError),
    "float64": (lambda tensor: tensor.to(torch.float64), TypeError),
    "int32": (lambda tensor: tensor.to(torch.int32), TypeError),
    "one dimension more": (lambda tensor: tensor.unsqueeze(0), ValueError),
    "no dimension": (lambda tensor: tensor.flatten()[0], ValueError),
    "one column more": (lambda tensor: torch.cat([tensor, tensor[..., :1]], dim=-1), ValueError),
    "every other column": (lambda tensor: tensor.repeat_interleave(2, dim=-1)[..., ::2], ValueError),
    "misaligned": (misaligned, ValueError),
}
#: Arguments that may be None by themselves, and those of one byte an element, for which every address is a multiple.
OPTIONAL = {"sign_bits", "input_shift", "input_scale", "channel_scale", "static_scale", "format_index", "bias"}
BYTES = {"sign_bits", "paley_matrix", "rung_levels", "levels", "packed", "level_tables", "format_index"}


def faults() -> list[tuple[str, str, str]]:
    """(call, argument, fault) for every tensor argument."""
    found = []
    for call, (_, arguments) in CALLS.items():
        for name, value in arguments().items():
            tensor = value[0] if isinstance(value, list) else value
            if not isinstance(tensor, Tensor) or ("static" in call) != (name == "static_scale"):
                continue
            for fault in FAULTS:
                is_no_fault = (fault == "none" and name in OPTIONAL) or (fault == "misaligned" and name in BYTES)
                has_one_element = fault == "every other column" and tensor.shape[-1] == 1
                # torch itself takes no None in a list of tensors.
                if not is_no_fault and not has_one_element and not (fault == "none" and isinstance(value, list)):
                    found.append((call, name, fault))
    return found


@pytest.mark.parametrize("call", CALLS)
def test_the_arguments_below_are_valid(call: str) -> None:
    function, arguments = CALLS[call]
    function(**arguments())
    function(*arguments().values())


@pytest.mark.parametrize(("call", "name", "fault"), faults())
def test_every_wrong_tensor_is_refused(call: str, name: str, fault: str) -> None:
    function, arguments = CALLS[call]
    damage, expected = FAULTS[fault]
    wrong = arguments()
    value = wrong[name]
    wrong[name] = [damage(value[0])] if isinstance(value, list) else damage(value)
    if fault == "none" and name in ("gate", "residual", "mod_scale", "mod_shift", "paley_matrix"):
        expected = ValueError  # half of a pair
    with pytest.raises(expected, match=f"hqdit::{call.partition(',')[0]}.*found .*needed"):
        function(**wrong)


REFUSED: list[tuple[str, str, Arguments]] = [
    ("rotate_quantize", "a power of two", {"sylvester": 3, "paley": 12}),
    ("rotate_quantize", "a power of two", {"sylvester": 0}),
    ("rotate_quantize", "a power of two", {"sylvester": -2}),
    ("rotate_quantize", "factors", {"sylvester": 4}),
    ("rotate_quantize", "factors", {"inner": 0}),
    ("rotate_quantize", "factors", {"inner": 5}),
    ("rotate_quantize", "factors", {"paley": 0}),
    ("rotate_quantize", "divide the width", {"group_size": 0}),
    ("rotate_quantize", "divide the width", {"group_size": -12}),
    ("rotate_quantize", "divide the width", {"group_size": 7}),
    ("rotate_quantize", "divide the width", {"group_size": 144}),
    ("rotate_quantize", "paley_matrix", {"paley": 1}),
    ("rotate_quantize", "shape", {"paley": 4}),
    ("rotate_quantize", "rung_levels", {"rung_levels": torch.ones(1, dtype=torch.int8)}),
    ("rotate_quantize", "rung_levels", {"rung_levels": torch.ones(257, dtype=torch.uint8)}),
    ("rotate_quantize", "positive", {"rung_levels": torch.tensor([-2, -1, 0], dtype=torch.int8)}),
    ("rotate_quantize", "'relu'", {"function": "relu", "mod_scale": None, "mod_shift": None}),
    ("rotate_quantize", "pointwise function", {"function": "silu"}),
    ("rotate_quantize", "4 modulations for 6", {"mod_scale": floats(4, 72), "mod_shift": floats(4, 72)}),
    ("rotate_quantize", "0 modulations for 6", {"mod_scale": floats(0, 72), "mod_shift": floats(0, 72)}),
    ("rotate_quantize", "mod_shift", {"mod_shift": floats(2, 72)}),
    ("rotate_quantize", "static scale", {"static_scale": torch.ones(1)}),
    ("rotate_quantize, static", "static scale", {"scale_rule": "rms"}),
    ("rotate_quantize, static", "static scale", {"scale_factor": 0.5}),
    ("rotate_quantize, static", "static scale", {"round_scales": True}),
    ("rotate_quantize", "'mse'", {"scale_rule": "mse"}),
    ("rotate_quantize", "positive factor", {"scale_factor": 0.0}),
    ("rotate_quantize", "positive factor", {"scale_factor": -1.0}),
    ("rotate_quantize", "positive factor", {"scale_factor": math.inf}),
    ("rotate_quantize", "positive factor", {"scale_factor": math.nan}),
    ("rotate_quantize", "width", {"x": floats(6, 0)}),
    ("product", "float16", {"dtype": torch.float16}),
    ("product", "residual", {"dtype": torch.bfloat16}),
    ("product", "'silu'", {"function": "silu"}),
    ("product", "'relu'", {"function": "relu"}),
    ("product", "different lengths", {"packed": []}),
    ("product", "different lengths", {"bias": [None, None]}),
    ("product", "different lengths", {"level_tables": []}),
    ("product", "gate", {"gate": floats(4, 5)}),
    ("product", "gate", {"gate": floats(0, 5)}),
    ("product", "residual", {"residual": floats(5, 5)}),
    ("product", "token_scale", {"token_scale": floats(5, 3)}),
    ("product", "groups", {"token_scale": floats(6, 5), "weight_scale": [floats(5, 5)]}),
    ("product", "groups", {"token_scale": floats(6, 4), "weight_scale": [floats(5, 4)]}),
    ("product", "groups", {"token_scale": floats(6, 0), "weight_scale": [floats(5, 0)]}),
    ("product", "weight_scale", {"token_scale": floats(6, 0)}),
    ("product", "weight_scale", {"token_scale": floats(6, 2)}),
    ("product", "weight_scale", {"weight_scale": [floats(4, 3)]}),
    ("product", "found 2, needed less than 2", {"format_index": [torch.full((5,), 2, dtype=torch.uint8)]}),
    ("product", "level_tables", {"level_tables": [torch.ones(0, 16, dtype=torch.int8)], "format_index": [None]}),
    ("product", "level_tables", {"level_tables": [torch.ones(2, 15, dtype=torch.int8)]}),
    ("product", "packed", {"packed": [torch.ones(5, 24, dtype=torch.uint8)]}),
    ("attention", "key", {"key": floats(1, 7, 3, 8)}),
    ("attention", "key", {"key": floats(2, 7, 2, 8)}),
    ("attention", "value", {"value": floats(2, 6, 3, 8)}),
    ("attention", "value", {"value": floats(2, 7, 3, 9)}),
    ("attention", "key", {"key": floats(2, 7, 3, 8).to(torch.bfloat16)}),
    ("attention", "at least one key", {"key": floats(2, 0, 3, 8), "value": floats(2, 0, 3, 8)}),
    ("attention", "head size 257", {name: floats(1, 2, 1, 257) for name in ("query", "key", "value")}),
    ("attention", "head size 0", {name: floats(1, 2, 1, 0) for name in ("query", "key", "value")}),
]


@pytest.mark.parametrize(("call", "part", "changes"), REFUSED, ids=[f"{c}: {', '.join(a)}" for c, _, a in REFUSED])
def test_values_that_do_not_fit_are_refused(call: str, part: str, changes: Arguments) -> None:
    function, arguments = CALLS[call]
    with pytest.raises((TypeError, ValueError), match=re.escape(part)) as info:
        function(**{**arguments(), **changes})
    assert "found" in str(info.value)
    assert "needed" in str(info.value)


@pytest.mark.parametrize("width", [0, 1, 7])
def test_products_of_odd_width_are_refused(width: int) -> None:
    wrong = {
        **product_arguments(),
        "levels": torch.ones(6, width, dtype=torch.int8),
        "packed": [torch.ones(5, width // 2, dtype=torch.uint8)],
        "token_scale": floats(6, 1),
        "weight_scale": [floats(5, 1)],
    }
    with pytest.raises(ValueError, match=f"width {width}"):
        native_ops.product(**wrong)


def test_gate_and_residual_are_for_one_weight() -> None:
    both = product_arguments()
    for name in ("packed", "level_tables", "format_index", "weight_scale", "bias"):
        both[name] = both[name] * 2
    with pytest.raises(ValueError, match="2 weights, needed one weight"):
        native_ops.product(**both)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_sums_beyond_int32_are_refused(dtype: torch.dtype) -> None:
    # The widest product that fits is exact, the next wider one is refused: levels decide, not their type.
    largest, weight = 120, -128
    width = (2**31 - 1) // (largest * -weight) // 2 * 2
    for extra, fits in ((0, True), (2, False)):
        levels = torch.full((1, width + extra), largest, dtype=dtype)
        arguments = {
            "levels": levels,
            "token_scale": torch.ones(1, 1),
            "packed": [torch.zeros(1, levels.shape[1] // 2, dtype=torch.uint8)],
            "level_tables": [torch.full((1, 16), weight, dtype=torch.int8)],
            "format_index": [None],
            "weight_scale": [torch.ones(1, 1)],
            "bias": [None],
            "function": None,
            "gate": None,
            "residual": None,
            "dtype": torch.float32,
        }
        if fits:
            (found,) = native_ops.product(**arguments)
            assert found.item() == float(np.float32(largest * weight * levels.shape[1]))
        else:
            with pytest.raises(ValueError, match="levels up to 120 and weights up to 128"):
                native_ops.product(**arguments)


def test_tensors_that_torch_lays_out_otherwise_are_refused() -> None:
    wrong = rotate_quantize_arguments()
    wrong["x"] = wrong["x"].to_sparse()
    with pytest.raises(NotImplementedError, match="SparseCPU"):
        native_ops.rotate_quantize(**wrong)


def test_strides_of_tensors_without_elements_do_not_matter() -> None:
    # NumPy gives them a stride of 0.
    nothing = torch.from_numpy(np.empty((0, 24), dtype=np.int8))
    plain = {**product_arguments(), "levels": nothing, "token_scale": floats(0, 3), "gate": None, "residual": None}
    (found,) = native_ops.product(**plain)
    assert found.shape == (0, 5)


def test_modulations_may_lie_apart() -> None:
    together = rotate_quantize_arguments()
    apart = copy.copy(together)
    apart["mod_shift"] = torch.nn.functional.pad(together["mod_shift"], (0, 5))[:, :72]
    for one, other in zip(native_ops.rotate_quantize(**together), native_ops.rotate_quantize(**apart), strict=True):
        assert torch.equal(one, other)

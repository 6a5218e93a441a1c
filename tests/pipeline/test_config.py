"""The request: what it accepts, what it refuses, and its JSON."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import require_complete

from hqdit.errors import UsageError
from hqdit.formats.catalog import E1M2, E2M1, E3M0, FORMAT_NAMES, INT4
from hqdit.pipeline.config import BIT_WIDTHS, DEFAULT_PRESET, PRESETS, QuantizationConfig

TABLE = "table:-64,-32,-16,-8,-4,-2,-1,0,1,2,4,8,16,32,64,127"

FLAGS = {
    "weights": "--weights",
    "activations": "--activations",
    "weight_granularity": "--weight-granularity",
    "activation_granularity": "--activation-granularity",
    "group_size": "--group-size",
    "format_granularity": "--format-granularity",
    "alpha": "--alpha",
    "rotation": "--rotation",
    "fold_value_rotation": "--fold-value-rotation",
    "scale_rule": "--scale-rule",
    "keep_dtype": "--keep-dtype",
    "seed": "--seed",
}


def refused(*parts: str, **values: Any) -> None:
    with pytest.raises(UsageError) as info:
        QuantizationConfig(**values)
    assert info.value.exit_code == 2
    require_complete(info.value, *parts)


configs = st.builds(
    lambda **values: values,
    weights=st.sampled_from(["fp4", *FORMAT_NAMES, TABLE]),
    activations=st.sampled_from(["same", *FORMAT_NAMES, TABLE]),
    weight_granularity=st.sampled_from(["tensor", "channel"]),
    activation_granularity=st.sampled_from(["token", "tensor", "channel", "channel-token"]),
    alpha=st.floats(0, 1, exclude_min=True, exclude_max=True),
    rotation=st.sampled_from(["full", "none", "block:4", "block:36"]),
    scale_rule=st.sampled_from(["absmax", "mse"]),
    smoothing=st.none() | st.floats(0, 1),
    low_rank=st.integers(0, 2**40),
    gptq=st.booleans(),
    act_order=st.booleans(),
    include=st.tuples(st.text(max_size=5)),
    exclude=st.sampled_from([(), ("*fc*", "x")]),
    keep_dtype=st.sampled_from([None, "float32", "bfloat16", "float16"]),
    seed=st.integers(0, 2**70),
)


@given(configs)
def test_json_round_trip(values: dict[str, Any]) -> None:
    config = QuantizationConfig(**values)
    text = json.dumps(config.to_json())
    assert QuantizationConfig.from_json(text) == config
    assert QuantizationConfig.from_json(json.loads(text)) == config
    # What came after format version 1 is written only where it is used, so that older releases read the other files.
    version_1 = (
        "weights activations weight_granularity activation_granularity group_size format_granularity alpha rotation "
        "fold_value_rotation scale_rule gptq act_order include exclude keep_dtype seed"
    ).split()
    defaults = {field.name: field.default for field in dataclasses.fields(QuantizationConfig)}
    added = {name: default for name, default in defaults.items() if name not in version_1}
    unused = {name for name, default in added.items() if getattr(config, name) == default}
    assert config.to_json().keys() == {field.name for field in dataclasses.fields(QuantizationConfig)} - unused


@pytest.mark.parametrize("grouped", [*itertools.product(["weight", "activation", "both"], [4, 36])], ids=str)
def test_json_round_trip_of_groups(grouped: tuple[str, int]) -> None:
    side, size = grouped
    config = QuantizationConfig(
        weight_granularity="group" if side != "activation" else "channel",
        activation_granularity="group" if side != "weight" else "token",
        group_size=size,
    )
    assert QuantizationConfig.from_json(config.to_json()) == config


def test_partial_json_has_the_defaults() -> None:
    assert QuantizationConfig.from_json({}) == QuantizationConfig()
    assert QuantizationConfig.from_json('{"gptq": false}') == QuantizationConfig(gptq=False)


@pytest.mark.parametrize("values", [{"weigths": "fp4"}, {"alpha": 0.5, "bits": 4, "Gptq": True}], ids=str)
def test_unknown_keys(values: dict[str, Any]) -> None:
    unknown = sorted(values.keys() - {"alpha"})
    with pytest.raises(UsageError) as info:
        QuantizationConfig.from_json(values)
    require_complete(info.value, ", ".join(unknown), "gptq")
    with pytest.raises(TypeError):
        QuantizationConfig(**values)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "7", '"fp4"', '["weights"]', "[" * 100_000], ids=lambda t: t[:9]
)
def test_json_that_is_no_object(text: str) -> None:
    with pytest.raises(UsageError) as info:
        QuantizationConfig.from_json(text)
    require_complete(info.value, "QuantizationConfig")


@pytest.mark.parametrize("value", [[], None, 7, ("weights",)], ids=str)
def test_json_value_that_is_no_object(value: Any) -> None:
    with pytest.raises(UsageError) as info:
        QuantizationConfig.from_json(value)
    require_complete(info.value, "QuantizationConfig")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weights", "fp5"),
        ("weights", ""),
        ("weights", "same"),
        ("weights", "table:1,2,3"),
        ("weights", "table:" + ",".join(["1"] * 16)),
        ("weights", "table:a,b"),
        ("activations", "fp4"),
        ("activations", "e9m9"),
        ("weight_granularity", "token"),
        ("weight_granularity", "row"),
        ("activation_granularity", "row"),
        ("activation_granularity", ""),
        ("format_granularity", "tensor"),
        ("alpha", 0.0),
        ("alpha", 1.0),
        ("alpha", -0.25),
        ("alpha", 25),
        ("alpha", float("nan")),
        ("alpha", float("inf")),
        ("rotation", "half"),
        ("rotation", "block"),
        ("rotation", "block:"),
        ("rotation", "block:0"),
        ("rotation", "block:1"),
        ("rotation", "block:-4"),
        ("rotation", "block:3.5"),
        ("rotation", "block:52"),
        ("rotation", "block:92"),
        ("rotation", "Full"),
        ("scale_rule", "minmax"),
        ("keep_dtype", "float64"),
        ("keep_dtype", "bf16"),
        ("seed", -1),
    ],
)
def test_values_out_of_range(name: str, value: Any) -> None:
    refused(FLAGS[name], str(value) if isinstance(value, float) else repr(value), **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("weights", "rotation", "scale_rule") for value in (None, 4, ["fp4"], True)),
        *((name, value) for name in ("gptq", "act_order", "fold_value_rotation") for value in (None, 0, 1, "yes")),
        *((name, value) for name in ("include", "exclude") for value in (None, "*", 7, ["*"], (1,), (None,))),
        *(("alpha", value) for value in (None, "0.25", True)),
        *(("smoothing", value) for value in ("0.5", True, [0.5])),
        *(("low_rank", value) for value in (None, "4", 4.0, True)),
        *(("format_search", value) for value in (None, 0, "yes")),
        *(("seed", value) for value in (None, "0", 0.0, True)),
        *(("group_size", value) for value in ("36", 36.0, True)),
        *(("keep_dtype", value) for value in (32, True)),
    ],
    ids=str,
)
def test_wrong_types(name: str, value: Any) -> None:
    grouped = {"weight_granularity": "group"} if name == "group_size" else {}
    refused(f"QuantizationConfig.{name}", repr(value), **{name: value}, **grouped)


@pytest.mark.parametrize("size", [None, 0, -4, 2, 3, 6, 37])
@pytest.mark.parametrize("side", ["weight_granularity", "activation_granularity"])
def test_group_sizes(side: str, size: int | None) -> None:
    refused("--group-size", repr(size), **{side: "group", "group_size": size})


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--group-size", {"group_size": 36}),
        ("--format-granularity", {"format_granularity": "channel", "weights": "e2m1"}),
        ("--format-granularity", {"format_granularity": "channel", "weight_granularity": "tensor"}),
        ("--fold-value-rotation", {"fold_value_rotation": True, "rotation": "none"}),
        ("--fold-value-rotation", {"fold_value_rotation": True, "rotation": "block:4"}),
    ],
)
def test_values_that_do_not_go_together(flag: str, values: dict[str, Any]) -> None:
    refused(flag, **values)


def test_limits_are_accepted() -> None:
    QuantizationConfig(alpha=5e-324)
    QuantizationConfig(alpha=1 - 2**-53)
    QuantizationConfig(weight_granularity="group", group_size=4)
    QuantizationConfig(rotation="block:2")
    QuantizationConfig(activations=TABLE, weights=TABLE)


def test_presets() -> None:
    assert next(iter(PRESETS)) == DEFAULT_PRESET == "hqdit"
    paper = QuantizationConfig.preset("hqdit")
    assert paper == QuantizationConfig()
    assert (paper.weights, paper.alpha, paper.rotation, paper.gptq) == ("fp4", 0.25, "full", True)
    assert (paper.weight_granularity, paper.activation_granularity) == ("channel", "token")
    assert paper.weight_candidates == (E3M0, E2M1, E1M2)
    minmax = QuantizationConfig.preset("minmax")
    assert minmax.weight_candidates == (E2M1,)
    assert (minmax.rotation, minmax.gptq, minmax.scale_rule) == ("none", False, "absmax")
    assert not minmax.needs_calibration
    for name in ("", "HQDIT", "best"):
        with pytest.raises(UsageError) as info:
            QuantizationConfig.preset(name)
        require_complete(info.value, "--preset", repr(name), "hqdit, minmax")


NEAREST: dict[str, Any] = {"rotation": "none", "gptq": False, "activation_granularity": "token", "weights": "int4"}
#: Preset -> what it has that differs from the paper's method.
PLUS: dict[str, Any] = {
    "weights": "lloyd-max",
    "scale_rule": "mse-refit",
    "act_order": True,
    "smoothing": 0.5,
    "smoothing_statistic": "rms",
    "centring": "sample",
    "emphasis": 8,
    "bias_correction": True,
}
METHODS: dict[str, dict[str, Any]] = {
    "hqdit": {},
    "minmax": {**NEAREST, "weights": "e2m1"},
    "minmax-int4": NEAREST,
    "smoothquant": {**NEAREST, "smoothing": 0.5},
    "fpq": {
        **NEAREST,
        "weights": "fp4",
        "activations": "fp4",
        "activation_granularity": "channel",
        "format_search": True,
    },
    "gptq": {**NEAREST, "gptq": True},
    "hqdit-plus-token": {**PLUS, "activation_scale_rule": "rms"},
    "hqdit-plus": {
        **PLUS,
        "activation_scale_rule": "clipped",
        "weight_granularity": "group",
        "activation_granularity": "group",
        "group_size": 72,
        "sensitive_group_size": 16,
        "group_fit": "at-most",
        "scale_format": "e4m3",
    },
    "w4a8": {"activations": "int8"},
    "quarot": {"weights": "int4", "scale_rule": "mse"},
    "svdquant": {**NEAREST, "smoothing": 0.5, "low_rank": 32},
    "hqdit-no-rotation": {"rotation": "none"},
    "hqdit-fixed-format": {"weights": "e2m1"},
    "hqdit-no-gptq": {"gptq": False},
    "hqdit-channel": {"activation_granularity": "channel"},
}


def test_methods_differ_from_the_paper_in_what_they_are_named_after() -> None:
    assert {name: QuantizationConfig(**values) for name, values in METHODS.items()} == PRESETS
    assert len(set(PRESETS.values())) == len(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_bit_widths_change_formats_only(name: str) -> None:
    plain = QuantizationConfig.preset(name)
    assert QuantizationConfig.preset(name, "W4A4") == plain == PRESETS[name]
    integer = plain.weights == "int4"
    int8, int6 = ("int8", "int6") if integer else ("e4m3", "e2m3")
    found = {bits: QuantizationConfig.preset(name, bits) for bits in BIT_WIDTHS}
    assert {bits: (config.weights, config.activations) for bits, config in found.items()} == {
        "W8A8": (int8, int8),
        "W4A8": (plain.weights, int8),
        "W4A6": (plain.weights, int6),
        "W4A4": (plain.weights, plain.activations),
    }
    for config in found.values():
        assert config.replace(weights=plain.weights, activations=plain.activations) == plain
        assert QuantizationConfig.from_json(json.dumps(config.to_json())) == config


@pytest.mark.parametrize("bits", ["", "w4a4", "W2A2", "4"])
def test_unknown_bit_widths(bits: str) -> None:
    with pytest.raises(UsageError) as info:
        QuantizationConfig.preset("hqdit", bits)
    require_complete(info.value, "--bits", repr(bits), "W8A8, W4A8, W4A6, W4A4")


def test_json_of_before_the_baselines_has_none_of_them() -> None:
    new = {"smoothing": None, "low_rank": 0, "format_search": False}
    config = QuantizationConfig(rotation="block:36", seed=3)
    old = {key: value for key, value in config.to_json().items() if key not in new}
    assert QuantizationConfig.from_json(old) == config
    assert {key: getattr(config, key) for key in new} == new


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        *(("--smoothing", {"smoothing": value}) for value in (-0.1, 1.1, float("nan"), float("inf"))),
        ("--low-rank", {"low_rank": -1}),
        ("--low-rank", {"low_rank": 4, "fold_value_rotation": True}),
        *(
            ("--format-search", {"format_search": True, "activations": "fp4", **change})
            for change in (
                {"activation_granularity": "token"},
                {"activation_granularity": "channel-token"},
                {"activation_granularity": "channel", "weight_granularity": "tensor"},
                {"activation_granularity": "channel", "format_granularity": "channel"},
                {"activation_granularity": "channel", "scale_rule": "mse"},
            )
        ),
        *(
            ("--activations", {"format_search": True, "activation_granularity": "channel", "activations": value})
            for value in ("same", "int4", TABLE)
        ),
        ("--weights", {"format_search": True, "activation_granularity": "channel", "weights": "int4"}),
        ("--activations", {"activations": "fp4"}),
    ],
)
def test_smoothing_branch_and_search(flag: str, values: dict[str, Any]) -> None:
    if values.get("weights") == "int4":
        values = {**values, "activations": "fp4"}
    refused(flag, **values)


def test_smoothing_branch_and_search_in_full() -> None:
    for alpha in (0, 0.0, 0.5, 1, 1.0):
        assert QuantizationConfig(smoothing=alpha, gptq=False).needs_calibration
    assert not QuantizationConfig(low_rank=8, gptq=False).needs_calibration
    search = QuantizationConfig.preset("fpq")
    assert search.needs_calibration and search.weight_candidates == search.activation_candidates == (E3M0, E2M1, E1M2)
    assert QuantizationConfig(weights="int4").activation_candidates == (INT4,)
    search.replace(rotation="full", gptq=True, smoothing=0.5, low_rank=4)  # parts that go together


@pytest.mark.parametrize("granularity", ["token", "group", "tensor", "channel", "channel-token"])
@pytest.mark.parametrize("gptq", [False, True])
def test_needs_calibration(granularity: str, gptq: bool) -> None:
    group_size = 12 if granularity == "group" else None
    config = QuantizationConfig(gptq=gptq, activation_granularity=granularity, group_size=group_size)
    assert config.needs_calibration == (gptq or granularity in ("tensor", "channel", "channel-token"))


def test_frozen_and_replaceable() -> None:
    config = QuantizationConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.alpha = 0.5  # type: ignore[misc]
    assert config.replace(alpha=0.5) == QuantizationConfig(alpha=0.5) != config
    with pytest.raises(UsageError):
        config.replace(alpha=2.0)
    assert len({config, QuantizationConfig(), config.replace(seed=1)}) == 2

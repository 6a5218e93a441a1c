"""Layer specifications: what is refused, and JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from oracles import GRIDS, ONE_SIDED_TABLE, SIGNED_TABLE

from hqdit.errors import CheckpointError, UsageError
from hqdit.formats.catalog import E1M2, E2M1, E2M3, E3M0, E4M3, E5M2, FP4_FORMATS, INT4, INT6, INT8, format_from_json
from hqdit.formats.number_format import NumberFormat, TableFormat
from hqdit.quantizers.spec import (
    ACTIVATION_GRANULARITIES,
    ACTIVATION_SCALE_RULES,
    INT32_MAX,
    SCALE_FORMATS,
    WEIGHT_GRANULARITIES,
    ActivationSpec,
    LinearSpec,
    WeightSpec,
    require_group_size,
)
from hqdit.transforms.rotation import RotationSpec, plan_rotation

FORMATS = [format_from_json(name) for name in GRIDS]
SIGNED = [fmt for fmt in FORMATS if fmt.is_signed]
NO_ROTATION = RotationSpec("none", 144, 144)


def spec_of(
    weight: WeightSpec | None = None,
    activation: ActivationSpec | None = None,
    in_features: int = 144,
    rotation: RotationSpec | None = None,
) -> LinearSpec:
    return LinearSpec(
        "blocks.3.fc1",
        in_features,
        8,
        weight or WeightSpec((E2M1,)),
        activation or ActivationSpec(E2M1),
        rotation or RotationSpec("none", in_features, in_features),
    )


# Shapes and arithmetic


@pytest.mark.parametrize(
    ("weight", "shape"),
    [
        (WeightSpec((E2M1,), "tensor"), (1, 1)),
        (WeightSpec((E2M1,), "channel"), (8, 1)),
        (WeightSpec((E2M1,), "group", 36), (8, 4)),
        (WeightSpec((E2M1,), "group", 4), (8, 36)),
        (WeightSpec((E2M1,), "group", 144), (8, 1)),
    ],
)
def test_scale_shape(weight: WeightSpec, shape: tuple[int, int]) -> None:
    assert weight.scale_shape(8, 144) == shape
    assert spec_of(weight).weight == weight


@pytest.mark.parametrize("weight", SIGNED, ids=str)
@pytest.mark.parametrize("activation", FORMATS, ids=str)
def test_arithmetic_is_recorded(weight: NumberFormat, activation: NumberFormat) -> None:
    spec = spec_of(WeightSpec((weight,)), ActivationSpec(activation))
    exact = weight not in (E4M3, E5M2) and activation not in (E4M3, E5M2)
    assert spec.is_int8 == exact
    assert spec.arithmetic == spec.to_json()["arithmetic"] == ("int8" if exact else "float32")


@pytest.mark.parametrize(
    ("granularity", "channel", "static"),
    [
        ("token", False, False),
        ("group", False, False),
        ("tensor", False, True),
        ("channel", True, False),
        ("channel-token", True, False),
    ],
)
def test_what_comes_from_calibration(granularity: str, channel: bool, static: bool) -> None:
    spec = ActivationSpec(E2M1, granularity, 36 if granularity == "group" else None)
    assert (spec.has_channel_scale, spec.has_static_scale) == (channel, static)
    assert spec.needs_calibration == (channel or static)


# Refusals: each names the layer


def refused(match: str, **parts: Any) -> None:
    with pytest.raises(UsageError, match=match) as error:
        spec_of(**parts)
    assert str(error.value).startswith("blocks.3.fc1: found ")
    assert "Fix: " in str(error.value)


@pytest.mark.parametrize("granularity", ["", "row", "token", "Channel"])
def test_unknown_weight_granularity(granularity: str) -> None:
    refused("weight granularity .* needed one of tensor, channel, group", weight=WeightSpec((E2M1,), granularity))


@pytest.mark.parametrize("granularity", ["", "row", "tokens"])
def test_unknown_activation_granularity(granularity: str) -> None:
    refused("activation granularity .* needed one of token", activation=ActivationSpec(E2M1, granularity))


@pytest.mark.parametrize("size", [None, 0, -4, 2, 3, 6, 18, 32, 288])
def test_group_size_must_be_a_multiple_of_four_that_divides(size: int | None) -> None:
    sizes = r"\[4, 8, 12, 16, 24, 36, 48, 72, 144\]"
    refused(f"multiple of 4 that divides it.*{sizes}", weight=WeightSpec((E2M1,), "group", size))
    refused(f"multiple of 4 that divides it.*{sizes}", activation=ActivationSpec(E2M1, "group", size))


@pytest.mark.parametrize("size", [4, 8, 12, 16, 24, 36, 48, 72, 144])
def test_every_group_size_that_divides_works(size: int) -> None:
    assert require_group_size(size, 144, "x") == size
    spec_of(WeightSpec((E2M1,), "group", size), ActivationSpec(E2M1, "group", size))


def test_groups_of_both_sides_must_agree() -> None:
    refused(
        "groups of 36 for weights and 72 for activations",
        weight=WeightSpec((E2M1,), "group", 36),
        activation=ActivationSpec(E2M1, "group", 72),
    )


@pytest.mark.parametrize("granularity", ["token", "tensor", "channel", "channel-token"])
def test_group_size_without_groups(granularity: str) -> None:
    refused("group size 36 with granularity", activation=ActivationSpec(E2M1, granularity, 36))
    if granularity in WEIGHT_GRANULARITIES:
        refused("group size 36 with granularity", weight=WeightSpec((E2M1,), granularity, 36))


def test_one_sided_weights() -> None:
    one_sided = TableFormat(ONE_SIDED_TABLE)
    refused("one-sided table for the weights", weight=WeightSpec((one_sided,)))
    assert spec_of(activation=ActivationSpec(one_sided)).is_int8


@pytest.mark.parametrize("formats", [(E2M1, INT8), (E2M1, E2M3), (INT8, E4M3)])
def test_formats_of_different_storage(formats: tuple[NumberFormat, ...]) -> None:
    refused("different storage", weight=WeightSpec(formats))


def test_formats_of_one_storage() -> None:
    assert spec_of(WeightSpec((*FP4_FORMATS, INT4, TableFormat(SIGNED_TABLE)))).is_int8
    assert spec_of(WeightSpec((INT6, INT8, E2M3))).is_int8


def test_a_single_input_channel() -> None:
    # torch 2.13's int8 product is wrong for one column, and nothing is gained by quantizing it
    refused("1 input channels, needed at least 2", in_features=1)


@pytest.mark.parametrize("width", [3, 143])
def test_odd_width(width: int) -> None:
    refused(f"{width} input channels, needed an even number", in_features=width)
    assert spec_of(WeightSpec((INT8,)), in_features=width).in_features == width


@pytest.mark.parametrize(
    ("weight", "activation", "largest"),
    [
        (INT8, INT8, 128 * 128),
        (E2M1, E2M1, 12 * 12),
        (E3M0, E3M0, 64 * 64),
        (INT4, INT4, 8 * 8),
        (E1M2, INT4, 7 * 8),
        (INT8, TableFormat(ONE_SIDED_TABLE), 128 * 127),
        (E2M3, INT6, 60 * 32),
    ],
    ids=str,
)
def test_int32_sums_cannot_overflow(weight: NumberFormat, activation: NumberFormat, largest: int) -> None:
    most = (2**31 - 1) // largest
    assert INT32_MAX == 2**31 - 1
    even = most - most % 2
    assert spec_of(WeightSpec((weight,)), ActivationSpec(activation), in_features=even).is_int8
    assert even * largest <= INT32_MAX < (even + 2) * largest
    refused(
        f"needed at most {most} so that int32 sums",
        weight=WeightSpec((weight,)),
        activation=ActivationSpec(activation),
        in_features=even + 2,
    )


def test_widest_format_of_several_decides_the_overflow() -> None:
    refused("so that int32 sums", weight=WeightSpec((E1M2, E3M0)), activation=ActivationSpec(INT8), in_features=300_000)
    spec_of(WeightSpec((E1M2,)), ActivationSpec(INT8), in_features=300_000)


def test_float32_products_have_no_such_bound() -> None:
    assert spec_of(WeightSpec((E4M3,)), ActivationSpec(E4M3), in_features=10_000_000).arithmetic == "float32"


def test_rotation_of_another_width() -> None:
    refused("rotation of width 72 on 144", rotation=plan_rotation("full", 72, "x"))


# How scales are found and kept


@pytest.mark.parametrize("rule", ["", "mse", "RMS", None])
def test_unknown_activation_scale_rule(rule: Any) -> None:
    refused("scale rule .* needed one of absmax, rms", activation=ActivationSpec(E2M1, scale_rule=rule))


@pytest.mark.parametrize("factor", [0, 0.0, -1.0, math.nan, math.inf, True, "1", None])
def test_scale_factors_that_are_no_positive_number(factor: Any) -> None:
    refused("scale factor .* needed a positive number", activation=ActivationSpec(E2M1, scale_factor=factor))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("changes", [{"scale_rule": "rms"}, {"scale_factor": 0.9}])
def test_static_scales_have_no_rule(granularity: str, changes: dict[str, Any]) -> None:
    match = f"granularity '{granularity}', whose scales are static, needed one of token, group, channel-token"
    refused(match, activation=ActivationSpec(E2M1, granularity, **changes))


@pytest.mark.parametrize("scale_format", ["", "float16", "E4M3", None])
def test_unknown_scale_format(scale_format: Any) -> None:
    match = "scale format .* needed one of float32, e4m3"
    refused("activation " + match, activation=ActivationSpec(E2M1, "group", 36, scale_format=scale_format))
    refused("weight " + match, weight=WeightSpec((E2M1,), "group", 36, scale_format=scale_format))


@pytest.mark.parametrize("granularity", ["token", "tensor", "channel", "channel-token"])
def test_short_scales_without_groups(granularity: str) -> None:
    match = f"scales in e4m3 with granularity '{granularity}', needed granularity group"
    refused("found activation " + match, activation=ActivationSpec(E2M1, granularity, scale_format="e4m3"))
    if granularity in WEIGHT_GRANULARITIES:
        refused("found weight " + match, weight=WeightSpec((E2M1,), granularity, scale_format="e4m3"))


def test_dynamic_granularities() -> None:
    for granularity in ACTIVATION_GRANULARITIES:
        spec = ActivationSpec(E2M1, granularity, 36 if granularity == "group" else None)
        assert spec.has_dynamic_scale == (granularity not in ("tensor", "channel"))
        if spec.has_dynamic_scale:
            spec_of(activation=dataclasses.replace(spec, scale_rule="rms", scale_factor=0.3))


# JSON


def test_new_keys_are_written_where_they_say_something() -> None:
    # Files of before have none of these keys, and keep their bytes.
    plain = spec_of(WeightSpec((E2M1,), "group", 36), ActivationSpec(E2M1, "group", 36)).to_json()
    assert plain["weight"].keys() == {"formats", "granularity", "group_size"}
    assert plain["activation"].keys() == {"format", "granularity", "group_size"}
    all_new = spec_of(
        WeightSpec((E2M1,), "group", 36, scale_format="e4m3"),
        ActivationSpec(E2M1, "group", 36, scale_rule="rms", scale_factor=0.28, scale_format="e4m3"),
    )
    assert all_new.to_json()["weight"] == {**plain["weight"], "scale_format": "e4m3"}
    assert all_new.to_json()["activation"] == {
        **plain["activation"],
        "scale_rule": "rms",
        "scale_factor": 0.28,
        "scale_format": "e4m3",
    }


ROTATIONS = ["none", "full", "block:36", "block:4"]
STATIC = ("tensor", "channel")


@given(
    st.lists(st.sampled_from(SIGNED), min_size=1, max_size=4, unique=True),
    st.sampled_from(FORMATS),
    st.sampled_from(WEIGHT_GRANULARITIES),
    st.sampled_from(ACTIVATION_GRANULARITIES),
    st.sampled_from([4, 16, 36, 48, 72, 144]),
    st.sampled_from(ROTATIONS),
    st.sampled_from([None, 72, 36, 12]),
    st.sampled_from(ACTIVATION_SCALE_RULES),
    st.sampled_from([1.0, 0.9, 1 / 3]),
    st.tuples(st.sampled_from(SCALE_FORMATS), st.sampled_from(SCALE_FORMATS)),
)
def test_json_round_trip(
    weights: list[NumberFormat],
    activation: NumberFormat,
    weight_granularity: str,
    activation_granularity: str,
    group: int,
    rotation: str,
    head_dim: int | None,
    rule: str,
    factor: float,
    scale_formats: tuple[str, str],
) -> None:
    weight = WeightSpec(
        tuple(weights),
        weight_granularity,
        group if weight_granularity == "group" else None,
        scale_format=scale_formats[0] if weight_granularity == "group" else "float32",
    )
    given_activation = ActivationSpec(
        activation,
        activation_granularity,
        group if activation_granularity == "group" else None,
        scale_rule=rule if activation_granularity not in STATIC else "absmax",
        scale_factor=factor if activation_granularity not in STATIC else 1.0,
        scale_format=scale_formats[1] if activation_granularity == "group" else "float32",
    )
    try:
        spec = spec_of(weight, given_activation, rotation=plan_rotation(rotation, 144, "x", head_dim))
    except UsageError:
        assume(False)
    text = json.dumps(spec.to_json())
    assert LinearSpec.from_json("blocks.3.fc1", json.loads(text)) == spec
    assert json.loads(text)["weight"]["granularity"] == weight_granularity


GOOD = spec_of(WeightSpec(FP4_FORMATS, "group", 36), rotation=plan_rotation("full", 144, "x")).to_json()
REMOVED = object()


def changed(path: str, value: object) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(json.dumps(GOOD))
    *outer, last = path.split(".")
    place = document
    for key in outer:
        place = place[key]
    if value is REMOVED:
        del place[last]
    else:
        place[last] = value
    return document


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("weight", REMOVED),
        ("activation", REMOVED),
        ("rotation", REMOVED),
        ("in_features", REMOVED),
        ("in_features", 145),
        ("in_features", "many"),
        ("in_features", None),
        ("out_features", REMOVED),
        ("weight.formats", REMOVED),
        ("weight.formats", ["e9m9"]),
        ("weight.formats", []),
        ("weight.formats", 3),
        ("weight.granularity", "row"),
        ("weight.group_size", 35),
        ("weight.group_size", REMOVED),
        ("weight.scale_format", "float32"),
        ("weight.scale_format", "float16"),
        ("weight.scale_format", None),
        ("activation.scale_format", "e4m3"),
        ("activation.scale_rule", "mean"),
        ("activation.scale_rule", "absmax"),
        ("activation.scale_factor", 1.0),
        ("activation.scale_factor", 1),
        ("activation.scale_factor", 0),
        ("activation.scale_factor", True),
        ("activation.scale_factor", "0.9"),
        ("activation.scale_factor", [0.9]),
        ("activation.scale", 0.9),
        ("activation.format", [1, 2, 3]),
        ("activation.format", None),
        ("activation.granularity", "group"),
        ("activation.group_size", 36),
        ("rotation.kind", "half"),
        ("rotation.kind", "heads"),
        ("rotation.block", 52),
        ("rotation.block", 72),
        ("rotation.block", REMOVED),
        ("rotation.factors", "2*72(paley1)"),  # made with another matrix than this version would use
        ("rotation", {"kind": "block", "block": 64, "factors": "block:64 64"}),  # does not divide: would mix tokens
        ("rotation", {"kind": "heads", "block": 24, "factors": "heads 6 x 2*12(paley1)"}),
        ("rotation", "full"),
    ],
)
def test_damaged_json_is_a_checkpoint_error_with_the_layers_name(path: str, value: object) -> None:
    assert LinearSpec.from_json("blocks.3.fc1", GOOD).to_json() == GOOD
    with pytest.raises(CheckpointError, match="layer blocks.3.fc1 of quantization_config"):
        LinearSpec.from_json("blocks.3.fc1", changed(path, value))


def test_specs_are_frozen_and_hashable() -> None:
    spec = spec_of()
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.in_features = 3  # type: ignore[misc]
    assert hash(spec) == hash(spec_of())
    assert NO_ROTATION.is_identity

"""8-bit inputs: which ones, for how many bits, and that they are what the model then has."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import calibration, predicted, tiny_dit

from hqdit.analysis.inspection import bits_per_activation, bits_per_input
from hqdit.cli.main import run
from hqdit.errors import NumericsError, UsageError
from hqdit.numerics.error import sqnr_db
from hqdit.pipeline.checkpoint import load, quantized_layers, save
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.mixed_precision import InputCost, choose_wide_inputs, input_cost
from hqdit.pipeline.plan import plan_quantization
from hqdit.pipeline.quantize import quantize

PLUS = QuantizationConfig.preset("hqdit-plus")
#: With weights so fine that inputs make the whole error: random weights profit little from GPTQ.
FINE = PLUS.replace(weights="int8", activations="lloyd-max")


@st.composite
def models(draw: st.DrawFn) -> dict[str, InputCost]:
    count = draw(st.integers(1, 7))
    sizes = st.floats(1e-6, 1.0)
    costs = {}
    for index in range(count):
        error = draw(sizes)
        costs[str(index)] = InputCost((error, error * draw(sizes)), (4.25, 8.25), draw(st.integers(1, 3)))
    return costs


def error_of(costs: dict[str, InputCost], wide: Any) -> float:
    return math.fsum(cost.errors[name in wide] for name, cost in costs.items())


def bits_of(costs: dict[str, InputCost], wide: Any) -> float:
    layers = sum(cost.readers for cost in costs.values())
    return math.fsum(cost.readers * cost.bits[name in wide] for name, cost in costs.items()) / layers


@given(costs=models(), budget=st.floats(4.0, 9.0))
def test_the_budget_is_kept_and_not_left_unused(costs: dict[str, InputCost], budget: float) -> None:
    if bits_of(costs, ()) > budget:
        with pytest.raises(UsageError, match=r"--average-bits: found .*, needed at least 4.250"):
            choose_wide_inputs(costs, budget, None)
        return
    wide = choose_wide_inputs(costs, budget, None)
    assert bits_of(costs, wide) <= budget * (1 + 1e-12)
    for name, cost in costs.items():
        if name not in wide and cost.errors[1] < cost.errors[0]:
            assert bits_of(costs, wide | {name}) > budget * (1 - 1e-12)


@given(costs=models(), share=st.floats(0.0, 1.0))
def test_the_error_is_reached_with_no_input_too_many(costs: dict[str, InputCost], share: float) -> None:
    least, most = error_of(costs, costs), error_of(costs, ())
    target = least + share * (most - least) + 1e-9
    wide = choose_wide_inputs(costs, None, target)
    assert error_of(costs, wide) <= target * (1 + 1e-9)
    # Inputs of one price: no smaller number of them does it.
    if len({cost.readers for cost in costs.values()}) == 1 and wide:
        fewer = itertools.combinations(costs, len(wide) - 1)
        assert all(error_of(costs, set(names)) > target * (1 - 1e-9) for names in fewer)


def test_an_error_out_of_reach_is_refused() -> None:
    costs = {"a": InputCost((0.1, 0.02), (4.0, 8.0), 1), "b": InputCost((0.2, 0.01), (4.0, 8.0), 1)}
    assert choose_wide_inputs(costs, None, 0.12) == {"b"}
    with pytest.raises(NumericsError, match=r"--max-error: found a predicted error of 0.03 .* for 2 of 2 inputs"):
        choose_wide_inputs(costs, None, 0.02)
    with pytest.raises(NumericsError, match=r"1 of 2 inputs, 6.00 bits each on average, needed at most 0.05"):
        choose_wide_inputs(costs, 6.0, 0.05)


def test_wide_codes_with_cheaper_scales_come_first() -> None:
    costs = {
        "dear": InputCost((0.5, 0.01), (4.25, 8.25), 1),
        "as dear": InputCost((0.1, 0.01), (12.0, 12.0), 1),
        "cheaper": InputCost((0.1, 0.01), (12.0, 8.9), 1),
        "worse": InputCost((0.1, 0.2), (12.0, 8.9), 1),
    }
    assert choose_wide_inputs(costs, bits_of(costs, ()), None) == {"as dear", "cheaper"}
    assert choose_wide_inputs(costs, None, 0.2) == {"dear", "as dear", "cheaper"}
    with pytest.raises(NumericsError, match="3 of 4 inputs"):
        choose_wide_inputs(costs, None, 0.1)


@pytest.fixture(scope="module")
def narrow() -> Any:
    return quantize(tiny_dit(), FINE, calibration())


def test_the_preset_has_no_wide_input() -> None:
    model = quantize(tiny_dit(), PLUS, calibration())
    assert {layer.spec.activation.format.bits for layer in quantized_layers(model).values()} == {4}


def test_bits_are_spent_and_saved(narrow: Any, tmp_path: Any) -> None:
    config = FINE.replace(average_bits=5.5)
    model = quantize(tiny_dit(), config, calibration())
    layers = quantized_layers(model)
    wide = {name for name, layer in layers.items() if layer.spec.activation.format.name == "int8"}
    assert wide and wide != set(layers)
    assert bits_per_activation(narrow) < bits_per_activation(model) <= 5.5
    exact = predicted(tiny_dit())
    assert sqnr_db(exact, predicted(model)) > sqnr_db(exact, predicted(narrow)) + 1
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.quantization_record.config == config
    assert {name: layer.spec for name, layer in quantized_layers(again).items()} == {
        name: layer.spec for name, layer in layers.items()
    }


def test_a_smaller_error_takes_wide_inputs(narrow: Any) -> None:
    exact = predicted(tiny_dit())
    error = 10 ** (-sqnr_db(exact, predicted(narrow)) / 10)
    counts = []
    # What is predicted is what is found within a factor of 4 in power.
    for wanted in (4 * error, error / 4):
        model = quantize(tiny_dit(), FINE.replace(max_error=wanted), calibration())
        counts.append(sum(layer.spec.activation.format.bits == 8 for layer in quantized_layers(model).values()))
        assert 10 ** (-sqnr_db(exact, predicted(model)) / 10) < 4 * wanted
    assert counts[0] == 0 < counts[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"average_bits": 0.0},
        {"max_error": -1.0},
        {"average_bits": math.nan},
        {"average_bits": 5.0, "activations": "int8"},
        {"max_error": 0.1, "activation_granularity": "channel"},
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--average-bits|--max-error"):
        QuantizationConfig(**changes)


def test_bits_per_input_by_hand() -> None:
    for config, tokens, expected in (
        (QuantizationConfig(gptq=False, weights="e2m1"), None, lambda k: 4 + 32 / k),
        (PLUS.replace(sensitive_group_size=None, centring="static", emphasis=0), None, lambda k: 4 + 8 / 72 + 8 / k),
        (FINE.replace(sensitive_group_size=None, emphasis=0), 16, None),
    ):
        model = quantize(tiny_dit(), config, calibration())
        for layer in quantized_layers(model).values():
            width, is_split = layer.in_features, layer.spec.activation.centring == "sample"
            found = bits_per_input(layer, tokens)
            if expected is not None:
                assert found == pytest.approx(expected(width))
            else:
                assert found == pytest.approx(4 + 8 / 72 + 8 / width + is_split * (8 + 32 / width) / 16)


def test_inspect_shows_which_inputs_have_8_bits(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = quantize(tiny_dit(), PLUS.replace(average_bits=5.0), calibration())
    save(model, tmp_path / "model")
    assert run(["inspect", str(tmp_path / "model")]) == 0
    shown = capsys.readouterr()
    lines = (shown.out + shown.err).splitlines()
    wide = [name for name, layer in quantized_layers(model).items() if layer.spec.activation.format.bits == 8]
    assert f"inputs with 8 bits, {len(wide)} of {len(quantized_layers(model))} layers: {', '.join(wide)}" in lines
    rows = {line.split()[0]: line.split()[1:3] for line in lines if line.startswith("transformer_blocks")}
    assert all(rows[name] == ["lloyd-max", "int8"] for name in wide)
    assert {tuple(cells) for name, cells in rows.items() if name not in wide} == {("lloyd-max", "lloyd-max")}


def test_a_wide_input_gives_up_its_fine_groups_on_both_sides() -> None:
    layer = next(layer for layer in plan_quantization(tiny_dit(), PLUS).layers if layer.in_features == 72)
    fine, plain = (input_cost(PLUS, layer, (0.0, 1.0), 1, is_sensitive) for is_sensitive in (True, False))
    # Errors of the weights alone: groups of 12 channels are finer than those of 72, and a wide input has the latter.
    assert fine.errors[0] < fine.errors[1] == plain.errors[0] == plain.errors[1]
    assert fine.bits[0] > plain.bits[0] and fine.bits[1] == plain.bits[1] == pytest.approx(plain.bits[0] + 4)

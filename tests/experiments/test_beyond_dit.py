"""`beyond-dit`: networks trained as written, quantized by the same arithmetic, compared in pairs."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hqdit.errors import EnvironmentUnavailable, NumericsError, UsageError
from hqdit.experiments.beyond_dit import study
from hqdit.experiments.cache import ResultCache
from hqdit.experiments.laboratory import Laboratory
from hqdit.experiments.small_networks import examples as data
from hqdit.experiments.small_networks import quantization
from hqdit.experiments.small_networks.comparison import Outcome, compare, db_gain, score_gain, verdict
from hqdit.experiments.small_networks.examples import Examples, bigram_bits, text_windows
from hqdit.experiments.small_networks.findings import benefit, drawback, format_answer, network_answer
from hqdit.experiments.small_networks.grid import FORMATS, ROTATIONS, Case, NetworkResult
from hqdit.experiments.small_networks.networks import (
    KINDS,
    LANGUAGE_MODEL,
    MIXER,
    VISION_TRANSFORMER,
    Architecture,
    SmallNetwork,
    scale_normalized_channels,
)
from hqdit.experiments.small_networks.quantization import Setting, quantize_linear, quantize_network
from hqdit.experiments.small_networks.training import (
    RECIPES,
    Recipe,
    Trained,
    calibration_inputs,
    held_out_examples,
    scores,
    train,
    trained,
)
from hqdit.formats.catalog import E2M1, FP4_FORMATS
from hqdit.kernels.selection import use_backend
from hqdit.pipeline.checkpoint import quantized_layers
from hqdit.records.run_record import Interval
from hqdit.records.run_record_reader import run_record_from_json
from hqdit.transforms.hadamard import hadamard_matrix
from hqdit.transforms.rotation import plan_rotation, random_signs

E2M1_LEVELS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])

TINY = {
    VISION_TRANSFORMER: Recipe(
        Architecture(VISION_TRANSFORMER, 32, 64, 1, 16, 4, 10, heads=2), 12, 16, 2e-3, 0.0, 8, 24
    ),
    MIXER: Recipe(Architecture(MIXER, 32, 64, 1, 16, 4, 10, token_hidden=32), 12, 16, 2e-3, 0.0, 8, 24),
    LANGUAGE_MODEL: Recipe(Architecture(LANGUAGE_MODEL, 32, 64, 2, 16, 256, 256, heads=2), 6, 8, 2e-3, 9.0, 8, 6),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def fresh_network(kind: str) -> SmallNetwork:
    """Random weights, also in the LayerNorms, where a new network has ones and zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = SmallNetwork(TINY[kind].shape).eval().requires_grad_(False)
        for module in network.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.5, 2.0)
                module.bias.normal_()
    return network


def readers(network: SmallNetwork) -> dict[str, nn.Linear]:
    return {name: module for name, module in network.blocks.named_modules() if isinstance(module, nn.Linear)}


def inputs_of_readers(network: SmallNetwork, inputs: Tensor) -> dict[str, Tensor]:
    """Name -> what each linear layer of the blocks reads."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, args: seen.__setitem__(name, args[0])

    layers = readers(network)
    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    network(inputs)
    for handle in handles:
        handle.remove()
    return seen


# Data


def test_the_text_is_split_by_file_and_repeatable(tmp_path: Path) -> None:
    for name in ("b.py", "a.py", "_made_by_the_build.py", "c.txt"):
        (tmp_path / name).write_text(name)
    assert [path.name for path in data.text_files(tmp_path)] == ["a.py", "b.py"]
    text, held_out = data.python_text()
    assert text.dtype == torch.uint8 and len(text) > 5 * len(held_out) > 100_000
    sources = b"".join(path.read_bytes() for path in data.text_files(Path(json.__file__).parents[1]))
    assert len(sources) == len(text) + len(held_out)


def test_windows_pair_each_byte_with_the_next() -> None:
    found = text_windows(torch.arange(20, dtype=torch.uint8), torch.tensor([0, 7]), 4)
    assert found.inputs.tolist() == [[0, 1, 2, 3], [7, 8, 9, 10]]
    assert found.targets.tolist() == [[1, 2, 3, 4], [8, 9, 10, 11]]


def test_patches_are_squares_of_pixels_row_by_row() -> None:
    image = torch.arange(64.0).reshape(1, 1, 8, 8)
    assert data.patches(image).shape == (1, 16, 4)
    assert data.patches(image)[0, 5].tolist() == [18, 19, 26, 27]  # second row of patches, second patch


def test_bits_of_byte_pairs_against_a_count_by_hand() -> None:
    text = torch.tensor([1, 2, 1, 2, 1, 3], dtype=torch.uint8)  # after 1: 2, 2, 3; after 2: 1, 1
    judged = Examples(torch.tensor([[1, 2]]), torch.tensor([[3, 1]]))
    expected = -(math.log2((1 + 1) / (3 + 256)) + math.log2((2 + 1) / (2 + 256))) / 2
    assert bigram_bits(text, judged) == pytest.approx(expected)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    data.digits_images.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(EnvironmentUnavailable, match=r"pip install 'hqdit\[train\]'"):
        data.digits_images()


def test_without_sources_the_error_names_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data.python_text.cache_clear()
    monkeypatch.setattr(data.sysconfig, "get_path", lambda _name: str(tmp_path))
    with pytest.raises(EnvironmentUnavailable, match=str(tmp_path)):
        data.python_text()


# Networks and training


@each_kind
def test_logits_have_the_shape_of_the_targets(kind: str) -> None:
    examples = held_out_examples(TINY[kind])
    logits = fresh_network(kind)(examples.inputs)
    assert logits.shape == (*examples.targets.shape, TINY[kind].shape.outputs)


def test_the_language_model_sees_no_later_byte() -> None:
    text = held_out_examples(TINY[LANGUAGE_MODEL]).inputs
    changed = text.clone()
    changed[:, 9:] = 7
    network = fresh_network(LANGUAGE_MODEL)
    torch.testing.assert_close(network(text)[:, :9], network(changed)[:, :9])
    assert not torch.equal(network(text)[:, 9:], network(changed)[:, 9:])


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="'perceptron'"):
        SmallNetwork(dataclasses.replace(TINY[MIXER].shape, kind="perceptron"))


@each_kind
def test_training_is_repeatable_and_leaves_the_global_generator_alone(kind: str) -> None:
    before = torch.random.get_rng_state()
    first, second = train(TINY[kind]).state_dict(), train(TINY[kind]).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = train(dataclasses.replace(TINY[kind], seed=1)).state_dict()
    assert not torch.equal(first["head.weight"], other["head.weight"])


@each_kind
def test_training_lowers_the_loss(kind: str) -> None:
    recipe = dataclasses.replace(TINY[kind], steps=100, learning_rate=1e-2)
    examples = held_out_examples(recipe)

    def loss(network: SmallNetwork) -> float:
        logits = network(examples.inputs)
        return float(nn.functional.cross_entropy(logits.flatten(0, -2), examples.targets.flatten()))

    assert loss(train(recipe)) < loss(train(dataclasses.replace(recipe, steps=1, learning_rate=1e-9))) - 0.1


def test_a_missed_bound_is_an_error_of_one_line(tmp_path: Path) -> None:
    recipe = dataclasses.replace(TINY[MIXER], steps=1, bound=99.5)
    with pytest.raises(NumericsError, match="needed at least 99.5 %") as caught:
        trained(ResultCache(tmp_path), recipe)
    assert "\n" not in str(caught.value)


def test_the_committed_recipes_have_widths_that_every_rotation_serves() -> None:
    assert [recipe.shape.kind for recipe in RECIPES] == list(KINDS)
    for recipe in RECIPES:
        network = SmallNetwork(recipe.shape)
        for layer in readers(network).values():
            for rotation in ROTATIONS:
                plan_rotation(rotation, layer.in_features, "here")


def test_scores_against_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 10, generator=generator)
    targets = torch.tensor([int(logits[0].argmax()), int(logits[1].argmin()), int(logits[2].argmax())])
    assert scores(logits, Examples(logits, targets)).tolist() == [100.0, 0.0, 100.0]
    text = torch.randn(2, 3, 5, generator=generator)
    following = torch.tensor([[0, 1, 2], [4, 4, 0]])
    expected = [
        sum(-math.log2(float(row.double().softmax(0)[byte])) for row, byte in zip(text[n], following[n], strict=True))
        / 3
        for n in range(2)
    ]
    assert scores(text, Examples(text, following)).tolist() == pytest.approx(expected)


# Injected outliers


@each_kind
@pytest.mark.parametrize("factor", [10.0, 30.0])
def test_injected_outliers_keep_the_function_and_are_there(kind: str, factor: float) -> None:
    network = copy.deepcopy(fresh_network(kind)).double()
    inputs = held_out_examples(TINY[kind]).inputs
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    scaled = scale_normalized_channels(copy.deepcopy(network), factor, share=0.1)
    exact, found = network(inputs), scaled(inputs)
    assert float((found - exact).norm() / exact.norm()) < 1e-12
    before, after = inputs_of_readers(network, inputs), inputs_of_readers(scaled, inputs)
    touched = {"fc1"} if kind == MIXER else {"fc1", "qkv"}
    for name, x in before.items():
        ratio = (after[name].flatten(0, -2).norm(dim=0) / x.flatten(0, -2).norm(dim=0)).round(decimals=6)
        expected = 3 if name.rpartition(".")[2] in touched else 0  # a tenth of 32 channels
        assert int((ratio == factor).sum()) == expected
        assert int((ratio == 1).sum()) == len(ratio) - expected


def test_a_factor_of_one_changes_nothing() -> None:
    network = fresh_network(MIXER)
    scaled = scale_normalized_channels(copy.deepcopy(network), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), scaled.parameters(), strict=True))


# Quantization


def nearest_e2m1(x: np.ndarray) -> np.ndarray:
    """Each row scaled so that its largest magnitude is 6, rounded to the nearest level by trying all of them."""
    scale = np.abs(x).max(axis=1, keepdims=True) / 6
    distance = np.abs(np.abs(x / scale)[..., None] - E2M1_LEVELS)
    return np.sign(x) * E2M1_LEVELS[distance.argmin(axis=-1)] * scale


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_a_quantized_layer_against_dense_matrices_and_a_search_over_levels(rotation: str) -> None:
    torch.manual_seed(3)
    linear = nn.Linear(32, 8)
    x = torch.randn(5, 32)
    layer = quantize_linear(linear, "here", Setting(rotation, (E2M1,), False, seed=4), None)
    matrix = np.eye(32)
    if rotation != "none":
        signs = random_signs(32, 4, "signs/here").double().numpy()
        order = 32 if rotation == "full" else 16
        inner = hadamard_matrix(order).astype(np.float64) / math.sqrt(order)
        matrix = np.diag(signs) @ np.kron(np.eye(32 // order), inner)
    weight = nearest_e2m1(linear.weight.detach().double().numpy() @ matrix)
    expected = nearest_e2m1(x.double().numpy() @ matrix) @ weight.T + linear.bias.detach().double().numpy()
    with use_backend("reference"):
        found = layer(x).double().numpy()
    # float32 accuracy; a single level that differed would show as 1e-2.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_format_follows_the_statistic() -> None:
    linear = nn.Linear(32, 4, bias=False)
    row = torch.linspace(1.0, 2.0, 32)
    for tail, name in ((1.0, "e1m2"), (6.0, "e2m1"), (40.0, "e3m0")):
        # max / 25 % quantile is about 1.6, 9.6 and 64 times the smallest number, and the borders are 9.17 and 27.7.
        weight = row.repeat(4, 1)
        weight[:, -1] = 2.0 * tail
        linear.weight = nn.Parameter(weight)
        layer = quantize_linear(linear, "here", Setting("none", FP4_FORMATS, False), None)
        assert layer.spec.weight.formats[0].name == layer.spec.activation.format.name == name


def test_gptq_moves_the_output_on_calibration_data_no_more_than_rounding_to_nearest() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(32, 16).requires_grad_(False)
    x = torch.randn(400, 32) @ torch.randn(32, 32)
    errors = {}
    for has_gptq in (False, True):
        layer = quantize_linear(linear, "here", Setting("full", (E2M1,), has_gptq), x)
        # Against the float weight on the quantized input, which is what GPTQ minimises.
        quantized_x = layer.quantize_input(x).dequantize()
        signs = layer.signs
        assert signs is not None
        rotated = (linear.weight * signs) @ torch.from_numpy(hadamard_matrix(32)).float() / math.sqrt(32)
        exact = quantized_x @ rotated.T + linear.bias
        errors[has_gptq] = float((layer(x) - exact).square().sum())
    assert errors[True] < 0.9 * errors[False]


def test_gptq_needs_inputs() -> None:
    with pytest.raises(ValueError, match="here: GPTQ needs"):
        quantize_linear(nn.Linear(16, 4), "here", Setting("none", (E2M1,), True), None)


@each_kind
def test_every_layer_of_the_blocks_is_quantized_on_what_quantized_predecessors_give(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Tensor] = {}

    def spy(linear: nn.Linear, name: str, setting: Setting, inputs: Tensor | None) -> nn.Linear:
        assert inputs is not None
        seen[name.removeprefix("blocks.")] = inputs.clone()
        return quantize_linear(linear, name, setting, inputs)

    monkeypatch.setattr(quantization, "quantize_linear", spy)
    network, calibration = fresh_network(kind), calibration_inputs(TINY[kind], 0)
    quantized = quantize_network(network, Setting("block:16", (E2M1,), True), calibration)
    assert [f"blocks.{name}" for name in readers(network)] == list(quantized_layers(quantized))
    assert not quantized_layers(network)
    given = inputs_of_readers(quantized, calibration)
    assert set(seen) == set(given)
    for name, x in given.items():
        torch.testing.assert_close(seen[name], x, rtol=0, atol=0)


# Comparison


@each_kind
def test_compare_against_the_two_networks_by_hand(kind: str) -> None:
    network, examples = fresh_network(kind), held_out_examples(TINY[kind])
    setting = Setting("full", (E2M1,), False, seed=2)
    found = compare(network, setting, 10.0, calibration_inputs(TINY[kind], 0), examples)
    exact = scale_normalized_channels(copy.deepcopy(network), 10.0)
    quantized = quantize_network(exact, setting, examples.inputs)
    true, other = (
        logits - logits.sum(dim=-1, keepdim=True) / logits.shape[-1]
        for logits in (exact(examples.inputs).double(), quantized(examples.inputs).double())
    )
    for sample in range(len(true)):
        assert found["signal"][sample] == pytest.approx(float((true[sample] ** 2).sum()))
        assert found["noise"][sample] == pytest.approx(float(((true - other)[sample] ** 2).sum()))
    assert found["score"] == pytest.approx(scores(quantized(examples.inputs), examples).tolist())
    last = next(reversed(found["layer_sqnr_db"]))
    x = inputs_of_readers(exact, examples.inputs)[last.removeprefix("blocks.")]
    y = exact.get_submodule(last)(x).double()
    ratio = float((y**2).sum() / ((quantized.get_submodule(last)(x).double() - y) ** 2).sum())
    assert found["layer_sqnr_db"][last] == pytest.approx(10 * math.log10(ratio))
    assert set(found["formats"].values()) == {"e2m1"}


def outcome(noise: Sequence[float], score: Sequence[float], layer_db: float = 10.0) -> Outcome:
    """Signal of 100 in every sample, one layer."""
    result = {
        "score": list(score),
        "signal": [100.0] * len(noise),
        "noise": list(noise),
        "layer_sqnr_db": {"blocks.0.qkv": layer_db},
        "formats": {"blocks.0.qkv": "e2m1"},
    }
    return Outcome.of([result])


def test_gains_are_paired_and_signed() -> None:
    scatter = [1.0, 5.0, 25.0, 2.0]
    base, other = outcome(scatter, [50.0] * 4), outcome([noise / 10 for noise in scatter], [75.0] * 4)
    gain = db_gain(base, other)
    # Ten times less noise in every sample: 10 dB whichever samples are drawn.
    assert (gain.value, gain.low, gain.high) == pytest.approx((10.0, 10.0, 10.0))
    assert verdict(gain) == "better" and verdict(db_gain(other, base)) == "worse"
    assert score_gain(base, other, lower_is_better=False).value == 25.0
    assert score_gain(base, other, lower_is_better=True).value == -25.0
    mixed = db_gain(outcome([1.0, 4.0] * 8, [0.0] * 16), outcome([4.0, 1.0] * 8, [0.0] * 16))
    assert verdict(mixed) == "no clear difference"
    assert verdict(Interval(0.0, 0.0, 0.0)) == "no clear difference"


def test_outcomes_over_seeds_add_powers_and_average_scores() -> None:
    results = [
        {
            "score": [0.0, 100.0],
            "signal": [4.0, 4.0],
            "noise": [n, n],
            "layer_sqnr_db": {"a": db},
            "formats": {"a": "e2m1"},
        }
        for n, db in ((0.4, 10.0), (0.04, 20.0))
    ]
    found = Outcome.of(results)
    assert found.scores.tolist() == [0.0, 100.0]
    assert found.db_by_seed == pytest.approx((10.0, 20.0))
    assert found.db.value == pytest.approx(10 * math.log10(16 / 0.88))
    assert found.mean_layer_db == 15.0


# Answers


def result_with(noise: dict[str, float], score: dict[str, float]) -> NetworkResult:
    """A network whose outcomes depend on the rotation alone, with a little scatter over 12 samples."""
    recipe = TINY[VISION_TRANSFORMER]
    wobble = [1.0, 1.1, 0.9] * 4
    outcomes = {
        Case(factor, formats, has_gptq, rotation): outcome(
            [noise[rotation] * w for w in wobble], [score[rotation] * w for w in wobble], -noise[rotation]
        )
        for factor, formats, has_gptq, rotation in itertools.product((1.0, 10.0), FORMATS, (False, True), ROTATIONS)
    }
    found = Trained(fresh_network(VISION_TRANSFORMER), held_out_examples(recipe), 1.0, 50.0)
    return NetworkResult(recipe, found, outcomes, {1.0: math.inf, 10.0: 120.0})


def test_answers_where_rotations_help() -> None:
    helped = [result_with({"none": 10.0, "block:16": 5.0, "full": 1.0}, {"none": 50, "block:16": 60, "full": 70})]
    answer = network_answer(helped[0])
    assert answer.startswith("Vision transformer, full rotation against none")
    assert "as trained +10.00 dB [+10.00, +10.00] (better), accuracy +20.00 points" in answer and "c = 10" in answer
    for outliers in ("as trained", "c = 10"):
        expected = f"vision transformer, {outliers}: block:16 raises it in 4 of 4 settings (+3.01 dB on average), full"
        assert f"{expected} raises it in 4 of 4 settings (+10.00 dB on average)" in benefit(helped)
        assert f"{outliers}: rotations lower the SQNR of the logits in 0 of 8 settings and the score in 0" in drawback(
            helped
        )
    assert "most favourable change is as trained +10.00 dB [+10.00, +10.00] (vision transformer" in benefit(helped)
    assert "that of 0 of 1 layers;" in drawback(helped)
    assert "rotation full: e3m0 0, e2m1 1, e1m2 0" in format_answer(helped)


def test_answers_where_rotations_hurt() -> None:
    hurt = [result_with({"none": 1.0, "block:16": 2.0, "full": 10.0}, {"none": 50, "block:16": 50, "full": 40})]
    assert "(worse), accuracy -10.00 points" in network_answer(hurt[0])
    assert "full raises it in 0 of 4 settings (-10.00 dB" in benefit(hurt)
    text = drawback(hurt)
    for outliers in ("as trained", "c = 10"):
        assert f"{outliers}: rotations lower the SQNR of the logits in 8 of 8 settings and the score in 4" in text
        assert f"{outliers} -10.00 dB [-10.00, -10.00] (vision transformer" in text
    assert "1 of 1 layers, most often qkv" in text


def test_injected_outliers_do_not_hide_what_rotations_do_to_networks_as_trained() -> None:
    plain = result_with({"none": 1.0, "block:16": 2.0, "full": 10.0}, dict.fromkeys(ROTATIONS, 50.0))
    loud = result_with({"none": 10.0, "block:16": 5.0, "full": 1.0}, dict.fromkeys(ROTATIONS, 50.0))
    outcomes = {case: (plain if case.factor == 1 else loud).outcomes[case] for case in plain.outcomes}
    mixed = [dataclasses.replace(plain, outcomes=outcomes)]
    assert "as trained: block:16 raises it in 0 of 4" in benefit(mixed)
    assert "c = 10: block:16 raises it in 4 of 4" in benefit(mixed)
    assert "as trained: rotations lower the SQNR of the logits in 8 of 8" in drawback(mixed)
    assert "c = 10: rotations lower the SQNR of the logits in 0 of 8" in drawback(mixed)
    assert "favourable change is as trained -3.01 dB" in benefit(mixed) and "; c = 10 +10.00 dB" in benefit(mixed)


def test_operations_of_rotations_are_weighed_by_rows() -> None:
    # Per token: qkv, attention out and fc1 read 32 channels, 32 * (5 + 2) each; fc2 reads 64, 64 * (6 + 2).
    rotations = 3 * 32 * 7 + 64 * 8
    products = 2 * (32 * 96 + 32 * 32 + 32 * 64 + 64 * 32)
    plain = result_with(dict.fromkeys(ROTATIONS, 1.0), dict.fromkeys(ROTATIONS, 1.0))
    assert plain.operation_share == pytest.approx(rotations / products)
    mixer = dataclasses.replace(
        plain, recipe=TINY[MIXER], trained=dataclasses.replace(plain.trained, network=fresh_network(MIXER))
    )
    # The MLP over 16 tokens runs on 32 rows, the MLP over channels on 16.
    rotations = 32 * (16 * 6 + 32 * 7) + 16 * (32 * 7 + 64 * 8)
    products = 2 * (32 * (16 * 32 + 32 * 16) + 16 * (32 * 64 + 64 * 32))
    assert mixer.operation_share == pytest.approx(rotations / products)


# The record


def test_the_record_is_complete_survives_json_and_is_taken_from_the_cache_again(tmp_path: Path) -> None:
    lab = Laboratory(ResultCache(tmp_path / "cache"), tmp_path, tell=lambda _text: None)
    recipes = tuple(dataclasses.replace(recipe, steps=4) for recipe in TINY.values())
    record = study(lab, recipes, (1.0,), seeds=2)
    assert run_record_from_json(json.loads(json.dumps(record.to_json())), "here").to_json() == record.to_json()
    titles = [table.title for table in record.tables]
    assert titles[0] == "The networks" and len(titles) == 2 + 2 * len(KINDS) == 1 + len(set(titles[1:]))
    for kind in KINDS:
        assert f"W4A4, {kind}" in titles and f"What the rotation changes, {kind}" in titles
        table = record.tables[titles.index(f"W4A4, {kind}")]
        assert len(table.rows) == 1 + len(FORMATS) * 2 * len(ROTATIONS)
        assert table.rows[0][1] == "float32" and isinstance(table.rows[0][3], Interval)
        assert {row[2] for row in table.rows} == set(ROTATIONS)
        by_seed = [len(entry["logits_sqnr_db_by_seed"]) for entry in record.measurements[kind]]
        assert by_seed == [1 if entry["rotation"] == "none" else 2 for entry in record.measurements[kind]]
    assert len(record.figures) == len(KINDS) and len(record.answers) == len(KINDS) + 3
    misses = lab.cache.misses
    again = study(lab, recipes[1:2], (1.0,), seeds=2)
    assert lab.cache.misses == misses
    assert again.tables[1].rows == record.tables[titles.index(f"W4A4, {MIXER}")].rows
    assert again.measurements[MIXER] == record.measurements[MIXER]

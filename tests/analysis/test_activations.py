"""Activation statistics against a straight-line recomputation from captured inputs."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import scipy.stats
import torch
from tiny import ddim, tiny_dit

from hqdit.analysis.activations import ActivationStatistics, activation_histograms, activation_statistics
from hqdit.errors import CheckpointError, NumericsError, UsageError
from hqdit.evaluation.fidelity import PAIRS, evaluation_inputs
from hqdit.models.outliers import inject_outliers
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.plan import plan_quantization
from hqdit.pipeline.quantize import quantize
from hqdit.sampling.sampler import SamplingConfig
from hqdit.transforms.hadamard import hadamard_matrix

CONFIG = QuantizationConfig(gptq=False)
QKV = [f"transformer_blocks.1.attn1.to_{letter}" for letter in "qkv"]
OUT, FC2, MODULATION = (f"transformer_blocks.1.{tail}" for tail in ("attn1.to_out.0", "ff.net.2", "norm1.linear"))


@pytest.fixture(scope="module")
def model():
    return tiny_dit()


@pytest.fixture(scope="module")
def inputs(model):
    return evaluation_inputs(model, ddim(), SamplingConfig(8, 1.5), seed=3)


@pytest.fixture(scope="module")
def statistics(model, inputs):
    return activation_statistics(model, inputs, CONFIG)


def captured(model, inputs, name):
    """The inputs of a layer, float64 (timesteps, tokens, channels)."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda _m, args, _o: seen.append(args[0].double()))
    with torch.no_grad():
        for timestep, latents in zip(inputs.timesteps, inputs.latents, strict=True):
            model(latents, timestep=torch.full((PAIRS,), timestep), class_labels=inputs.classes)
    handle.remove()
    return torch.stack([x.reshape(-1, x.shape[-1]) for x in seen]).numpy()


def test_every_planned_layer_is_there_and_shared_inputs_are_shared(model, inputs, statistics):
    assert list(statistics) == [layer.site.name for layer in plan_quantization(model, CONFIG).layers]
    assert all(statistics[name] is statistics[QKV[0]] for name in QKV)
    assert all(entry.timesteps == inputs.timesteps for entry in statistics.values())


@pytest.mark.parametrize("name", [QKV[1], OUT, FC2, MODULATION])
def test_moments_and_maxima_before_the_rotation(model, inputs, statistics, name):
    values = captured(model, inputs, name)
    found = statistics[name].before
    assert np.array_equal(found.channel_absmax, np.abs(values).max(axis=1).astype(np.float32))
    by_step = values.reshape(len(values), -1)
    np.testing.assert_allclose(found.by_timestep.skewness, scipy.stats.skew(by_step, axis=1), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        found.by_timestep.kurtosis, scipy.stats.kurtosis(by_step, axis=1, fisher=False), rtol=1e-9
    )
    by_channel = values.reshape(-1, values.shape[2])
    np.testing.assert_allclose(
        found.by_channel.kurtosis, scipy.stats.kurtosis(by_channel, axis=0, fisher=False), rtol=1e-9
    )
    assert float(found.overall.kurtosis) == pytest.approx(scipy.stats.kurtosis(values, axis=None, fisher=False))
    assert float(found.overall.absmax) == np.abs(values).max()
    maxima = np.abs(values).max(axis=(0, 1))
    assert found.max_over_median == pytest.approx(maxima.max() / np.median(maxima), rel=1e-6)
    of_first = np.abs(values[0]).max(axis=0)
    assert found.max_over_median_by_timestep[0] == pytest.approx(of_first.max() / np.median(of_first), rel=1e-6)
    between, within = found.variance_between_channels, found.variance_within_channels
    assert between == pytest.approx(by_channel.mean(axis=0).var())
    assert between + within == pytest.approx(values.var())


@pytest.mark.parametrize("name", [QKV[0], FC2])
def test_after_is_the_input_times_signs_times_hadamard(model, inputs, statistics, name):
    values = captured(model, inputs, name)
    quantized = quantize(copy.deepcopy(model), CONFIG)
    layer = quantized.get_submodule(name)
    matrix = hadamard_matrix(values.shape[2]) / math.sqrt(values.shape[2])
    rotated = values * layer.signs.double().numpy() @ matrix
    found = statistics[name].after
    assert statistics[name].rotation == layer.spec.rotation.describe()
    # The rotation runs in float32: its rounding, relative to the largest entry, is that of 10 additions.
    scale = np.abs(rotated).max()
    np.testing.assert_allclose(found.channel_absmax, np.abs(rotated).max(axis=1), atol=1e-5 * scale)
    assert float(found.overall.mean_square) == pytest.approx(
        float(statistics[name].before.overall.mean_square), rel=1e-5
    )
    assert float(found.overall.kurtosis) == pytest.approx(
        scipy.stats.kurtosis(rotated, axis=None, fisher=False), rel=1e-4
    )


def test_a_folded_rotation_counts_as_a_whole(model, inputs, statistics):
    folded = activation_statistics(model, inputs, CONFIG.replace(fold_value_rotation=True), [OUT])
    assert list(folded) == [OUT] and folded[OUT].rotation.startswith("heads")
    found, plain = folded[OUT].after.overall, statistics[OUT].before.overall
    assert float(found.mean_square) == pytest.approx(float(plain.mean_square), rel=1e-5)


def test_without_a_rotation_after_is_before(model, inputs):
    found = activation_statistics(model, inputs, CONFIG.replace(rotation="none"), [FC2])
    assert found[FC2].after is found[FC2].before and found[FC2].rotation == "none"


def test_injected_outliers_stand_out_before_and_not_after(model, inputs):
    plain = activation_statistics(model, inputs, CONFIG, QKV[:1])[QKV[0]]
    with_outliers = inject_outliers(copy.deepcopy(model), 30.0)
    found = activation_statistics(with_outliers, inputs, CONFIG, QKV[:1])[QKV[0]]
    assert found.before.max_over_median > 10 * plain.before.max_over_median
    assert found.before.overall.kurtosis > 20 and found.after.overall.kurtosis < 6
    assert found.after.max_over_median < 2


def test_histograms_hold_every_number_once(model, inputs, statistics):
    found = activation_histograms(model, inputs, CONFIG, {name: statistics[name] for name in (QKV[0], FC2)}, bins=40)
    assert list(found) == [QKV[0], FC2]
    for name, histogram in found.items():
        values = captured(model, inputs, name)
        unit = math.sqrt((values**2).mean())
        expected = np.histogram(values / unit, histogram.edges, density=True)[0]
        # A number within rounding of an edge may fall to either side.
        np.testing.assert_allclose(histogram.before, expected, atol=2 / values.size / np.diff(histogram.edges)[0])
        for densities in (histogram.before, histogram.after):
            assert (densities * np.diff(histogram.edges)).sum() == pytest.approx(1.0)
        assert histogram.edges[0] == -histogram.edges[-1] == -round(histogram.edges[-1])
    assert not np.array_equal(found[FC2].before, found[FC2].after)


def test_histograms_of_another_model_are_refused(model, inputs, statistics):
    louder = inject_outliers(copy.deepcopy(model), 100.0)
    with pytest.raises(NumericsError, match=rf"{QKV[0]}: found \d+ activations outside the range of the statistics"):
        activation_histograms(louder, inputs, CONFIG, {QKV[0]: statistics[QKV[0]]})


def test_the_model_and_its_hooks_are_as_before(model, inputs, statistics):
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_unknown_layers_and_quantized_models_are_refused(model, inputs):
    with pytest.raises(UsageError, match="found the layer 'nowhere'"):
        activation_statistics(model, inputs, CONFIG, ["nowhere"])
    with pytest.raises((UsageError, CheckpointError), match="float"):
        activation_statistics(quantize(copy.deepcopy(model), CONFIG), inputs, CONFIG)


def test_a_nan_is_refused_with_the_layers_name(model, inputs):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.transformer_blocks[0].attn1.to_v.weight[0, 0] = math.nan
    with pytest.raises(NumericsError, match=r"transformer_blocks\.0\.attn1\.to_out\.0: found a NaN"):
        activation_statistics(broken, inputs, CONFIG)


def test_statistics_grow_with_steps_and_channels_not_with_samples(statistics):
    entry: ActivationStatistics = statistics[FC2]
    assert entry.before.channel_absmax.shape == (8, 4 * 72)
    assert entry.before.by_timestep.mean.shape == (8,) and entry.before.by_channel.mean.shape == (4 * 72,)
    assert float(entry.before.overall.count) == 8 * PAIRS * 4 * (4 * 72)  # 4 tokens of 4 x 72 channels

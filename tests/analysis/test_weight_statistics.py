"""The spread of weights and the format it selects, against what quantize itself records."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
from tiny import tiny_dit

from hqdit.analysis.weights import format_shares, weight_statistics
from hqdit.pipeline.checkpoint import quantized_layers
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.quantize import quantize

BY_LAYER = QuantizationConfig(gptq=False)
CONFIGS = [
    BY_LAYER,
    BY_LAYER.replace(rotation="none"),
    BY_LAYER.replace(fold_value_rotation=True, alpha=0.1),
    BY_LAYER.replace(format_granularity="channel"),
    BY_LAYER.replace(weights="e2m1", exclude=("*.ff.*",)),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["paper", "unrotated", "folded", "by channel", "fixed"])
def test_formats_are_those_that_quantize_chooses(config):
    model = tiny_dit()
    found = weight_statistics(model, config)
    quantized = quantized_layers(quantize(copy.deepcopy(model), config))
    assert list(found) == list(quantized)
    for name, layer in quantized.items():
        names = [fmt.name for fmt in layer.spec.weight.formats]
        index = [0] if layer.format_index is None else layer.format_index.tolist()
        counts = Counter(names[position] for position in index)
        expected = {fmt: count / len(index) for fmt, count in counts.items()}
        assert found[name].formats == format_shares(layer) == expected


def test_statistics_before_and_after_the_rotation_by_hand():
    model = tiny_dit()
    name = "transformer_blocks.0.ff.net.2"
    found = weight_statistics(model, BY_LAYER.replace(alpha=0.3))[name]
    magnitudes = np.abs(model.get_submodule(name).weight.detach().double().numpy())
    assert found.statistic_before == pytest.approx(magnitudes.max() / np.quantile(magnitudes, 0.3))
    record = quantize(model, BY_LAYER.replace(alpha=0.3)).quantization_record
    assert found.statistic_after == pytest.approx(record.layers[name]["statistic"])
    assert found.statistic_after != found.statistic_before

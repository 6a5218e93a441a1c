"""The spread of each layer's weights before and after the planned rotation, and the formats of their channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hqdit.layers.linear import HQLinear
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.plan import plan_quantization
from hqdit.pipeline.rotation_check import signs_of, weight_to_rotate
from hqdit.quantizers.format_selection import range_statistic, select_format
from hqdit.transforms.rotation import rotate


@dataclass(frozen=True)
class WeightStatistics:
    """One layer's weight.

    Attributes:
        statistic_before: max|W| / Quantile(|W|, alpha) of the float weight.
        statistic_after: the same of the rotated weight, which is what the rule looks at.
        formats: format name -> share of the output channels that would hold it.
    """

    statistic_before: float
    statistic_after: float
    formats: Mapping[str, float]


def format_shares(layer: HQLinear) -> dict[str, float]:
    """Share of a quantized layer's output channels that each of its weight formats holds, zero shares left out."""
    formats = layer.spec.weight.formats
    if layer.format_index is None:
        return {formats[0].name: 1.0}
    chosen = layer.format_index.tolist()
    shares = {fmt.name: chosen.count(position) / len(chosen) for position, fmt in enumerate(formats)}
    return {name: share for name, share in shares.items() if share}


@torch.no_grad()
def weight_statistics(model: nn.Module, config: QuantizationConfig) -> dict[str, WeightStatistics]:
    """Statistic and chosen format of every planned layer; needs no data.

    A static scale per channel, which would be folded into the weight, is left out.

    Args:
        model: a float model with an adapter; not changed.
        config: rotation, alpha, candidate formats and format granularity.

    Returns:
        Layer name -> statistics, in the order of the forward pass.

    Source: HQ-DiT (arXiv 2405.19751), section 3.3.
    """
    plan = plan_quantization(model, config)
    found = {}
    for layer in plan.layers:
        linear = model.get_submodule(layer.site.name)
        assert isinstance(linear, nn.Linear)  # the plan holds nothing else
        signs = signs_of(layer, config.seed)
        weight, _ = weight_to_rotate(layer, plan, linear, config.seed)
        rotated = rotate(weight, layer.rotation, None if signs is None else signs.to(weight.device))
        found[layer.site.name] = WeightStatistics(
            range_statistic(linear.weight.reshape(1, -1), config.alpha)[0],
            range_statistic(rotated.reshape(1, -1), config.alpha)[0],
            _shares(rotated, config),
        )
    return found


def _shares(weight: Tensor, config: QuantizationConfig) -> dict[str, float]:
    candidates = config.weight_candidates
    if len(candidates) == 1:
        return {candidates[0].name: 1.0}
    rows = weight if config.format_granularity == "channel" else weight.reshape(1, -1)
    statistics = range_statistic(rows, config.alpha)
    chosen = [select_format(statistic, candidates).name for statistic in statistics]  # type: ignore[arg-type]
    return {fmt.name: chosen.count(fmt.name) / len(chosen) for fmt in candidates if fmt.name in chosen}

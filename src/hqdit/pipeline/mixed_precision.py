"""Which inputs get 8 bits: those through which most of the model's error comes, for the bits that they cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from hqdit.errors import NumericsError, UsageError
from hqdit.formats.catalog import INT8
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.plan import PlannedLayer, activation_spec
from hqdit.quantizers.expected_scale import normal_error

#: What an input with 8 bits is rounded to: its product is the same int8 product that one of 4-bit numbers is.
WIDE_FORMAT = INT8
#: Error of a weight under GPTQ relative to that of rounding to nearest, as it reaches the output: errors of columns
#: compensate each other. Of the size that trials on the bundled models had; the prediction is no finer than that.
GPTQ_ERROR = 0.2


class InputCost(NamedTuple):
    """One input, as it is and with 8 bits.

    Attributes:
        errors: predicted power of the error that reaches the model's output through the input and the weights that it
            meets, relative to the output's: as it is, and with 8 bits.
        bits: of its codes and scales for each number, likewise.
        readers: how many layers read it.
    """

    errors: tuple[float, float]
    bits: tuple[float, float]
    readers: int


def input_cost(
    config: QuantizationConfig, layer: PlannedLayer, powers: tuple[float, float], readers: int, is_sensitive: bool
) -> InputCost:
    """What the input of a layer costs.

    Args:
        config: the request.
        layer: one of those that read the input.
        powers: error of the model's output per relative error of the input, and of the weights that it meets.
        readers: how many layers read it.
        is_sensitive: whether it and its weights have finer groups while it has 4 bits.
    """
    width, rule = layer.in_features, config.activation_scale_rule
    narrow = [activation_spec(config, fmt, layer, 0, is_sensitive) for fmt in config.activation_candidates]
    wide = activation_spec(config, WIDE_FORMAT, layer)
    of_weights = []
    for has_fine_groups in (is_sensitive, False):
        group = config.group_size_for(width, has_fine_groups) if config.weight_granularity == "group" else None
        error = min(normal_error(fmt, group or width, "clipped") for fmt in config.weight_candidates)
        of_weights.append(error * (GPTQ_ERROR if config.gptq else 1.0))
    of_inputs = min(normal_error(spec.format, spec.group_size or width, rule) for spec in narrow)
    of_wide = normal_error(wide.format, wide.group_size or width, rule)
    return InputCost(
        (powers[0] * of_inputs + powers[1] * of_weights[0], powers[0] * of_wide + powers[1] * of_weights[1]),
        (narrow[0].bits_per_number(width), wide.bits_per_number(width)),
        readers,
    )


def choose_wide_inputs(
    costs: Mapping[str, InputCost], average_bits: float | None, max_error: float | None
) -> frozenset[str]:
    """The inputs that take most of the error for each bit more, until the error is small enough or the bits are spent.

    Args:
        costs: input -> what it costs, for all inputs of one model.
        average_bits: the most bits for each number of an input, mean over the layers, without means of samples; None
            for no limit.
        max_error: the largest error that is wanted, relative to the output's power; None for the least that can be had.

    Raises:
        UsageError: fewer `average_bits` than inputs of 4 bits take.
        NumericsError: `max_error` cannot be reached.
    """
    layers = sum(cost.readers for cost in costs.values())
    bits = math.fsum(cost.readers * cost.bits[0] for cost in costs.values())
    error = math.fsum(cost.errors[0] for cost in costs.values())
    limit = math.inf if average_bits is None else average_bits * layers
    target = 0.0 if max_error is None else max_error
    if bits > limit:
        raise UsageError(
            f"--average-bits: found {average_bits:g}, needed at least {bits / layers:.3f}, which inputs of 4 bits take "
            "with their scales. Fix: ask for more, or for larger groups"
        )
    chosen: set[str] = set()

    def gain(name: str) -> float:
        cost = costs[name]
        saved, more = cost.errors[0] - cost.errors[1], cost.bits[1] - cost.bits[0]
        # Scales of fine groups may take as many bits as wide codes save.
        return math.inf if saved > 0 and more <= 0 else saved / max(more * cost.readers, 1e-12)

    for name in sorted(costs, key=gain, reverse=True):
        more = costs[name].readers * (costs[name].bits[1] - costs[name].bits[0])
        saved = costs[name].errors[0] - costs[name].errors[1]
        if error > target and saved > 0 and bits + more <= limit:
            chosen.add(name)
            bits += more
            error -= saved
    if max_error is not None and error > max_error:
        raise NumericsError(
            f"--max-error: found a predicted error of {error:.3g} of the output's power with 8 bits for {len(chosen)} "
            f"of {len(costs)} inputs, {bits / layers:.2f} bits each on average, needed at most {max_error:g}. Fix: ask "
            "for more --average-bits, for a larger error, or for finer weights (--weights int8 --activations lloyd-max)"
        )
    return frozenset(chosen)

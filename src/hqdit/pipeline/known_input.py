"""What is known of every input before anything is quantized: its mean, its smoothing, its sensitive directions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from hqdit.calibration.capture import CalibrationData
from hqdit.calibration.sensitivity import gradient_sketches
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.mixed_precision import choose_wide_inputs, input_cost
from hqdit.pipeline.plan import QuantizationPlan
from hqdit.pipeline.smoothing import smooth_model
from hqdit.pipeline.survey import survey_inputs
from hqdit.quantizers.emphasis import Emphasis, EmphasisCandidates, choose_emphases, predicted_errors
from hqdit.quantizers.spec import SHIFT_DTYPE

#: An input is sensitive from this share of the model's predicted error on.
SENSITIVE_SHARE = 0.05
#: Means of samples are worth their time where they take at least this share from the model's predicted error.
LEAST_SHARE_OF_MEANS = 0.005


class KnownInput(NamedTuple):
    """Of one input.

    Attributes:
        scale: 1 / s of the smoothing, float32 (in_features,), or None.
        shift: its static mean as the layers before deliver it, bfloat16 (in_features,), or None if it is not centred.
        centring: what is subtracted from it, one of `quantizers.spec.CENTRINGS`.
        emphasis: directions in which it is stretched, or None.
        error_share: of the rounding error that is predicted to reach the model's output through this input, emphasis
            included; None where it is not known.
        is_wide: whether it gets 8 bits.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    centring: str = "none"
    emphasis: Emphasis | None = None
    error_share: float | None = None
    is_wide: bool = False

    @property
    def is_sensitive(self) -> bool:
        """Whether much of the model's error comes through this input, which has 4 bits."""
        return not self.is_wide and self.error_share is not None and self.error_share >= SENSITIVE_SHARE


def known_inputs(
    model: nn.Module, plan: QuantizationPlan, calibration: CalibrationData, config: QuantizationConfig
) -> dict[str, KnownInput]:
    """Look at every input of the float model, and smooth the model if that is asked for.

    Args:
        model: float32; changed in place by smoothing only, which keeps its function.
        plan: the layers that will be quantized.
        calibration: inputs of the float model.
        config: the request.

    Returns:
        Input group -> what is known, for every planned layer.

    Raises:
        NumericsError: calibration inputs or gradients that are not finite, a fold that changed the function, or an
            error that was asked for and cannot be reached.
    """
    surveys = survey_inputs(model, plan, calibration, config.seed)
    scales: dict[str, Tensor] = {}
    if config.smoothing is not None:
        scales = smooth_model(model, plan, calibration, surveys, config)
    folded = {layer.site.input_group for layer in plan.layers if layer.smoothing == "folded"}

    def delivered(group: str, x: Tensor) -> Tensor:
        return x * scales[group] if group in folded else x

    shifts: dict[str, Tensor] = {}
    if config.centring != "none":
        shifts = {group: delivered(group, survey.mean).to(SHIFT_DTYPE) for group, survey in surveys.items()}
    if not config.needs_gradients:
        centring = "none" if config.centring == "none" else "static"
        return {group: KnownInput(scales.get(group), shifts.get(group), centring) for group in surveys}

    def applied(group: str, x: Tensor) -> Tensor:
        return x * scales[group] if group in scales and group not in folded else x

    # Of the smoothed model, whose inputs are those that the layers will get.
    gradients = gradient_sketches(model, [layer.site for layer in plan.layers], calibration, config.seed)
    readers = Counter(layer.site.input_group for layer in plan.layers)
    candidates, kept = {}, {}
    for group, rows in gradients.rows.items():
        survey = surveys[group]
        x = delivered(group, survey.sample)
        x = applied(group, x - shifts[group] if group in shifts else x)
        of_x = rows / scales[group] if group in scales and group not in folded else rows
        candidates[group] = EmphasisCandidates(x, of_x, config.emphasis, readers[group])
        if survey.has_samples:
            kept[group] = _share_of_power(applied(group, delivered(group, survey.rest)), x)
    emphases = choose_emphases(candidates, sum(layer.in_features * layer.out_features for layer in plan.layers))
    of_weights = predicted_errors(candidates, emphases)
    of_inputs = dict(of_weights)
    by_sample: set[str] = set()
    if config.centring == "sample":
        # Not beside emphasised directions: tokens that equal the static mean have no error, but would get that of
        # their sample's mean, stretched (docs/method.md).
        kept = {group: share for group, share in kept.items() if group not in emphases}
        by_sample = _worth_their_time(of_inputs, kept)
        of_inputs |= {group: of_inputs[group] * kept[group] for group in by_sample}
    total = math.fsum(of_inputs.values())
    known = {}
    for group in surveys:
        centring = "none" if config.centring == "none" else "sample" if group in by_sample else "static"
        share = of_inputs[group] / total if group in of_inputs and total > 0 else None
        known[group] = KnownInput(scales.get(group), shifts.get(group), centring, emphases.get(group), share)
    if config.average_bits is None and config.max_error is None:
        return known
    power = gradients.output_power
    errors = {group: (of_inputs[group] / power, of_weights[group] / power) for group in of_inputs if power > 0}
    costs = {
        group: input_cost(config, layer, errors[group], readers[group], known[group].is_sensitive)
        for group, layer in ((layer.site.input_group, layer) for layer in plan.layers)
        if group in errors
    }
    wide = choose_wide_inputs(costs, config.average_bits, config.max_error)
    return {group: found._replace(is_wide=group in wide) for group, found in known.items()}


def _share_of_power(part: Tensor, whole: Tensor) -> float:
    power = float(whole.square().sum())
    return float(part.square().sum()) / power if power > 0 else 1.0


def _worth_their_time(errors: Mapping[str, float], kept: Mapping[str, float]) -> set[str]:
    """The inputs for which means of samples take enough of the model's predicted error.

    Args:
        errors: of all inputs with static means.
        kept: share of an input's power, and so of its error, that is left where means of samples are subtracted, too.
    """
    left = math.fsum(error * min(kept.get(group, 1.0), 1.0) for group, error in errors.items())
    return {group for group, share in kept.items() if errors[group] * (1 - share) > LEAST_SHARE_OF_MEANS * left}

"""What is known of every input before anything is quantized: its mean, its smoothing, its sensitive directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hqdit.calibration.capture import CalibrationData
from hqdit.calibration.sensitivity import gradient_sketches
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.plan import QuantizationPlan
from hqdit.pipeline.smoothing import smooth_model
from hqdit.pipeline.survey import survey_inputs
from hqdit.quantizers.emphasis import Emphasis, EmphasisCandidates, choose_emphases
from hqdit.quantizers.spec import SHIFT_DTYPE


class KnownInput(NamedTuple):
    """Of one input.

    Attributes:
        scale: 1 / s of the smoothing, float32 (in_features,), or None.
        shift: its mean as the layers before deliver it, bfloat16 (in_features,), or None if it is not centred.
        emphasis: directions in which it is stretched, or None.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    emphasis: Emphasis | None = None


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
        NumericsError: calibration inputs or gradients that are not finite, or a fold that changed the function.
    """
    surveys = survey_inputs(model, plan, calibration, config.seed)
    scales: dict[str, Tensor] = {}
    if config.smoothing is not None:
        scales = smooth_model(model, plan, calibration, surveys, config)
    is_folded = {layer.site.input_group: layer.smoothing == "folded" for layer in plan.layers}

    def delivered(group: str, x: Tensor) -> Tensor:
        return x * scales[group] if is_folded[group] else x

    shifts: dict[str, Tensor] = {}
    if config.centring:
        shifts = {group: delivered(group, survey.mean).to(SHIFT_DTYPE) for group, survey in surveys.items()}
    emphases: Mapping[str, Emphasis] = {}
    if config.emphasis:
        # Of the smoothed model, whose inputs are those that the layers will get.
        gradients = gradient_sketches(model, [layer.site for layer in plan.layers], calibration, config.seed)
        candidates = {}
        for group, sketch in gradients.items():
            x = delivered(group, surveys[group].sample)
            x = x - shifts[group] if group in shifts else x
            applied = scales[group] if group in scales and not is_folded[group] else torch.ones(1, device=x.device)
            candidates[group] = EmphasisCandidates(x * applied, sketch / applied, config.emphasis)
        emphases = choose_emphases(candidates)
    return {group: KnownInput(scales.get(group), shifts.get(group), emphases.get(group)) for group in surveys}

"""Smoothing a float model: where factors can be folded into earlier layers they are, elsewhere the layer keeps them.

| Input of            | Place   | What absorbs 1 / s                                                    |
|---------------------|---------|-----------------------------------------------------------------------|
| q, k, v and fc1     | folded  | shift and scale of the modulated normalisation, which come from adaLN  |
| attention output    | folded  | the rows of the value projection: attention only mixes tokens          |
| fc2 and modulation  | applied | nothing, behind GELU and SiLU: the layer scales its input by itself    |

Source: SmoothQuant (arXiv 2211.10438), section 4; DiTAS (arXiv 2409.07756) for the folds into adaLN and W_v.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import groupby

import torch
from torch import Tensor, nn

from hqdit.calibration.capture import CalibrationData
from hqdit.errors import NumericsError
from hqdit.layers.matrix_layers import weight_matrix
from hqdit.models.adapter import LinearSite, adapter_for
from hqdit.numerics.error import relative_error
from hqdit.pipeline.checkpoint import quantized_layers
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.plan import QuantizationPlan
from hqdit.pipeline.rotation_check import TOLERANCE, probe_call
from hqdit.pipeline.survey import InputSurvey
from hqdit.quantizers.smoothing import smoothing_factors


@torch.no_grad()
def smooth_model(
    model: nn.Module,
    plan: QuantizationPlan,
    calibration: CalibrationData,
    surveys: Mapping[str, InputSurvey],
    config: QuantizationConfig,
) -> dict[str, Tensor]:
    """Fold smoothing factors into a float model wherever the plan says so; the model's function stays.

    Layers that read one input share their factors.

    Args:
        model: float32, changed in place.
        plan: the layers that will be quantized, with their places; the factors look at these layers.
        calibration: inputs of the float model, of which the first call checks that the function stays.
        surveys: what is known of every input.
        config: its smoothing, the statistic behind it, and its seed.

    Returns:
        Input group -> input_scale = 1 / s, float32 (in_features,): the smoothed input is x * input_scale. Where the
        place is "applied", weights are still those of the plain input.

    Raises:
        NumericsError: calibration inputs that are not finite, or a fold that changed the model's function.
    """
    adapter = adapter_for(model)
    probes = probe_call(model, config.seed, "smoothing check", calibration)
    assert probes is not None  # there is calibration data
    exact = probes.output(model)
    modulated = set(adapter.modulated_groups(model))
    scales: dict[str, Tensor] = {}
    for block in range(len(adapter.blocks(model))):
        of_block = [layer for layer in plan.layers if layer.site.block == block]
        # Backwards: a fold changes rows of an earlier layer, whose own factors shall see them as they will be.
        ordered = sorted(of_block, key=lambda layer: layer.site.stage, reverse=True)
        for group, layers in groupby(ordered, key=lambda layer: layer.site.input_group):
            readers = list(layers)
            sites = [layer.site for layer in readers]
            scales[group] = _input_scale(model, sites, surveys[group], config)
            if readers[0].smoothing == "applied":
                continue
            if group in modulated:
                adapter.scale_modulated_channels(model, {group: scales[group]})
            else:
                _scale_value_channels(model, sites, scales[group])
    _require_same_function(exact, probes.output(model))
    return scales


@torch.no_grad()
def smoothed_twin(exact: nn.Module, quantized: nn.Module) -> nn.Module:
    """The float model in the basis of a quantized one: with the folds that the quantized layers name.

    Both compute the same function, so that whole predictions need no twin; inputs and outputs of single layers do.

    Args:
        exact: the float model that `quantized` was made from; it stays as it is.
        quantized: its layers hold the factors of their inputs.

    Returns:
        `exact` itself if nothing was folded, else a changed copy.
    """
    adapter = adapter_for(exact)
    layers = quantized_layers(quantized)
    folded: dict[str, list[LinearSite]] = {}
    for site in adapter.sites(exact):
        if site.name in layers and layers[site.name].spec.activation.smoothing == "folded":
            folded.setdefault(site.input_group, []).append(site)
    if not folded:
        return exact
    twin = copy.deepcopy(exact)
    modulated = set(adapter.modulated_groups(twin))
    for group, sites in folded.items():
        factor = layers[sites[0].name].input_scale
        assert factor is not None  # a layer with smoothing has the buffer
        if group in modulated:
            adapter.scale_modulated_channels(twin, {group: factor})
        else:
            _scale_value_channels(twin, sites, factor)
    return twin


def _input_scale(
    model: nn.Module, readers: list[LinearSite], survey: InputSurvey, config: QuantizationConfig
) -> Tensor:
    """1 / s of one input, float32 (in_features,)."""
    assert config.smoothing is not None  # the caller looked
    weights = torch.cat([weight_matrix(model.get_submodule(site.name)) for site in readers])
    if config.smoothing_statistic == "absmax":
        factors = smoothing_factors(survey.absmax, weights.abs().amax(dim=0), config.smoothing)
    else:
        # The mean is subtracted before anything is rounded, so that it needs no range.
        power = survey.mean_square - survey.mean.square() if config.centring != "none" else survey.mean_square
        columns = weights.to(torch.float64).square().mean(dim=0).sqrt()
        factors = smoothing_factors(power.clamp_min(0).sqrt(), columns, config.smoothing)
    return factors.reciprocal().to(torch.float32)


def _scale_value_channels(model: nn.Module, readers: list[LinearSite], factor: Tensor) -> None:
    """Multiply the value projection's output channels by `factor`, and divide the weights that read them."""
    assert readers[0].value_site is not None  # the plan looked
    value = model.get_submodule(readers[0].value_site)
    value.get_parameter("weight").mul_(factor.unsqueeze(1))
    if value.bias is not None:
        value.get_parameter("bias").mul_(factor)
    for site in readers:
        model.get_submodule(site.name).get_parameter("weight").div_(factor)


def _require_same_function(exact: Tensor, found: Tensor) -> None:
    error = relative_error(exact, found)
    if not error <= TOLERANCE:
        raise NumericsError(
            f"smoothing check: found a relative change of {error:.2e} in the model's output, needed at most "
            f"{TOLERANCE:.0e}, before anything was quantized. Fix: choose another --smoothing; please report the "
            "model, because this should not happen"
        )

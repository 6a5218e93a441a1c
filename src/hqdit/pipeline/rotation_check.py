"""Proof before quantizing: the planned rotations alone leave the model's output unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hqdit.calibration.capture import CalibrationData
from hqdit.errors import NumericsError
from hqdit.layers.matrix_layers import channels_back, channels_last, weight_matrix
from hqdit.models.adapter import ClassConditionalAdapter, adapter_for
from hqdit.models.calls import ModelCall
from hqdit.numerics.error import relative_error
from hqdit.pipeline.plan import PlannedLayer, QuantizationPlan
from hqdit.randomness import random_stream
from hqdit.transforms.rotation import fold_into_value, random_signs, rotate, rotate_online

#: Largest relative change of the model's output, in float32.
TOLERANCE = 1e-5
PROBES = 4


def signs_of(layer: PlannedLayer, seed: int) -> Tensor | None:
    """The random signs of a layer; layers with one input group share them."""
    if layer.rotation.is_identity:
        return None
    return random_signs(layer.in_features, seed, f"signs/{layer.site.input_group}")


def weight_to_rotate(
    layer: PlannedLayer, plan: QuantizationPlan, float_layer: nn.Module, seed: int
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a float layer, float64, with the fold of a later rotation into it if one is planned."""
    weight = weight_matrix(float_layer).detach().to(torch.float64)
    stored = float_layer._parameters["bias"]
    bias = None if stored is None else stored.detach().to(torch.float64)
    for other in plan.layers:
        if other.rotation.is_folded and other.site.value_site == layer.site.name:
            signs = signs_of(other, seed)
            assert signs is not None  # a folded rotation is never the identity
            return fold_into_value(weight, bias, other.rotation, signs.to(weight.device))
    return weight, bias


def probe_call(
    model: nn.Module, seed: int, stream: str, calibration: CalibrationData | None = None
) -> ModelCall | None:
    """A call of `model` for checks of its function, on its device.

    Returns:
        Random latents, time steps and classes from the random stream of that name, for models on these; for others the
        first call of the calibration data, or None where there is none.
    """
    adapter = adapter_for(model)
    device = next(model.parameters()).device
    if isinstance(adapter, ClassConditionalAdapter):
        random = random_stream(seed, stream)
        latents = torch.from_numpy(random.standard_normal((PROBES, *adapter.latent_shape(model)), dtype="float32"))
        timesteps = torch.from_numpy(random.integers(0, adapter.train_timesteps(model), PROBES))
        classes = torch.from_numpy(random.integers(0, adapter.num_classes(model), PROBES))
        return adapter.call(model, latents.to(device), timesteps.to(device), classes.to(device))
    return None if calibration is None else next(calibration.calls(model)).to(device)


@torch.no_grad()
def rotation_error(model: nn.Module, plan: QuantizationPlan, seed: int, call: ModelCall) -> float:
    """Relative change of the model's output when every planned layer runs rotated but unquantized.

    One layer's rotated weight exists at a time, so the check needs no second copy of the model.
    """
    device = next(model.parameters()).device
    exact = call.output(model)

    def rotated(layer: PlannedLayer) -> Callable[..., Tensor]:
        signs = signs_of(layer, seed)
        signs = None if signs is None else signs.to(device)

        def hook(module: nn.Module, args: tuple[Any, ...], _output: Tensor) -> Tensor:
            weight, bias = weight_to_rotate(layer, plan, module, seed)
            x = rotate_online(channels_last(module, args[0]).to(torch.float32), layer.rotation, signs)
            rotated_weight = rotate(weight, layer.rotation, signs).to(torch.float32)
            output = nn.functional.linear(x, rotated_weight, None if bias is None else bias.to(torch.float32))
            return channels_back(module, output).to(args[0].dtype)

        return hook

    handles = [model.get_submodule(layer.site.name).register_forward_hook(rotated(layer)) for layer in plan.layers]
    try:
        return relative_error(exact, call.output(model))
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def layer_rotation_error(model: nn.Module, plan: QuantizationPlan, seed: int) -> float:
    """The largest relative change of a planned layer's output on random inputs by its own rotation alone."""
    largest = 0.0
    for layer in plan.layers:
        signs = signs_of(layer, seed)
        weight = weight_matrix(model.get_submodule(layer.site.name)).detach()
        random = random_stream(seed, f"rotation check/{layer.site.name}")
        x = torch.from_numpy(random.standard_normal((PROBES, layer.in_features), dtype="float32")).to(weight.device)
        signs = None if signs is None else signs.to(weight.device)
        rotated_weight = rotate(weight.to(torch.float64), layer.rotation, signs).to(torch.float32)
        rotated = nn.functional.linear(rotate(x, layer.rotation, signs), rotated_weight)
        exact = nn.functional.linear(x.to(torch.float64), weight.to(torch.float64))
        if bool(exact.any()):  # an all-zero weight has nothing to compare
            largest = max(largest, relative_error(exact, rotated))
    return largest


def require_rotation_is_exact(
    model: nn.Module, plan: QuantizationPlan, seed: int, calibration: CalibrationData | None = None
) -> float:
    """The relative change of the output by rotation alone, refused above `TOLERANCE`.

    It is that of the whole model (`rotation_error`), or where no inputs of the model are at hand the largest of its
    layers (`layer_rotation_error`).

    Raises:
        NumericsError: the rotated model is not the same function.
    """
    call = probe_call(model, seed, "rotation check", calibration)
    error = layer_rotation_error(model, plan, seed) if call is None else rotation_error(model, plan, seed, call)
    if not error <= TOLERANCE:
        raise NumericsError(
            f"rotation check: found a relative change of {error:.2e} in the model's output, needed at most "
            f"{TOLERANCE:.0e}, before anything was quantized. Fix: --rotation none; please report the model, "
            "because this should not happen"
        )
    return error

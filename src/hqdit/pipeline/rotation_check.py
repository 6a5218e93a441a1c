"""Proof before quantizing: the planned rotations alone leave the model's output unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hqdit.errors import NumericsError
from hqdit.models.adapter import adapter_for
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
    layer: PlannedLayer, plan: QuantizationPlan, linear: nn.Linear, seed: int
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a float layer, float64, with the fold of a later rotation into it if one is planned."""
    weight = linear.weight.detach().to(torch.float64)
    bias = None if linear.bias is None else linear.bias.detach().to(torch.float64)
    for other in plan.layers:
        if other.rotation.is_folded and other.site.value_site == layer.site.name:
            signs = signs_of(other, seed)
            assert signs is not None  # a folded rotation is never the identity
            return fold_into_value(weight, bias, other.rotation, signs.to(weight.device))
    return weight, bias


def probe_inputs(model: nn.Module, seed: int, stream: str) -> tuple[Tensor, Tensor, Tensor]:
    """`PROBES` random latents, time steps and classes on the model's device, from the random stream of that name."""
    adapter = adapter_for(model)
    device = next(model.parameters()).device
    random = random_stream(seed, stream)
    latents = torch.from_numpy(random.standard_normal((PROBES, *adapter.latent_shape(model)), dtype="float32"))
    timesteps = torch.from_numpy(random.integers(0, adapter.train_timesteps(model), PROBES))
    classes = torch.from_numpy(random.integers(0, adapter.num_classes(model), PROBES))
    return latents.to(device), timesteps.to(device), classes.to(device)


@torch.no_grad()
def rotation_error(model: nn.Module, plan: QuantizationPlan, seed: int) -> float:
    """Relative change of the predicted noise when every planned layer runs rotated but unquantized.

    One layer's rotated weight exists at a time, so the check needs no second copy of the model.
    """
    adapter = adapter_for(model)
    device = next(model.parameters()).device
    inputs = probe_inputs(model, seed, "rotation check")
    exact = adapter.predict_noise(model, *inputs)

    def rotated(layer: PlannedLayer) -> Callable[..., Tensor]:
        signs = signs_of(layer, seed)
        signs = None if signs is None else signs.to(device)

        def hook(module: nn.Module, args: tuple[Any, ...], _output: Tensor) -> Tensor:
            assert isinstance(module, nn.Linear)  # the plan holds nothing else
            weight, bias = weight_to_rotate(layer, plan, module, seed)
            x = rotate_online(args[0].to(torch.float32), layer.rotation, signs)
            rotated_weight = rotate(weight, layer.rotation, signs).to(torch.float32)
            output = nn.functional.linear(x, rotated_weight, None if bias is None else bias.to(torch.float32))
            return output.to(args[0].dtype)

        return hook

    handles = [model.get_submodule(layer.site.name).register_forward_hook(rotated(layer)) for layer in plan.layers]
    try:
        return relative_error(exact, adapter.predict_noise(model, *inputs))
    finally:
        for handle in handles:
            handle.remove()


def require_rotation_is_exact(model: nn.Module, plan: QuantizationPlan, seed: int) -> float:
    """`rotation_error`, refused above `TOLERANCE`.

    Raises:
        NumericsError: the rotated model is not the same function.
    """
    error = rotation_error(model, plan, seed)
    if not error <= TOLERANCE:
        raise NumericsError(
            f"rotation check: found a relative change of {error:.2e} in the model's output, needed at most "
            f"{TOLERANCE:.0e}, before anything was quantized. Fix: --rotation none; please report the model, "
            "because this should not happen"
        )
    return error

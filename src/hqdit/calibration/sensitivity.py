"""How strongly the model's output depends on every input of its layers: gradients over calibration data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hqdit.calibration.capture import CalibrationData
from hqdit.errors import NumericsError
from hqdit.layers.matrix_layers import channels_last
from hqdit.models.adapter import ClassConditionalAdapter, LinearSite, adapter_for
from hqdit.models.calls import ModelCall, map_tensors
from hqdit.progress import track
from hqdit.randomness import random_stream

#: Calls of the model whose gradients are taken.
CALLS = 16
#: Samples whose activations are kept at once, for models on latents, time step and class.
SAMPLES_AT_ONCE = 8
#: Rows of the sketch of an input's gradients.
SKETCH_ROWS = 64


class GradientSketches(NamedTuple):
    """What backward passes over some calls say.

    Attributes:
        rows: input group -> float32 (SKETCH_ROWS, in_features), zero where the output does not depend on the input.
        output_power: sum of the squares of all outputs of the same calls.
    """

    rows: dict[str, Tensor]
    output_power: float


def gradient_sketches(
    model: nn.Module, sites: Sequence[LinearSite], calibration: CalibrationData, seed: int
) -> GradientSketches:
    """For every input of `sites`: rows whose Gram matrix estimates the second moment of the output's gradient there.

    The output is multiplied by random signs and summed, once for each call: the expected square of the gradient is then
    the sum over all output numbers of their squared derivatives (Hutchinson 1990). The gradients of all tokens are
    added into `SKETCH_ROWS` rows with random signs (Charikar, Chen and Farach-Colton 2002, "Finding frequent items in
    data streams"), which keeps their Gram matrix in expectation, so that memory does not grow with the tokens.

    Args:
        model: float, in evaluation mode; not changed.
        sites: layers; those of one input group read one input.
        calibration: its first `CALLS` calls are used.
        seed: of the signs.

    Raises:
        NumericsError: a gradient that is NaN or infinite.

    Memory: for the backward pass the activations of `SAMPLES_AT_ONCE` samples, or of one recorded call.
    """
    device = next(model.parameters()).device
    groups = list(dict.fromkeys(site.input_group for site in sites))
    sketches: dict[str, Tensor] = {}
    output_power = 0.0
    calls = _small_calls(model, calibration)
    for number, call in enumerate(track(calls, "sensitivity")):
        taps: dict[str, list[Tensor]] = {}

        def tap(site: LinearSite, taps: dict[str, list[Tensor]] = taps) -> Callable[..., tuple[Tensor, ...]]:
            def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                x = inputs[0]
                # A tensor of the layer's own, so that its gradient holds this reader's part only.
                own = x.view_as(x) if x.requires_grad else x.detach().clone().requires_grad_()
                taps.setdefault(site.name, []).append(own)
                return (own, *inputs[1:])

            return hook

        handles = [model.get_submodule(site.name).register_forward_pre_hook(tap(site)) for site in sites]
        try:
            with torch.enable_grad():
                output = _judged_output(model, call.to(device)(model))
                signs = _signs(seed, f"sensitivity/output/{number}", output.numel()).to(device)
                total = (output * signs).sum()
            output_power += float(output.detach().to(torch.float64).square().sum())
        finally:
            for handle in handles:
                handle.remove()
        flat = [tensor for site in sites for tensor in taps.get(site.name, [])]
        found = iter(torch.autograd.grad(total, flat, allow_unused=True))
        of_group: dict[str, Tensor] = {}
        for site in sites:
            gradients = [next(found) for _ in taps.get(site.name, [])]
            rows = [_rows(model, site, gradient) for gradient in gradients if gradient is not None]
            if rows:
                together = torch.cat(rows)
                # All readers of one input see the same tokens in the same order.
                known = of_group.get(site.input_group)
                of_group[site.input_group] = together if known is None else known + together
        for group, gradient in of_group.items():
            if not bool(torch.isfinite(gradient).all()):
                raise NumericsError(
                    f"sensitivity: found NaN or infinity in the gradient at the input of {group}, needed finite "
                    "numbers. Fix: check the calibration data and the float model, or ask for nothing that needs "
                    "gradients: --emphasis 0, --centring static, no sensitive groups, --average-bits or --max-error"
                )
            rows_of_tokens = random_stream(seed, f"sensitivity/{group}/{number}").integers(
                0, SKETCH_ROWS, len(gradient)
            )
            token_signs = _signs(seed, f"sensitivity/signs/{group}/{number}", len(gradient)).to(device)
            sketch = sketches.setdefault(group, torch.zeros(SKETCH_ROWS, gradient.shape[1], device=device))
            sketch.index_add_(0, torch.from_numpy(rows_of_tokens).to(device), gradient * token_signs.unsqueeze(1))
    return GradientSketches({group: sketches[group] for group in groups if group in sketches}, output_power)


def _small_calls(model: nn.Module, calibration: CalibrationData) -> list[ModelCall]:
    """The first `CALLS` calls; those of many samples in parts, because all their activations have to be kept."""
    calls = list(islice(calibration.calls(model), CALLS))
    if not isinstance(adapter_for(model), ClassConditionalAdapter):
        return calls  # as the pipeline made them: not every tensor has an entry for each sample
    parts = []
    for call in calls:
        for start in range(0, len(_tensors(call)[0]), SAMPLES_AT_ONCE):
            samples = slice(start, start + SAMPLES_AT_ONCE)
            parts.append(call.map_tensors(lambda tensor, samples=samples: tensor[samples]))  # type: ignore[misc]
    return parts


def _tensors(value: object) -> list[Tensor]:
    """Every tensor in `value`, in the order of `map_tensors`."""
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    if isinstance(value, ModelCall):
        value.map_tensors(collect)
    else:
        map_tensors(value, collect)
    return found


def _judged_output(model: nn.Module, returned: object) -> Tensor:
    """What the model is judged by, flat: the predicted noise without a learned variance, or all that it returns."""
    found = _tensors(returned)
    adapter = adapter_for(model)
    if isinstance(adapter, ClassConditionalAdapter):
        channels = adapter.latent_shape(model)[0]
        found = [tensor[:, :channels] for tensor in found]
    return torch.cat([tensor.flatten() for tensor in found if tensor.requires_grad])


def _rows(model: nn.Module, site: LinearSite, gradient: Tensor) -> Tensor:
    moved = channels_last(model.get_submodule(site.name), gradient)
    return moved.reshape(-1, moved.shape[-1]).to(torch.float32)


def _signs(seed: int, stream: str, count: int) -> Tensor:
    bits = random_stream(seed, stream).integers(0, 2, count)
    return torch.from_numpy((1 - 2 * bits).astype("float32"))

"""Sketches of gradients, against the derivatives of the model written out."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import inputs_of, latent_dit, predicted, random_calibration, tiny_dit
from torch import nn

from hqdit.calibration.sensitivity import SAMPLES_AT_ONCE, SKETCH_ROWS, gradient_sketches
from hqdit.errors import NumericsError
from hqdit.models.adapter import LinearSite, adapter_for


def sites_of(model: nn.Module) -> list[LinearSite]:
    return adapter_for(model).sites(model)


def finite_difference_power(model: nn.Module, group: str, channels: int) -> float:
    """Sum over outputs and the first channels of a group's input of the squared derivative, by central differences.

    A step in one channel of one token; all tokens and samples are summed.
    """
    names = [site.name for site in sites_of(model) if site.input_group == group]
    total, step = 0.0, 1e-3
    shape: list[int] = []
    model = model.double()

    def run(sample: int, token: int, channel: int, size: float) -> torch.Tensor:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            x = args[0].clone()
            shape[:] = x.shape
            x[sample, token, channel] += size
            return (x,)

        handles = [model.get_submodule(name).register_forward_pre_hook(hook) for name in names]
        fields = inputs_of(model, 2)
        fields["latents"] = fields["latents"].double()
        found = predicted(model, **fields)[:, : fields["latents"].shape[1]]
        for handle in handles:
            handle.remove()
        return found

    run(0, 0, 0, 0.0)
    for sample in range(shape[0]):
        for token in range(shape[1]):
            for channel in range(channels):
                derivative = (run(sample, token, channel, step) - run(sample, token, channel, -step)) / (2 * step)
                total += float(derivative.square().sum())
    model.float()
    return total


@pytest.mark.parametrize("build", [tiny_dit, latent_dit], ids=["noise", "noise and variance"])
def test_the_gram_matrix_is_that_of_the_derivatives(build) -> None:
    model, group, channels = build(), "transformer_blocks.1.qkv", 3
    exact = finite_difference_power(model, group, channels)
    sites = [site for site in sites_of(model) if site.input_group == group]
    data = random_calibration(model, 2)
    assert torch.equal(data.latents, inputs_of(model, 2)["latents"])
    found = []
    for seed in range(60):
        sketch = gradient_sketches(model, sites, data, seed).rows[group]
        assert sketch.shape == (SKETCH_ROWS, model.inner_dim)
        found.append(float(sketch[:, :channels].double().square().sum()))
    spread = math.sqrt(sum((value - exact) ** 2 for value in found) / len(found))
    # An unbiased estimate: its mean lies within four standard errors.
    assert abs(sum(found) / len(found) - exact) < 4 * spread / math.sqrt(len(found))


def test_the_model_and_its_gradients_are_left_alone() -> None:
    model = tiny_dit()
    before = predicted(model)
    found = gradient_sketches(model, sites_of(model), random_calibration(model, 4), 0).rows
    assert list(found) == list(dict.fromkeys(site.input_group for site in sites_of(model)))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(predicted(model), before)


def test_calls_of_many_samples_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, seen = tiny_dit(), random_calibration(tiny_dit(), 2 * SAMPLES_AT_ONCE + 3), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x, **kwargs: seen.append((x, kwargs)) or forward(x, **kwargs))
    gradient_sketches(model, sites_of(model), data, 0)
    assert max(len(x) for x, _ in seen) == SAMPLES_AT_ONCE
    assert torch.equal(torch.cat([x for x, _ in seen]), data.latents)
    for name, expected in (("timestep", data.timesteps), ("class_labels", data.classes)):
        assert torch.equal(torch.cat([kwargs[name] for _, kwargs in seen]), expected)


def test_the_same_seed_gives_the_same_sketch() -> None:
    model = tiny_dit()
    one, same, other = (
        gradient_sketches(model, sites_of(model)[:1], random_calibration(model, 4), s).rows for s in (1, 1, 2)
    )
    (group,) = one
    assert torch.equal(one[group], same[group]) and not torch.equal(one[group], other[group])


def test_bad_gradients_are_refused_with_the_input() -> None:
    model = tiny_dit()
    with torch.no_grad():
        model.transformer_blocks[1].ff.net[2].weight[0, 0] = math.inf
    with pytest.raises(NumericsError, match=r"transformer_blocks\.\d\.\w+"):
        gradient_sketches(model, sites_of(model), random_calibration(model, 2), 0)

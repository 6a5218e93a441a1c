"""The noise floor, against the definition written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hqdit.experiments.noise_floor import noise_floor
from hqdit.models.adapter import adapter_for


@torch.no_grad()
def test_the_next_trajectory_stands_for_a_method(lab, tiny_subject):
    model, inputs = tiny_subject.model, lab.inputs(tiny_subject)
    adapter = adapter_for(model)
    null = torch.full_like(inputs.classes, adapter.null_class(model))
    signal = noise = 0.0
    for timestep, latents in zip(inputs.timesteps, inputs.latents, strict=True):
        times = torch.full_like(inputs.classes, timestep)
        with_class, without = (adapter.predict_noise(model, latents, times, c) for c in (inputs.classes, null))
        guided = (without + 1.5 * (with_class - without)).double().numpy()
        for pair in range(len(guided)):
            signal += float((guided[pair] ** 2).sum())
            noise += float(((guided[pair] - guided[pair - 1]) ** 2).sum())
    found = noise_floor(lab, tiny_subject)
    value, low, high = found["eps_sqnr_db"]["guided 1.5"]
    assert value == pytest.approx(10 * np.log10(signal / noise), abs=1e-4)
    assert low <= value <= high < 10
    assert set(found["layer_sqnr_db"]) == {site.name for site in adapter.sites(model)}
    mean, low, high = found["mean_layer_sqnr_db"]
    assert mean == pytest.approx(np.mean(list(found["layer_sqnr_db"].values())))
    assert low < mean < high

"""Errors by block and time step against a forward pass by hand."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from tiny import BLOCKS, ddim, tiny_dit

from hqdit.analysis.errors import block_errors, block_powers
from hqdit.errors import NumericsError
from hqdit.evaluation.fidelity import PAIRS, evaluation_inputs
from hqdit.pipeline.checkpoint import quantized_layers
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.quantize import quantize
from hqdit.sampling.sampler import SamplingConfig


@pytest.fixture(scope="module")
def exact():
    return tiny_dit()


@pytest.fixture(scope="module")
def quantized(exact):
    return quantize(copy.deepcopy(exact), QuantizationConfig(gptq=False))


@pytest.fixture(scope="module")
def inputs(exact):
    return evaluation_inputs(exact, ddim(), SamplingConfig(8, 1.5), seed=3)


def states_by_hand(model, inputs, position):
    """Hidden states after each block, block called after block, float64 (blocks, pairs, tokens, width)."""
    with torch.no_grad():
        hidden = model.pos_embed(inputs.latents[position])
        conditions = {
            "timestep": torch.full((PAIRS,), inputs.timesteps[position]),
            "class_labels": inputs.classes,
        }
        states = []
        for block in model.transformer_blocks:
            hidden = block(hidden, **conditions)
            states.append(hidden.double().numpy())
    return np.stack(states)


def test_powers_are_those_of_the_hidden_states(exact, quantized, inputs):
    signal, noise = block_powers(exact, quantized, inputs)
    assert signal.shape == noise.shape == (8, BLOCKS, PAIRS)
    for position in (0, 7):
        true, found = (states_by_hand(model, inputs, position) for model in (exact, quantized))
        # Batches of another size round float32 products differently, and a rounding at a border moves a whole level.
        np.testing.assert_allclose(signal[position], (true**2).sum(axis=(2, 3)), rtol=1e-5)
        np.testing.assert_allclose(noise[position], ((found - true) ** 2).sum(axis=(2, 3)), rtol=0.05)


def test_ratios_pool_the_pairs(exact, quantized, inputs):
    signal, noise = block_powers(exact, quantized, inputs)
    expected = 10 * np.log10(signal.sum(axis=2) / noise.sum(axis=2))
    np.testing.assert_allclose(block_errors(exact, quantized, inputs), expected, rtol=1e-12)


def test_an_error_in_the_last_block_leaves_the_first_exact(exact, inputs):
    changed = copy.deepcopy(exact)
    with torch.no_grad():
        changed.transformer_blocks[-1].ff.net[2].weight *= 1.01
    found = block_errors(exact, changed, inputs)
    assert (found[:, 0] == math.inf).all()
    assert np.isfinite(found[:, 1]).all()


def test_nothing_stays_behind(exact, quantized, inputs):
    block_errors(exact, quantized, inputs)
    for model in (exact, quantized):
        assert not any(block._forward_hooks for block in model.transformer_blocks)


def test_a_broken_block_is_named(exact, quantized, inputs):
    broken = copy.deepcopy(quantized)
    layers = quantized_layers(broken)
    layers["transformer_blocks.1.ff.net.2"].weight_scale.fill_(math.nan)
    with pytest.raises(NumericsError, match="block 1: found NaN or infinity in its output at time step"):
        block_errors(exact, broken, inputs)

"""How the error of a quantized model grows from block to block and from time step to time step."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hqdit.analysis.moments import Float64Array
from hqdit.analysis.trajectories import NoisyInputs
from hqdit.errors import NumericsError
from hqdit.models.adapter import adapter_for
from hqdit.numerics.error import decibel
from hqdit.progress import track
from hqdit.sampling.sampler import predict_branches

#: Pairs that pass through both models at once: the float model's hidden states after all blocks are held for these.
_PAIRS_AT_ONCE = 8


@torch.no_grad()
def block_powers(exact: nn.Module, quantized: nn.Module, inputs: NoisyInputs) -> tuple[Float64Array, Float64Array]:
    """Powers of the hidden state after each block, and of its error, on the conditional branch.

    Both models start from the same latents at every time step, so errors accumulate over blocks but not over steps.

    Args:
        exact: the float model.
        quantized: the one to judge, of the same shape.
        inputs: noisy latents.

    Returns:
        Sums of squares of the exact hidden state and of the difference, each float64 (timesteps, blocks, pairs).

    Raises:
        NumericsError: a hidden state that is NaN or infinite.
    """
    blocks = len(adapter_for(exact).blocks(exact))
    signal = np.zeros((len(inputs.timesteps), blocks, len(inputs.classes)))
    noise = np.zeros_like(signal)
    for position, timestep in enumerate(track(inputs.timesteps, "hidden states")):
        for start in range(0, len(inputs.classes), _PAIRS_AT_ONCE):
            pairs = slice(start, start + _PAIRS_AT_ONCE)
            latents, classes = inputs.latents[position][pairs], inputs.classes[pairs]
            true = _hidden_states(exact, latents, timestep, classes)
            found = _hidden_states(quantized, latents, timestep, classes)
            for block, (a, b) in enumerate(zip(true, found, strict=True)):
                a64 = a.to(torch.float64).flatten(1)
                signal[position, block, pairs] = a64.square().sum(dim=1).cpu().numpy()
                noise[position, block, pairs] = (b.to(torch.float64).flatten(1) - a64).square().sum(dim=1).cpu().numpy()
    for position, block in zip(*np.nonzero(~np.isfinite(signal + noise).all(axis=2)), strict=True):
        raise NumericsError(
            f"block {block}: found NaN or infinity in its output at time step {inputs.timesteps[position]}, needed "
            "finite numbers. Fix: quantize again, or check the checkpoint with hqdit inspect"
        )
    return signal, noise


def block_errors(exact: nn.Module, quantized: nn.Module, inputs: NoisyInputs) -> Float64Array:
    """SQNR of the hidden state after each block, in dB, float64 (timesteps, blocks); see `block_powers`.

    Infinite where nothing differs.
    """
    signal, noise = (powers.sum(axis=2) for powers in block_powers(exact, quantized, inputs))
    return np.vectorize(decibel, otypes=[np.float64])(signal, noise)  # type: ignore[no-any-return]


def _hidden_states(model: nn.Module, latents: Tensor, timestep: int, classes: Tensor) -> list[Tensor]:
    """The hidden state after each block, (pairs, tokens, width)."""
    states: list[Tensor] = []

    def keep(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        states.append(output)

    with ExitStack() as stack:
        for block in adapter_for(model).blocks(model):
            stack.enter_context(block.register_forward_hook(keep))
        predict_branches(model, latents, torch.full_like(classes, timestep), classes, 1.0)
    return states

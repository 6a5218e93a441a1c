"""Streaming calibration: inputs of block i + 1 are the outputs of quantized block i."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hqdit.calibration.samples import CalibrationSet
from hqdit.models.adapter import LinearSite, adapter_for
from hqdit.progress import track
from hqdit.randomness import random_stream

#: Samples that pass through a block at once.
BATCH_SIZE = 64
#: (time step, class) pairs behind a modulation layer's statistics: it sees one vector per sample, so that the
#: calibration samples alone would leave its Hessian rank-deficient.
MODULATION_PAIRS = 8192
#: Receives a layer's input, (tokens, in_features), batch after batch.
InputConsumer = Callable[[Tensor], None]


class _Stop(Exception):
    """Ends a block's forward pass once the wanted layer's input is known."""


class BlockStream:
    """The hidden states of all calibration samples in front of the current block.

    Memory: the hidden states of one block boundary, plus one block's activations for one batch.

    Args:
        model: quantized in place, block by block, by the caller.
        calibration: checked against the model.
        seed: of the modulation pairs.

    Raises:
        NumericsError: calibration data that does not fit the model.
    """

    def __init__(self, model: nn.Module, calibration: CalibrationSet, seed: int) -> None:
        calibration.require_fits(model)
        self._model = model
        self._adapter = adapter_for(model)
        self._blocks = self._adapter.blocks(model)
        self._device = next(model.parameters()).device
        self._batches: list[tuple[Tensor, dict[str, Any]]] = []
        for start in range(0, len(calibration), BATCH_SIZE):
            rows = slice(start, start + BATCH_SIZE)
            fields = (calibration.latents[rows], calibration.timesteps[rows], calibration.classes[rows])
            with torch.no_grad():
                self._batches.append(self._adapter.block_input(model, *(field.to(self._device) for field in fields)))
        stream = random_stream(seed, "modulation pairs")
        null_class = self._adapter.null_class(model)
        top = self._adapter.num_classes(model) + (null_class is not None)
        self._pair_timesteps = torch.from_numpy(
            stream.integers(0, self._adapter.train_timesteps(model), MODULATION_PAIRS)
        )
        self._pair_classes = torch.from_numpy(stream.integers(0, top, MODULATION_PAIRS))

    @torch.no_grad()
    def capture(self, site: LinearSite, consume: InputConsumer, what: str) -> None:
        """Hand the inputs of `site` to `consume`, (tokens, in_features) per batch, in a fixed order."""
        if site.is_modulation:
            for start in range(0, MODULATION_PAIRS, 1024):
                rows = slice(start, start + 1024)
                timesteps, classes = self._pair_timesteps[rows], self._pair_classes[rows]
                consume(
                    self._adapter.modulation_input(
                        self._model, site.block, timesteps.to(self._device), classes.to(self._device)
                    )
                )
            return

        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            consume(inputs[0].reshape(-1, inputs[0].shape[-1]))
            raise _Stop

        handle = self._model.get_submodule(site.name).register_forward_pre_hook(hook)
        try:
            for hidden, arguments in track(self._batches, what):
                try:
                    self._blocks[site.block](hidden, **arguments)
                except _Stop:
                    continue
        finally:
            handle.remove()

    @torch.no_grad()
    def advance(self, block: int) -> None:
        """Replace the hidden states by the outputs of `block`, as it is now."""
        for position, (hidden, arguments) in enumerate(self._batches):
            self._batches[position] = (self._blocks[block](hidden, **arguments), arguments)

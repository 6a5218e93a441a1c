"""Streaming calibration: inputs of block i + 1 are the outputs of quantized block i."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hqdit.calibration.standing_in import StandIns, Stop
from hqdit.layers.matrix_layers import channels_last
from hqdit.models.adapter import ClassConditionalAdapter, LinearSite, adapter_for
from hqdit.models.calls import ModelCall
from hqdit.progress import track
from hqdit.randomness import random_stream

#: (time step, class) pairs behind a modulation layer's statistics: it sees one vector per sample, so that the
#: calibration samples alone would leave its Hessian rank-deficient. For models on latents, time step and class.
MODULATION_PAIRS = 8192
#: Receives a layer's input, (tokens, in_features), batch after batch.
InputConsumer = Callable[[Tensor], None]
#: Receives the same, and of how many samples the tokens are, equally many of each; None where each is by itself.
SampleConsumer = Callable[[Tensor, int | None], None]


class CalibrationData(Protocol):
    """What a model is calibrated on: `calibration.samples.CalibrationSet`, `calibration.recording.RecordedCalls`."""

    @property
    def origin(self) -> str:
        """Where the data came from, for the record."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the contents, for the record."""

    def __len__(self) -> int:
        """How many samples."""

    def require_fits(self, model: nn.Module) -> None:
        """Raise `NumericsError` for data that is not of this model."""

    def calls(self, model: nn.Module) -> Iterator[ModelCall]:
        """The data as calls of the model, a batch each, always in the same order."""


class _Trajectory:
    """One call of the model on its way through the blocks.

    Attributes:
        call: of the whole model.
        entry: of the current block, or None if the model does not run that block.
        outputs: what finished blocks returned, by key of `StandIns`.
    """

    def __init__(self, call: ModelCall) -> None:
        self.call = call
        self.entry: ModelCall | None = None
        self.outputs: dict[str, Any] = {}


class BlockStream:
    """All calibration calls in front of the current block, with the blocks before it as they are now.

    How the output of one block becomes the input of the next is the model's own business: to get there, the model is
    run with finished blocks replaced by what they returned, up to the block that is wanted.

    Memory: the arguments and outputs of one block boundary, plus one block's activations for one batch; with long skip
    connections the outputs of all finished blocks.

    Args:
        model: quantized in place, block by block, by the caller.
        calibration: checked against the model.
        seed: of the modulation pairs.

    Raises:
        NumericsError: calibration data that does not fit the model.
    """

    def __init__(self, model: nn.Module, calibration: CalibrationData, seed: int) -> None:
        calibration.require_fits(model)
        self._model = model
        self._adapter = adapter_for(model)
        self._device = next(model.parameters()).device
        self._trajectories = [_Trajectory(call.to(self._device)) for call in calibration.calls(model)]
        first_call = self._trajectories[0].call if self._trajectories else None
        self._stand_ins = StandIns(model, self._adapter, first_call)
        self._blocks = self._stand_ins.blocks
        self._runs: dict[str, int] = {}
        for trajectory in self._trajectories:
            trajectory.entry = self._stand_ins.entry(0, trajectory.call, trajectory.outputs)
        self._pairs = _modulation_pairs(model, self._adapter, seed)

    @torch.no_grad()
    def capture(self, site: LinearSite, consume: InputConsumer, what: str) -> None:
        """Hand the inputs of `site`, a layer of the current block, to `consume`, in a fixed order.

        Each batch is (tokens, in_features); there are none if the calls do not run the layer.
        """
        self.capture_samples(site, lambda x, _samples: consume(x), what)

    @torch.no_grad()
    def capture_samples(self, site: LinearSite, consume: SampleConsumer, what: str) -> None:
        """`capture` with the number of samples: the length of the first of at least three axes."""
        if site.is_modulation and self._pairs is not None:
            for start in range(0, MODULATION_PAIRS, 1024):
                timesteps, classes = (pairs[start : start + 1024] for pairs in self._pairs)
                consume(self._modulation_input(site.block, timesteps.to(self._device), classes.to(self._device)), None)
            return
        layer = self._model.get_submodule(site.name)
        runs = self._runs_of(site)
        seen = 0

        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            nonlocal seen
            x = channels_last(module, inputs[0])
            # One image without a batch has rows of pixels on its first axis.
            is_single = x.dim() == 3 and isinstance(module, nn.Conv2d)
            samples = None if x.dim() < 3 else 1 if is_single else x.shape[0]
            consume(x.reshape(-1, x.shape[-1]), samples)
            seen += 1
            if seen == runs:
                raise Stop

        handle = layer.register_forward_pre_hook(hook)
        try:
            for trajectory in track(self._trajectories, what):
                seen = 0
                if trajectory.entry is not None:
                    try:
                        trajectory.entry(self._blocks[site.block])
                    except Stop:
                        continue
        finally:
            handle.remove()

    @torch.no_grad()
    def advance(self, block: int) -> None:
        """Finish `block`, the current one, as it is now, and go on to the next."""
        for trajectory in self._trajectories:
            if trajectory.entry is not None:
                self._stand_ins.keep(block, trajectory.entry(self._blocks[block]), trajectory.outputs)
            if block + 1 < len(self._blocks):
                trajectory.entry = self._stand_ins.entry(block + 1, trajectory.call, trajectory.outputs)
        self._runs = {}

    def _runs_of(self, site: LinearSite) -> int:
        """How often a run of the current block runs a layer, at least 1: that of all its layers is tried once.

        Some blocks apply one layer to the latents and then to the text.
        """
        entries = [trajectory.entry for trajectory in self._trajectories if trajectory.entry is not None]
        if not self._runs and entries:
            names = [other.name for other in self._adapter.sites(self._model) if other.block == site.block]

            def count(name: str) -> Callable[..., None]:
                def hook(_module: nn.Module, _inputs: tuple[Tensor, ...]) -> None:
                    self._runs[name] = self._runs.get(name, 0) + 1

                return hook

            handles = [self._model.get_submodule(name).register_forward_pre_hook(count(name)) for name in names]
            try:
                entries[0](self._blocks[site.block])
            finally:
                for handle in handles:
                    handle.remove()
        return max(1, self._runs.get(site.name, 0))

    def _modulation_input(self, block: int, timesteps: Tensor, classes: Tensor) -> Tensor:
        assert isinstance(self._adapter, ClassConditionalAdapter)  # others have no pairs
        return self._adapter.modulation_input(self._model, block, timesteps, classes)


def _modulation_pairs(model: nn.Module, adapter: object, seed: int) -> tuple[Tensor, Tensor] | None:
    """`MODULATION_PAIRS` time steps and classes, the null class among them; None for other kinds of models."""
    if not isinstance(adapter, ClassConditionalAdapter):
        return None
    stream = random_stream(seed, "modulation pairs")
    top = adapter.num_classes(model) + (adapter.null_class(model) is not None)
    timesteps = stream.integers(0, adapter.train_timesteps(model), MODULATION_PAIRS)
    return torch.from_numpy(timesteps), torch.from_numpy(stream.integers(0, top, MODULATION_PAIRS))

"""Streaming calibration: inputs of block i + 1 are the outputs of quantized block i."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

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


class _Stop(Exception):
    """Ends a forward pass once what was wanted of it is known."""


class _Trajectory:
    """One call of the model on its way through the blocks.

    Attributes:
        call: of the whole model.
        entry: of the current block, or None if the model does not run that block.
        outputs: what finished blocks returned, by `_Standins` key.
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
        self._blocks = self._adapter.blocks(model)
        self._keys = _output_keys(model, self._blocks, self._adapter.has_long_skips)
        self._device = next(model.parameters()).device
        self._trajectories = [_Trajectory(call.to(self._device)) for call in calibration.calls(model)]
        for trajectory in self._trajectories:
            self._enter(trajectory, 0)
        self._pairs = _modulation_pairs(model, self._adapter, seed)

    @torch.no_grad()
    def capture(self, site: LinearSite, consume: InputConsumer, what: str) -> None:
        """Hand the inputs of `site`, a layer of the current block, to `consume`, in a fixed order.

        Each batch is (tokens, in_features); there are none if the calls do not run the layer.
        """
        if site.is_modulation and self._pairs is not None:
            for start in range(0, MODULATION_PAIRS, 1024):
                timesteps, classes = (pairs[start : start + 1024] for pairs in self._pairs)
                consume(self._modulation_input(site.block, timesteps.to(self._device), classes.to(self._device)))
            return
        layer = self._model.get_submodule(site.name)

        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = channels_last(module, inputs[0])
            consume(x.reshape(-1, x.shape[-1]))
            raise _Stop

        handle = layer.register_forward_pre_hook(hook)
        try:
            for trajectory in track(self._trajectories, what):
                if trajectory.entry is not None:
                    try:
                        trajectory.entry(self._blocks[site.block])
                    except _Stop:
                        continue
        finally:
            handle.remove()

    @torch.no_grad()
    def advance(self, block: int) -> None:
        """Finish `block`, the current one, as it is now, and go on to the next."""
        for trajectory in self._trajectories:
            if trajectory.entry is not None:
                trajectory.outputs[self._keys[block]] = trajectory.entry(self._blocks[block])
            if block + 1 < len(self._blocks):
                self._enter(trajectory, block + 1)

    @torch.no_grad()
    def _enter(self, trajectory: _Trajectory, block: int) -> None:
        """Find the arguments of `block` by running the model up to it."""
        entry: list[ModelCall] = []

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entry.append(ModelCall(args, kwargs))
            raise _Stop

        handle = self._blocks[block].register_forward_pre_hook(hook, with_kwargs=True)
        try:
            with _standing_in(self._blocks[:block], self._keys, trajectory.outputs):
                trajectory.call(self._model)
        except _Stop:
            pass
        finally:
            handle.remove()
        trajectory.entry = entry[0] if entry else None

    def _modulation_input(self, block: int, timesteps: Tensor, classes: Tensor) -> Tensor:
        assert isinstance(self._adapter, ClassConditionalAdapter)  # others have no pairs
        return self._adapter.modulation_input(self._model, block, timesteps, classes)


def _output_keys(model: nn.Module, blocks: list[nn.Module], has_long_skips: bool) -> list[str]:
    """Under which key each block's output is kept.

    Blocks of one list hand on outputs of one kind, so that the latest is enough, unless later blocks read earlier ones.
    """
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(block)] if has_long_skips else names[id(block)].rpartition(".")[0] for block in blocks]


@contextmanager
def _standing_in(blocks: list[nn.Module], keys: list[str], outputs: dict[str, Any]) -> Iterator[None]:
    """Inside the body, each of `blocks` returns the output kept for it instead of computing one."""

    def returning(output: Any) -> Callable[..., Any]:
        return lambda *_args, **_kwargs: output

    standing = [(block, outputs[key]) for block, key in zip(blocks, keys, strict=False) if key in outputs]
    for block, output in standing:
        block.forward = returning(output)
    try:
        yield
    finally:
        for block, _ in standing:
            del block.forward


def _modulation_pairs(model: nn.Module, adapter: object, seed: int) -> tuple[Tensor, Tensor] | None:
    """`MODULATION_PAIRS` time steps and classes, the null class among them; None for other kinds of models."""
    if not isinstance(adapter, ClassConditionalAdapter):
        return None
    stream = random_stream(seed, "modulation pairs")
    top = adapter.num_classes(model) + (adapter.null_class(model) is not None)
    timesteps = stream.integers(0, adapter.train_timesteps(model), MODULATION_PAIRS)
    return torch.from_numpy(timesteps), torch.from_numpy(stream.integers(0, top, MODULATION_PAIRS))

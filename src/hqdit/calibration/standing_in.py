"""Blocks that have run are replaced by what they returned, so that the model leads to the next one by itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hqdit.errors import NumericsError
from hqdit.models.adapter import ModelAdapter
from hqdit.models.calls import ModelCall


class Stop(Exception):
    """Ends a forward pass once what was wanted of it is known."""


class StandIns:
    """How the blocks of one model stand for themselves.

    Blocks of one list hand on outputs of one kind, so that it is enough to keep the latest of each list, unless later
    blocks read those of earlier ones. Where the adapter does not know, it is tried on a call.

    Args:
        model: with its blocks as they are.
        adapter: names the blocks.
        call: tells how blocks depend on each other, if the adapter does not.

    Raises:
        NumericsError: a block gets other arguments when the blocks before it are replaced.
    """

    def __init__(self, model: nn.Module, adapter: ModelAdapter, call: ModelCall | None) -> None:
        self.blocks = adapter.blocks(model)
        self._model = model
        names = {id(module): name for name, module in model.named_modules()}
        each = [names[id(block)] for block in self.blocks]
        latest = [name.rpartition(".")[0] for name in each]
        if adapter.has_long_skips is not None or call is None:
            self._keys = each if adapter.has_long_skips else latest
            return
        expected = _arguments(model, self.blocks, call)
        for keys in (latest, each):
            self._keys = keys
            wrong = self._first_difference(call, expected)
            if wrong is None:
                return
        raise NumericsError(
            f"calibration: found other inputs of {each[wrong]} of {type(model).__name__} when the blocks before it are "  # type: ignore[index]
            "replaced by their outputs, needed the same. Fix: use gptq=False, or write an adapter (CONTRIBUTING.md "
            "says how)"
        )

    @torch.no_grad()
    def entry(self, block: int, call: ModelCall, outputs: dict[str, Any]) -> ModelCall | None:
        """The arguments that `block` gets in a call of the model, or None if the model does not run it.

        Args:
            block: index.
            call: of the whole model.
            outputs: what the blocks before it returned, filled by `keep`.
        """
        found: list[ModelCall] = []

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(ModelCall(args, kwargs))
            raise Stop

        handle = self.blocks[block].register_forward_pre_hook(hook, with_kwargs=True)
        try:
            with self._standing_in(block, outputs):
                call(self._model)
        except Stop:
            pass
        finally:
            handle.remove()
        return found[0] if found else None

    def keep(self, block: int, output: Any, outputs: dict[str, Any]) -> None:
        """Note in `outputs` what `block` returned."""
        outputs[self._keys[block]] = output

    @contextmanager
    def _standing_in(self, until: int, outputs: dict[str, Any]) -> Iterator[None]:
        """Inside the body, each block before `until` returns the output kept for it instead of computing one."""

        def returning(output: Any) -> Callable[..., Any]:
            return lambda *_args, **_kwargs: output

        standing = [
            (self.blocks[index], outputs[self._keys[index]]) for index in range(until) if self._keys[index] in outputs
        ]
        for block, output in standing:
            block.forward = returning(output)
        try:
            yield
        finally:
            for block, _ in standing:
                del block.forward

    @torch.no_grad()
    def _first_difference(self, call: ModelCall, expected: list[str | None]) -> int | None:
        """The first block whose arguments are not the `expected` ones when those before it are replaced."""
        outputs: dict[str, Any] = {}
        for index, block in enumerate(self.blocks):
            entry = self.entry(index, call, outputs)
            if (None if entry is None else _digest(entry)) != expected[index]:
                return index
            if entry is not None:
                self.keep(index, entry(block), outputs)
        return None


@torch.no_grad()
def _arguments(model: nn.Module, blocks: list[nn.Module], call: ModelCall) -> list[str | None]:
    """Digest of the arguments that each block gets first in a call of the model; None if it does not run."""
    found: list[str | None] = [None] * len(blocks)

    def hook(index: int) -> Callable[..., None]:
        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[index] = found[index] or _digest(ModelCall(args, kwargs))

        return note

    handles = [block.register_forward_pre_hook(hook(index), with_kwargs=True) for index, block in enumerate(blocks)]
    try:
        call(model)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _digest(call: ModelCall) -> str:
    """SHA-256 of the bytes of all tensors."""
    digest = hashlib.sha256()

    def add(tensor: Tensor) -> Tensor:
        flat = tensor.detach().flatten().cpu().clone(memory_format=torch.contiguous_format)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
        return tensor

    call.map_tensors(add)
    return digest.hexdigest()
